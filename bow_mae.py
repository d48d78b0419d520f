# SPDX-License-Identifier: MIT
"""BoW-MAE: pre-training for dense retrieval by bag-of-word prediction (arXiv 2401.11248).

A masked language model learns to retrieve when its [CLS] vector must also predict, through the
model's own masked-LM head, the set of words of its input. No decoder, no new parameter. Two
baselines are trained by the same script: `mlm`, and `enhanced` (RetroMAE's decoder).

    torchrun bow_mae.py  # a tiny BERT from scratch, on the documentation of Python packages
    torchrun --nproc_per_node 8 bow_mae.py --model bert-base-uncased --data corpus.jsonl
The same command again resumes a run. Reading order: `cut_sequences`, the method, `train`.
"""

import argparse
import ast
import contextlib
import csv
import fcntl
import functools
import gc
import glob
import gzip
import inspect
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer, BatchEncoding, BertConfig
from transformers.hf_argparser import HfArg, HfArgumentParser


@dataclass
class Config:
    """Pre-train. Unset flags get the paper's values, or those of a short run for a new model."""

    # Data and model.
    data: str = HfArg(default="python-docs", help="python-docs, file, folder, glob or hub dataset")
    text_columns: list[str] = HfArg(default_factory=lambda: ["text"], help="columns of the text")
    model: str = HfArg(default="tiny", help="hub name, folder, or new: tiny, mini, small, base")
    objective: Literal["bow", "mlm", "enhanced"] = HfArg(default="bow", help="bow, or a baseline")
    max_length: int | None = HfArg(default=None, help="tokens of a sequence, with [CLS] and [SEP]")
    mask_ratio: float = HfArg(default=0.3, help="share of the words that are masked")
    bow_weight: float = HfArg(default=1.0, help="weight λ of the bag-of-word loss at the start")
    bow_weight_final: float = HfArg(default=0.1, help="λ at the last step, reached by a cosine")
    # Optimization.
    steps: int | None = HfArg(default=None, help="optimizer steps")
    batch_size: int | None = HfArg(default=None, help="sequences of a step, over all processes")
    micro_batch_size: int | None = HfArg(default=None, help="sequences of one forward pass")
    lr: float | None = HfArg(default=None, help="peak learning rate of AdamW")
    lr_final_ratio: float | None = HfArg(default=None, help="final learning rate over its peak")
    warmup_steps: int | None = HfArg(default=None, help="linear warm-up; unset: steps // 20")
    weight_decay: float = HfArg(default=0.01, help="of AdamW; not of biases and LayerNorm")
    adam_beta2: float | None = HfArg(default=None, help="β₂ of AdamW")
    # System.
    precision: Literal["auto", "bf16", "fp16", "fp32"] = HfArg(default="auto", help="of autocast")
    compile: bool = HfArg(default=False, help="use torch.compile")
    seed: int = HfArg(default=0, help="of weights, order of the data, masks and dropout")
    workers: int | None = HfArg(default=None, help="data-loader processes of a training process")
    output: str = HfArg(default="out/bow_mae", help="folder of the checkpoints, logs and model")
    save_every: int = HfArg(default=500, help="steps between checkpoints")
    keep: int = HfArg(default=2, help="newest checkpoints that are kept")
    log_every: int = HfArg(default=10, help="steps between lines of metrics.jsonl")
    eval_every: int = HfArg(default=300, help="steps between evaluations on held-out texts")
    bench: bool = HfArg(default=False, help="measure the cost of each objective, do not train")

    @property
    def num_shards(self) -> int:
        """Micro-batches of a step. The data has as many shards: micro-batch i reads shard i."""
        return self.batch_size // self.micro_batch_size


class UserError(Exception):
    """An error that the user can mend; its message says what, where, and how."""


# ---- the method


def whole_word_mask(input_ids, word_ids, tokenizer, mask_ratio=0.3, generator=None):
    """Mask a share of the words of each sequence, all tokens of a word together (paper §3.1).

    Of the chosen tokens 80 % become [MASK], 10 % a random token that is not special, 10 % stay.
    At least one word of a sequence is chosen; special tokens never are.
    input_ids (B, L) long; word_ids (B, L) long counts the words of a sequence from 1, with 0 at
    special tokens and padding. Returns masked_ids (B, L) long and chosen (B, L) bool.
    """
    device = input_ids.device
    is_ordinary = torch.ones(len(tokenizer), dtype=torch.bool, device=device)  # (V,)
    is_ordinary[tokenizer.all_special_ids] = False
    is_word = is_ordinary[input_ids] & (word_ids > 0)  # (B, L)

    # A clause in a script without spaces is one word to many tokenizers. Words of more than 8
    # tokens are therefore masked token by token: each of their tokens is a unit of its own.
    word_sizes = word_ids.new_zeros(len(word_ids), int(word_ids.max()) + 1)  # (B, 1 + words)
    word_sizes = word_sizes.scatter_add(1, word_ids, torch.ones_like(word_ids))
    is_long = word_sizes.gather(1, word_ids) > 8  # (B, L)
    previous_word_ids = F.pad(word_ids * is_word, (1, 0))[:, :-1]  # (B, L) of the token before
    starts_unit = is_word & (is_long | (word_ids != previous_word_ids))
    units = starts_unit.cumsum(1) * is_word  # (B, L) counts the units from 1

    # Give each unit a random number, and choose those with the lowest.
    num_units = starts_unit.sum(1, keepdim=True)  # (B, 1)
    num_chosen = (mask_ratio * num_units).round().clamp(min=1)
    unit_ids = torch.arange(input_ids.shape[1] + 1, device=device)  # 0: tokens in no unit
    unit_draws = torch.rand(len(input_ids), len(unit_ids), generator=generator, device=device)
    unit_draws = unit_draws.masked_fill((unit_ids == 0) | (unit_ids > num_units), 2.0)  # last
    is_chosen_unit = unit_draws.argsort(1).argsort(1) < num_chosen  # argsort twice: the rank
    chosen = is_chosen_unit.gather(1, units) & is_word  # (B, L)

    # Replace the chosen tokens.
    ordinary_ids = is_ordinary.nonzero().squeeze(1)
    picks = torch.randint(len(ordinary_ids), input_ids.shape, generator=generator, device=device)
    token_draws = torch.rand(input_ids.shape, generator=generator, device=device)  # (B, L)
    masked_ids = input_ids.masked_fill(chosen & (token_draws < 0.8), tokenizer.mask_token_id)
    masked_ids = torch.where(chosen & (token_draws >= 0.9), ordinary_ids[picks], masked_ids)
    return masked_ids, chosen


def bag_of_words(input_ids, special):
    """The set T of each sequence's tokens that are not special, as (B, V) bool.

    input_ids (B, L) long of the unmasked text; special (V,) bool, see `special_ids`.
    """
    bag = torch.zeros(len(input_ids), len(special), dtype=torch.bool, device=input_ids.device)
    return bag.scatter(1, input_ids, True) & ~special


def bow_loss(cls_logits, input_ids, special):
    """L_bow (paper §3.2): the mean over sequences of -1/|T| Σ_{t in T} log softmax(f(h_CLS))_t.

    cls_logits (B, V); input_ids (B, L) long of the unmasked text; special (V,) bool. Returns a
    float32 scalar. A sequence of special tokens alone contributes 0.
    """
    bag = bag_of_words(input_ids, special)  # (B, V)
    log_probabilities = cls_logits.float().log_softmax(1)  # (B, V)
    mean_over_bag = (log_probabilities * bag).sum(1) / bag.sum(1).clamp(min=1)  # (B,)
    return -mean_over_bag.mean()


def term_coverage(cls_logits, input_ids, special):
    """The share of a text's |T| terms among the |T| highest logits of its [CLS]: (B,) float.

    cls_logits (B, V); input_ids (B, L) long of the unmasked text; special (V,) bool. A text
    without terms has coverage 0. This measure is ours; the paper has none like it.
    """
    bag = bag_of_words(input_ids, special)  # (B, V)
    num_terms = bag.sum(1, keepdim=True)  # (B, 1)
    most_terms = max(int(num_terms.max()), 1)
    top_ids = cls_logits.topk(most_terms, dim=1).indices  # (B, K)
    ranks = torch.arange(most_terms, device=top_ids.device)
    is_hit = bag.gather(1, top_ids) & (ranks < num_terms)
    return is_hit.sum(1) / num_terms.squeeze(1).clamp(min=1)


def mlm_head(lm, hidden):
    """f: a model's own masked-LM head, (..., D) to (..., V); TypeError for any other family."""
    if hasattr(lm, "cls"):  # BERT
        return lm.cls(hidden)
    if hasattr(lm, "lm_head") and not lm.config.is_encoder_decoder:  # RoBERTa, XLM-R
        return lm.lm_head(hidden)
    if hasattr(lm, "vocab_projector"):  # DistilBERT
        hidden = lm.activation(lm.vocab_transform(hidden))
        return lm.vocab_projector(lm.vocab_layer_norm(hidden))
    if hasattr(lm, "head") and hasattr(lm, "decoder"):  # ModernBERT
        return lm.decoder(lm.head(hidden))
    raise TypeError(f"{type(lm).__name__} has no head of BERT, RoBERTa, DistilBERT or ModernBERT")


class EnhancedDecoder(nn.Module):
    """RetroMAE's one-layer decoder (arXiv 2205.12035 §3.3), the baseline.

    Queries are h_CLS + positions, keys and values the unmasked tokens' embeddings (h_CLS for
    [CLS]) + positions. Token i sees position 0 and a random half of the others, not itself. The
    original draws this mask in Python, which takes most of its time; here it is one draw on device.
    """

    def __init__(self, lm, max_length):
        super().__init__()
        width, num_heads = lm.config.hidden_size, lm.config.num_attention_heads
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.02)
        self.norm_queries = nn.LayerNorm(width)
        self.norm_memory = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm_attention = nn.LayerNorm(width)
        layers = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        self.feed_forward = nn.Sequential(*layers)
        self.norm_output = nn.LayerNorm(width)

    def forward(self, cls, embeddings, attention_mask):
        """cls (B, D), token embeddings (B, L, D), attention_mask (B, L) or None: to (B, L, D)."""
        batch_size, length, _ = embeddings.shape
        queries = self.norm_queries(cls[:, None] + self.positions[:length])  # (B, L, D)
        memory = torch.cat([cls[:, None], embeddings[:, 1:]], dim=1) + self.positions[:length]
        memory = self.norm_memory(memory)  # (B, L, D)

        unseen = torch.rand(batch_size, length, length, device=cls.device) < 0.5  # (B, L, L)
        unseen |= torch.eye(length, dtype=torch.bool, device=cls.device)
        if attention_mask is not None:
            unseen |= attention_mask[:, None] == 0
        unseen[:, :, 0] = False
        unseen = unseen.repeat_interleave(self.attention.num_heads, dim=0)  # (B·H, L, L)

        attended = self.attention(queries, memory, memory, attn_mask=unseen, need_weights=False)[0]
        decoded = self.norm_attention(queries + attended)
        return self.norm_output(decoded + self.feed_forward(decoded))


class BowMAE(nn.Module):
    """A masked LM and its losses, which `train` adds up; only `enhanced` adds parameters."""

    def __init__(self, lm, special, objective, max_length):
        super().__init__()
        self.lm, self.objective = lm, objective
        self.register_buffer("special", special, persistent=False)  # (V,)
        self.decoder = EnhancedDecoder(lm, max_length) if objective == "enhanced" else nn.Identity()

    def encode(self, input_ids, attention_mask):
        """The last hidden states h (B, L, D) of input_ids (B, L)."""
        return self.lm.base_model(input_ids, attention_mask=attention_mask).last_hidden_state

    def forward(self, original_ids, input_ids, attention_mask, masked_positions, word_positions):
        """The losses of a micro-batch, by name; vocabulary logits only where a loss needs them.

        original_ids (B, L) is the text, input_ids (B, L) its masked copy, which the encoder reads;
        attention_mask (B, L) is None where nothing is padded. masked_positions (M,) and
        word_positions (N,) index the masked and the non-special tokens of the flattened (B·L,).
        """
        hidden = self.encode(input_ids, attention_mask)  # (B, L, D)
        flat_ids, flat_hidden = original_ids.flatten(), hidden.flatten(0, 1)  # (B·L,), (B·L, D)
        logits = mlm_head(self.lm, flat_hidden[masked_positions]).float()  # (M, V)
        losses = {"mlm_loss": F.cross_entropy(logits, flat_ids[masked_positions])}
        if self.objective == "bow" or not self.training:  # evaluation reports it for each objective
            cls_logits = mlm_head(self.lm, hidden[:, 0])  # (B, V)
            losses["bow_loss"] = bow_loss(cls_logits, original_ids, self.special)
        if self.objective == "enhanced" and self.training:
            embeddings = self.lm.get_input_embeddings()(original_ids)  # (B, L, D)
            decoded = self.decoder(hidden[:, 0], embeddings, attention_mask)  # (B, L, D)
            logits = mlm_head(self.lm, decoded.flatten(0, 1)[word_positions]).float()  # (N, V)
            losses["enhanced_loss"] = F.cross_entropy(logits, flat_ids[word_positions])
        return losses


# ---- data: texts

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")  # all but the last also .gz
TSV_HEADERS = (b"id", b"_id", b"docid", b"text", b"title")
CORPORA = ("corpus.jsonl", "corpus.jsonl.gz", "collection.tsv", "collection.tsv.gz")
OTHER_FILES = re.compile(r"(^|/)\.|(^|[^a-z])(test|dev|val|valid|validation|eval)([^a-z]|$)", re.I)
# What readers raise where a file is malformed.
BAD_DATA = (ValueError, TypeError, KeyError, RecursionError, OSError, EOFError, csv.Error)
BAD_DATA += (zlib.error,)
PACKAGES = "pandas numpy networkx transformers torch sympy datasets huggingface_hub"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SAMPLE_TEXTS, SAMPLE_CHARACTERS = 200_000, 100_000_000  # for the vocabulary and the held-out texts
BUFFER_TEXTS, BUFFER_CHARACTERS = 2048, 2_000_000  # of a shard, tokenised and shuffled together


def docstrings(versions):
    """Yield _id (a name), query (first paragraph), text (the rest) of packages' docstrings."""
    for package in versions:  # {name: version}; a new version makes the cache build anew
        root = Path(os.__file__ if package == "python" else util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            # A tuple, as the cache is keyed by this code, pickled: a set has no fixed order.
            if any(name in parts for name in ("site-packages", "dist-packages", "test", "tests")):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            name = ".".join(part for part in parts if part not in ("python", "__init__"))
            nodes = [(name, tree)]
            for name, node in nodes:  # the loop appends the children that it finds
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, DOCUMENTED):
                        nodes.append((f"{name}.{child.name}", child))
                    elif isinstance(child, ast.stmt):
                        nodes.append((name, child))
                docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
                query, _, text = (docstring or "").partition("\n\n")
                if query.strip() and text.strip():
                    yield {"_id": name, "query": " ".join(query.split()), "text": text.strip()}


@functools.cache
def python_docs():
    """Some 24,000 rows of _id, query and text, no two of them equal, shuffled.

    One process builds them, while the lock of the cache of `datasets` makes the others wait.
    """
    print_once("building the corpus python-docs, or reading it from the cache")
    versions = {name: metadata.version(name) for name in PACKAGES.split()}
    arguments = {"versions": {"python": sys.version} | versions}
    cache = os.environ.get("HF_DATASETS_CACHE", "out/cache")
    gc.freeze()  # else every collection looks at all of torch again: three times slower
    rows = datasets.Dataset.from_generator(docstrings, gen_kwargs=arguments, cache_dir=cache)
    gc.unfreeze()
    table = rows.to_pandas().drop_duplicates("_id").drop_duplicates("text")
    table = table.drop_duplicates("query", keep=False)
    table = table.sort_values("text", key=lambda texts: texts.map(text_hash), kind="stable")
    return datasets.Dataset.from_pandas(table, rows.features, preserve_index=False)


def text_hash(text):
    """A number in [0, 1) that is a function of the text alone."""
    return zlib.crc32(text.encode()) / 2**32


def file_format(path):
    """The ending that tells the format of a file: ".jsonl" of a.jsonl and of a.jsonl.gz."""
    path = Path(path)
    inner = Path(path.stem).suffix.lower()
    is_packed = path.suffix == ".gz" and inner in FORMATS[:-1]
    return inner if is_packed else path.suffix.lower()


def is_path(name):
    """Whether a --model or --data must be a path; any other may be a name of the hub, as a/b is."""
    path = Path(name)
    in_folder = len(path.parts) == 2 and path.parent.is_dir()
    is_file = path.exists() or file_format(path) in FORMATS
    return is_file or in_folder or len(path.parts) > 2 or name[0] in "./"


def list_folder(folder):
    """The files of a folder to train on; the number of the others is printed.

    Left out are hidden and empty files, those whose names tell of a test or validation split, and
    what our own runs have left there.
    """
    everything = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    runs = {path.parent for path in everything if path.name == "run.json"}
    files = [path for path in everything if file_format(path) in FORMATS]
    files = [path for path in files if not runs & {*path.parents}]
    files = [path for path in files if not OTHER_FILES.search(str(path.relative_to(folder)))]
    files = [path for path in files if path.is_file() and path.stat().st_size]
    corpora = [path.parent for path in files if path.name in CORPORA]
    if corpora:
        raise UserError(f"--data {folder} holds a corpus: give {corpora[0]}, or a glob of files")
    if len(files) < len(everything):
        kinds = "empty, hidden, a link to a folder, of another format, of a test split, of a run"
        count = len(everything) - len(files)
        print_once(f"note: {len(files)} files are read; {count} are not ({kinds})")
    return files


def list_files(data):
    """The files of --data, of one format; [] for python-docs, a saved dataset, or a hub name."""
    if not data:
        raise UserError("--data is empty")
    path = Path(data)
    corpora = [path / name for name in CORPORA if (path / name).is_file()]
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return []  # a saved dataset
    if corpora:  # of BEIR or MS MARCO, without their queries and judgements
        files = corpora[:1]
    elif path.is_dir():
        files = list_folder(path)
    elif is_path(data) or glob.has_magic(data):
        files = [path] if path.is_file() else map(Path, glob.glob(data, recursive=True))
    else:
        return []  # python-docs, or a hub name
    files = [file for file in files if file.is_file() and file.stat().st_size]
    if not files and not path.exists():
        raise UserError(f"--data {data}: no such file or folder")
    formats = " and ".join(sorted({file_format(file) for file in files})) or "no file with content"
    if formats not in FORMATS:
        raise UserError(f"--data {data}: found {formats}; give one format of {' '.join(FORMATS)}")
    contents = Counter(os.path.realpath(file).removesuffix(".gz") for file in files)
    content, count = contents.most_common(1)[0]
    if count > 1:
        raise UserError(f"--data {data} has {content} twice, as .gz or as a link")
    return sorted(map(str, files))


def list_pieces(config, files, num_shards=1, epoch=None):
    """The parts of the data that can be read alone, as (name, source, part).

    The part is a row group of .parquet, (count, i) of a dataset, None of any other file. Each epoch
    has another order, but for python-docs and saved datasets, whose shards are ranges of rows.
    """
    pieces = []
    for file in files:
        if file_format(file) == ".parquet":
            parquet = pyarrow.parquet.read_metadata(file)
            names = parquet.schema.to_arrow_schema().names
            if set(names).isdisjoint(config.text_columns):
                asked = " ".join(config.text_columns)
                raise UserError(f"{file} has the columns {sorted(names)}, not {asked}")
            parts = [i for i in range(parquet.num_row_groups) if parquet.row_group(i).num_rows]
            pieces += [(f"{file}, row group {part}", file, part) for part in parts]
        else:
            pieces.append((file, file, None))
    name, subset, split = (config.data.split(":") + ["", ""])[:3]
    if Path(config.data).is_dir():  # a saved dataset, whose path may hold a colon
        name, subset, split = config.data, "", ""
    if not files and (name == "python-docs" or Path(name).is_dir()):
        if subset or split:
            raise UserError(f"--data {config.data}: only a hub dataset has :config:split")
        table = python_docs() if name == "python-docs" else datasets.load_from_disk(name)
        table = table["train"] if isinstance(table, datasets.DatasetDict) else table
        count = min(num_shards, len(table))
        return [(f"{name}, part {i}", table, (count, i)) for i in range(count)]
    if not files:
        options = {"split": split or "train", "streaming": True}
        stream = datasets.load_dataset(name, subset or None, **options)
        count = stream.num_shards
        pieces = [(f"{name}, part {i}", stream, (count, i)) for i in range(count)]
    if epoch is not None:
        np.random.default_rng([config.seed, epoch]).shuffle(pieces)
    return pieces


def parse_line(line, kind):
    """The record of a line of bytes of a .txt, .tsv (an _id and a text) or JSON lines file."""
    text = line.decode("utf-8-sig").rstrip("\r\n")
    if kind == ".tsv":
        _, tab, text = text.partition("\t")
        if not tab:
            raise ValueError("no tab between an _id and a text")
    if kind in (".tsv", ".txt"):
        return {"text": text}
    if not text.lstrip().startswith("{"):
        raise ValueError("not one object {...} a line: convert it to JSON lines")
    return json.loads(text)


def read_tables(source, part, columns):
    """Yield (number, row) of a row group of a .parquet file, or of a part of a dataset."""
    if isinstance(part, int):
        tables = pyarrow.parquet.ParquetFile(source).iter_batches(1000, [part], columns)
    else:
        dataset = source.select_columns(columns) if columns else source
        tables = dataset.shard(*part).with_format("arrow").iter(1000)
    first = 1
    for table in tables:
        # Only the names of the columns: values that nobody asks for may not convert to Python.
        rows = table.to_pylist() if columns else [dict.fromkeys(table.schema.names)] * len(table)
        yield from enumerate(rows, first)
        first += len(rows)


def read_lines(file, kind):
    """Yield (line number, row) of a .csv file, (line number, line of bytes) of any other."""
    with (gzip.open if str(file).endswith(".gz") else open)(file, "rb") as lines:
        if kind == ".csv":
            csv.field_size_limit(2**31 - 1)  # characters; the default is 131,072
            rows = csv.DictReader((line.decode("utf-8-sig") for line in lines), strict=True)
            for row in rows:
                yield rows.line_num, row
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def read_records(piece, first=0, stride=1, columns=None):
    """Yield (line number, record) of every stride-th record of a piece, from the first on."""
    name, source, part = piece
    number, kind = 0, file_format(name)
    try:
        lines = read_lines(source, kind) if part is None else read_tables(source, part, columns)
        for number, line in itertools.islice(lines, first, None, stride):
            if number == 1 and kind == ".tsv" and line.split(b"\t")[0] in TSV_HEADERS:
                raise ValueError("a header: remove it, or make it .csv")
            record = parse_line(line, kind) if isinstance(line, bytes) else line
            if None in record or kind == ".csv" and None in record.values():
                raise ValueError("more or fewer fields than the header names")
            yield number, record
    except BAD_DATA as error:
        place = "after line" if kind == ".csv" else "line"
        raise UserError(f"{name}, {place} {number}: {error}") from error


def read_texts(config, files, shard=0, num_shards=1, epoch=None, data_position=(0, 0)):
    """Yield (data position, text) of one shard of --data: the --text_columns joined by a space.

    A shard reads pieces of its own where there are enough of them; else it reads all, and keeps one
    record in num_shards. A data position is (piece, records read of it): where to go on.
    """
    columns = config.text_columns
    pieces = list_pieces(config, files, num_shards, epoch)
    if len(pieces) >= num_shards:
        pieces, shard, num_shards = pieces[shard::num_shards], 0, 1
    start, done = data_position
    for index in range(start, len(pieces)):
        name = pieces[index][0]
        # Which shard gets the first record depends on the name: else small pieces feed shard 0.
        offset = zlib.crc32(os.fsencode(Path(name).name))
        first = (shard + offset) % num_shards + done * num_shards
        for number, record in read_records(pieces[index], first, num_shards, columns):
            if record.keys().isdisjoint(columns):
                raise UserError(f"{name}, line {number}: no {' or '.join(columns)}")
            values = [record[column] for column in columns if record.get(column) is not None]
            if not all(isinstance(value, str) for value in values):
                reason = f"{values!r:.80} in {' '.join(columns)} is not text"
                raise UserError(f"{name}, line {number}: {reason}")
            text = " ".join(value for value in values if value).strip()
            done += 1
            yield (index, done), text.encode(errors="replace").decode()  # no lone surrogate
        done = 0


def sample_texts(config, files):
    """The texts at the start of --data, and the share to hold out: some 100, at most 1 in 10."""
    found = set()  # the columns of the first records
    try:
        records = itertools.chain.from_iterable(map(read_records, list_pieces(config, files)))
        for _, record in itertools.islice(records, 100):
            found |= record.keys()
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"--data {config.data}: {short_reason(error)}") from error
    if not set(config.text_columns) <= found:
        asked = " ".join(config.text_columns)
        raise UserError(f"--data {config.data} has the columns {sorted(found)}, not {asked}")
    unread = found.difference(config.text_columns)
    if unread:
        print_once(f"columns that --text_columns leaves out: {' '.join(sorted(unread))}")
    texts, num_characters = [], 0
    for _, text in read_texts(config, files):
        texts.append(text)
        num_characters += len(text)
        if len(texts) == SAMPLE_TEXTS or num_characters >= SAMPLE_CHARACTERS:
            break
    if len(texts) < 100:
        print_once(f"note: nothing is held out, as there are only {len(texts)} texts")
        return texts, 0.0
    return texts, float(np.clip(100 / len(texts), 1 / 1000, 1 / 10))


# ---- data: batches


def special_ids(tokenizer, vocab_size):
    """(V,) bool, true for ids that are no words: special tokens, and ids the tokenizer lacks."""
    special = torch.arange(vocab_size) >= len(tokenizer)
    special[tokenizer.all_special_ids] = True
    return special


def cut_sequences(texts, tokenizer, max_length):
    """Cut texts into sequences of at most max_length tokens, [CLS] and [SEP] included.

    Returns a list of (token_ids, word_ids), L integers each; word_ids count the words of the
    sequence from 1, with 0 at special tokens. Sequences without a word are left out.
    """
    cut = {"truncation": True, "max_length": max_length, "return_overflowing_tokens": True}
    special = set(tokenizer.all_special_ids)
    sequences = []
    encoded = tokenizer(texts, **cut) if texts else {"input_ids": []}
    for index, token_ids in enumerate(encoded["input_ids"]):
        if not special.issuperset(token_ids):
            numbers = encoded.word_ids(index)  # None at special tokens
            first = min((number for number in numbers if number is not None), default=None)
            if first is None:  # no word, but tokens that the tokenizer adds
                continue
            word_ids = [0 if number is None else number - first + 1 for number in numbers]
            sequences.append((token_ids, word_ids))
    return sequences


def collate(sequences, tokenizer, mask_ratio, seed):
    """The arguments of `BowMAE.forward` for B sequences, padded to the longest, and masked."""
    pad = nn.utils.rnn.pad_sequence
    token_ids = [torch.tensor(token_ids) for token_ids, _ in sequences]
    attention_mask = pad([torch.ones_like(row) for row in token_ids], batch_first=True)  # (B, L)
    original_ids = pad(token_ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    word_ids = pad([torch.tensor(word_ids) for _, word_ids in sequences], batch_first=True)
    generator = torch.Generator().manual_seed(seed)
    input_ids, chosen = whole_word_mask(original_ids, word_ids, tokenizer, mask_ratio, generator)
    is_word = ~special_ids(tokenizer, len(tokenizer))[original_ids]  # (B, L)
    batch = {"original_ids": original_ids, "input_ids": input_ids}
    # None where nothing is padded: else the GPU waits while the model looks for padding.
    batch["attention_mask"] = None if attention_mask.all() else attention_mask
    batch["masked_positions"] = chosen.flatten().nonzero().squeeze(1)  # (M,)
    batch["word_positions"] = is_word.flatten().nonzero().squeeze(1)  # (N,)
    return BatchEncoding(batch)


class PretrainingStream(torch.utils.data.IterableDataset):
    """The micro-batches of some shards of the data, one of each shard in turn, without end.

    What a shard yields depends only on (data, seed, step, shard), not on the process. A micro-batch
    comes with the point from which its shard resumes: the epoch, the data position where its buffer
    of texts begins, and the step of that buffer's first batch.
    """

    def __init__(self, config, tokenizer, files, held_out_share, shards, state):
        self.config, self.tokenizer, self.files = config, tokenizer, files
        self.held_out_share, self.shards = held_out_share, shards
        self.resume_points = state.get("resume_points", {})
        self.first_step = state.get("step", 0) + 1

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        shards = self.shards[worker.id :: worker.num_workers] if worker else self.shards
        for reader in itertools.cycle([self.read_shard(shard) for shard in shards]):
            yield next(reader)

    def read_shard(self, shard):
        """Yield (info, batch) for each step from first_step on."""
        config = self.config
        epoch, data_position, step = self.resume_points.get(shard, (0, (0, 0), 1))
        num_empty = 0  # epochs, one after another
        while True:
            epoch_start = step
            where = (shard, config.num_shards, epoch, data_position)
            for texts, buffer_end in self.read_buffers(read_texts(config, self.files, *where)):
                resume_point = (epoch, data_position, step)
                for sequences in self.make_batches(texts, shard, step):
                    if step >= self.first_step:  # a resumed run skips batches it has trained on
                        numbers = np.random.SeedSequence([config.seed, step, shard])
                        mask_seed, dropout_seed = numbers.generate_state(2).tolist()
                        info = {"shard": shard, "resume_point": resume_point, "seed": dropout_seed}
                        info["num_tokens"] = sum(len(token_ids) for token_ids, _ in sequences)
                        yield info, collate(sequences, self.tokenizer, config.mask_ratio, mask_seed)
                    step += 1
                data_position = buffer_end
            num_empty = num_empty + 1 if step == epoch_start else 0
            if num_empty == 10:  # fewer may be chance: in each, a shard has other files
                message = f"--data {config.data}: no text for shard {shard} of {config.num_shards}"
                raise UserError(f"{message}: lower --batch_size or raise --micro_batch_size")
            epoch, data_position = epoch + 1, (0, 0)

    def read_buffers(self, positions_and_texts):
        """Yield (texts to train on, data position after them), as many as a buffer takes."""
        texts, num_characters, data_position = [], 0, None
        for data_position, text in positions_and_texts:
            if text_hash(text) >= self.held_out_share:
                # A text longer than a buffer is cut, so that a book does not fill memory.
                starts = range(0, len(text), BUFFER_CHARACTERS)
                texts += [text[start : start + BUFFER_CHARACTERS] for start in starts]
                num_characters += len(text)
            if len(texts) >= BUFFER_TEXTS or num_characters >= BUFFER_CHARACTERS:
                yield texts, data_position
                texts, num_characters = [], 0
        if texts:
            yield texts, data_position

    def make_batches(self, texts, shard, first_step):
        """Yield the batches of a buffer, of sequences of like length, in a random order."""
        config = self.config
        sequences = cut_sequences(texts, self.tokenizer, config.max_length)
        if not sequences:
            return
        order = np.random.default_rng([config.seed, shard, first_step]).permutation(len(sequences))
        sequences = sorted((sequences[i] for i in order), key=lambda sequence: len(sequence[0]))
        count = math.ceil(len(sequences) / config.micro_batch_size)
        bounds = [len(sequences) * i // count for i in range(count + 1)]
        batches = [sequences[start:end] for start, end in itertools.pairwise(bounds)]
        for step in range(first_step, first_step + count):
            # The same draw for all shards: their batches are of like length, and no process waits.
            draw = np.random.default_rng([config.seed, step]).random()
            yield batches.pop(int(draw * len(batches)))


def init_worker(worker_id):
    """In a data-loader process: leave signals to the training process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=exit_with, args=[os.getppid()], daemon=True).start()


def exit_with(parent):
    """End this process when its parent has ended: else it waits for ever to hand on its batches."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def to_arrays(item):
    """A micro-batch as arrays: a worker would pass each tensor by a file, which is slower."""
    info, batch = item
    return info, {name: None if rows is None else rows.numpy() for name, rows in batch.items()}


def fetch_ahead(items, count):
    """Yield items in order, while a thread fetches the next ones, and keeps `count` of them.

    The pipe from a worker holds one or two, and the worker does not fill it while it tokenises.
    """
    thread = ThreadPoolExecutor(1)
    upcoming = deque(thread.submit(next, items) for _ in range(count))
    try:
        while True:
            yield upcoming.popleft().result()
            upcoming.append(thread.submit(next, items))
    finally:
        thread.shutdown(cancel_futures=True)


def make_loader(config, tokenizer, files, held_out_share, state):
    """Yield the micro-batches of this process's shards, from the step after a checkpoint on."""
    share = config.num_shards // dist.get_world_size()
    shards = range(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    stream = PretrainingStream(config, tokenizer, files, held_out_share, shards, state)
    num_workers = math.gcd(config.workers, share) if config.workers else 0
    options = {"num_workers": num_workers, "worker_init_fn": init_worker, "collate_fn": to_arrays}
    if num_workers:
        # A worker makes the batches of a buffer at once: with room for two, training need not wait.
        sequences = BUFFER_TEXTS + BUFFER_CHARACTERS // (4 * config.max_length)
        batches = math.ceil(sequences / config.micro_batch_size)
        options["prefetch_factor"] = min(2 * batches * share // num_workers, 10_000)
    items = iter(torch.utils.data.DataLoader(stream, batch_size=None, **options))
    if num_workers:
        items = fetch_ahead(items, 64)
    for info, arrays in items:
        yield info, BatchEncoding(torch.utils.data.default_convert(arrays))


# ---- tokenizer and model

FRESH_MODELS = {  # layers, width, size of the vocabulary
    "tiny": (2, 128, 2048),
    "mini": (4, 256, 8192),
    "small": (4, 512, 16384),
    "base": (12, 768, 30522),
}


def learn_tokenizer(config, texts):
    """An uncased WordPiece tokenizer, its vocabulary learnt from texts, the same at every call.

    The alphabet covers 99.95 % of the characters; where it takes over half of the vocabulary, as
    in Chinese, the vocabulary grows to twice the alphabet. Accents and vowel signs are kept.
    """
    # Words of over 100 letters, as in base64, are [UNK] anyway, and would hold up the training.
    texts = [re.sub("[A-Za-z0-9]{101,}", " ", text) for text in texts]
    wordpiece = BertWordPieceTokenizer(strip_accents=False, lowercase=True)
    counts = Counter()
    for text in texts:
        counts.update(wordpiece.normalize(text))
    del counts[" "]
    characters = sorted(counts, key=lambda character: (-counts[character], character))
    covered = np.cumsum([counts[character] for character in characters]) / counts.total()
    alphabet = characters[: int(np.searchsorted(covered, 0.9995)) + 1]
    # A character that always stands alone, as a Chinese one does, continues no word.
    split = wordpiece.pre_tokenizer.pre_tokenize_str
    inner = [f"##{c}" for c in alphabet if len(split(wordpiece.normalize(f"a{c}a"))) == 1]
    size = FRESH_MODELS[config.model][2]
    if len(alphabet) + len(inner) > size / 2:
        size = 2 * (len(alphabet) + len(inner))
    # The trainer numbers new pieces in the order of a random hash. Once all characters are given,
    # and all that continue a word, the vocabulary is a function of the texts.
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *inner]
    options = {"special_tokens": special, "show_progress": False}
    options |= {"initial_alphabet": alphabet, "limit_alphabet": len(alphabet)}
    wordpiece.train_from_iterator(texts, vocab_size=size, **options)
    # Made again of the vocabulary, it adds [CLS] and [SEP], and no piece is a special token.
    wordpiece = BertWordPieceTokenizer(wordpiece.get_vocab(), strip_accents=False)
    backend = Tokenizer.from_str(wordpiece.to_str())
    options = {"strip_accents": False, "model_max_length": max(512, config.max_length)}
    return transformers.BertTokenizerFast(tokenizer_object=backend, **options)


def fresh_lm(config, tokenizer):
    """A new BERT of --model's size, with larger weights than BERT's 0.02, for a short run."""
    layers, width, _ = FRESH_MODELS[config.model]
    sizes = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 4 * width}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": width // 64}
    sizes |= {"max_position_embeddings": max(512, config.max_length)}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertConfig(**sizes, **no_dropout, initializer_range=0.05)  # its padding id is 0, too
    return AutoModelForMaskedLM.from_config(bert)


def load_tokenizer(source):
    """The tokenizer of a model's folder or hub name; UserError if it cannot serve."""
    if is_path(source) and not Path(source).is_dir():
        raise UserError(f"--model {source}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
    except Exception as error:  # tokenizers raises nothing more exact
        raise UserError(f"--model {source} has no tokenizer: {short_reason(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of no file
        raise UserError(f"--model {source} has no tokenizer files")
    is_unfit = not tokenizer.is_fast or None in (tokenizer.mask_token, tokenizer.pad_token)
    is_unfit = is_unfit or tokenizer("a")["input_ids"][0] != tokenizer.cls_token_id
    if is_unfit or max(tokenizer.get_vocab().values()) >= len(tokenizer):
        reasons = "is not fast, lacks [MASK] or [PAD], puts no [CLS] first, or its ids have gaps"
        raise UserError(f"--model {source}: its tokenizer {reasons}")
    return tokenizer


def trial_ids(tokenizer, length):
    """Ids (2, L) to try a model with: the last may be padding, to which RoBERTa gives no place."""
    return torch.tensor([[tokenizer.mask_token_id], [len(tokenizer) - 1]]).repeat(1, length)


def load_masked_lm(source, tokenizer, max_length, dtype=torch.float32):
    """The masked LM of a folder or hub name; UserError if a trial in this dtype shows it unfit."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    try:
        lm, report = AutoModelForMaskedLM.from_pretrained(source, **options)
        input_ids = trial_ids(tokenizer, max_length)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = mlm_head(lm, lm.base_model(input_ids).last_hidden_state)  # (2, L, V)
            torch.testing.assert_close(logits, lm(input_ids).logits, atol=1e-3, rtol=1e-3)
        logits.sum().backward()
        unused = [name for name, weight in lm.named_parameters() if weight.grad is None]
        if report["missing_keys"] or unused:
            names = [*report["missing_keys"], *unused]
            raise ValueError(f"{names[0]} is missing or gets no gradient")
    except Exception as error:  # whatever a model that is not meant for this raises
        heads = "BERT, RoBERTa, DistilBERT or ModernBERT"
        reason = f"is damaged, or no masked LM of {heads} for --max_length {max_length}"
        raise UserError(f"{source} {reason}: {short_reason(error)}") from error
    lm.zero_grad()
    return lm


# ---- checkpoints and logs

# No loss depends on these flags, so they may change when a run resumes.
FREE_FLAGS = ("workers", "output", "save_every", "keep", "log_every", "eval_every", "bench")
FREE_FLAGS += ("index", "split", "top_k", "relevance_level", "keep_identical_ids", "compare")


def print_once(message):
    """Print a line on the first process; its data-loader processes are in no group."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def short_reason(error):
    """One line of an error; that of a data-loader process has the cause in its last line."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1].partition(": ")[2] if lines[0].startswith("Caught ") else lines[0]


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


@contextlib.contextmanager
def locked_output(config):
    """Make --output, and keep other runs out of it until the context ends.

    UserError where it is in use, or holds anything but a run of the same script. The lock holds
    for folders inside, such as those of a recipe's stages.
    """
    if dist.get_rank() > 0:
        yield
        return
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in output.iterdir()} - {".lock"}
    known = None  # the flags of the run that is there
    if "run.json" in names:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a run.json of another program
            known = {*json.loads((output / "run.json").read_text())["config"]}
    if names and known != {*asdict(config)}:
        raise UserError(f"--output {output} holds other files: give another folder")
    with (output / ".lock").open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = Path(lock.name).read_text()
            raise UserError(f"--output {output} is in use by {holder}") from error
        lock.truncate(0)
        print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=lock, flush=True)
        yield


def list_checkpoints(output):
    """The folders checkpoint-STEP of a run, the newest last."""
    folders = Path(output).glob("checkpoint-*")
    folders = [path for path in folders if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]))


def load_checkpoint(config):
    """The newest checkpoint in --output and its state, or (None, {}); UserError for other flags."""
    checkpoints = list_checkpoints(config.output)
    newest = [None] * dist.get_world_size()
    dist.all_gather_object(newest, [path.name for path in checkpoints[-1:]])
    if any(names != newest[0] for names in newest):
        raise UserError(f"processes see other checkpoints {newest}: put --output on a shared disk")
    if not checkpoints and Path(config.output, "model.safetensors").exists():
        reason = "has a model without checkpoints: give another folder"
        raise UserError(f"--output {config.output} {reason}")
    if not checkpoints:
        return None, {}
    path = checkpoints[-1] / "training_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file raises
        raise UserError(f"{path} is damaged: remove its folder to resume: {error}") from error
    for name, value in asdict(config).items():
        before = state["config"].get(name)
        if name not in FREE_FLAGS and value != before:
            reason = f"has a run of --{name} {before}, not {value}: give another --output"
            raise UserError(f"--output {config.output} {reason}")
    return str(checkpoints[-1]), state


def write_model(folder, lm, tokenizer, max_length, pooling="cls", similarity="dot"):
    """Write a model and its tokenizer, as transformers and SentenceTransformer open them."""
    lm.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    modules = {"Transformer": "", "Pooling": "1_Pooling"}
    if similarity == "cos":
        modules["Normalize"] = "2_Normalize"
    entries = []
    for index, (name, path) in enumerate(modules.items()):
        kind = f"sentence_transformers.models.{name}"
        entries.append({"idx": index, "name": str(index), "path": path, "type": kind})
        (folder / path).mkdir(exist_ok=True)
    # Every mode is written out, as some versions take a missing one for true.
    modes = "cls_token max_tokens mean_tokens mean_sqrt_len_tokens weightedmean_tokens lasttoken"
    chosen = {"cls": "cls_token", "mean": "mean_tokens"}[pooling]
    pooling_config = {f"pooling_mode_{mode}": mode == chosen for mode in modes.split()}
    pooling_config["word_embedding_dimension"] = lm.config.hidden_size
    score = {"similarity_fn_name": {"dot": "dot", "cos": "cosine"}[similarity]}
    transformer = {"max_seq_length": max_length, "do_lower_case": False}
    if "add_pooling_layer" in inspect.signature(type(lm.base_model)).parameters:
        transformer["model_args"] = {"add_pooling_layer": False}
    write_json(folder / "modules.json", entries)
    write_json(folder / "1_Pooling" / "config.json", pooling_config)
    write_json(folder / "config_sentence_transformers.json", score)
    write_json(folder / "sentence_bert_config.json", transformer)


def save_checkpoint(config, state, lm, tokenizer, max_length, pooling="cls", similarity="dot"):
    """Write output/checkpoint-STEP whole or not at all, and keep the newest --keep of them."""
    temporary = Path(config.output, ".checkpoint.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    target = Path(config.output, f"checkpoint-{state['step']}")
    log_size = Path(config.output, "metrics.jsonl").stat().st_size
    state = {**state, "config": asdict(config), "log_size": log_size}
    try:
        write_model(temporary, lm, tokenizer, max_length, pooling, similarity)
        torch.save(state, temporary / "training_state.pt")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written; earlier ones are whole: {error}") from error
    os.sync()
    temporary.rename(target)
    for old in list_checkpoints(config.output)[: -config.keep]:
        shutil.rmtree(old)


def write_run_json(config, device):
    """Write how this run was started: flags, versions, git commit, device and processes."""
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
    packages = ("torch", "transformers", "datasets", "tokenizers", "numpy")
    content = {"config": asdict(config), "argv": sys.argv, "git_commit": commit or None}
    content["versions"] = {name: metadata.version(name) for name in packages}
    content["versions"]["python"] = sys.version
    content |= {"device": str(device), "world_size": dist.get_world_size()}
    Path(config.output).mkdir(parents=True, exist_ok=True)
    write_json(Path(config.output, "run.json"), content)


def start_logs(config, device, state):
    """Write run.json, drop what metrics.jsonl has after the checkpoint, and tell of a resume."""
    write_run_json(config, device)
    with Path(config.output, "metrics.jsonl").open("a") as file:
        file.truncate(min(state.get("log_size", 0), file.tell()))
    step = state.get("step")
    if step == config.steps:
        print(f"this run is finished: {step} steps", flush=True)
    elif step:
        print(f"resuming from step {step}", flush=True)


def append_metrics(config, record):
    """Append a line to metrics.jsonl; UserError where a value is not finite."""
    for name, value in record.items():
        # The scaler of fp16 skips steps whose gradient overflows.
        is_skipped = name == "grad_norm" and config.precision == "fp16"
        if not math.isfinite(value) and not is_skipped:
            reason = f"{name} is {value} at step {record['step']}; earlier checkpoints are whole"
            raise UserError(f"{reason}: lower --lr or set --precision fp32, with a new --output")
    if dist.get_rank() == 0:
        record = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with Path(config.output, "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def print_table(rows, columns, title=""):
    """Print an aligned table of numbers, {row: {column: value}}."""
    table = pd.DataFrame.from_dict(rows, orient="index")[columns].rename_axis(columns=title)
    print("\n" + table.to_string(float_format="{:,.4f}".format), flush=True)


def peak_memory_mb(device):
    """Peak memory in MB: allocated by PyTorch on a GPU, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- training

# Of flags that are not given: for a pre-trained model, and for a fresh one a run of minutes.
PAPER_DEFAULTS = {"max_length": 144, "steps": 80_000, "batch_size": 256, "lr": 3e-4, "workers": 1}
PAPER_DEFAULTS |= {"micro_batch_size": 32, "lr_final_ratio": 0.1, "adam_beta2": 0.999}
FRESH_DEFAULTS = {"max_length": 64, "steps": 1800, "batch_size": 64, "lr": 2e-3, "workers": 0}
FRESH_DEFAULTS |= {"micro_batch_size": 32, "lr_final_ratio": 0.03, "adam_beta2": 0.98}


def parse_config(argv, kind):
    """Parse a command line into a dataclass; UserError for an unknown flag or a bad value."""
    options = {"description": kind.__doc__, "allow_abbrev": False, "exit_on_error": False}
    parser = HfArgumentParser(kind, **options)
    options = {"look_for_args_file": False, "return_remaining_strings": True}
    try:
        config, unknown = parser.parse_args_into_dataclasses(argv, **options)
    except (argparse.ArgumentError, ValueError) as error:
        raise UserError(f"{error} (--help lists the flags)") from error
    if unknown:
        raise UserError(f"unknown flag {unknown[0]} (--help lists the flags)")
    return config


def check_numbers(config, minimums):
    """UserError for a number that is not finite, or below its minimum: else 0, or 1 of integers."""
    for name, value in vars(config).items():
        lowest = minimums.get(name, 0 if isinstance(value, float) else 1)
        if type(value) in (int, float) and not lowest <= value < math.inf:
            raise UserError(f"--{name} {value} must be a finite number, at least {lowest}")


def fill_in(config, table):
    """Fill in the flags of a table that were not given, and print them."""
    filled = {name: value for name, value in table.items() if getattr(config, name) is None}
    vars(config).update(filled)
    if filled:
        print_once(f"defaults: {' '.join(f'--{name} {filled[name]}' for name in filled)}")


def complete_config(config):
    """Fill in the flags that were not given; UserError for impossible values."""
    table = FRESH_DEFAULTS if config.model in FRESH_MODELS else PAPER_DEFAULTS
    fill_in(config, table | {"warmup_steps": (config.steps or table["steps"]) // 20})
    check_numbers(config, {"max_length": 3, "warmup_steps": 0, "workers": 0, "seed": 0})
    for name in ("mask_ratio", "adam_beta2"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} must lie between 0 and 1")
    if config.warmup_steps >= config.steps:
        raise UserError(f"--warmup_steps {config.warmup_steps} is not below --steps {config.steps}")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % (config.micro_batch_size * world_size):
        multiple = f"--micro_batch_size {config.micro_batch_size} x {world_size} processes"
        raise UserError(f"--batch_size {config.batch_size} is no multiple of {multiple}")


def init_distributed():
    """Join the processes of torchrun, or be a group of one; returns the device of this process."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and {"RANK", "WORLD_SIZE"} & os.environ.keys():
        raise UserError(f"{missing[0]} is not set: use torchrun, or unset RANK and WORLD_SIZE")
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        if device.index >= torch.cuda.device_count():
            raise UserError(f"no GPU for process {device.index}: lower --nproc_per_node")
        torch.cuda.set_device(device)
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if missing else {}
    # The first process may read or search for hours while the others wait.
    dist.init_process_group(backend, timeout=timedelta(days=7), **alone)
    return device


def compute_dtype(precision, device):
    """The type that --precision computes in; `auto` is bfloat16 where the device has it."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    elif precision == "auto":
        precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def build_optimizer(config, model):
    """AdamW, with weight decay on matrices alone: not on biases and LayerNorm."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas, decay = (0.9, config.adam_beta2), config.weight_decay
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=decay, fused=True)


def cosine(first, last, progress):
    """From first at progress 0 to last at progress 1, along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(config, step):
    """The learning rate of an optimizer step, 1 to --steps: linear warm-up, then a cosine."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return cosine(config.lr, config.lr * config.lr_final_ratio, progress)


def sum_over_processes(values):
    """The sums over all processes of {name: number}, as Python floats."""
    sums = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


class StopSignal:
    """Notes SIGTERM and Ctrl-C while it is open, so that a run can save; a second one ends it."""

    def __enter__(self):
        self.received, self.time = 0, math.inf
        self.terminate = signal.signal(signal.SIGTERM, self.note)
        self.interrupt = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, number, frame):
        """Handle a signal; a second one within two seconds is torchrun's copy of the first."""
        if time.monotonic() > self.time + 2:
            sys.exit(128 + number)
        self.received, self.time = number, time.monotonic()

    def __exit__(self, *exception):
        signal.signal(signal.SIGTERM, self.terminate)
        signal.signal(signal.SIGINT, self.interrupt)


def prepare_model(config, checkpoint, texts, device):
    """The tokenizer and model of a checkpoint or of --model, or new ones of this seed."""
    torch.manual_seed(config.seed)
    if checkpoint is None and config.model in FRESH_MODELS:
        print_once(f"learning the vocabulary of {len(texts):,} texts")
        tokenizer = learn_tokenizer(config, texts)
        lm = fresh_lm(config, tokenizer)
    else:
        source, dtype = checkpoint or config.model, compute_dtype(config.precision, device)
        tokenizer = load_tokenizer(source)
        lm = load_masked_lm(source, tokenizer, config.max_length, dtype)
    if config.max_length <= 128 and not torch.cuda.is_available():
        lm.set_attn_implementation("eager")  # faster: a CPU's fused attention is slow backward
    special = special_ids(tokenizer, lm.config.vocab_size)
    model = BowMAE(lm, special, config.objective, config.max_length)
    return tokenizer, model.to(device).train()


def wrap_ddp(model, compiles=False):
    """The model under DistributedDataParallel, which averages the gradients of the processes."""
    module = torch.compile(model) if compiles else model
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the new name of broadcast_buffers is of one version only
        return nn.parallel.DistributedDataParallel(module, **options)


def held_out_batches(config, tokenizer, texts, share):
    """The first 1,024 sequences of the held-out texts, in batches of like length, masked once."""
    texts = [text for text in texts if text_hash(text) < share]
    sequences = cut_sequences(texts, tokenizer, config.max_length)[:1024]
    sequences.sort(key=lambda sequence: len(sequence[0]))
    batches = [sequences[start : start + 64] for start in range(0, len(sequences), 64)]
    return [collate(batch, tokenizer, config.mask_ratio, i) for i, batch in enumerate(batches)]


@torch.no_grad()
def evaluate(model, batches, device, autocast):
    """Held-out means: masked-LM loss a masked token, bag-of-word loss and coverage a sequence."""
    model.eval()
    sums = Counter()
    for batch in batches:
        batch = batch.to(device)
        original_ids = batch["original_ids"]
        with autocast:
            losses = model(**batch)
            cls = model.encode(original_ids, batch["attention_mask"])[:, 0]  # of the unmasked text
            coverage = term_coverage(mlm_head(model.lm, cls), original_ids, model.special)
        sums["masked"] += len(batch["masked_positions"])
        sums["sequences"] += len(original_ids)
        sums["mlm_loss"] += float(losses["mlm_loss"]) * len(batch["masked_positions"])
        sums["bow_loss"] += float(losses["bow_loss"]) * len(original_ids)
        sums["coverage"] += float(coverage.sum())
    model.train()
    metrics = {"eval_mlm_loss": sums["mlm_loss"] / sums["masked"]}
    metrics["eval_bow_loss"] = sums["bow_loss"] / sums["sequences"]
    metrics["eval_term_coverage"] = sums["coverage"] / sums["sequences"]
    return metrics


def measure_rates(sums, start, device):
    """What a log line tells of the speed, from the counts that all processes have summed up."""
    seconds = time.perf_counter() - start
    return {
        "tokens_per_second": sums["tokens"] / seconds,
        "padding_share": 1 - sums["tokens"] / sums["padded_tokens"],
        "data_wait_share": sums["wait_seconds"] / dist.get_world_size() / seconds,
        "peak_memory_mb": peak_memory_mb(device),
    }


def end_run(config, step, should_stop, stop_signal):
    """Copy the newest model into --output and print the gain, or exit with a signal's code."""
    output = Path(config.output)
    if should_stop:
        print_once(f"stopped by a signal; step {step} is saved, and the same command resumes")
    elif dist.get_rank() == 0:
        lines = (output / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines if "eval_mlm_loss" in line]
        if records:
            columns = ["eval_mlm_loss", "eval_bow_loss", "eval_term_coverage"]
            print_table({"before": records[0], "after": records[-1]}, columns, "held-out")
        state = shutil.ignore_patterns("training_state.pt")
        shutil.copytree(list_checkpoints(output)[-1], output, ignore=state, dirs_exist_ok=True)
        print(f"model saved in {output}", flush=True)
    dist.barrier()  # torchrun ends the others at the first exit
    if should_stop:
        sys.exit(128 + (stop_signal.received or signal.SIGTERM))


def train(config, device):
    """Pre-train to --steps, from the newest checkpoint or the start; the model ends in --output."""
    # Checkpoint and data.
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checkpoint, state = load_checkpoint(config)
    files = list_files(config.data)
    texts, held_out_share = sample_texts(config, files)
    held_out_share = state.get("held_out_share", held_out_share)
    file_sizes = {file: os.path.getsize(file) for file in files}
    texts_hash = zlib.crc32("\n".join(texts).encode())
    changed = file_sizes.items() ^ state.get("file_sizes", file_sizes).items()
    for file in sorted({file for file, _ in changed}):
        print_once(f"warning: --data has changed since the checkpoint: {file}")
    if state.get("texts_hash", texts_hash) != texts_hash:
        print_once("warning: the first texts of --data have changed since the checkpoint")

    # Model, optimizer and loader.
    tokenizer, model = prepare_model(config, checkpoint, texts, device)
    optimizer = build_optimizer(config, model)
    dtype = compute_dtype(config.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        model.decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    ddp = wrap_ddp(model, config.compile)
    loader = make_loader(config, tokenizer, files, held_out_share, state)
    held_out = held_out_batches(config, tokenizer, texts, held_out_share)
    del texts

    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    print_once(
        f"{config.objective}: {millions:.2f} M parameters, {config.steps:,} steps of "
        f"{config.num_shards} x {config.micro_batch_size} sequences of up to {config.max_length} "
        f"tokens, {world_size} process(es), {device}, {dtype}, output {config.output}"
    )
    if rank == 0:
        start_logs(config, device, state)
    if rank == 0 and held_out and not checkpoint:
        append_metrics(config, {"step": 0} | evaluate(model, held_out, device, autocast))

    step = last_step = state.get("step", 0)
    num_micro_batches = config.num_shards // world_size
    resume_points = {}  # of the shards of this process
    counts = Counter()  # sums since the last line of the log
    start = time.perf_counter()
    should_stop = False
    bar = tqdm(total=config.steps, initial=last_step, unit="step", disable=rank > 0)
    with StopSignal() as stop_signal, contextlib.closing(loader), bar:
        for step in range(last_step + 1, config.steps + 1):
            # Forward and backward, over this process's micro-batches of the step.
            bow_weight = cosine(config.bow_weight, config.bow_weight_final, step / config.steps)
            step_losses = defaultdict(float)
            for index in range(num_micro_batches):
                wait_start = time.perf_counter()
                info, batch = next(loader)
                resume_points[info["shard"]] = info["resume_point"]
                counts["wait_seconds"] += time.perf_counter() - wait_start
                counts["tokens"] += info["num_tokens"]
                counts["padded_tokens"] += batch["input_ids"].numel()

                torch.manual_seed(info["seed"])  # so dropout depends on (seed, step, shard) only
                # DDP averages the gradients of all processes in the last backward pass alone.
                ddp.require_backward_grad_sync = index == num_micro_batches - 1
                with autocast:
                    losses = ddp(**batch.to(device, non_blocking=True))
                loss = losses["mlm_loss"]
                if config.objective == "bow":
                    loss = loss + bow_weight * losses["bow_loss"]
                if config.objective == "enhanced":
                    loss = loss + losses["enhanced_loss"]
                scaler.scale(loss / num_micro_batches).backward()
                for name, value in {"loss": loss, **losses}.items():
                    step_losses[name] += value.detach() / num_micro_batches

            # Update the weights.
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            lr = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            bar.update()

            should_save = step % config.save_every == 0 or step == config.steps
            should_evaluate = step % config.eval_every == 0 or step == config.steps
            if not (should_save or should_evaluate or step % config.log_every == 0):
                continue

            # Log the losses of this step, and the rates since the last line. Summing the losses
            # waits for the device, so that the time includes all of its work.
            counts["signals"] = stop_signal.received > 0
            sums = sum_over_processes(step_losses | counts)
            record = {"step": step, "epoch": info["resume_point"][0]}
            record |= {name: sums[name] / world_size for name in step_losses}
            record |= {"bow_weight": bow_weight, "lr": lr, "grad_norm": float(grad_norm)}
            record |= measure_rates(sums, start, device)
            append_metrics(config, record)
            shown = [f"{name} {value:.3f}" for name, value in record.items() if "_loss" in name]
            shown += [f"{record['tokens_per_second']:,.0f} tokens/s", f"epoch {record['epoch']}"]
            bar.set_postfix_str(", ".join(shown))

            # Evaluate.
            if should_evaluate and held_out and rank == 0:
                metrics = evaluate(model, held_out, device, autocast)
                append_metrics(config, {"step": step} | metrics)

            # Save.
            should_stop = sums["signals"] > 0
            if should_save or should_stop:
                everyone = [None] * world_size
                dist.all_gather_object(everyone, resume_points)
                state = {"step": step, "resume_points": {}}
                for own in everyone:
                    state["resume_points"] |= own
                state |= {"file_sizes": file_sizes, "texts_hash": texts_hash}
                state["held_out_share"] = held_out_share
                state["decoder"] = model.decoder.state_dict()
                state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                if rank == 0:
                    save_checkpoint(config, state, model.lm, tokenizer, config.max_length)
            if should_stop:
                break
            counts.clear()
            start = time.perf_counter()

    end_run(config, step, should_stop, stop_signal)


# ---- benchmark


def bench(config, device):
    """Train the objectives by turns on the same batches, and print what each of them costs.

    Medians of rounds of four steps, the first two uncounted, back and forth so that none always
    comes first. Memory is what steps take beyond the weights on a GPU, else the process's peak.
    """
    dtype = compute_dtype(config.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    files = list_files(config.data)
    texts, _ = sample_texts(config, files)
    runs, seconds, memory = {}, defaultdict(list), {}
    for objective in ("mlm", "bow", "enhanced"):
        tokenizer, model = prepare_model(replace(config, objective=objective), None, texts, device)
        runs[objective] = (wrap_ddp(model, config.compile), build_optimizer(config, model))
    num_micro_batches = config.num_shards // dist.get_world_size()
    with contextlib.closing(make_loader(config, tokenizer, files, 0.0, {})) as loader:
        micro_batches = [next(loader) for _ in range(4 * num_micro_batches)]

    for turn in tqdm(range(10), desc="bench", unit="round", disable=dist.get_rank() > 0):
        for objective in runs if turn % 2 == 0 else reversed(runs):
            ddp, optimizer = runs[objective]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            memory_before = peak_memory_mb(device) if device.type == "cuda" else 0.0
            start = time.perf_counter()
            for index, (_, batch) in enumerate(micro_batches, 1):
                ddp.require_backward_grad_sync = index % num_micro_batches == 0
                with autocast:
                    losses = ddp(**batch.to(device))
                sum(losses.values()).backward()
                if ddp.require_backward_grad_sync:
                    nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            sum(losses.values()).item()  # waits for the device
            seconds[objective].append(time.perf_counter() - start)
            memory[objective] = peak_memory_mb(device) - memory_before

    counts = {"tokens": sum(info["num_tokens"] for info, _ in micro_batches)}
    counts["samples"] = sum(len(batch["input_ids"]) for _, batch in micro_batches)
    sums = sum_over_processes(counts)
    rows = {}
    for objective in runs:
        median = np.median(seconds[objective][2:])
        ratios = np.array(seconds["mlm"][2:]) / seconds[objective][2:]
        row = {"samples/s": sums["samples"] / median, "tokens/s": sums["tokens"] / median}
        row |= {"x mlm": np.median(ratios), "min": ratios.min(), "max": ratios.max()}
        rows[objective] = row | {"peak MB": memory[objective]}
    if dist.get_rank() == 0:
        print_table(rows, list(rows["mlm"]), f"{device}, {dtype}")


# ---- command line


@contextlib.contextmanager
def errors_in_one_line():
    """Print an error that a user can mend as one line, and exit with code 2.

    Under torchrun the first process prints such an error at once. Any other waits five seconds,
    in which torchrun ends it: so the error is printed once, not by each process.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # frees the loader, so that its processes end
        is_expected = isinstance(error, (UserError, OSError))
        if world_size > 1 and (rank > 0 or not is_expected):
            time.sleep(5)
        if not is_expected:
            raise
        print(f"error: {short_reason(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if world_size == 1 and dist.is_initialized():
            # A thread of gloo that still frees a tensor needs Python's lock, which the end of the
            # group holds while it waits for the thread: torch 2.6 hung here, once in 180 runs.
            time.sleep(0.02)
            dist.destroy_process_group()


@errors_in_one_line()
def main(argv=None):
    """Train or measure, as the flags of a command line say."""
    config = parse_config(argv, Config)
    device = init_distributed()
    complete_config(config)
    if config.bench:
        bench(config, device)
    else:
        with locked_output(config):
            train(config, device)


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()  # it would cut the bar of the run in two
    main()
    # All work is done. Threads that gloo leaves behind would abort some exits of Python.
    sys.stdout.flush()
    os._exit(0)
