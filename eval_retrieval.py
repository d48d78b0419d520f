# SPDX-License-Identifier: MIT
"""Evaluate, fine-tune and search with dense retrievers (arXiv 2401.11248, section 4).

The paper's recipe on the documentation of the installed Python packages, after `bow_mae.py`:
    torchrun eval_retrieval.py
Its steps, one by one; `COMMAND --help` lists the flags of each:
    torchrun eval_retrieval.py evaluate --data beir/scifact --output out/scifact
    torchrun eval_retrieval.py mine --data msmarco --model bm25 --output out/bm25
    torchrun eval_retrieval.py finetune --data msmarco --negatives_file out/bm25/negatives.jsonl
    torchrun eval_retrieval.py index --data msmarco --model out/retrieval --output out/index
    python eval_retrieval.py search "how to read a csv file" --output out/index
    python eval_retrieval.py explain "Read a comma-separated values file."

Reading order: a task is read, its texts are encoded and searched, the ranking is measured;
`finetune` trains the encoder, and `mine` finds its hard negatives.
"""

import ast
import csv
import gzip
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import unicodedata
import zlib
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Literal

import datasets
import faiss
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import xxhash
from datasets.fingerprint import Hasher
from huggingface_hub import try_to_load_from_cache
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForMaskedLM
from transformers.hf_argparser import HfArg
from transformers.utils import cached_file

import bow_mae
from bow_mae import BAD_DATA, UserError, print_once


@dataclass
class RetrievalConfig:
    """The flags of all commands; COMMANDS, at the end, says which command has which."""

    # Data and encoder.
    data: str = HfArg(default="python-docs", help="python-docs, folder, or BEIR name on the hub")
    model: str = HfArg(default="out/bow_mae", help="encoder (folder, hub name), or bm25")
    output: str = HfArg(default="out/retrieval", help="folder of all that is written")
    pooling: Literal["auto", "cls", "mean"] = HfArg(default="auto", help="auto: as its files say")
    similarity: Literal["auto", "dot", "cos"] = HfArg(default="auto", help="auto: as its files say")
    query_prefix: str = HfArg(default="", help="text before each query, such as 'query: '")
    passage_prefix: str = HfArg(default="", help="text before each passage")
    max_query_length: int = HfArg(default=32, help="tokens of a query")
    max_passage_length: int | None = HfArg(default=None, help="tokens of a passage")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = HfArg(default="auto", help="of autocast")
    seed: int = HfArg(default=0, help="of everything that is drawn")
    text: str = HfArg(default="", help="question or text; may stand first, without --text")
    # Search and evaluation.
    index: str = HfArg(default="Flat", help="of FAISS: Flat, SQfp16, PQ16, IVF1024,Flat, HNSW32")
    split: str = HfArg(default="test", help="split that is evaluated")
    top_k: int = HfArg(default=1000, help="passages of a query; no metric is cut deeper")
    relevance_level: int = HfArg(default=1, help="lowest relevant grade; nDCG uses all grades")
    keep_identical_ids: bool = HfArg(default=False, help="keep a passage with its query's id")
    compare: str = HfArg(default="", help="TREC run file, for a paired permutation test")
    # Mining.
    train_split: str = HfArg(default="train", help="split that is trained on, or mined for")
    depth: list[int] = HfArg(default_factory=lambda: [2, 200], help="first and last rank to mine")
    sample: int = HfArg(default=128, help="negatives that are drawn from these ranks")
    # Fine-tuning.
    train_data: list[str] = HfArg(default_factory=list, help="files of Tevatron or DPR, joined")
    negatives_file: list[str] = HfArg(default_factory=list, help="files of `mine`, joined")
    negatives: int | None = HfArg(default=None, help="hard negatives of a query in a step")
    temperature: float = HfArg(default=1.0, help="of the softmax over passages")
    batch_size: int = HfArg(default=64, help="queries of a step, over all processes")
    epochs: int | None = HfArg(default=None, help="passes over the training queries")
    steps: int | None = HfArg(default=None, help="optimizer steps; unset: those of --epochs")
    micro_batch_size: int | None = HfArg(default=None, help="queries that are encoded at a time")
    lr: float | None = HfArg(default=None, help="peak learning rate of AdamW")
    lr_final_ratio: float = HfArg(default=0.1, help="final learning rate over its peak")
    warmup_steps: int | None = HfArg(default=None, help="linear warm-up; unset: steps // 20")
    weight_decay: float | None = HfArg(default=None, help="of AdamW")
    adam_beta2: float = HfArg(default=0.999, help="β₂ of AdamW")
    workers: int = HfArg(default=0, help="data-loader processes of each process")
    save_every: int = HfArg(default=500, help="steps between checkpoints")
    keep: int = HfArg(default=1, help="newest checkpoints that are kept")
    log_every: int = HfArg(default=10, help="steps between lines of metrics.jsonl")


# Of flags that are not given: those of a run of minutes for python-docs, else the paper's values.
SHORT_DEFAULTS = {"max_passage_length": 96, "negatives": 1, "epochs": 1, "micro_batch_size": 64}
SHORT_DEFAULTS |= {"lr": 5e-4, "weight_decay": 0.01}
PAPER_DEFAULTS = {"max_passage_length": 144, "negatives": 15, "epochs": 3, "micro_batch_size": 16}
PAPER_DEFAULTS |= {"lr": 2e-5, "weight_decay": 0.0}


# ---- task: passages, queries and judgements

FIELD_NAMES = {  # of passages and queries
    "_id": ("_id", "id", "docid", "passage_id", "psg_id", "query_id"),
    "title": ("title",),
    "text": ("text", "query"),
}


@dataclass
class Task:
    """Passages (on disk), the queries of a split, their judgements and answers (in memory)."""

    passages: datasets.Dataset  # _id, text, perhaps title
    rows: dict[str, int]  # the row of each passage id
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]  # grades by query id and passage id
    answers: dict[str, list[str]]  # of NQ and TriviaQA
    drop_identical: bool  # whether a passage with a query's id is its own text, as in BEIR


def split_array(file):
    """Yield each object of a JSON array as text, reading a piece at a time: DPR's has 7 GB."""
    text = ""
    for piece in iter(lambda: file.read(2**16), ""):
        text = (text + piece).lstrip("[, \r\n\t")
        while text.startswith("{"):
            try:
                _, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break  # the object goes on in the next piece
            yield text[:end]
            text = text[end:].lstrip(", \r\n\t")
    if text.strip() != "]":
        raise ValueError("an object is malformed, or the array has no end")


def parse_record(line, number, name):
    """The record of a line: of JSON, of a file of DPR, or of fields; a tab parts id and text."""
    if line.lstrip().startswith("{"):
        return json.loads(line)
    line = line.rstrip("\r\n")
    if name.startswith("psgs_w100.tsv"):
        passage_id, text, title = next(csv.reader([line], delimiter="\t"))
        return {"_id": passage_id, "text": text, "title": title}
    if ".qa.csv" in name:
        text, answers = next(csv.reader([line], delimiter="\t"))
        query_id = f"{name.split('.')[0]}:{number}"  # such as nq-test:1
        return {"_id": query_id, "text": text, "answers": ast.literal_eval(answers)}
    fields = line.split("\t" if "\t" in line else None)
    if "\t" not in line:  # of qrels or a run
        return {"_fields": fields}
    return {"_id": fields[0], "text": " ".join(fields[1:]), "_fields": fields}


def read_file(path):
    """Yield (where, record) of a file of any format; UserError names the line of a bad one."""
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            is_array = file.read(99).lstrip().startswith("[")
            file.seek(0)
            lines = split_array(file) if is_array else file
            for number, line in enumerate(lines, 1):
                if line.strip() and not line.startswith("id\ttext\ttitle"):  # DPR's header
                    yield f"{path}, line {number}", parse_record(line, number, path.name)
    except (SyntaxError, *BAD_DATA) as error:
        raise UserError(f"{path}, line {number}: {error}") from error


def clean_record(record, where):
    """_id, title and text of a passage or query, whatever their names; "" for what is missing."""
    # A tuple, as the cache is keyed by this code, pickled: a set has no fixed order.
    if not isinstance(record, dict) or record.keys().isdisjoint(("title", "text", "query")):
        raise UserError(f"{where}: no text, or no tab before it")
    cleaned = {}
    for field, names in FIELD_NAMES.items():
        values = [record[name] for name in names if record.get(name) is not None]
        value = values[0] if values else ""
        if not isinstance(value, str | int):
            raise UserError(f"{where}: {field} is no text")
        cleaned[field] = str(value).encode(errors="replace").decode()  # for half a surrogate pair
    return cleaned


def read_passages(path, size, modified):
    """Yield _id, title and text of a collection; size and time of the file key the cache."""
    for where, record in read_file(Path(path)):
        yield clean_record(record, where)


def cached_dataset(read, path):
    """What `read` yields from a file, on disk in the cache of `datasets`, which locks it."""
    stat = path.stat()
    arguments = {"path": str(path), "size": stat.st_size, "modified": stat.st_mtime_ns}
    cache = os.environ.get("HF_DATASETS_CACHE", "out/cache")
    try:
        return datasets.Dataset.from_generator(read, gen_kwargs=arguments, cache_dir=cache)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, datasets.arrow_writer.SchemaInferenceError):
            raise UserError(f"{path} has no records") from error
        raise error.__cause__ or error from error  # a UserError, with the line
    except ValueError as error:
        raise UserError(f"{path} has no records") from error


def collect_queries(records):
    """Texts, and answers where there are any, by query id."""
    queries, answers = {}, {}
    for where, record in records:
        query = clean_record(record, where)
        if len(record.get("_fields", [])) > 2:
            raise UserError(f"{where}: expected a query id and a text")
        if query["_id"] in queries:
            raise UserError(f"{where}: query {query['_id']} occurs twice")
        if query["text"].strip():
            queries[query["_id"]] = query["text"]
        found = record.get("answers") or []
        is_list = isinstance(found, list | tuple)
        if not is_list or not all(isinstance(answer, str) for answer in found):
            raise UserError(f"{where}: answers must be a list of texts")
        if found:
            answers[query["_id"]] = found
    return queries, answers


def collect_qrels(records):
    """Grades by query and passage id; TREC has its iteration between a query and a passage."""
    qrels = defaultdict(dict)
    for where, record in records:
        fields = record.get("_fields", [])
        if len(fields) not in (3, 4):
            raise UserError(f"{where}: expected query-id, passage-id and grade")
        query_id, passage_id, grade = fields[0], fields[-2], fields[-1].strip()
        if grade == "score":  # BEIR's header
            continue
        if not re.fullmatch(r"-?\d+(\.0*)?", grade):
            raise UserError(f"{where}: the grade {grade} is no integer")
        grade = int(float(grade))
        if qrels[query_id].setdefault(passage_id, grade) != grade:
            raise UserError(f"{where}: {query_id} {passage_id} has another grade further up")
    return dict(qrels)


def find_file(folder, *names):
    """The first of these files that is there, as it is or with .gz."""
    paths = [folder / name for name in names]
    paths += [folder / f"{name}.gz" for name in names]
    return next((path for path in paths if path.is_file()), None)


def read_folder(folder, split):
    """Passages, queries, answers and qrels of a folder in the layout of BEIR, MS MARCO or DPR."""
    corpus = find_file(folder, "corpus.jsonl", "collection.tsv", "psgs_w100.tsv")
    if corpus is None:
        raise UserError(f"--data {folder} has no corpus.jsonl, collection.tsv or psgs_w100.tsv")
    queries, answers, qrels = {}, {}, {}
    if split:
        names = [f"queries.{split}.tsv", f"queries.{split}.jsonl", "queries.tsv", "queries.jsonl"]
        files_of_dpr = sorted(path.name for path in folder.glob(f"*{split}.qa.csv*"))
        if len(files_of_dpr) > 1:
            example = files_of_dpr[0].split(".")[0]
            raise UserError(f"--data {folder}: --split {split} may be {example} or another")
        names += files_of_dpr
        asked = find_file(folder, *names)
        judged = find_file(folder, f"qrels/{split}.tsv", f"qrels.{split}.tsv")
        if asked is None:
            raise UserError(f"--data {folder} has no queries of {split}")
        if judged is None and split not in asked.name:
            raise UserError(f"--data {folder} has no qrels of {split}")
        queries, answers = collect_queries(read_file(asked))
        qrels = collect_qrels(read_file(judged)) if judged else {}
    return cached_dataset(read_passages, corpus), queries, answers, qrels


def read_hub(name, split):
    """Passages, queries, answers and qrels of BEIR on the hub: NAME and NAME-qrels."""
    try:
        passages = datasets.load_dataset(name, "corpus", split="corpus")
        queries = datasets.load_dataset(name, "queries", split="queries") if split else []
        qrels = datasets.load_dataset(f"{name}-qrels", split=split) if split else []
    except (OSError, ValueError) as error:
        reason = bow_mae.short_reason(error)
        raise UserError(f"--data {name} is no folder; the hub says: {reason}") from error
    asked = [(f"{name}, query {number}", row) for number, row in enumerate(queries)]
    judged = []
    for number, row in enumerate(qrels):
        fields = [str(row[column]) for column in ("query-id", "corpus-id", "score")]
        judged.append((f"{name}-qrels, row {number}", {"_fields": fields}))
    return passages, *collect_queries(asked), collect_qrels(judged)


def read_python_docs(split):
    """Passages, queries and qrels of python-docs: a summary asks for the text that follows it."""
    numbers = {"train": range(2, 10), "dev": [1], "test": [0]}.get(split, [])
    docs = bow_mae.python_docs()
    queries, qrels = {}, {}
    for row in docs.select_columns(["_id", "query"]):
        if zlib.crc32(row["_id"].encode()) % 10 in numbers:
            queries[f"query:{row['_id']}"] = row["query"]
            qrels[f"query:{row['_id']}"] = {row["_id"]: 1}
    return docs, queries, {}, qrels


def load_task(config, split):
    """Read --data, with the queries that a split judges or, without qrels, those with answers.

    A missing passage stays judged, as in trec_eval; a judged query without a text is left out.
    """
    folder = Path(config.data).expanduser()
    if config.data == "python-docs":
        passages, queries, answers, qrels = read_python_docs(split)
    elif folder.is_dir():
        passages, queries, answers, qrels = read_folder(folder, split)
    elif "/" not in config.data or bow_mae.is_path(config.data):
        raise UserError(f"--data {config.data}: no such folder")
    else:
        passages, queries, answers, qrels = read_hub(config.data, split)
    if "text" not in passages.column_names or not any(passages["text"]):
        raise UserError(f"--data {config.data}: no passage has a text, a field of the name `text`")
    rows = {str(name): row for row, name in enumerate(passages["_id"])}
    if len(rows) < len(passages):
        name = Counter(passages["_id"]).most_common(1)[0][0]
        raise UserError(f"--data {config.data}: passage id {name!r} occurs twice")
    judged = list(itertools.chain.from_iterable(qrels.values()))
    for name in itertools.chain(rows, queries, judged, qrels):
        if name.split() != [name]:
            raise UserError(f"--data {config.data}: the id {name!r} is empty or has white space")
    lost_passages = [name for name in judged if name not in rows]
    lost_queries = [query_id for query_id in qrels if query_id not in queries]
    for kind, lost in {"judged passages": lost_passages, "queries": lost_queries}.items():
        if lost:
            print_once(f"warning: {len(lost)} {kind} are missing, the first is {lost[0]!r}")
    asked = [query_id for query_id in qrels or answers if query_id in queries]
    grades = [grade for name in asked for grade in qrels.get(name, {}).values()]
    if max(grades, default=1) < 1:
        raise UserError(f"--data {config.data}: no passage is relevant to a query of {split}")
    if split and not asked:
        raise UserError(f"--data {config.data} has no query of {split}")
    if judged and len(lost_passages) == len(judged):
        raise UserError(f"--data {config.data} has no judged passage of {split}")
    queries = {query_id: queries[query_id] for query_id in asked}
    qrels = {query_id: qrels[query_id] for query_id in asked if query_id in qrels}
    is_beir = find_file(folder, "collection.tsv") is None  # in MS MARCO equal ids mean nothing
    return Task(passages, rows, queries, qrels, answers, is_beir and not config.keep_identical_ids)


def passage_texts(passages, rows):
    """Title and text of passages, by row; either may be null or missing."""
    chosen = passages[list(map(int, rows))]
    titles = chosen.get("title", [""] * len(rows))
    pairs = zip(titles, chosen["text"], strict=True)
    return [f"{title or ''} {text or ''}".strip() for title, text in pairs]


# ---- encoding

CHUNK_SIZE = 1024  # texts in a file of vectors
MOST_TRAINING_VECTORS = 300_000  # of an index, in each process
SPARE_HITS = 17  # searched beyond --top_k, for ties and for a passage that is dropped


def model_file(source, name):
    """The content of a JSON file of a model's folder or hub name; {} where there is none."""
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    is_unknown = path is None and not Path(source).is_dir() and name == "modules.json"
    if is_unknown and try_to_load_from_cache(source, name) is None:
        print_once(f"warning: {name} of {source} is not in the cache, and the hub is out of reach")
    return json.loads(Path(path).read_text()) if path else {}


def saved_pooling(source):
    """Pooling and similarity that the sentence-transformers files of a model ask for."""
    modules = model_file(source, "modules.json")
    kinds = [module["type"].split(".")[-1] for module in modules]
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise UserError(f"--model {source}: its module {min(unknown)} is not supported")
    folders = [module["path"] for module in modules if module["type"].endswith("Pooling")]
    config = model_file(source, f"{(folders or ['1_Pooling'])[0]}/config.json")
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    modes = [name for name in config if "pooling_mode_" in name and config[name]]
    pooling = "+".join(names.get(mode, mode) for mode in modes) or config.get("pooling_mode", "cls")
    score = model_file(source, "config_sentence_transformers.json").get("similarity_fn_name")
    is_cosine = "Normalize" in kinds or score == "cosine"
    return pooling, "cos" if is_cosine else "dot"


class Encoder(nn.Module):
    """Vectors of texts, by any encoder; `lm` is what is saved, with its head if it has one."""

    def __init__(self, config, device):
        super().__init__()
        source = config.model
        longest = max(config.max_query_length, config.max_passage_length)
        options = {"dtype": torch.float32, "output_loading_info": True}
        self.tokenizer = bow_mae.load_tokenizer(source)
        try:
            lm, report = AutoModelForMaskedLM.from_pretrained(source, **options)
            if lm.config.is_encoder_decoder:
                raise ValueError("it is an encoder-decoder")
            lm.base_model(bow_mae.trial_ids(self.tokenizer, longest))
        except Exception as error:  # whatever damaged files or other kinds of models raise
            reason = bow_mae.short_reason(error)
            raise UserError(f"--model {source} cannot encode {longest} tokens: {reason}") from error
        missing = report["missing_keys"]
        if any(name.startswith(f"{lm.base_model_prefix}.") for name in missing):
            raise UserError(f"--model {source} lacks weights of its encoder")
        # Without a head the encoder stays, which a masked LM makes without a pooler.
        self.lm = lm.base_model if missing else lm
        self.width = lm.config.hidden_size
        self.sides = {  # prefix and most tokens
            "queries": (config.query_prefix, config.max_query_length),
            "passages": (config.passage_prefix, config.max_passage_length),
        }
        self.to(device).eval()
        self.device, self.dtype = device, bow_mae.compute_dtype(config.precision, device)
        pooling, similarity = saved_pooling(source)
        self.pooling = pooling if config.pooling == "auto" else config.pooling
        self.similarity = similarity if config.similarity == "auto" else config.similarity
        if self.pooling not in ("cls", "mean"):
            raise UserError(f"--model {source}: pooling {self.pooling} is not supported")
        settings = f"{self.dtype} {self.pooling} {self.similarity}"
        state = [self.tokenizer.backend_tokenizer.to_str(), self.lm.base_model.state_dict()]
        state += [model_file(source, name) for name in ("config.json", "tokenizer_config.json")]
        self.content_hash = Hasher.hash(state)
        self.vectors_hash = Hasher.hash([settings, self.content_hash])
        lengths = f"queries of {config.max_query_length}, passages of {config.max_passage_length}"
        print_once(f"{source}: {settings}, {lengths} tokens at most, {device}")
        prompts = model_file(source, "config_sentence_transformers.json").get("prompts") or {}
        if any(prompts.values()) and not config.query_prefix + config.passage_prefix:
            print_once(f"warning: this model has prompts; give them as prefixes: {prompts}")

    def forward(self, batch):
        """Vectors (B, D), float32 and of norm 1 for `cos`, of input_ids, attention_mask (B, L)."""
        input_ids = batch["input_ids"].to(self.device)
        attention_mask = batch["attention_mask"].to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outputs = self.lm.base_model(input_ids, attention_mask=attention_mask)
        hidden = outputs.last_hidden_state.float()  # (B, L, D)
        vectors = hidden[:, 0]  # (B, D)
        if self.pooling == "mean":
            weights = attention_mask[:, :, None].float()  # (B, L, 1)
            vectors = (hidden * weights).sum(1) / weights.sum(1)
        return F.normalize(vectors, dim=1) if self.similarity == "cos" else vectors

    @torch.no_grad()
    def encode(self, texts, side):
        """The vectors (N, D), float32, of queries or passages, in batches of like length."""
        prefix, length = self.sides[side]
        texts = [prefix + text for text in texts]
        tokens = self.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        vectors = np.empty((len(texts), self.width), np.float32)
        for start in range(0, len(texts), 64):
            chosen = order[start : start + 64]
            padded = {"input_ids": [tokens[i] for i in chosen]}
            vectors[chosen] = self(self.tokenizer.pad(padded, return_tensors="pt")).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise UserError("a vector is not finite: set --precision fp32")
        return vectors


def vector_files(config, encoder, texts, side):
    """The files of the vectors of texts, in a folder that is named by all that they depend on."""
    key = [encoder.vectors_hash, texts._fingerprint, CHUNK_SIZE, *encoder.sides[side]]
    target = Path(config.output, "vectors", side, Hasher.hash(key))
    return [target / f"{start:010}.npy" for start in range(0, len(texts), CHUNK_SIZE)]


def encode_collection(config, encoder, texts, side):
    """Write the vectors of texts, CHUNK_SIZE a file, which processes share out; returns all files.

    What an interrupted run has finished serves again, and folders of other vectors are removed.
    """
    files, rank = vector_files(config, encoder, texts, side), dist.get_rank()
    target = files[0].parent
    if rank == 0:
        target.mkdir(parents=True, exist_ok=True)
        for outdated in set(target.parent.iterdir()) - {target}:
            shutil.rmtree(outdated)
    dist.barrier()
    own = files[rank :: dist.get_world_size()]
    for file in tqdm(own, f"encode {side}", unit="file", disable=rank > 0):
        if not file.exists():
            rows = range(int(file.stem), len(texts))[:CHUNK_SIZE]
            unfinished = file.with_suffix(".tmp.npy")
            np.save(unfinished, encoder.encode(passage_texts(texts, rows), side))
            unfinished.replace(file)
    dist.barrier()
    return files


# ---- search

# Strings of faiss.index_factory that search by inner product, as it is.
INDEX = re.compile(
    r"(IVF(?P<lists>[1-9]\d*),)?(Flat|SQ8|SQfp16|PQ[1-9]\d*(?P<small>x4)?)|HNSW([2-9]|[1-9]\d+)"
)


def check_index(config, encoder, num_passages):
    """UserError if --index is of another kind, or needs more passages to be trained on."""
    match = INDEX.fullmatch(config.index)
    if not match:
        kinds = "Flat, SQ8, SQfp16, PQ<n>, PQ<n>x4, one of these after IVF<n>, or HNSW<n>"
        raise UserError(f"--index {config.index}: give {kinds}")
    try:
        faiss.index_factory(encoder.width, config.index, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).split("Error: ")[-1]
        raise UserError(f"--index {config.index} of width {encoder.width}: {reason}") from error
    needed = int(match["lists"] or 1)
    if "PQ" in config.index:
        needed = max(needed, 16 if match["small"] else 256)  # centroids of 4 or 8 bits
    starts = range(0, num_passages, CHUNK_SIZE)[dist.get_rank() :: dist.get_world_size()]
    share = sum(min(CHUNK_SIZE, num_passages - start) for start in starts)
    every = max(1, math.ceil(share / MOST_TRAINING_VECTORS))  # see build_index
    share = math.ceil(share / every)
    if 0 < share < needed:
        raise UserError(f"--index {config.index} needs {needed} passages a process, not {share}")


def build_index(config, encoder, passages):
    """The faiss index, by row, of this process's share of the passages, which it encodes."""
    files = encode_collection(config, encoder, passages, "passages")
    own = files[dist.get_rank() :: dist.get_world_size()]
    kind = f"IDMap,{config.index}" if own else "IDMap,Flat"  # nothing to train on
    index = faiss.index_factory(encoder.width, kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        print_once(f"training the index {config.index}")
        every = math.ceil(len(own) * CHUNK_SIZE / MOST_TRAINING_VECTORS)
        index.train(np.concatenate([np.load(file)[::every] for file in own]))
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.nprobe = max(1, inverted.nlist // 16)  # lists searched for a query, not only 1
    if "HNSW" in kind:  # where efSearch is below k, fewer than k are found
        depth = max(config.top_k, config.depth[1]) + SPARE_HITS
        faiss.ParameterSpace().set_index_parameter(index, "efSearch", depth)
    for file in tqdm(own, "index", unit="file", disable=dist.get_rank() > 0):
        vectors = np.load(file)
        index.add_with_ids(vectors, np.arange(len(vectors)) + int(file.stem))
    return index


def search_index(index, vectors, k):
    """Scores and rows (Q, k) of the best passages of all processes; None but on the first."""
    batches = np.split(vectors, range(256, len(vectors), 256))
    is_quiet = dist.get_rank() > 0 or len(batches) == 1
    found = [index.search(batch, k) for batch in tqdm(batches, "search", disable=is_quiet)]
    scores = np.concatenate([scores for scores, _ in found])
    rows = np.concatenate([rows for _, rows in found])
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object((scores, rows), everyone)
    if everyone is None:
        return None
    all_scores = np.stack([scores for scores, _ in everyone])  # (processes, Q, k)
    all_rows = np.stack([rows for _, rows in everyone])
    return faiss.merge_knn_results(all_scores, all_rows, keep_max=True)


# Those that Lucene's EnglishAnalyzer leaves out.
STOP_WORDS = """a an and are as at be but by for if in into is it no not of on or such that the
their then there these they this to was will with"""
STOP_WORDS = frozenset(STOP_WORDS.split())
MARKS = "".join(chr(i) for i in range(0x10000) if unicodedata.category(chr(i)).startswith("M"))
# Thai, Lao, Burmese, Khmer, Chinese and Japanese are written without spaces.
SPACELESS = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u3096\u309d-\u309f"
SPACELESS += "\u30a1-\u30fa\u30fc-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
SPACELESS_RUN = re.compile(rf"[{SPACELESS}][{SPACELESS}{MARKS}]*")
CHARACTER = re.compile(rf".[{MARKS}]*")
# As in Unicode's annex 29: a dot or apostrophe joins letters, a dot or comma digits.
WORD = re.compile(rf"(?:[\w{MARKS}]|(?<=[^\W\d])[.'’](?=[^\W\d])|(?<=\d)[.,](?=\d))+")


def bm25_terms(text):
    """Words without stop words; pairs of characters, as Lucene's, where a script has no spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    words = WORD.findall(SPACELESS_RUN.sub(" ", text))
    terms = [word for word in words if word not in STOP_WORDS]
    for run in SPACELESS_RUN.findall(text):
        characters = CHARACTER.findall(run)
        last = max(1, len(characters) - 1)
        terms += ["".join(characters[i : i + 2]) for i in range(last)]
    return terms


def bm25(passages, queries, k):
    """Scores and rows of the best passages of each query, at most k, by BM25.

    Robertson's BM25 as in Lucene, k1 = 0.9 and b = 0.4, without a stemmer. Its inverted index is
    in memory, some 20 bytes a posting: meant for up to a few million passages.
    """
    rows, counts = defaultdict(lambda: array("i")), defaultdict(lambda: array("i"))  # by term
    lengths = []
    for row in tqdm(range(len(passages)), "BM25 index", unit="passage"):
        found = Counter(bm25_terms(passage_texts(passages, [row])[0]))
        lengths.append(found.total())
        for term, count in found.items():
            rows[term].append(row)
            counts[term].append(count)
    norm = 0.9 * (1 - 0.4 + 0.4 * np.array(lengths) / max(np.mean(lengths), 1e-9))  # (passages,)

    best_scores, best_rows = [], []
    for query in tqdm(queries, "BM25 search", unit="query"):
        scores = np.zeros(len(lengths), np.float32)  # (passages,)
        for term, repeats in Counter(bm25_terms(query)).items():
            if term in rows:
                postings, count = np.array(rows[term]), np.array(counts[term])
                idf = math.log(1 + (len(lengths) - len(count) + 0.5) / (len(count) + 0.5))
                scores[postings] += repeats * idf * count / (count + norm[postings])
        matched = np.flatnonzero(scores)
        best = matched[np.argsort(-scores[matched], kind="stable")[:k]]
        best_scores.append(scores[best])
        best_rows.append(best)
    return best_scores, best_rows


def ranking(hits):
    """Passage ids by falling score (as float32), then by falling id, as trec_eval ranks them."""
    keys = {name: (np.float32(score), name.encode()) for name, score in hits.items()}
    return sorted(keys, key=keys.get, reverse=True)


def retrieve(config, task, encoder, k):
    """The k best passages of each query, see `ranked_hits`; on the first process alone, else []."""
    queries = list(task.queries.values())
    depth = k + SPARE_HITS
    if encoder is None:
        found = bm25(task.passages, queries, depth) if dist.get_rank() == 0 else None
    else:
        index = build_index(config, encoder, task.passages)
        if len(queries) == 1:  # of `search`: nothing to share out or to keep
            vectors = encoder.encode(queries, "queries")
        else:
            texts = datasets.Dataset.from_dict({"text": queries})
            files = encode_collection(config, encoder, texts, "queries")
            vectors = np.concatenate([np.load(file) for file in files])
        found = search_index(index, vectors, depth)
        if found:
            num_found = (found[1] >= 0).sum(1)  # (Q,)
            num_short = (num_found < min(k, len(task.passages))).sum()
            if num_short:
                reason = f"get fewer than {k} from --index {config.index}"
                print_once(f"warning: {num_short} queries {reason}")
    return ranked_hits(task, *found, k) if found else []


def drop_identical(task, query_id, hits):
    """Drop a passage with its query's id, as in BEIR's ArguAna; returns whether there was one."""
    is_relevant = task.qrels.get(query_id, {}).get(query_id, 0) > 0
    if is_relevant or not task.drop_identical:
        return False
    return hits.pop(query_id, None) is not None


def ranked_hits(task, scores, rows, k):
    """Yield each query id and its k best passages {passage id: score}, of at least k candidates."""
    ids, num_dropped = list(task.rows), 0
    for query_id, query_scores, query_rows in zip(task.queries, scores, rows, strict=True):
        found = zip(query_scores.tolist(), query_rows.tolist(), strict=True)
        hits = {ids[row]: score for score, row in found if row >= 0}
        num_dropped += drop_identical(task, query_id, hits)
        yield query_id, {name: hits[name] for name in ranking(hits)[:k]}
    if num_dropped:
        print_once(f"{num_dropped} hits had the id of their query and were dropped, as in BEIR")


# ---- metrics


def dcg(grades):
    """Discounted cumulative gain of grades by rank; the gain is linear (trec_eval m_ndcg_cut.c)."""
    return sum(max(grade, 0) / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))


def evaluate_run(run, qrels, relevance_level=1, top_k=1000):
    """Each metric of each query, {query id: {metric: value}}, to agree with trec_eval -c.

    run {query id: {passage id: score}}, qrels {query id: {passage id: grade}}. A query without a
    passage of a positive grade is left out (trec_eval counts it as 0); one that the run lacks
    scores 0. Relevant is a grade from relevance_level on. No metric is cut deeper than top_k.
    """
    results = {}
    for query_id, judged in qrels.items():
        if max(judged.values(), default=0) < 1:
            continue
        ranked = ranking(run.get(query_id, {}))[:top_k]
        relevant = {name for name, grade in judged.items() if grade >= relevance_level}
        ranks = [rank for rank, name in enumerate(ranked, 1) if name in relevant]
        first = min(ranks, default=math.inf)
        num_relevant = max(len(relevant), 1)  # none at this level: all metrics but nDCG are 0
        gains = [judged.get(name, 0) for name in ranked[:10]]
        ideal = sorted(judged.values(), reverse=True)[:10]
        precisions = [found / rank for found, rank in enumerate(ranks, 1) if rank <= 1000]
        values = {
            "MRR@10": 1 / first if first <= 10 else 0,
            "nDCG@10": dcg(gains) / dcg(ideal),
            "MAP@1000": sum(precisions) / num_relevant,
        }
        for k in (50, 100, 1000):
            values[f"Recall@{k}"] = sum(rank <= k for rank in ranks) / num_relevant
        for k in (1, 10, 50, 1000):
            values[f"Hit@{k}"] = first <= k
        names = [name for name in values if int(name.split("@")[1]) <= top_k]
        results[query_id] = {name: float(values[name]) for name in names}
    return results


ANSWER_WORD = re.compile(rf"(?:[^\W_]|[{MARKS}])+|\S")


def answer_words(text):
    """DPR's words of a text: runs of letters, digits and marks, or single visible characters."""
    words = ANSWER_WORD.findall(unicodedata.normalize("NFD", text).lower())
    words = [word for word in words if unicodedata.category(word[0])[0] not in "CZ"]
    return " ".join(["", *words, ""])


def has_answer(text, answers):
    """Whether a text has the words of an answer in a row, as in DPR; no words match nothing."""
    body = answer_words(text)
    return any(words.strip() and words in body for words in map(answer_words, answers))


def find_answers(task, query_id, names):
    """Whether the text (without title) of each passage has an answer of a query."""
    rows = [task.rows[name] for name in names]
    texts = task.passages[rows]["text"] if rows else []
    return [has_answer(text or "", task.answers[query_id]) for text in texts]


def answer_hits(task, run, top_k):
    """AnswerHit@k of each query with answers: whether one of its k best passages has one."""
    results = {}
    for query_id in task.queries:
        if query_id in task.answers:
            names = ranking(run.get(query_id, {}))[:100]
            known = [name for name in names if name in task.rows]
            has = dict(zip(known, find_answers(task, query_id, known), strict=True))
            found = [has.get(name, False) for name in names]
            ranks = [k for k in (5, 20, 100) if k <= top_k]
            results[query_id] = {f"AnswerHit@{k}": float(any(found[:k])) for k in ranks}
    return results


def measure_run(config, task, run):
    """Each metric of each query, by the judgements and by the answers."""
    judged = evaluate_run(run, task.qrels, config.relevance_level, config.top_k)
    answered = answer_hits(task, run, config.top_k)
    return {name: judged.get(name, {}) | answered.get(name, {}) for name in judged | answered}


def permutation_test(differences, seed=0):
    """The two-sided p-value of paired differences (Q,): how often random signs give as much."""
    rng = np.random.default_rng(seed)
    draws = [rng.choice([-1, 1], len(differences)) @ differences for _ in range(10_000)]
    is_larger = np.abs(draws) >= abs(differences.sum()) - 1e-9
    return (is_larger.sum() + 1) / (len(draws) + 1)


def read_run(path):
    """A TREC run file, `qid Q0 docid rank score tag` a line; trec_eval does not use the rank."""
    run = defaultdict(dict)
    for where, record in read_file(Path(path)):
        try:
            query_id, _, passage_id, _, score, _ = record["_fields"]
            score = float(score)
            if math.isnan(score) or passage_id in run[query_id]:
                raise ValueError
            run[query_id][passage_id] = score
        except (KeyError, ValueError) as error:
            reason = "expected qid Q0 docid rank score tag, each docid once"
            raise UserError(f"{where}: {reason}") from error
    if not run:
        raise UserError(f"{path} is empty")
    return dict(run)


# ---- fine-tuning


@dataclass
class TrainingSet:
    """Passages, and for each query its text, the rows of its positives and hard negatives."""

    passages: datasets.Dataset  # of --data, then of each --train_data
    ids: np.ndarray  # (passages,) numbers, equal for equal ids
    hashes: np.ndarray  # (passages,) of title and text
    queries: list[str]
    positives: list[np.ndarray]
    negatives: list[np.ndarray]
    relevant: list[np.ndarray]  # the positives of all queries of the same text

    def is_relevant(self, rows, i):
        """Whether each of some passages is relevant to query i, by its id or its title and text."""
        has_id = np.isin(self.ids[rows], self.ids[self.relevant[i]])
        return has_id | np.isin(self.hashes[rows], self.hashes[self.relevant[i]])


def read_examples(path, size, modified):
    """Yield the passages of a file in Tevatron's or DPR's format, with query and role."""
    for where, record in read_file(Path(path)):
        query = record.get("query", record.get("question"))
        positives = record.get("positive_passages", record.get("positive_ctxs"))
        negatives = record.get("negative_passages") or record.get("hard_negative_ctxs") or []
        if not query or not isinstance(positives, list) or not isinstance(negatives, list):
            raise UserError(f"{where}: give a query, and positive_passages as a list")
        query = clean_record({"query": query}, where)["text"]
        query_id = str(record.get("query_id", ""))
        for i, passage in enumerate(positives + negatives):
            row = clean_record(passage, where)
            row["_id"] = row["_id"] or row["text"]
            yield row | {"query_id": query_id, "query": query, "relevant": i < len(positives)}


def read_negatives(path, task):
    """Yield (query id, rows) of a file of `mine`, or of lines of a query id and a passage id."""
    for where, record in read_file(Path(path)):
        given = record.get("_fields", [])
        if given and len(given) != 2:
            raise UserError(f"{where}: expected a query id and one passage id")
        query_id = given[0] if given else str(record.get("query_id", record.get("_id")))
        names = record.get("negatives") or given[1:]
        unknown = [name for name in names if str(name) not in task.rows]
        if query_id not in task.queries or unknown:
            raise UserError(f"{where}: query {query_id} or passages {unknown} are not in --data")
        yield query_id, [task.rows[str(name)] for name in names]


def load_training_set(config, uses_data=False):
    """The judged queries of --data, with --negatives_file, and --train_data, joined by text.

    If --train_data is given, python-docs is used for --negatives_file or uses_data only.
    """
    tables, ids, queries = [], [], {}
    positives = defaultdict(lambda: array("i"))  # rows by query id
    negatives = defaultdict(lambda: array("i"))
    is_given = config.data != "python-docs" or not config.train_data
    if is_given or config.negatives_file or uses_data:
        task = load_task(config, config.train_split)
        tables.append(task.passages)
        ids.extend(task.rows)
        queries |= task.queries
        for query_id, grades in task.qrels.items():
            known = [name for name, grade in grades.items() if grade > 0 and name in task.rows]
            positives[query_id].extend(task.rows[name] for name in known)
        for path in config.negatives_file:
            for query_id, rows in read_negatives(path, task):
                negatives[query_id].extend(rows)
    ids_by_text = {query: query_id for query_id, query in queries.items()}
    for path in config.train_data:
        table = cached_dataset(read_examples, Path(path))
        columns = ["query_id", "query", "relevant"]
        frame = table.select_columns([*columns, "_id"]).to_pandas()
        for (query_id, query, relevant), rows in frame.groupby(columns).indices.items():
            query_id = ids_by_text.get(query, f"{query_id} {query}")  # DPR's have no id
            queries[query_id] = query
            side = positives if relevant else negatives
            side[query_id].extend((rows + len(ids)).tolist())
        tables.append(table.select_columns(["_id", "title", "text"]))
        ids.extend(frame["_id"])

    passages = datasets.concatenate_datasets(tables)
    hashes = []
    for start in range(0, len(passages), 1000):
        texts = passage_texts(passages, range(start, len(passages))[:1000])
        hashes += [xxhash.xxh64_intdigest(text.encode()) for text in texts]
    numbers = pd.factorize(np.array(ids, dtype=object))[0]
    training = TrainingSet(passages, numbers, np.array(hashes, np.uint64), [], [], [], [])
    relevant = defaultdict(list)
    for query_id, query in queries.items():
        relevant[query].extend(positives[query_id])
    for query_id, query in queries.items():
        if len(positives[query_id]):
            training.queries.append(query)
            training.positives.append(np.array(positives[query_id], np.int32))
            training.relevant.append(np.array(relevant[query], np.int32))
            rows = np.array(negatives[query_id], np.int32)
            training.negatives.append(rows[~training.is_relevant(rows, -1)])
    num_queries = len(training.queries)
    if num_queries < len(queries):
        print_once(f"warning: {len(queries) - num_queries} queries have no positive: left out")
    lacking = sum(len(rows) == 0 for rows in training.negatives)
    if lacking and config.negatives:
        print_once(f"{lacking:,} of {num_queries:,} queries get random passages as negatives")
    return training


class FinetuningSteps(torch.utils.data.Dataset):
    """Item `step` holds this process's micro-batches of that step, a function of (seed, step).

    An epoch has whole steps only: the queries left over at its end are skipped.
    """

    def __init__(self, config, tokenizer, training):
        self.config, self.tokenizer, self.training = config, tokenizer, training
        self.share = config.batch_size // dist.get_world_size()
        self.first = dist.get_rank() * self.share
        self.epoch, self.order = -1, np.empty(0)

    def __getitem__(self, step):
        """The micro-batches of a step, and its false negatives, see `contrastive_loss`."""
        config, training = self.config, self.training
        epoch, number = divmod(step - 1, len(training.queries) // config.batch_size)
        if epoch != self.epoch:
            rng = np.random.default_rng([config.seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(len(training.queries))
        chosen = self.order[number * config.batch_size :][: config.batch_size]  # (B,)
        rows = np.stack([self.draw(i, epoch) for i in chosen])  # (B, 1+n)
        false_negatives = torch.zeros(len(rows), rows.size, dtype=torch.bool)  # (B, B·(1+n))
        for place, i in enumerate(chosen):
            false_negatives[place] = torch.from_numpy(training.is_relevant(rows.ravel(), i))
            false_negatives[place, place * rows.shape[1]] = False  # the query's positive

        micro_batches = []
        end = self.first + self.share
        for start in range(self.first, end, config.micro_batch_size):
            own = slice(start, min(start + config.micro_batch_size, end))
            queries = [config.query_prefix + training.queries[i] for i in chosen[own]]
            texts = passage_texts(training.passages, rows[own].ravel())
            passages = [config.passage_prefix + text for text in texts]
            numbers = np.random.SeedSequence([config.seed, step, start])
            batch = {"seed": int(numbers.generate_state(1)[0])}  # of dropout
            options = {"truncation": True, "padding": True, "return_tensors": "pt"}
            options["max_length"] = config.max_query_length
            batch["queries"] = dict(self.tokenizer(queries, **options))
            options["max_length"] = config.max_passage_length
            batch["passages"] = dict(self.tokenizer(passages, **options))
            micro_batches.append(batch)
        return micro_batches, false_negatives

    def draw(self, i, epoch):
        """The rows of a positive and of n negatives of query i (1+n,), others in each epoch."""
        training, count = self.training, self.config.negatives
        rng = np.random.default_rng([self.config.seed, epoch, i])
        positive = rng.choice(training.positives[i])
        pool = training.negatives[i]
        if len(pool) == 0:
            pool = rng.integers(len(training.passages), size=count)  # any passages
        return np.append(positive, rng.choice(pool, count, replace=len(pool) < count))


def contrastive_loss(queries, passages, false_negatives, temperature):
    """InfoNCE over all passages of a step (section 4.2): 1+n of each query, its positive first.

    queries (B, D), passages (B·(1+n), D); false_negatives (B, B·(1+n)) bool are passages that are
    relevant to a query beside its positive, and so are left out.
    """
    scores = queries @ passages.T / temperature  # (B, B·(1+n))
    scores = scores.masked_fill(false_negatives, -math.inf)
    group_size = len(passages) // len(queries)
    targets = torch.arange(len(queries), device=scores.device) * group_size  # (B,)
    return F.cross_entropy(scores, targets)


def gather(vectors):
    """The vectors of all processes in order (B, D); only this one's (b, D) carry a gradient."""
    everyone = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, vectors.detach())
    everyone[dist.get_rank()] = vectors
    return torch.cat(everyone)


def encode_pair(encoder, batch):
    """Vectors of queries (b, D) and passages (b·(1+n), D); the same dropout at each call."""
    torch.manual_seed(batch["seed"])
    return encoder(batch["queries"]), encoder(batch["passages"])


def plan_steps(config, num_queries):
    """The config with --steps and --warmup_steps filled in, and warnings about them."""
    if config.batch_size > num_queries or config.batch_size % dist.get_world_size():
        most = f"at most {num_queries}, the training queries, and a multiple of the processes"
        raise UserError(f"--batch_size {config.batch_size} must be {most}")
    steps = config.steps or num_queries // config.batch_size * config.epochs
    warmup_steps = steps // 20 if config.warmup_steps is None else config.warmup_steps
    if warmup_steps >= steps:
        print_once(f"warning: {steps} steps, of which {warmup_steps} are warm-up")
    if config.train_split == config.split:
        print_once(f"warning: training on the split that is evaluated, {config.split}")
    return replace(config, steps=steps, warmup_steps=warmup_steps)


def finetune(config, device):
    """Fine-tune --model, from the newest checkpoint or the start; the model ends in --output.

    Gradients are cached at the vectors (GradCache, arXiv 2101.06983): the vectors of a step are
    computed without a graph, the loss is back-propagated to them, and each micro-batch is encoded
    again with a graph, to back-propagate its part. Loss and gradient are those of one big batch.
    """
    # Data, checkpoint and model.
    rank, world_size = dist.get_rank(), dist.get_world_size()
    encoder = Encoder(config, device)  # first, as a slip in --model shows at once
    training = load_training_set(config)
    config = plan_steps(config, len(training.queries))
    checkpoint, state = bow_mae.load_checkpoint(config)
    # What training depends on, beside the flags: a change would go unseen when a run resumes.
    rows = [*training.positives, *training.negatives]
    content = [training.hashes, training.queries, np.concatenate(rows), list(map(len, rows))]
    inputs = {"--model": encoder.content_hash}
    inputs["--data, --train_data or --negatives_file"] = Hasher.hash(content)
    for name, value in inputs.items():
        if state.get(name, value) != value:
            reason = f"was begun with other content of {name}: give another --output"
            raise UserError(f"--output {config.output} {reason}")
    if checkpoint:
        encoder = Encoder(replace(config, model=checkpoint), device)
    encoder.train()
    parameters = list(encoder.lm.base_model.parameters())
    optimizer = bow_mae.build_optimizer(config, encoder.lm.base_model)
    scaler = torch.amp.GradScaler(device.type, enabled=encoder.dtype == torch.float16)
    if checkpoint:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    step = last_step = state.get("step", 0)
    batches = FinetuningSteps(config, encoder.tokenizer, training)
    options = {"sampler": range(step + 1, config.steps + 1), "num_workers": config.workers}
    options["worker_init_fn"] = bow_mae.init_worker
    loader = torch.utils.data.DataLoader(batches, batch_size=None, **options)

    print_once(
        f"{config.steps} steps, {config.warmup_steps} of them warm-up, of {config.batch_size} of "
        f"{len(training.queries):,} queries, with 1 + {config.negatives} passages each"
    )
    if rank == 0:
        bow_mae.start_logs(config, device, state)

    counts = Counter()  # since the last line of the log
    should_stop = False
    start = wait_start = time.perf_counter()
    bar = tqdm(total=config.steps, initial=last_step, unit="step", disable=rank > 0)
    with bow_mae.StopSignal() as stop_signal, bar:
        for step, (micro_batches, false_negatives) in enumerate(loader, last_step + 1):
            counts["wait_seconds"] += time.perf_counter() - wait_start
            for batch in micro_batches:
                for side in ("queries", "passages"):
                    counts["tokens"] += int(batch[side]["attention_mask"].sum())
                    counts["padded_tokens"] += batch[side]["attention_mask"].numel()

            # Encode. A single micro-batch keeps its graph; several are encoded again below.
            encodes_again = len(micro_batches) > 1
            with torch.set_grad_enabled(not encodes_again):
                pairs = [encode_pair(encoder, batch) for batch in micro_batches]
            queries = torch.cat([pair[0] for pair in pairs]).detach().requires_grad_()  # (b, D)
            passages = torch.cat([pair[1] for pair in pairs]).detach().requires_grad_()

            # Loss, and its gradient at the vectors.
            vectors = (gather(queries), gather(passages))
            loss = contrastive_loss(*vectors, false_negatives.to(device), config.temperature)
            scaler.scale(loss).backward()

            # Backward through the encoder, one micro-batch at a time.
            query_gradients = queries.grad.split([len(pair[0]) for pair in pairs])
            passage_gradients = passages.grad.split([len(pair[1]) for pair in pairs])
            for i, batch in enumerate(micro_batches):
                pair = encode_pair(encoder, batch) if encodes_again else pairs[i]
                torch.autograd.backward(pair, (query_gradients[i], passage_gradients[i]))
            # Each process has the gradient of its own vectors; that of the loss is their sum.
            for parameter in parameters:
                if world_size > 1 and parameter.grad is not None:
                    dist.all_reduce(parameter.grad)

            # Update the weights.
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            lr = bow_mae.learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            bar.update()

            # Log the loss of this step, and the rates since the last line.
            should_save = step == config.steps or step % config.save_every == 0
            if should_save or step % config.log_every == 0:
                counts["signals"] = stop_signal.received > 0
                sums = bow_mae.sum_over_processes(counts)
                epoch = step / (len(training.queries) // config.batch_size)
                record = {"step": step, "epoch": epoch, "loss": loss.item()}
                record |= {"lr": lr, "grad_norm": grad_norm.item()}
                record |= bow_mae.measure_rates(sums, start, device)
                bow_mae.append_metrics(config, record)
                bar.set_postfix(loss=record["loss"], epoch=record["epoch"])
                should_stop = sums["signals"] > 0
                counts.clear()
                start = time.perf_counter()

            # Save.
            if (should_save or should_stop) and rank == 0:
                state = {"step": step, **inputs, "optimizer": optimizer.state_dict()}
                state["scaler"] = scaler.state_dict()
                model = (encoder.lm, encoder.tokenizer, config.max_passage_length)
                pooling = (encoder.pooling, encoder.similarity)
                bow_mae.save_checkpoint(config, state, *model, *pooling)
            if should_stop:
                break
            wait_start = time.perf_counter()

    bow_mae.end_run(config, step, should_stop, stop_signal)


# ---- mining


def mine(config, device):
    """Write output/negatives.jsonl: --sample passages of the ranks --depth for each query.

    Passages that are relevant to the query, or hold an answer to it, are left out.
    """
    task, encoder = prepare(config, config.train_split, device)
    ranked = retrieve(config, task, encoder, config.depth[1])
    if not ranked:  # the first process writes
        return
    path, num_negatives = Path(config.output, "negatives.jsonl"), 0
    with path.open("w") as file:
        bar = tqdm(ranked, "negatives", len(task.queries), unit="query")
        for i, (query_id, hits) in enumerate(bar):
            grades = task.qrels.get(query_id, {})
            names = list(hits)[config.depth[0] - 1 :]
            names = [name for name in names if grades.get(name, 0) < 1]
            if query_id in task.answers:
                found = find_answers(task, query_id, names)
                names = [name for name, has in zip(names, found, strict=True) if not has]
            picks = np.random.default_rng([config.seed, i]).permutation(len(names))
            chosen = [names[pick] for pick in sorted(picks[: config.sample])]
            num_negatives += len(chosen)
            file.write(json.dumps({"query_id": query_id, "negatives": chosen}) + "\n")
    print(f"{num_negatives:,} negatives of {len(task.queries):,} queries in {path}")


# ---- commands


def prepare(config, split, device):
    """Task and encoder (None: bm25) of a command; all that can be refused is refused here."""
    run = Path(config.output, "run.json")
    saved = json.loads(run.read_text())["config"] if run.exists() else vars(config)
    for name in ("model", "data", "split"):
        if saved[name] != getattr(config, name):
            reason = f"has results of --{name} {saved[name]}: give another --output"
            raise UserError(f"--output {config.output} {reason}")
    encoder = None if config.model == "bm25" else Encoder(config, device)
    task = load_task(config, split)
    if encoder is not None:
        check_index(config, encoder, len(task.passages))
    if dist.get_rank() == 0:
        bow_mae.write_run_json(config, device)
    dist.barrier()
    return task, encoder


def index_passages(config, device):
    """Encode the passages of --data, which need no queries, for `search`."""
    if config.model == "bm25":
        raise UserError("--model bm25 has no index to write")
    task, encoder = prepare(config, "", device)
    encode_collection(config, encoder, task.passages, "passages")


def evaluate(config, device):
    """Retrieve for the queries of --split; write run and metrics, return mean metrics."""
    other = read_run(config.compare) if config.compare else {}
    task, encoder = prepare(config, config.split, device)
    if not task.qrels and config.top_k < 5:
        raise UserError(f"--top_k {config.top_k} is below 5, where answers are first counted")
    ranked = retrieve(config, task, encoder, config.top_k)
    if not ranked:
        return None
    run, output = dict(ranked), Path(config.output)
    with (output / "run.trec").open("w") as file:
        for query_id, hits in run.items():
            for rank, (name, score) in enumerate(hits.items(), 1):
                file.write(f"{query_id} Q0 {name} {rank} {score!r} bow_mae\n")
    with (output / "qrels.trec").open("w") as file:
        for query_id, grades in task.qrels.items():
            for name, grade in grades.items():
                file.write(f"{query_id} 0 {name} {grade}\n")
    (output / "compare.json").unlink(missing_ok=True)  # of another ranking
    results = measure_run(config, task, run)
    rows = [{"query_id": query_id} | values for query_id, values in results.items()]
    lines = [json.dumps(row) + "\n" for row in rows]
    (output / "per_query.jsonl").write_text("".join(lines))
    means = pd.DataFrame(rows).mean(numeric_only=True).to_dict()
    bow_mae.write_json(output / "metrics.json", means)
    title = f"{config.model}, {len(results):,} queries, {len(task.rows):,} passages"
    bow_mae.print_table({name: {"": means[name]} for name in means}, [""], title)
    lost = sum(max(grades.values()) < 1 for grades in task.qrels.values())
    if lost:
        print_once(f"{lost} queries without a relevant passage are left out; trec_eval counts 0")
    if other:
        compare(config, task, results, other)
    print(f"ranking and metrics saved in {output}", flush=True)
    return means


def compare(config, task, results, other):
    """Print by how much the mean of each metric is above that of --compare, with its p-value."""
    num_missing = len(results.keys() - other.keys())
    if num_missing:
        print_once(f"warning: {num_missing} queries are not in {config.compare} and count 0 there")
    depth = max(map(len, other.values()))
    for query_id, hits in other.items():
        drop_identical(task, query_id, hits)
    if depth < min(config.top_k, len(task.rows)):
        reason = f"has at most {depth} passages of a query: deeper metrics favour this run"
        print_once(f"warning: {config.compare} {reason}")
    others = measure_run(config, task, other)
    differences = pd.DataFrame(results) - pd.DataFrame(others)  # a column a query
    table = {}
    for name, row in differences.iterrows():
        row = row.dropna()  # some queries have judgements, some answers
        p = permutation_test(row.to_numpy(), config.seed)
        table[name] = {"difference": row.mean(), "p": p}
    bow_mae.print_table(table, ["difference", "p"], f"against {config.compare}")
    bow_mae.write_json(Path(config.output, "compare.json"), table)


def recipe(config, device):
    """The paper's two stages, with negatives of BM25, then of the first stage's model.

    Other commands: evaluate, index, mine, finetune, search, explain.
    """
    if config.model == "bm25" or config.negatives_file:
        raise UserError("the recipe mines its own negatives, and fine-tunes --model, not bm25")
    _, encoder = prepare(config, config.split, device)
    load_task(config, config.train_split)  # refuses a split that cannot be mined
    training = load_training_set(replace(config, negatives=0), uses_data=True)
    config = plan_steps(config, len(training.queries))
    output, miner, plans = Path(config.output), "bm25", {}
    for stage in ("stage1", "stage2"):
        mined, tuned, tested = (str(output / stage / name) for name in ("mined", "model", "test"))
        tuning = replace(config, negatives_file=[f"{mined}/negatives.jsonl"], output=tuned)
        checkpoint, state = bow_mae.load_checkpoint(tuning)  # refuses other flags
        if state.get("--model", encoder.content_hash) != encoder.content_hash:
            raise UserError(f"--output {tuned} was begun with another model: give another --output")
        # Where training has begun, its negatives stay: another number of processes mines others.
        mining = None if checkpoint else replace(config, model=miner, output=mined)
        plans[stage] = (mining, tuning, replace(config, model=tuned, output=tested))
        miner = tuned

    table = {}
    for name, model in {"bm25": "bm25", "zero_shot": config.model}.items():
        table[name] = evaluate(replace(config, model=model, output=str(output / name)), device)
    for stage, (mining, tuning, testing) in plans.items():
        if mining:
            mine(mining, device)
        dist.barrier()  # all processes read what the first has written
        finetune(tuning, device)
        table[stage] = evaluate(testing, device)
    if dist.get_rank() == 0:
        bow_mae.write_json(output / "table.json", table)
        names = ("MRR@10", "nDCG@10", "Recall@100", "Hit@10")
        chosen = [name for name in names if name in table["bm25"]]
        bow_mae.print_table(table, chosen or list(table["bm25"]))


def search(config, device):
    """Print the ten best passages for a text, of what `index` or `evaluate` left in --output."""
    if not Path(config.output, "vectors", "passages").is_dir():
        raise UserError(f"--output {config.output} has no vectors: run `index` first")
    saved = json.loads(Path(config.output, "run.json").read_text())["config"]
    config = RetrievalConfig(**saved | {"output": config.output, "text": config.text})
    task, encoder = load_task(config, ""), Encoder(config, device)
    files = vector_files(config, encoder, task.passages, "passages")
    if not all(file.exists() for file in files):
        reason = "has vectors of other data or another model, or not all: run `index` again"
        raise UserError(f"--output {config.output} {reason}")
    task.queries["the question"] = config.text
    for _, hits in retrieve(config, task, encoder, 10):
        for name, score in hits.items():
            passage = " ".join(passage_texts(task.passages, [task.rows[name]])[0].split())
            print(f"{score:8.3f}  {name}\n          {passage[:150]}")


def explain(config, device):
    """Print the 20 best terms of a text's [CLS], with those in the text, and the coverage."""
    encoder = Encoder(config, device)
    if encoder.lm.base_model is encoder.lm:
        raise UserError(f"--model {config.model} has no masked-LM head to explain with")
    options = {"max_length": config.max_passage_length, "return_tensors": "pt"}
    input_ids = encoder.tokenizer(config.text, truncation=True, **options)["input_ids"].to(device)
    special = bow_mae.special_ids(encoder.tokenizer, encoder.lm.config.vocab_size).to(device)
    with torch.no_grad():
        hidden = encoder.lm.base_model(input_ids).last_hidden_state  # (1, L, D)
        logits = bow_mae.mlm_head(encoder.lm, hidden[:, 0]).float()  # (1, V)
    terms = bow_mae.bag_of_words(input_ids, special)[0]  # (V,)
    coverage = bow_mae.term_coverage(logits, input_ids, special).item()
    count = int(terms.sum())
    print(f"{coverage:.1%} of the {count} terms of the text are among the {count} best of [CLS]:")
    for term in logits[0].topk(20).indices:
        name = encoder.tokenizer.convert_ids_to_tokens(term.item())
        print(f"{name!s:<20}{'in the text' if terms[term] else ''}")


ENCODER_FLAGS = "model pooling similarity query_prefix passage_prefix max_query_length "
ENCODER_FLAGS += "max_passage_length precision "
INDEX_FLAGS = ENCODER_FLAGS + "data output seed index "
EVALUATE_FLAGS = INDEX_FLAGS + "split top_k relevance_level keep_identical_ids compare "
MINE_FLAGS = INDEX_FLAGS + "train_split depth sample keep_identical_ids "
FINETUNE_FLAGS = ENCODER_FLAGS + "data output seed train_split train_data negatives_file negatives "
FINETUNE_FLAGS += "temperature epochs steps batch_size micro_batch_size lr lr_final_ratio "
FINETUNE_FLAGS += "warmup_steps weight_decay adam_beta2 workers save_every keep log_every "
COMMANDS = {
    "": (recipe, EVALUATE_FLAGS + MINE_FLAGS + FINETUNE_FLAGS),
    "evaluate": (evaluate, EVALUATE_FLAGS),
    "index": (index_passages, INDEX_FLAGS),
    "mine": (mine, MINE_FLAGS),
    "finetune": (finetune, FINETUNE_FLAGS),
    "search": (search, "text output"),
    "explain": (explain, "text model max_passage_length"),
}


def parse_command(argv):
    """The command of a command line, and its config."""
    name, *flags = argv if argv and not argv[0].startswith("-") else ["", *argv]
    if name not in COMMANDS:
        raise UserError(f"{name}: the commands are{' '.join(COMMANDS)}, or none for the recipe")
    command, names = COMMANDS[name]
    if "text" in names.split() and flags and not flags[0].startswith("-"):
        flags = ["--text", *flags]
    own = [field for field in fields(RetrievalConfig) if field.name in names.split()]
    chosen = [(field.name, field.type, field) for field in own]
    kind = make_dataclass("Flags", chosen, namespace={"__doc__": command.__doc__})
    given = vars(bow_mae.parse_config(flags, kind))
    config = RetrievalConfig(**given)
    is_short = config.data == "python-docs" and not config.train_data
    table = SHORT_DEFAULTS if is_short else PAPER_DEFAULTS
    bow_mae.fill_in(config, {name: table[name] for name in table if name in given})
    least = {"seed": 0, "negatives": 0, "warmup_steps": 0, "workers": 0}
    least |= {"max_query_length": 3, "max_passage_length": 3}
    bow_mae.check_numbers(config, least)
    if len(config.depth) != 2 or not 1 <= config.depth[0] <= config.depth[1]:
        raise UserError("--depth needs two ranks, the first and the last, such as 2 200")
    if config.temperature == 0 or config.adam_beta2 >= 1:
        raise UserError("--temperature must be above 0, and --adam_beta2 below 1")
    if "" in (config.split, config.train_split):
        raise UserError("--split and --train_split need a name")
    if "text" in given and not config.text:
        raise UserError(f"{argv[0]} needs a text, in quotation marks")
    return command, config


@bow_mae.errors_in_one_line()
def main(argv=None):
    """Run the command of a command line, or the recipe."""
    device = bow_mae.init_distributed()
    command, config = parse_command(sys.argv[1:] if argv is None else argv)
    if command in (search, explain):  # they write nothing
        command(config, device)
    else:
        with bow_mae.locked_output(config):
            command(config, device)


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # else it reports a head that an encoder lacks
    main()
    # All work is done. Threads that gloo leaves behind would abort some exits of Python.
    sys.stdout.flush()
    os._exit(0)
