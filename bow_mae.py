# SPDX-License-Identifier: MIT
"""BoW-MAE: pre-training for dense retrieval by bag-of-word prediction, without a decoder (arXiv 2401.11248).

A masked language model whose [CLS] vector must also predict, through the model's own masked-LM head, the set
of words of its input. No parameter is added. This file is self-contained: copy it; it needs torch,
transformers, datasets and numpy.

A small BERT from scratch on the documentation of the installed Python packages, CPU or GPU, no network:
    torchrun bow_mae.py
The paper's first stage on 8 GPUs (other numbers of processes, or --nnodes, give the same batches and losses):
    torchrun --nproc_per_node 8 bow_mae.py --model bert-base-uncased --data wikimedia/wikipedia:20231101.en \
        --max_length 512 --steps 140000 --batch_size 2048 --micro_batch_size 64 --lr 3e-4 \
        --lr_final_ratio 0.1 --warmup_steps 4000 --bow_weight 1 --bow_weight_final 0.1 --workers 4 \
        --output out/wikipedia
Run the same command again to resume a run that was stopped or killed.
"""

import ast
import contextlib
import csv
import gc
import glob
import gzip
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib import metadata, util
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.benchmark
import transformers
from datasets.distributed import split_dataset_by_node
from tokenizers.trainers import WordPieceTrainer
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer, BatchEncoding, BertConfig, BertTokenizer
from transformers.hf_argparser import HfArg, HfArgumentParser

@dataclass
class Config:
    """Every flag of the command line, with its unit. The defaults are the run of `torchrun bow_mae.py`."""

    data: str = HfArg(default="python-docs", help="python-docs, file, folder, glob, or hub name:config:split")
    text_columns: list[str] = HfArg(default_factory=lambda: ["text"], help="columns, joined by a space")
    model: str = HfArg(default="tiny", help="masked LM (hub name, folder) or new tiny|mini|small|medium|base")
    objective: Literal["bow", "mlm", "enhanced"] = HfArg(default="bow", help="the paper's, or a baseline")
    max_length: int = HfArg(default=64, help="tokens in a window, [CLS] and [SEP] included")
    mask_ratio: float = HfArg(default=0.3, help="share of the words that are masked")
    bow_weight: float = HfArg(default=10.0, help="weight λ of the bag-of-word loss at the first step")
    bow_weight_final: float = HfArg(default=10.0, help="λ at the last step, reached by a cosine")
    steps: int = HfArg(default=1800, help="optimizer steps")
    batch_size: int = HfArg(default=64, help="windows in an optimizer step, over all processes")
    micro_batch_size: int = HfArg(default=32, help="windows in one forward and backward pass")
    lr: float = HfArg(default=2e-3, help="peak learning rate of AdamW")
    lr_final_ratio: float = HfArg(default=0.03, help="final learning rate over its peak, by a cosine")
    warmup_steps: int = HfArg(default=200, help="steps of linear warm-up")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay; biases and LayerNorm are exempt")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = HfArg(default="auto", help="auto: bf16 if native")
    compile: bool = HfArg(default=False, help="run the model through torch.compile")
    seed: int = HfArg(default=0, help="of the weights, the data order, the masks and the dropout")
    workers: int = HfArg(default=0, help="data-loader workers per process; 0: load in the process itself")
    output: str = HfArg(default="out/bow_mae", help="folder of the checkpoints, the logs and the model")
    save_every: int = HfArg(default=500, help="steps between checkpoints")
    keep: int = HfArg(default=2, help="how many of the newest checkpoints to keep")
    log_every: int = HfArg(default=10, help="steps between lines of metrics.jsonl")
    eval_every: int = HfArg(default=300, help="steps between evaluations on the held-out texts")
    resume: str = HfArg(default="auto", help="auto (newest complete checkpoint), never, or its folder")
    bench: bool = HfArg(default=False, help="measure what each objective costs instead of training")

    @property
    def parts(self) -> int:
        """Micro-batches per step, n: number i of every step comes from part i of the data, 1 text in n."""
        return self.batch_size // self.micro_batch_size

    def __post_init__(self):
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask_ratio {self.mask_ratio} must lie between 0 and 1")

class UserError(Exception):
    """An error the user can fix; the message says what is wrong, where, and how to fix it."""

def parse_config(argv: list[str] | None = None, kind: type = Config, trains: bool = True):
    """Parse a command line into a dataclass; UserError for an unknown flag or an impossible value."""
    parser = HfArgumentParser(kind, description=kind.__doc__, allow_abbrev=False, exit_on_error=False)
    with blame("command line (see --help)"):
        (config,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name, value in vars(config).items():
        from_zero = isinstance(value, float) or name in ("warmup_steps", "negatives")
        least = 3 if name.endswith("_length") else 0 if from_zero else 1
        if type(value) in (int, float) and value != getattr(kind, name) and not least <= value < math.inf:
            raise UserError(f"--{name} {value} must be a finite number, at least {least}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if trains and config.batch_size % (config.micro_batch_size * processes):
        raise UserError(f"--batch_size {config.batch_size} is not a multiple of --micro_batch_size "
                        f"{config.micro_batch_size} x {processes} processes")
    return config

# ---- data: texts

PACKAGES = "python pandas numpy networkx transformers torch sympy datasets huggingface_hub".split()
FOLDERS = "corpus.jsonl", "corpus.jsonl.gz", "data-*.arrow", "train/data-*.arrow", "**/*"  # BEIR, saved, any
BLOCK_TEXTS = 2048  # texts of a part that are tokenised, shuffled and sorted by length together
SAMPLE_BLOCKS = 100  # blocks from the start of the data that give the vocabulary and the held-out texts

@contextlib.contextmanager
def blame(what: str):
    """Turn what a library raises into a UserError of one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any kind: those of zlib, Arrow, the hub
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what}: {reason}") from error

def json_records(lines):
    """The records of JSON lines, or of one array that may span lines."""
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        return json.loads(first + "".join(lines))
    return (json.loads(line) for line in chain([first], lines) if line.strip())

READERS = {  # records from the lines of a local file
    ".jsonl": json_records, ".json": json_records, ".csv": lambda lines: csv.DictReader(lines, strict=True),
    ".txt": lambda lines: ({"text": line.rstrip("\r\n")} for line in lines)}
FORMATS = (*READERS, ".parquet", ".arrow")  # the last is of a folder saved by `datasets`

def docstrings(packages: list[str]):
    """Yield docstrings of packages, tests left out: _id (qualified name), query (first paragraph), text."""
    gc.freeze()  # halves the time: the garbage collector skips everything imported so far
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for package in packages:
        root = Path(os.__file__ if package == "python" else util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            parts = [package.removeprefix("python"), *path.relative_to(root).with_suffix("").parts]
            if {"site-packages", "dist-packages", "test", "tests"} & set(parts):
                continue
            with contextlib.suppress(SyntaxError, ValueError), warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
                stack = [(".".join(part for part in parts if part not in ("", "__init__")), tree)]
                while stack:
                    name, node = stack.pop()
                    stack += [(f"{name}.{child.name}" if isinstance(child, documented) else name, child)
                              for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
                    docstring = ast.get_docstring(node) if isinstance(node, documented) else None
                    query, _, text = (docstring or "").partition("\n\n")
                    if query.strip() and text.strip():
                        yield {"_id": name, "query": " ".join(query.split()), "text": text.strip()}

def python_docs() -> datasets.Dataset:
    """The documentation of PACKAGES: some 24,000 rows of _id, query and text, no two alike, in any order.

    Built in about a minute, then read from the cache of `datasets` under a key of the versions.
    """
    version = {name: metadata.version(name) for name in PACKAGES[1:]} | {"python": sys.version.split()[0]}
    with blame("--data python-docs cannot be built, set HF_DATASETS_CACHE to a folder to write in"):
        table = datasets.Dataset.from_generator(
            docstrings, gen_kwargs={"packages": PACKAGES}, fingerprint=f"docs-{text_hash(str(version))}",
            num_proc=2, cache_dir=os.environ.get("HF_DATASETS_CACHE", "out/cache")).to_pandas()
    table = table.drop_duplicates("_id").drop_duplicates("text").drop_duplicates("query", keep=False)
    table = table.sort_values("text", key=lambda texts: texts.map(text_hash), kind="stable")
    return datasets.Dataset.from_pandas(table, preserve_index=False)

def text_hash(text: str) -> int:
    """A number that is a function of the text alone."""
    return zlib.crc32(text.encode())

def is_held_out(text: str) -> bool:
    """Whether a text is kept for evaluation, as 1 in 1000 is."""
    return text_hash(text) % 1000 == 0

def suffix(path) -> str:
    """The ending of a file name, but for .gz."""
    return Path(str(path).removesuffix(".gz")).suffix

def find_files(data: str) -> list[str]:
    """The local files of --data, all of one format, of a folder as FOLDERS says; none for a hub name."""
    path = os.path.expanduser(data)
    name = glob.escape(path) if os.path.exists(path) else path
    patterns = [f"{name}/{pattern}" for pattern in FOLDERS] if os.path.isdir(path) else [name]
    found = ([file for file in sorted(glob.glob(pattern, recursive=True))
              if os.path.isfile(file) and suffix(file) in FORMATS] for pattern in patterns)
    files = next(filter(None, found), [])
    local = glob.has_magic(data) or data.startswith((".", "/", "~")) or suffix(data) in FORMATS
    if len(set(map(suffix, files))) != 1 and (files or local or os.path.exists(path)):
        raise UserError(f"--data {data}: no such files, no split `train`, or not of one format of "
                        f"{' '.join(FORMATS)} (.gz)")
    return files

def read_texts(files: list[str], columns: tuple[str, ...]):
    """Yield {"text": ...} for each record of local files; UserError names the file and line of a bad one."""
    def _decode(lines):
        nonlocal number
        for number, line in enumerate(lines, 1):
            yield line.decode("utf-8-sig")

    csv.field_size_limit(2**31 - 1)  # characters; the default is 131,072
    missing = set(columns)
    for file in files:
        number, count = 0, 0
        try:
            with (gzip.open if file.endswith(".gz") else open)(file, "rb") as lines:
                for count, record in enumerate(READERS[suffix(file)](_decode(lines)), 1):
                    yield {"text": join_columns(record, columns)}
                    missing -= record.keys()
                    if missing and count == BLOCK_TEXTS:
                        break
            if missing or not count:
                raise ValueError(f"no record has a column {min(missing)!r}" if count else "no record in it")
        except (ValueError, EOFError, OSError, csv.Error, zlib.error) as error:
            raise UserError(f"--data {file}, line {number}: {error}") from error

def join_columns(record: dict, columns: tuple[str, ...]) -> str:
    """A record's text: its columns joined by a space; some may be null or missing; ValueError if all are."""
    if not isinstance(record, dict) or None in record:  # None: csv.DictReader's key of surplus fields
        raise ValueError("not an object {...}, or a line with more fields than the first")
    values = [record.get(column) for column in columns]
    for column, value in zip(columns, values):
        if not isinstance(value, str | None) or values == [None] * len(values):
            raise ValueError(f"column {column!r} is {json.dumps(value, default=str):.50}, not a text; the "
                             f"columns are {' '.join(map(repr, record))}")
    text = " ".join(filter(None, values)).strip()
    return text.encode(errors="replace").decode()  # half an emoji is no text

def open_stream(config: Config) -> datasets.IterableDataset:
    """The records of --data as a stream: texts from local files of lines, else Arrow tables."""
    if config.data == "python-docs":
        return python_docs().to_iterable_dataset().with_format("arrow")
    files = find_files(config.data)
    if files and suffix(files[0]) in READERS:
        return datasets.IterableDataset.from_generator(
            read_texts, gen_kwargs={"files": files, "columns": tuple(config.text_columns)})
    name, subset, split = (config.data.split(":") + ["", ""])[:3]
    options = {"path": name, "name": subset or None, "split": split or "train"}
    if files:
        options = {"path": suffix(files[0])[1:], "data_files": [*map(glob.escape, files)], "split": "train"}
    with blame(f"--data {config.data}" + ("" if files else ", no file here, as a hub dataset")):
        stream = datasets.load_dataset(streaming=True, **options)
        columns = stream.column_names or list(next(iter(stream)))
    for column in set(config.text_columns) - set(columns):
        raise UserError(f"--text_columns: {config.data} has no column {column!r}; the columns are "
                        f"{' '.join(map(repr, columns))}")
    return stream.with_format("arrow")

def read_blocks(stream: datasets.IterableDataset, config: Config):
    """Yield lists of BLOCK_TEXTS texts; a record without one raises UserError."""
    with blame(f"--data {config.data}"):
        for block in stream.iter(batch_size=BLOCK_TEXTS):
            if not isinstance(block, dict):  # an Arrow table
                rows = block.select(config.text_columns).to_pylist()
                block = {"text": [join_columns(row, config.text_columns) for row in rows]}
            yield block["text"]

def first_texts(config: Config, held_out: bool):
    """The texts of the first SAMPLE_BLOCKS blocks that are held out for evaluation, or those that are not."""
    for block in islice(read_blocks(open_stream(config), config), SAMPLE_BLOCKS):
        yield from (text for text in block if is_held_out(text) == held_out)

# ---- data: batches

class PretrainingStream(torch.utils.data.IterableDataset):
    """The micro-batches of some parts of the data, in turn, without end.

    What a part yields depends on (data, seed, step) alone, not on the process that reads it. Each batch
    carries the position from which its part resumes: (epoch, block of texts, batches done in it, state of
    `datasets` at its start).
    """

    def __init__(self, config: Config, tokenizer, parts: list[int], positions: dict[int, tuple], step: int):
        self.config, self.tokenizer = config, tokenizer
        self.parts, self.positions, self.step = parts, positions, step
        self.tables = special_table(tokenizer, len(tokenizer)), word_table(tokenizer)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        parts = self.parts[worker.id :: worker.num_workers] if worker else self.parts
        source = open_stream(self.config)
        for batches in zip(*(self.read_part(part, source) for part in parts)):
            yield from batches

    def read_part(self, part: int, source: datasets.IterableDataset):
        """Yield the batches of a part from its position on."""
        config, (epoch, block, done, state) = self.config, self.positions.get(part, (0, 0, 0, None))
        step = self.step - done  # of the first batch of the block
        while True:
            # a new object for each epoch, since load_state_dict sticks to it
            stream = split_dataset_by_node(source, rank=part, world_size=config.parts)
            stream.set_epoch(epoch)
            if state:  # of `datasets` at the start of the block, of which `done` batches are behind us
                stream.load_state_dict(state)
            first_step = step
            for block, texts in enumerate(read_blocks(stream, config), block):
                batches = self.cut_block(texts, np.random.default_rng([config.seed, epoch, block]))
                for index in range(len(batches)):
                    # one draw for all parts of a step: they meet alike lengths, no process waits for another
                    draw = np.random.default_rng([config.seed, step]).random()
                    windows = batches.pop(int(draw * len(batches)))
                    if index >= done:
                        seed = hash((config.seed, step, part))  # of integers: the same in every process
                        batch = collate(windows, self.tokenizer, self.tables, config.mask_ratio, seed)
                        batch.update(seed=seed, part=part, position=(epoch, block, index + 1, state))
                        yield batch
                    step += 1
                state, done = stream.state_dict(), 0
            if step == first_step:
                raise UserError(f"--data {config.data} has too few texts for {config.parts} parts: lower "
                                f"--batch_size or raise --micro_batch_size")
            epoch, block, state = epoch + 1, 0, None

    def cut_block(self, texts: list[str], rng: np.random.Generator) -> list[list[list[int]]]:
        """Cut a block's training texts into windows, permuted, sorted by length, in nearly equal batches."""
        texts = [text for text in texts if not is_held_out(text)]
        windows = cut_windows(texts, self.tokenizer, self.config.max_length)
        windows = sorted((windows[i] for i in rng.permutation(len(windows))), key=len)
        count = math.ceil(len(windows) / self.config.micro_batch_size)
        return [windows[len(windows) * i // count : len(windows) * (i + 1) // count] for i in range(count)]

def cut_windows(texts: list[str], tokenizer, max_length: int) -> list[list[int]]:
    """Token ids of all windows of the texts: [CLS], 1 to max_length - 2 tokens, not all special, [SEP]."""
    if not texts:
        return []
    windows = tokenizer(texts, truncation=True, max_length=max_length, return_overflowing_tokens=True,
                        return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return [window for window in windows if not special.issuperset(window)]

def collate(windows: list[list[int]], tokenizer, tables, mask_ratio: float, seed: int) -> BatchEncoding:
    """A micro-batch of B windows, padded to the longest, L, and masked: input_ids and masked_ids (B, L).

    chosen (M,) and visible (N,) index the masked and the non-special tokens in the flattened (B·L);
    attention_mask (B, L) is None where nothing is padded; sizes: how many rows each loss is a mean of.
    """
    rows, pad = [torch.tensor(window) for window in windows], nn.utils.rnn.pad_sequence
    input_ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)      # (B, L)
    attention_mask = pad([torch.ones_like(row) for row in rows], batch_first=True)     # (B, L)
    generator = torch.Generator().manual_seed(seed)
    masked_ids, chosen = whole_word_mask(input_ids, *tables, tokenizer.mask_token_id, mask_ratio, generator)
    chosen, visible = (where.flatten().nonzero()[:, 0] for where in (chosen, ~tables[0][input_ids]))
    return BatchEncoding({
        "input_ids": input_ids, "masked_ids": masked_ids, "chosen": chosen, "visible": visible,
        "attention_mask": None if attention_mask.all() else attention_mask, "tokens": sum(map(len, windows)),
        "sizes": {"mlm_loss": len(chosen), "bow_loss": len(windows), "enhanced_loss": len(visible)}})

def leave_signals(worker: int) -> None:
    """In a loader worker: leave signals to the training process, and use one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

# ---- masking

def special_table(tokenizer, vocab_size: int) -> torch.Tensor:
    """(V,) bool: the ids that are no words: special tokens, and ids beyond the tokenizer's vocabulary."""
    special = torch.arange(vocab_size) >= len(tokenizer)
    special[tokenizer.all_special_ids] = True
    return special

def word_table(tokenizer) -> torch.Tensor:
    """(2, V): the kind of each token's left and right edge; a token continues the word before it if its left
    edge is not 0 and equals the right edge of the token before it.

    WordPiece marks a continuation by `##`, SentencePiece the start of a word by `▁`. Byte-level BPE marks a
    space by `Ġ` and splits, as its pre-tokenizer does, between letters 1, digits 2, spaces 3 and others 4.
    Chinese and Japanese have no spaces: each piece is a word, 0.
    """
    def _kind(character):
        if unicodedata.east_asian_width(character) in "WF":  # wide, as in Chinese
            return 0
        letter = character.isalpha() or character == "\ufffd"  # the second is a byte of a longer character
        return 1 if letter else 2 if character.isnumeric() else 3 if character.isspace() else 4

    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    wordpiece = type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece"
    byte_level = not wordpiece and any(token.startswith("Ġ") for token in tokens)
    table = torch.ones(2, len(tokens), dtype=torch.int8)
    for i, token in enumerate(tokens):
        text = (tokenizer.convert_tokens_to_string([token]) if byte_level else token) or " "
        kinds = torch.tensor([_kind(text[0]), _kind(text[-1])])
        table[:, i] = kinds if byte_level else kinds.clamp(max=1)
        table[0, i] *= token.startswith("##") if wordpiece else not token.startswith(("▁", "Ġ"))
    table[:, tokenizer.all_special_ids] = 0
    return table

def whole_word_mask(input_ids, special, joins, mask_token_id: int, mask_ratio: float, generator=None):
    """Mask a share of the words of each sequence, all pieces of a word together (paper §3.1).

    Of the chosen tokens 80 % become [MASK], 10 % a random token that is not special, 10 % stay.
    input_ids (B, L) long, special (V,) bool, joins (2, V) from `word_table`. Returns masked_ids (B, L) and
    chosen (B, L) bool. At least one word of a sequence is chosen, special tokens never.
    """
    is_special = special[input_ids]                                                    # (B, L)
    left, right = joins[0][input_ids[:, 1:]], joins[1][input_ids[:, :-1]]              # (B, L-1)
    starts = F.pad((left != right) | (left == 0), (1, 0), value=True)                  # (B, L)
    word = starts.long().cumsum(1) - 1                                                 # (B, L) its word
    is_word = torch.zeros_like(is_special).scatter_(1, word, ~is_special)              # (B, W), W = L
    count = (mask_ratio * is_word.sum(1, keepdim=True)).round().clamp(min=1)
    draw = torch.rand(input_ids.shape, generator=generator).masked_fill(~is_word, 2)   # (B, W)
    chosen_word = (draw.argsort(1).argsort(1) < count) & is_word                       # `count` smallest
    chosen = chosen_word.gather(1, word)                                               # (B, L)

    draw = torch.rand(input_ids.shape, generator=generator)
    words = (~special).nonzero()[:, 0]
    random_ids = words[torch.randint(len(words), input_ids.shape, generator=generator)]
    masked_ids = torch.where(chosen & (draw < 0.8), mask_token_id, input_ids)
    return torch.where(chosen & (draw >= 0.9), random_ids, masked_ids), chosen

# ---- losses and model

def bag_of_words(input_ids, special):
    """The set T of each sequence's tokens that are not special, as (B, V) bool from input_ids (B, L)."""
    bag = torch.zeros(len(input_ids), len(special), dtype=torch.bool, device=input_ids.device)
    return bag.scatter_(1, input_ids, True) & ~special

def bow_loss(cls_logits, input_ids, special):
    """L_bow (paper §3.2): the mean over sequences of -1/|T| Σ_{t in T} log softmax(f(h_CLS))_t.

    cls_logits (B, V), input_ids (B, L) of the unmasked text, special (V,) bool. Returns a float32 scalar; a
    sequence of special tokens alone counts 0.
    """
    bag, logits = bag_of_words(input_ids, special), cls_logits.float()                 # (B, V)
    size = bag.sum(1)                                                                  # (B,) |T|
    mean_logit = (logits * bag).sum(1) / size.clamp(min=1)  # log softmax(z)_t = z_t - logsumexp(z)
    return ((logits.logsumexp(1) - mean_logit) * (size > 0)).mean()

def term_coverage(cls_logits, input_ids, special):
    """The share of each text's |T| terms among the |T| highest logits of its [CLS], (B,); 0 without terms.

    cls_logits (B, V), input_ids (B, L) of the unmasked text, special (V,) bool.
    """
    bag = bag_of_words(input_ids, special)                                             # (B, V)
    size = bag.sum(1, keepdim=True)                                                    # (B, 1)
    top = cls_logits.topk(max(int(size.max()), 1), dim=1).indices                      # (B, K)
    hits = bag.gather(1, top) & (torch.arange(top.shape[1], device=top.device) < size)
    return hits.sum(1) / size[:, 0].clamp(min=1)

def mlm_head(lm, hidden):
    """f: the checkpoint's own masked-LM head, on any rows of hidden states: (..., D) to (..., V)."""
    if hasattr(lm, "cls"):  # BERT
        return lm.cls(hidden)
    if hasattr(lm, "lm_head") and not lm.config.is_encoder_decoder:  # RoBERTa, XLM-R
        return lm.lm_head(hidden)
    if hasattr(lm, "vocab_projector"):  # DistilBERT
        return lm.vocab_projector(lm.vocab_layer_norm(lm.activation(lm.vocab_transform(hidden))))
    if hasattr(lm, "head") and hasattr(lm, "decoder"):  # ModernBERT
        return lm.decoder(lm.head(hidden))
    raise UserError(f"--model: {type(lm).__name__} has no head of BERT, RoBERTa, DistilBERT or ModernBERT")

class EnhancedDecoder(nn.Module):
    """RetroMAE's one-layer decoder (arXiv 2205.12035 §3.3), the baseline, with its own positions.

    The queries are h_CLS + positions, the keys and values h_CLS and the embeddings of the unmasked tokens +
    positions. Token i sees position 0 and a random half of the others, never itself. This view is one draw on
    the device; the original draws it in Python loops, where most of its time goes.
    """

    def __init__(self, lm, max_length: int):
        super().__init__()
        width, self.heads = lm.config.hidden_size, lm.config.num_attention_heads
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.02)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm_query, self.norm_memory, self.norm_attention, self.norm = map(nn.LayerNorm, [width] * 4)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, cls, embeddings, attention_mask):
        """cls (B, D), token embeddings (B, L, D), attention_mask (B, L) or None; returns (B, L, D)."""
        batch, length, _ = embeddings.shape
        queries = self.norm_query(cls[:, None] + self.positions[:length])              # (B, L, D)
        memory = torch.cat([cls[:, None], embeddings[:, 1:]], 1) + self.positions[:length]
        memory = self.norm_memory(memory)                                              # (B, L, D)
        seen = torch.rand(batch, 1, length, length, device=cls.device) < 0.5           # (B, 1, L, L)
        seen &= ~torch.eye(length, dtype=torch.bool, device=cls.device)
        seen[..., 0] = True
        if attention_mask is not None:
            seen &= attention_mask[:, None, None].bool()
        projected = self.query(queries), self.key(memory), self.value(memory)
        q, k, v = (rows.unflatten(2, (self.heads, -1)).transpose(1, 2) for rows in projected)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        attended = self.output(attended)                                               # (B, L, D)
        decoded = self.norm_attention(queries + attended)
        return self.norm(decoded + self.feed_forward(decoded))

class BowMAE(nn.Module):
    """A masked LM and its losses; `bow` adds no parameter, `enhanced` a decoder for training alone."""

    def __init__(self, lm, config: Config, special):
        super().__init__()
        self.lm, self.objective = lm, config.objective
        self.register_buffer("special", special, persistent=False)
        enhanced = config.objective == "enhanced"
        self.decoder = EnhancedDecoder(lm, config.max_length) if enhanced else nn.Identity()

    def encode(self, input_ids, attention_mask):
        """The last hidden states h, (B, L, D), of input_ids (B, L)."""
        return self.lm.base_model(input_ids, attention_mask=attention_mask).last_hidden_state

    def forward(self, batch: BatchEncoding, objective: str | None = None) -> dict:
        """The mean of each loss over a micro-batch, by name; logits are made only where a loss needs them.

        h is of the masked text, and its [CLS] must predict the bag of the unmasked one.
        """
        objective, input_ids = objective or self.objective, batch["input_ids"]
        words = input_ids.flatten()                                                    # (B·L,)
        hidden = self.encode(batch["masked_ids"], batch["attention_mask"])             # (B, L, D)
        logits = mlm_head(self.lm, hidden.flatten(0, 1)[batch["chosen"]]).float()      # (M, V)
        losses = {"mlm_loss": F.cross_entropy(logits, words[batch["chosen"]])}
        if objective == "bow":
            losses["bow_loss"] = bow_loss(mlm_head(self.lm, hidden[:, 0]), input_ids, self.special)
        elif objective == "enhanced":
            embeddings = self.lm.get_input_embeddings()(input_ids)                     # (B, L, D)
            decoded = self.decoder(hidden[:, 0], embeddings, batch["attention_mask"])  # (B, L, D)
            logits = mlm_head(self.lm, decoded.flatten(0, 1)[batch["visible"]]).float()     # (N, V)
            losses["enhanced_loss"] = F.cross_entropy(logits, words[batch["visible"]])
        return losses

FRESH = {"tiny": (2, 128, 2048), "mini": (4, 256, 8192), "small": (4, 512, 16384), "medium": (8, 512, 30522),
         "base": (12, 768, 30522)}  # layers, width, vocabulary

def learn_tokenizer(config: Config):
    """An uncased WordPiece tokenizer with the vocabulary of the first texts; the same at every call."""
    tokenizer, characters, size = BertTokenizer(), Counter(), FRESH[config.model][2]
    backend = tokenizer.backend_tokenizer
    for text in first_texts(config, held_out=False):
        characters.update(backend.normalizer.normalize_str(text))
    common = sorted(characters, key=lambda character: (-characters[character], character))[: size // 8]
    alphabet = [character for character in common if not character.isspace()]
    # the trainer numbers new characters in the order of a random hash, so the vocabulary would change from
    # run to run; it is a function of the texts once all characters, and their continuations, are given
    backend.train_from_iterator(first_texts(config, held_out=False), WordPieceTrainer(
        vocab_size=size, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False,
        special_tokens=list(tokenizer.get_vocab()) + ["##" + character for character in alphabet]))
    return BertTokenizer(vocab=backend.get_vocab(), model_max_length=max(512, config.max_length))

def load_tokenizer(source: str, config: Config | None = None):
    """The tokenizer of a model or checkpoint, or one learnt for a new model; UserError if it cannot serve."""
    if config and source in FRESH:
        return learn_tokenizer(config)
    with blame(f"--model {source}: no such model, or no tokenizer in it"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast or tokenizer.mask_token is None or tokenizer.pad_token is None:
        raise UserError(f"--model {source}: its tokenizer must be fast and have a mask and a padding token")
    if max(tokenizer.get_vocab().values()) >= len(tokenizer):
        raise UserError(f"--model {source}: the ids of its tokenizer have gaps")
    if tokenizer.cls_token_id is None or tokenizer("a").input_ids[0] != tokenizer.cls_token_id:
        raise UserError(f"--model {source}: its tokenizer puts no [CLS] first, so no vector would be trained")
    return tokenizer

def fresh_lm(size: str, tokenizer):
    """A new BERT initialised for short runs: [CLS] starts out with something of all its words."""
    layers, width, _ = FRESH[size]
    lm = AutoModelForMaskedLM.from_config(BertConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=layers,
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
        max_position_embeddings=tokenizer.model_max_length, initializer_range=0.05,  # of BERT: 0.02
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    with torch.no_grad():
        embeddings = lm.base_model.embeddings
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.mul_(0.2)  # else they drown the words
        for layer in lm.base_model.encoder.layer:  # attention hands on what it sees, near the mean of all
            for linear in (layer.attention.self.value, layer.attention.output.dense):
                linear.weight.diagonal().add_(0.5)
    return lm

def load_lm(source: str, tokenizer, max_length: int, seed: int):
    """The masked LM of a model or checkpoint, or a fresh BERT of this seed; UserError if it cannot serve."""
    torch.manual_seed(seed)
    if source in FRESH:
        lm = fresh_lm(source, tokenizer)
    else:
        with blame(f"--model {source} is no masked LM"):
            lm, report = AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32,
                                                              output_loading_info=True)
        if report["missing_keys"]:
            raise UserError(f"--model {source} has no masked-LM head: no {min(report['missing_keys'])}")
    if max_length <= 128 and not torch.cuda.is_available():
        lm.set_attn_implementation("eager")  # 1.2 to 1.3 x tokens/s: CPUs' fused attention is slow backward
    mlm_head(lm, torch.zeros(1, lm.config.hidden_size))
    # RoBERTa counts positions from its padding id on
    first = getattr(getattr(lm.base_model, "embeddings", None), "padding_idx", -1) + 1
    positions, size = lm.config.max_position_embeddings - first, lm.config.vocab_size
    if max_length > positions or len(tokenizer) > size:
        raise UserError(f"--model {source} has {positions} positions and {size} embeddings, too few for "
                        f"--max_length {max_length} or the {len(tokenizer)} tokens of its tokenizer")
    return lm

# ---- schedules

def cosine(first: float, last: float, progress: float) -> float:
    """From first at progress 0 to last at 1, along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * min(max(progress, 0), 1))) / 2

def learning_rate(config: Config, step: int) -> float:
    """The learning rate of an optimizer step, 1 to steps: a linear warm-up, then a cosine."""
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    rise = min(step / max(config.warmup_steps, 1), 1)
    return rise * cosine(config.lr, config.lr * config.lr_final_ratio, progress)

# ---- processes

@contextlib.contextmanager
def process_group():
    """Join the processes of torchrun, or be a group of one; yields the device. CPU tensors travel by gloo."""
    logging.disable(logging.CRITICAL)  # of the libraries: what fails comes as an error
    transformers.utils.logging.disable_progress_bar()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "cpu:gloo,cuda:nccl"
        if device.index >= torch.cuda.device_count():
            print(f"error: no GPU for process {device.index}: lower --nproc_per_node", file=sys.stderr)
            sys.exit(2)
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # the first process may read, index or mine for hours while the others wait for it
    dist.init_process_group(backend, timeout=timedelta(days=7), **alone)
    try:
        yield device
    except Exception:
        if dist.get_world_size() > 1:  # to leave the group would wait for processes that wait for us
            sys.excepthook(*sys.exc_info())
            os._exit(1)  # loader processes end by themselves when they lose their parent
        raise
    finally:  # workers ignore SIGTERM, and an error keeps their iterator alive: end them here
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in torch.multiprocessing.active_children():
            child.kill()
        dist.destroy_process_group()

def leave() -> None:
    """End a process of torchrun without Python's teardown, where threads that gloo leaves may abort it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        os._exit(0)

def agree(error: Exception | None = None, numbers=()) -> list[float]:
    """Sum numbers over all processes. If any met an error, print it once; all exit with 2."""
    mine = torch.tensor([error is not None, *numbers], dtype=torch.float64)
    rows = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    failed = [rank for rank, row in enumerate(rows) if row[0]]
    if failed:
        if dist.get_rank() == failed[0]:  # what a loader process raises comes with its traceback before it
            tqdm.write(f"error: {str(error).split('UserError: ')[-1].strip()}", file=sys.stderr)
        dist.all_reduce(mine)  # wait until it is out: at the first exit torchrun ends the other processes
        sys.exit(2)
    return sum(rows)[1:].tolist()

def together(function, *args, first: bool = False):
    """function(*args) on every process, or on the first for all; a UserError on one of them ends all."""
    result = error = None
    try:
        if not first or dist.get_rank() == 0:
            result = function(*args)
    except UserError as caught:
        error = caught
    agree(error)
    if first:
        dist.broadcast_object_list(box := [result], device=torch.device("cpu"))
        result = box[0]
    return result

# ---- checkpoints

def write_json(path: Path, content) -> None:
    """Write a JSON file whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".tmp").replace(path)

def save_checkpoint(config, lm, tokenizer, state: dict, max_length: int, similarity: str = "dot") -> None:
    """Write output/checkpoint-STEP, as transformers and SentenceTransformer open it; keep the last --keep."""
    folder, target = Path(config.output, ".saving"), Path(config.output, f"checkpoint-{state['step']}")
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    pooling = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    pooler = {} if lm.config.model_type in ("distilbert", "modernbert") else {"add_pooling_layer": False}
    log = Path(config.output, "metrics.jsonl")
    with blame(f"--output: {target} cannot be written; fix that; the same command resumes from the last"):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "1_Pooling").mkdir(parents=True)
        lm.save_pretrained(folder)
        tokenizer.backend_tokenizer.no_truncation()  # left by the windows
        tokenizer.save_pretrained(folder)
        write_json(folder / "modules.json", [module, pooling])
        write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": similarity})
        write_json(folder / "1_Pooling/config.json", {
            "word_embedding_dimension": lm.config.hidden_size, "pooling_mode_cls_token": True})
        write_json(folder / "sentence_bert_config.json", {
            "max_seq_length": max_length, "do_lower_case": False, "model_args": pooler})
        torch.save(state | {"logged": log.stat().st_size}, folder / "training_state.pt")
        files = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
        write_json(folder / "trainer_state.json", {
            "global_step": state["step"], "config": asdict(config), "files": files})
        os.sync()
        shutil.rmtree(target, ignore_errors=True)  # a torn one of this step, which was passed over
        folder.rename(target)
    whole = [folder for folder in list_checkpoints(config.output) if read_manifest(folder)][: config.keep]
    for old in set(list_checkpoints(config.output)) - set(whole):
        shutil.rmtree(old, ignore_errors=True)

def list_checkpoints(output: str) -> list[Path]:
    """The folders checkpoint-STEP, newest first."""
    folders = [path for path in Path(output).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(folders, key=lambda path: -int(path.name[11:]))

def read_manifest(folder: Path) -> dict | None:
    """The trainer_state.json of a checkpoint; None if a file is missing or has another size than written."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        manifest = json.loads((folder / "trainer_state.json").read_text())
        if all((folder / name).stat().st_size == size for name, size in manifest["files"].items()):
            return manifest

def find_checkpoint(config) -> str | None:
    """The checkpoint to go on from, if any; UserError where --output or --resume is not this run's."""
    output, checkpoints, earlier = Path(config.output), list_checkpoints(config.output), {}
    with blame(f"--output {output} cannot be used"):
        output.mkdir(parents=True, exist_ok=True)
        used = {path.name for path in output.iterdir() if path.suffix != ".tmp"} - {"run.json"}
        if used and (output / "run.json").exists():
            earlier[output] = json.loads((output / "run.json").read_text())["config"]
        if used and (not earlier or config.resume == "never"):
            raise UserError(f"--output {output} holds {'a run' if earlier else 'other files'}: give another")
    begun = checkpoints and earlier.get(output, {}).get("resume") == config.resume
    if config.resume not in ("auto", "never") and not begun:
        path, manifest = Path(config.resume), read_manifest(Path(config.resume))
        if manifest is None or checkpoints and not checkpoints[0].samefile(path):
            raise UserError(f"--resume {path} is no whole checkpoint, or not the newest of --output")
        checkpoints, earlier[path] = [path], manifest["config"]
    # no loss depends on these flags (`compare` is of eval_retrieval.py), so they may change on a resume
    free = "workers output save_every keep log_every eval_every resume compare bench".split()
    for where, flags in earlier.items():
        for name, value in asdict(config).items():
            if name not in free and flags.get(name) != value:
                raise UserError(f"{where} holds a run with --{name} {flags.get(name)}, not {value}: "
                                f"give that, or another --output")
    for folder in checkpoints:
        if read_manifest(folder):
            return str(folder)
        print(f"warning: {folder} is not whole; passing it over", file=sys.stderr)

def write_run(config, device: torch.device, logged: int | None = None) -> int | None:
    """Write run.json: how this start was made. Cut metrics.jsonl to `logged` bytes; returns those it has."""
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "datasets", "numpy")}
    with blame(f"--output {config.output} cannot be written"):
        write_json(Path(config.output, "run.json"), {
            "config": asdict(config), "versions": versions | {"python": sys.version.split()[0]},
            "git_commit": commit or None, "device": str(device), "world_size": dist.get_world_size(),
            "argv": sys.argv})
        if logged is not None:
            with Path(config.output, "metrics.jsonl").open("a") as log:
                return log.truncate(min(logged, log.tell()))

# ---- evaluation and logs

def held_out_batches(config: Config, tokenizer) -> list[BatchEncoding]:
    """The windows of the held-out texts at the start of the data, as batches with fixed masks."""
    tables = special_table(tokenizer, len(tokenizer)), word_table(tokenizer)
    windows = cut_windows([*first_texts(config, held_out=True)], tokenizer, config.max_length)[:1024]
    windows.sort(key=len)
    return [collate(windows[i : i + 64], tokenizer, tables, config.mask_ratio, i)
            for i in range(0, len(windows), 64)]

@torch.no_grad()
def evaluate(model: BowMAE, batches: list[BatchEncoding], device) -> dict:
    """Held-out masked-LM loss (a mean over tokens), bag-of-word loss and term coverage (over windows)."""
    model.eval()
    values, weights = [], []
    for batch in (batch.to(device) for batch in batches):
        losses = model(batch, "bow")
        cls = model.encode(batch["input_ids"], batch["attention_mask"])[:, 0]          # of the unmasked text
        coverage = term_coverage(mlm_head(model.lm, cls), batch["input_ids"], model.special).mean()
        values.append([float(losses["mlm_loss"]), float(losses["bow_loss"]), float(coverage)])
        weights.append([len(batch["chosen"]), len(cls), len(cls)])
    model.train()
    means = np.average(values, axis=0, weights=weights).tolist()
    if not np.isfinite(means).all():
        raise UserError("a held-out loss is not finite: lower --lr, with another --output")
    return dict(zip(("eval_mlm_loss", "eval_bow_loss", "eval_term_coverage"), means))

def print_table(rows: dict[str, dict], columns: list[str], title: str = "") -> None:
    """An aligned table of numbers; a row is a name and its values by column."""
    width = max(map(len, [title, *rows]))
    print(f"\n{title:<{width}}" + "".join(f"{column:>12}" for column in columns))
    for name, values in rows.items():
        cells = (f"{values[column]:>12,.{0 if values[column] >= 100 else 4}f}" for column in columns)
        print(f"{name:<{width}}" + "".join(cells))

def write_metrics(config, record: dict) -> None:
    """Append a line to metrics.jsonl; what is no number (a norm that overflowed) is null."""
    record = {name: value if math.isfinite(value) else None for name, value in record.items()}
    with blame(f"--output: {config.output} cannot be written"):
        with Path(config.output, "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in MB: allocated by PyTorch on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

def log_steps(config, device, bar: tqdm, pending: list, totals: Counter, began: float) -> None:
    """Read the losses since the last log line; UserError if one is not finite, else log the last step."""
    for step, losses in pending:
        losses = {name: float(value) for name, value in losses.items()}
        # a loss scaler skips steps with an overflow in the gradient by itself
        for name in ("loss",) if config.precision == "fp16" else ("loss", "grad_norm"):
            if not math.isfinite(losses[name]):
                raise UserError(f"the {name} is {losses[name]} at step {step}, the last checkpoint is whole: "
                                f"lower --lr or set --precision fp32, with another --output")
    seconds = time.perf_counter() - began  # reading the losses has waited for the device
    rate = totals["tokens"] / seconds
    bar.set_postfix({name: losses[name] for name in losses if "_loss" in name} | {"tokens/s": int(rate)})
    if dist.get_rank() == 0:
        write_metrics(config, {"step": step, **losses, "tokens_per_second": rate,
                               "padding_share": 1 - totals["tokens"] / totals["positions"],
                               "data_wait_share": totals["waited"] / seconds,
                               "peak_memory_mb": peak_memory(device)})

# ---- training loop

def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that --precision computes in; `auto` is bfloat16 on devices that have it, else float32."""
    cuda = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()
    auto = torch.bfloat16 if native else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]

def load_optimizer(config, model, checkpoint: str | None, device):
    """AdamW (β₂ of RoBERTa) and the loss scaler, as in the checkpoint if any, and what else it holds."""
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == matrix],
               "weight_decay": config.weight_decay * matrix} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
    scaler, state = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"), {"step": 0}
    if checkpoint:
        state = torch.load(Path(checkpoint, "training_state.pt"), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    return optimizer, scaler, state

def wrap_ddp(model, batch, device, dtype, compiled: bool = False) -> nn.Module:
    """The model under DDP, after one backward pass whose gradients are thrown away."""
    # DDP rebuilds its buckets after the first pass, and a resumed run must sum gradients in the same order
    model = torch.compile(model, dynamic=True) if compiled else model
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = sum(ddp(batch).values())
    loss.backward()
    ddp.zero_grad()
    return ddp

def update(ddp, optimizer, scaler, lr: float):
    """Clip the gradient to a norm of 1 and take an AdamW step; returns the norm before."""
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return grad_norm

def train_step(ddp, optimizer, scaler, batches: list, sizes: dict, lr: float, weight: float, device, dtype):
    """One optimizer step; `sizes` are of all processes' batches. Returns its losses and gradient norm."""
    total = 0.0
    for i, batch in enumerate(batches):
        torch.manual_seed(batch["seed"] + 1)  # the dropout, too, is a function of (seed, step, part)
        with ddp.no_sync() if i < len(batches) - 1 else contextlib.nullcontext():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = ddp(batch.to(device, non_blocking=True))
            # means over the whole step: a micro-batch counts by its share of the rows, and DDP divides by
            # the number of processes
            shares = {name: loss * (batch["sizes"][name] / sizes[name]) for name, loss in losses.items()}
            loss = sum(share * (weight if name == "bow_loss" else 1.0) for name, share in shares.items())
            scaler.scale(loss * dist.get_world_size()).backward()
        total = total + torch.stack([loss, *shares.values()]).detach()
    dist.all_reduce(total)
    return dict(zip(["loss", *losses], total)) | {"grad_norm": update(ddp, optimizer, scaler, lr)}

def start_loader(config: Config, tokenizer, device, state: dict, kind: type = PretrainingStream):
    """This process's micro-batches from a checkpoint on: those of the first step, and an iterator of all."""
    share = config.parts // dist.get_world_size()
    parts = range(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    stream = kind(config, tokenizer, parts, state.get("positions", {}), state["step"] + 1)
    loader = iter(torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=config.workers and math.gcd(config.workers, share),
        pin_memory=device.type == "cuda", worker_init_fn=leave_signals))
    head = together(list, islice(loader, share))  # data that is bad at once ends all
    return head, chain(head, loader)

def next_batches(config: Config, loader) -> tuple[list[BatchEncoding], dict, Counter]:
    """This process's share of a step; over all processes, the rows behind each loss, and the tokens."""
    began = time.perf_counter()
    batches = together(list, islice(loader, config.parts // dist.get_world_size()))
    waited = time.perf_counter() - began
    counts = [[b["tokens"], b["input_ids"].numel(), *b["sizes"].values()] for b in batches]
    tokens, positions, *sizes = agree(numbers=np.sum(counts, axis=0))
    counts = Counter(tokens=tokens, positions=positions, waited=waited)
    return batches, dict(zip(batches[0]["sizes"], sizes)), counts

def run_steps(config, device, step: int, do_step, save, evaluation=None) -> None:
    """Take the steps after `step`, with bar, logs, evaluations and checkpoints; at a signal save and exit.

    do_step(step) returns losses by name and a Counter of tokens, positions and seconds waited for data;
    save(step) writes a checkpoint; evaluation(step) logs.
    """
    stops, leaving, pending, totals, began = [], 0, [], Counter(), time.perf_counter()
    before = {number: signal.signal(number, lambda number, frame: stops.append(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=dist.get_rank() > 0)
    while step < config.steps and not leaving:
        step += 1
        losses, counts = do_step(step)
        (leaving,) = agree(numbers=[len(stops)])  # signals, of all processes
        pending.append((step, losses))
        totals.update(counts)
        bar.update()
        saves = leaving or step == config.steps or step % config.save_every == 0
        evaluates = evaluation and (step == config.steps or step % config.eval_every == 0)
        if saves or evaluates or step % config.log_every == 0:
            together(log_steps, config, device, bar, pending, totals, began)
            if evaluates:
                together(evaluation, step, first=True)
            if saves:
                save(step)
            pending, totals, began = [], Counter(), time.perf_counter()  # the rate is of training alone
    bar.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    if step < config.steps:
        if dist.get_rank() == 0:
            print(f"stopped by a signal, saved after step {step}: the same command resumes", file=sys.stderr)
        agree()  # wait until it is out: at the first exit torchrun ends the other processes
        sys.exit(128 + signal.SIGTERM)

def train(config: Config, device: torch.device) -> None:
    """Pre-train to --steps, from the newest checkpoint or from the start; the model is left in --output."""
    world_size, dtype = dist.get_world_size(), compute_dtype(config.precision, device)
    checkpoint = together(find_checkpoint, config, first=True)
    source = checkpoint or config.model
    tokenizer = together(load_tokenizer, source, config, first=True)
    lm = together(load_lm, source, tokenizer, config.max_length, config.seed)
    model = BowMAE(lm, config, special_table(tokenizer, lm.config.vocab_size)).to(device).train()
    optimizer, scaler, state = load_optimizer(config, model, checkpoint, device)
    if checkpoint:
        model.decoder.load_state_dict(state["decoder"])
    head, loader = start_loader(config, tokenizer, device, state)
    held_out, positions = together(held_out_batches, config, tokenizer, first=True), {}
    ddp = wrap_ddp(model, head[0].to(device), device, dtype, config.compile)
    logged = together(write_run, config, device, state.get("logged", 0), first=True)

    def _step(step):
        batches, sizes, counts = next_batches(config, loader)
        positions.update({batch["part"]: batch["position"] for batch in batches})
        lr = learning_rate(config, step)
        weight = cosine(config.bow_weight, config.bow_weight_final, step / config.steps)  # λ
        losses = train_step(ddp, optimizer, scaler, batches, sizes, lr, weight, device, dtype)
        return losses | {"bow_weight": weight, "lr": lr}, counts

    def _evaluate(step):
        write_metrics(config, {"step": step} | evaluate(model, held_out, device))

    def _save(step):
        everyone = [None] * world_size
        dist.all_gather_object(everyone, positions)
        together(save_checkpoint, config, lm, tokenizer, {
            "step": step, "positions": {part: at for some in everyone for part, at in some.items()},
            "decoder": model.decoder.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict()}, config.max_length, first=True)

    if dist.get_rank() == 0:
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{config.objective}: {millions:.2f} M parameters | {config.batch_size} windows a step = "
              f"{config.parts} x {config.micro_batch_size} on {world_size} process(es) | {config.steps} "
              f"steps of up to {config.batch_size * config.max_length:,} tokens | {device}, {dtype} | "
              f"{sum(len(batch['input_ids']) for batch in held_out)} windows held out", flush=True)
    if held_out and not logged:
        together(_evaluate, state["step"], first=True)
    run_steps(config, device, state["step"], _step, _save, _evaluate if held_out else None)
    together(finish, config, first=True)

def finish(config) -> None:
    """Put the model of the last checkpoint into --output, and print the held-out metrics before and after."""
    output, ours = Path(config.output), shutil.ignore_patterns("trainer_state.json", "training_state.pt")
    with blame(f"--output: the model cannot be written to {output}; fix that and give the command again"):
        newest = (list_checkpoints(output) or [config.resume])[0]  # else no step was taken here
        shutil.copytree(newest, output, ignore=ours, dirs_exist_ok=True)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").open() if '"eval_' in line]
    if rows:
        print_table({name[5:]: {"before": value, "after": rows[-1][name]} for name, value in rows[0].items()
                     if name != "step"}, ["before", "after"], "held-out")
    print(f"model saved in {output}")

# ---- benchmark

class PaperMAE(BowMAE):
    """For --bench alone: `bow` at the cost of the paper's code, with vocabulary logits at every position."""

    def forward(self, batch: BatchEncoding, objective: str | None = None) -> dict:
        """The losses of BowMAE, by name."""
        input_ids, chosen = batch["input_ids"], batch["chosen"]
        labels = torch.full_like(input_ids, -100).flatten()                            # (B·L,)
        labels[chosen] = input_ids.flatten()[chosen]
        hidden = self.encode(batch["masked_ids"], batch["attention_mask"])             # (B, L, D)
        logits = mlm_head(self.lm, hidden).float()                                     # (B, L, V)
        return {"mlm_loss": F.cross_entropy(logits.flatten(0, 1), labels),
                "bow_loss": bow_loss(logits[:, 0], input_ids, self.special)}

class PaperStream(PretrainingStream):
    """For --bench alone: random batches, padded to their longest, as the paper's code makes them."""

    def cut_block(self, texts: list[str], rng: np.random.Generator) -> list[list[list[int]]]:
        """The windows of PretrainingStream in batches of any lengths."""
        batches = super().cut_block(texts, rng)
        rng.shuffle(windows := list(chain(*batches)))
        return [windows[i :: len(batches)] for i in range(len(batches))]

def loader_rate(config: Config, tokenizer) -> float:
    """Tokens a second of one loader process, over two blocks of texts."""
    stream, marks, tokens = PretrainingStream(config, tokenizer, [0], {}, 1), [], 0
    for batch in torch.utils.data.DataLoader(stream, None, num_workers=1, worker_init_fn=leave_signals):
        if batch["position"][2] == 1:  # a block begins
            marks.append((time.perf_counter(), tokens))
        if len(marks) == 4:
            return (tokens - marks[1][1]) / (marks[3][0] - marks[1][0])
        tokens += batch["tokens"]

def model_flops(config: Config, model: BowMAE, totals: Counter) -> float:
    """Operations that training on so many tokens, windows and rows of logits needs; padding does not count.

    6 for a weight (2 forward, 4 backward): one of the encoder, and of a decoder, for each token, one of the
    head for each row; in attention 12 · width · mean length for each layer and token, as if all was global.
    """
    lm = model.lm
    weights = [*lm.base_model.named_parameters(), *model.decoder.named_parameters()]
    matrices = sum(w.numel() for name, w in weights if w.ndim == 2 and not re.search("embed|positions", name))
    width, layers = lm.config.hidden_size, lm.config.num_hidden_layers + (config.objective == "enhanced")
    return 6 * totals["rows"] * width * (width + lm.config.vocab_size) + totals["tokens"] * (
        6 * matrices + 12 * layers * width * totals["tokens"] / totals["windows"])

def bench_turn(config: Config, ddp, loader, optimizer, scaler, device, dtype) -> dict:
    """What four steps cost, over all processes, after two that do not count."""
    steps = []

    def _step():
        batches, sizes, counts = next_batches(config, loader)
        losses = train_step(ddp, optimizer, scaler, batches, sizes, config.lr, config.bow_weight, device,
                            dtype)
        rows = sum(sizes.get(name, 0) for name in losses)
        steps.append(counts + Counter(windows=sizes["bow_loss"], rows=rows))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():  # Linux forgets the peak so far
        Path("/proc/self/clear_refs").write_text("5")
    timer = torch.utils.benchmark.Timer("step()", globals={"step": _step},
                                        num_threads=torch.get_num_threads())
    seconds = 4 * timer.timeit(4).mean  # takes two steps more before, and waits for the device
    totals = sum(steps[-4:], Counter())
    return {"samples/s": totals["windows"] / seconds, "tokens/s": totals["tokens"] / seconds,
            "waiting": totals["waited"] / seconds, "MB": peak_memory(device),
            "FLOP/s": model_flops(config, ddp.module, totals) / seconds}

def bench(config: Config, device: torch.device) -> None:
    """Train the objectives by turns on the same texts, for ten rounds, and print what each costs.

    `paper` is `bow` as the paper's code computes it. The first two rounds are not counted; the table has the
    medians of the others, and of the ratio to `mlm` in the same round the extremes too. MB is the peak of a
    process, less what the other rows keep; MFU is the share of the rate of large matrix products that the
    model needs; waiting is that of the first process. It needs more memory than training does.
    """
    dtype, runs, kept = compute_dtype(config.precision, device), {}, {}
    torch._dynamo.config.recompile_limit = 64  # all objectives share one forward
    tokenizer = together(load_tokenizer, config.model, config, first=True)
    for name in ("mlm", "bow", "enhanced", "paper"):
        kinds = (PaperMAE, PaperStream) if name == "paper" else (BowMAE, PretrainingStream)
        own = replace(config, objective="bow" if name == "paper" else name)
        lm = together(load_lm, config.model, tokenizer, config.max_length, config.seed)
        model = kinds[0](lm, own, special_table(tokenizer, lm.config.vocab_size)).to(device).train()
        head, loader = start_loader(own, tokenizer, device, {"step": 0}, kinds[1])
        ddp = wrap_ddp(model, head[0].to(device), device, dtype, config.compile)
        runs[name] = own, ddp, loader, *load_optimizer(own, model, None, device)[:2], device, dtype
        kept[name] = 4 * 4 * sum(weight.numel() for weight in model.parameters()) / 2**20  # AdamW's two, too
    # back and forth, so that `mlm` and `bow` have like turns before them: after `paper` all is slower
    rounds = [{name: bench_turn(*runs[name]) for name in list(runs)[:: (-1) ** turn]}
              for turn in tqdm(range(10), desc="bench", unit="round", disable=dist.get_rank() > 0)][2:]
    matrix = torch.randn(2 * (8192 if device.type == "cuda" else 1024,), device=device).to(dtype)
    timer = torch.utils.benchmark.Timer("matrix @ matrix", globals={"matrix": matrix},
                                        num_threads=torch.get_num_threads())
    dense, report = 2 * len(matrix) ** 3 / timer.timeit(20).median * dist.get_world_size(), {}
    for name in runs:
        turns = [turn[name] for turn in rounds]
        row = report[name] = {key: float(np.median([turn[key] for turn in turns])) for key in turns[0]}
        ratios = [turn["tokens/s"] / other["mlm"]["tokens/s"] for turn, other in zip(turns, rounds)]
        row |= {"x mlm": float(np.median(ratios)), "least": min(ratios), "most": max(ratios)}
        row |= {"MB": max(turn["MB"] for turn in turns) - sum(kept.values()) + kept[name],
                "MFU": row.pop("FLOP/s") / dense}
    together(print_bench, config, device, tokenizer, report, dense, first=True)

def print_bench(config: Config, device: torch.device, tokenizer, report: dict, dense: float) -> None:
    """Print what `bench` measured and the rate of a loader process, and write them beside --output."""
    columns = ["samples/s", "tokens/s", "x mlm", "least", "most", "MB", "waiting", "MFU"]
    print_table(report, columns)
    path, loader = Path(f"{Path(config.output)}.bench.json"), loader_rate(config, tokenizer)
    print(f"one loader process: {loader:,.0f} tokens/s | {device}, {dist.get_world_size()} process(es): "
          f"{dense / 1e9:,.0f} GFLOP/s | in {path}")
    with blame(f"--output: {path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"rows": report, "loader_tokens_per_second": loader, "dense_flops": dense,
                          "world_size": dist.get_world_size(), "device": str(device),
                          "config": asdict(config)})

def main(argv: list[str] | None = None) -> None:
    """Pre-train with the flags of a command line; exits with 2 and one line on an error the user can fix."""
    with process_group() as device:
        config = together(parse_config, argv)
        (bench if config.bench else train)(config, device)

if __name__ == "__main__":
    main()
    leave()
