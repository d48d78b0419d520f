# SPDX-License-Identifier: MIT
"""Fine-tune, search and evaluate a dense retriever that `bow_mae.py` has pre-trained (arXiv 2401.11248, §4).

The two-stage recipe of the paper on the documentation of the installed Python packages, and a table:
    torchrun eval_retrieval.py
Its steps one by one; --data is a BEIR folder or hub name, or a folder with the .tsv files of MS MARCO:
    torchrun eval_retrieval.py evaluate --data beir/nfcorpus --model out/bow_mae --output out/nfcorpus
    torchrun eval_retrieval.py mine     --data msmarco --model bm25 --output out/mined
    torchrun eval_retrieval.py finetune --data msmarco --negatives_file out/mined/negatives.jsonl
    python eval_retrieval.py search "how to read a csv file" --output out/retrieval/zero_shot
    python eval_retrieval.py explain "Read a comma-separated values (csv) file." --model out/bow_mae
Copy it together with bow_mae.py; it needs torch, transformers, datasets, faiss-cpu and numpy.
"""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import time
import unicodedata
import zlib
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Literal

import datasets
import faiss
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import bow_mae
from bow_mae import UserError, blame, together

@dataclass
class RetrievalConfig:
    """Commands: evaluate, mine, finetune, search TEXT, explain TEXT; without one, the whole recipe."""

    data: str = HfArg(default="python-docs", help="python-docs, BEIR folder or hub name, MS MARCO folder")
    split: str = HfArg(default="test", help="split whose queries are evaluated")
    train_split: str = HfArg(default="train", help="split whose queries are fine-tuned on or mined for")
    train_data: str = HfArg(default="", help="a Tevatron .jsonl to fine-tune on, instead of --data")
    model: str = HfArg(default="out/bow_mae", help="masked LM (folder, hub name), or bm25")
    output: str = HfArg(default="out/retrieval", help="folder of all that is written")
    index: str = HfArg(default="Flat", help="a faiss.index_factory string: SQfp16, IVF1024,Flat, HNSW32 ...")
    top_k: int = HfArg(default=1000, help="passages in the run file for each query")
    max_query_length: int = HfArg(default=32, help="tokens of a query")
    max_passage_length: int = HfArg(default=96, help="tokens of a passage")
    similarity: Literal["dot", "cos"] = HfArg(default="dot", help="between two [CLS] vectors")
    relevance_level: int = HfArg(default=1, help="lowest relevant grade; nDCG always uses the grades")
    keep_identical_ids: bool = HfArg(default=False, help="keep a passage whose id is that of its query")
    compare: str = HfArg(default="", help="TREC run file to compare with, by a permutation test")
    depth: list[int] = HfArg(default_factory=lambda: [2, 200], help="first and last rank to mine")
    sample: int = HfArg(default=128, help="negatives drawn per query from these ranks")
    max_positive_ratio: float = HfArg(default=0.0, help="drop those above it x the positive's score")
    negatives_file: str = HfArg(default="", help="negatives.jsonl of `mine`; else other queries' positives")
    negatives: int = HfArg(default=1, help="hard negatives of a query in a batch")
    temperature: float = HfArg(default=1.0, help="softmax temperature of the contrastive loss")
    epochs: int = HfArg(default=1, help="passes over the training queries")
    steps: int = HfArg(default=0, help="optimizer steps; 0: as many as --epochs make")
    batch_size: int = HfArg(default=64, help="queries in an optimizer step, over all processes")
    micro_batch_size: int = HfArg(default=32, help="queries encoded together; a step holds them all")
    lr: float = HfArg(default=5e-4, help="peak learning rate of AdamW")
    lr_final_ratio: float = HfArg(default=0.1, help="final learning rate over its peak, by a cosine")
    warmup_steps: int = HfArg(default=50, help="steps of linear warm-up")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay; biases and LayerNorm are exempt")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = HfArg(default="auto", help="auto: bf16 if native")
    seed: int = HfArg(default=0, help="of the order of the queries, the negatives and the dropout")
    workers: int = HfArg(default=0, help="data-loader workers per process")
    save_every: int = HfArg(default=500, help="steps between checkpoints")
    keep: int = HfArg(default=1, help="how many of the newest checkpoints to keep")
    log_every: int = HfArg(default=10, help="steps between lines of metrics.jsonl")
    resume: str = HfArg(default="auto", help="auto (newest complete checkpoint), never, or its folder")

    def __post_init__(self):
        if len(self.depth) != 2 or not 1 <= self.depth[0] <= self.depth[1]:
            raise UserError("--depth needs two ranks, the first and the last, such as 2 200")
        if not self.temperature:
            raise UserError("--temperature 0 would divide by zero")

# ---- task formats

@dataclass
class Task:
    """Passages, queries of a split, and their judgements. Passages stay on disk; the rest is in memory."""

    passages: datasets.Dataset  # _id, text, perhaps title
    rows: dict[str, int]  # the row of each passage id
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]  # the grade of each judged passage of each query
    answers: dict[str, list[str]] = field(default_factory=dict)  # of NQ and TriviaQA
    same_ids: bool = True  # a passage with the id of a query is its own text, as in BEIR, and is no hit

    def __getstate__(self):  # the other processes do without the ids, and their memory
        return self.__dict__ | {"rows": {}}

    def texts(self, rows) -> list[str]:
        """Title and text of passages, by row."""
        some = self.passages[list(map(int, rows))]
        titles = some.get("title", [""] * len(some["text"]))
        return [f"{title or ''} {text or ''}".strip() for title, text in zip(titles, some["text"])]

def clean(text: str | None) -> str:
    """The text, but for halves of surrogate pairs, which no tokenizer takes; null is empty."""
    return (text or "").encode(errors="replace").decode()

def read_records(path: Path, columns: str = ""):
    """Yield (line number, record) of a .jsonl(.gz) or .tsv(.gz); without columns, a list of the fields."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.decode("utf-8-sig")
                if ".jsonl" not in path.name:
                    tabs = "\t" if columns or "\t" in line else None
                    fields = line.rstrip("\r\n").split(tabs, len(columns.split()) - 1)  # -1: no limit
                    yield number, dict(zip(columns.split(), fields)) if columns else fields
                elif line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("a record must be an object {...}")
                    yield number, record
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{path}{f', line {number}' if number else ''}: {error}") from error

def find_file(folder: Path, *names: str) -> Path | None:
    """The first of these files that is there, as it is or with .gz."""
    paths = [folder / (name + end) for name in names for end in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)

def read_passages(path: str):
    """Yield the passages of a corpus.jsonl or collection.tsv."""
    for number, record in read_records(Path(path), "_id text"):
        passage_id, texts = record.get("_id", record.get("id")), [record.get("title"), record.get("text")]
        no_text = ".jsonl" not in Path(path).name and "text" not in record
        if passage_id is None or no_text or not all(isinstance(text, str | None) for text in texts):
            raise UserError(f"{path}, line {number}: a passage needs an _id and a text")
        yield {"_id": str(passage_id), "title": clean(texts[0]), "text": clean(texts[1])}

def read_queries(path: Path) -> tuple[dict, dict]:
    """Texts and answers (if any) by query id, of a queries.jsonl or queries.tsv."""
    queries, answers = {}, {}
    for number, record in read_records(path, "_id text"):
        query_id, text = str(record.get("_id", record.get("id"))), record.get("text", record.get("query"))
        if query_id == "None" or not isinstance(text, str) or query_id in queries:
            raise UserError(f"{path}, line {number}: a query needs a unique _id and a text")
        queries[query_id] = clean(text)
        if record.get("answers"):
            answers[query_id] = record["answers"]
            if not isinstance(answers[query_id], list) or {*map(type, answers[query_id])} != {str}:
                raise UserError(f"{path}, line {number}: answers must be a list of texts")
    return queries, answers

def read_qrels(path: Path) -> dict:
    """Grades by query and passage id; lines are query-id, (TREC's iteration,) passage-id, grade."""
    qrels = defaultdict(dict)
    for number, fields in read_records(path):
        if number == 1 and fields[-1:] == ["score"] or not fields:
            continue
        if len(fields) not in (3, 4) or not re.fullmatch(r" *-?\d+ *", fields[-1]):
            raise UserError(f"{path}, line {number}: expected query-id, passage-id and an integer grade")
        qrels[fields[0]][fields[-2]] = int(fields[-1])
    return dict(qrels)

def cached(read, path: Path, features: datasets.Features | None = None) -> datasets.Dataset:
    """What a generator reads from a file, on disk in the cache of `datasets`, under its size and time."""
    cache = os.environ.get("HF_DATASETS_CACHE", "out/cache")
    with blame(f"{path} cannot be read, or {cache} not written"):
        try:
            stamp = f"{read.__name__} {path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
            return datasets.Dataset.from_generator(
                read, gen_kwargs={"path": str(path)}, features=features, cache_dir=cache,
                fingerprint=hashlib.sha256(stamp.encode()).hexdigest()[:32])
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error  # a UserError with file and line

def load_task(config: RetrievalConfig, split: str) -> Task:
    """The passages, and the queries that a split judges; UserError names the file and line that is bad."""
    folder, queries, qrels, answers, same_ids = Path(config.data), {}, {}, {}, True
    if config.data == "python-docs":
        passages = docs = bow_mae.python_docs()
        splits = {"train": range(2, 10), "dev": [1], "test": [0], "all": range(10)}
        if split not in splits:
            raise UserError(f"--data python-docs has no split {split}, but {' '.join(splits)}")
        for name, query in zip(docs["_id"], docs["query"]):
            if bow_mae.text_hash(name) % 10 in splits[split]:
                queries[f"query:{name}"], qrels[f"query:{name}"] = query, {name: 1}
    elif folder.is_dir():
        corpus = find_file(folder, "corpus.jsonl", "collection.tsv")
        judged = find_file(folder, f"qrels/{split}.tsv", f"qrels.{split}.tsv")
        names = (f"queries{part}{end}" for part in (f".{split}", "") for end in (".tsv", ".jsonl"))
        asked = find_file(folder, *names)
        queries, answers = read_queries(asked) if asked else ({}, {})
        found = sorted([*folder.glob("qrels/*"), *folder.glob("qrels.*")])
        if not corpus or not queries or not judged and (found or not answers):
            there = " ".join(str(path.relative_to(folder)) for path in found)
            missing = "corpus.jsonl" if not corpus else f"{'qrels' if queries else 'queries'} of {split}"
            raise UserError(f"--data {folder} has no {missing}; its qrels are {there or 'none'}")
        qrels = read_qrels(judged) if judged else {name: {} for name in answers}
        passages, same_ids = cached(read_passages, corpus), ".jsonl" in corpus.name
    else:
        with blame(f"--data {config.data}, no folder here, as a hub dataset with corpus, queries and -qrels"):
            passages = datasets.load_dataset(config.data, "corpus", split="corpus")
            asked = datasets.load_dataset(config.data, "queries", split="queries")
            judged = datasets.load_dataset(f"{config.data}-qrels", split=split)
            queries, qrels = dict(zip(map(str, asked["_id"]), map(clean, asked["text"]))), defaultdict(dict)
            for query_id, passage_id, grade in zip(judged["query-id"], judged["corpus-id"], judged["score"]):
                qrels[str(query_id)][str(passage_id)] = int(grade)
    return check_task(config, passages, queries, qrels, answers, same_ids)

def check_task(config, passages, queries: dict, qrels: dict, answers: dict, same_ids: bool) -> Task:
    """A task of the queries that are judged; UserError where an id is unknown or there twice."""
    ids = list(map(str, passages["_id"]))
    rows = {name: row for row, name in enumerate(ids)}
    if len(rows) < len(ids):
        twice = next(name for row, name in enumerate(ids) if rows[name] != row)
        raise UserError(f"--data {config.data}: passage id {twice!r} occurs twice")
    unknown = [name for name in qrels if name not in queries]
    unknown += [name for judged in qrels.values() for name in judged if name not in rows]
    if unknown:
        raise UserError(f"--data {config.data}: the qrels have {len(unknown)} unknown ids: {unknown[0]!r}")
    if not answers and not any(grade > 0 for judged in qrels.values() for grade in judged.values()):
        raise UserError(f"--data {config.data}: the qrels name no relevant passage")
    answers = {name: answers[name] for name in qrels if name in answers}
    return Task(passages, rows, {name: queries[name] for name in qrels}, qrels, answers,
                same_ids and not config.keep_identical_ids)

# ---- BM25

def bm25(texts: list[str], queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The k best texts for each query: scores and rows (Q, k), row -1 where none matches; seconds of search.

    Robertson's BM25 as in Lucene, k1 = 0.9, b = 0.4, over runs of letters, digits and `_` in lower case. The
    inverted index is in memory, some 35 bytes a posting: meant for up to a few million passages.
    """
    words, numbers, counts, sizes, lengths = {}, array("i"), array("i"), [], []
    for text in tqdm(texts, desc="BM25 index", unit="passage", leave=False):
        found = Counter(re.findall(r"\w+", text.lower()))
        numbers.extend(words.setdefault(word, len(words)) for word in found)
        counts.extend(found.values())
        sizes.append(len(found))
        lengths.append(found.total())
    numbers, counts = np.asarray(numbers), np.asarray(counts)  # (postings,)
    rows = np.repeat(np.arange(len(texts), dtype=np.int32), sizes)
    frequency = np.bincount(numbers, minlength=len(words))                             # (words,)
    idf = np.log(1 + (len(lengths) - frequency + 0.5) / (frequency + 0.5))
    norm = 0.9 * (1 - 0.4 + 0.4 * np.array(lengths) / max(np.mean(lengths), 1e-9))     # (passages,)
    weights = (idf[numbers] * counts / (counts + norm[rows])).astype(np.float32)
    order, ends = np.argsort(numbers, kind="stable"), np.cumsum(frequency)
    rows, weights, began = rows[order], weights[order], time.perf_counter()
    scores, best = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1)
    for i, query in enumerate(tqdm(queries, desc="BM25 search", unit="query", leave=False)):
        total = np.zeros(len(texts), np.float32)
        for word, count in Counter(re.findall(r"\w+", query.lower())).items():
            if (number := words.get(word)) is not None:
                at = slice(ends[number] - frequency[number], ends[number])
                total[rows[at]] += count * weights[at]
        matched = np.flatnonzero(total)
        top = matched[np.argsort(-total[matched], kind="stable")[:k]]
        scores[i, : len(top)], best[i, : len(top)] = total[top], top
    return scores, best, time.perf_counter() - began

# ---- encoding

CHUNK = 4096  # passages in a file of vectors
TOKENS = 16384  # tokens in a batch to encode

class Encoder:
    """[CLS] vectors of texts by a masked LM; `key` is a hash of its weights and what else they depend on."""

    def __init__(self, config: RetrievalConfig, device: torch.device):
        self.config, self.device = config, device
        self.dtype = bow_mae.compute_dtype(config.precision, device)
        self.tokenizer = bow_mae.load_tokenizer(config.model)
        longest = max(config.max_query_length, config.max_passage_length)
        self.lm = bow_mae.load_lm(config.model, self.tokenizer, longest, config.seed).to(device).eval()
        flags = f"{self.dtype} {config.similarity} {config.max_passage_length}"
        weights = hashlib.sha256((flags + self.tokenizer.backend_tokenizer.to_str()).encode())
        for tensor in self.lm.base_model.state_dict().values():
            weights.update(tensor.cpu().numpy().tobytes())
        self.key = weights.hexdigest()

    @torch.no_grad()
    def __call__(self, texts: list[str], max_length: int) -> np.ndarray:
        """The vectors (N, D) of texts, float32, computed in batches of like length."""
        vectors = np.empty((len(texts), self.lm.config.hidden_size), np.float32)
        tokens = self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
        order, start = sorted(range(len(texts)), key=lambda i: -len(tokens[i])), 0
        while start < len(order):
            some = order[start : start + max(1, TOKENS // len(tokens[order[start]]))]
            batch = self.tokenizer.pad({"input_ids": [tokens[i] for i in some]}, return_tensors="pt")
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                cls = cls_vectors(self.lm.base_model, batch, self.config.similarity)
            vectors[some] = cls.cpu().numpy()
            start += len(some)
        if not np.isfinite(vectors).all():
            raise UserError(f"--model {self.config.model}: a vector is not finite; set --precision fp32")
        return vectors

def cls_vectors(encoder, batch, similarity: str):
    """h_CLS (B, D) as float32, of norm 1 for `cos`, of input_ids and attention_mask (B, L) on any device."""
    batch = batch.to(encoder.device)
    cls = encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0].float()
    return F.normalize(cls, dim=1) if similarity == "cos" else cls                     # (B, D)

def encode_passages(config: RetrievalConfig, task: Task, encoder: Encoder) -> list[Path]:
    """Write the vectors of this process's share of the passages, CHUNK a file; returns the files in order.

    A file is named by a hash of the encoder and its texts, so one that an earlier run finished serves again.
    """
    with blame(f"--index {config.index}"):  # a typo must not cost the encoding
        faiss.index_factory(encoder.lm.config.hidden_size, config.index)
    folder, size, rank, files = Path(config.output, "vectors"), len(task.passages), dist.get_rank(), []
    starts = np.array_split(np.arange(0, size, CHUNK), dist.get_world_size())[rank]
    for start in tqdm(starts, "encode", unit="passage", unit_scale=CHUNK, leave=False, disable=rank > 0):
        texts = task.texts(range(start, min(start + CHUNK, size)))
        key = hashlib.sha256("\0".join([encoder.key, *texts]).encode()).hexdigest()
        files.append(folder / f"{start:010}-{key}.npy")
        if not files[-1].exists():
            vectors = encoder(texts, config.max_passage_length)
            with blame(f"--output {folder} cannot be written"):
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{start:010}.tmp.npy", vectors)
                (folder / f"{start:010}.tmp.npy").replace(files[-1])
    return files

# ---- search

def build_index(config: RetrievalConfig, task: Task, files: list[Path], encoder: Encoder):
    """The faiss index of this process's passages, by row, saved under output/index."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    path, width = Path(config.output, "index", f"{dist.get_rank():05}.faiss"), encoder.lm.config.hidden_size
    together(shutil.rmtree, path.parent, True, first=True)  # of another number of processes
    with blame(f"--index {config.index} or --output {path}"):
        kind = config.index if files else "Flat"  # without passages there is nothing to train on
        index = faiss.index_factory(width, f"IDMap,{kind}", faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:  # on up to 100,000 vectors, evenly spaced
            step = -(-len(files) * CHUNK // 100_000)
            index.train(np.concatenate([np.load(file, mmap_mode="r")[::step] for file in files]))
        if (inverted := faiss.try_extract_index_ivf(index)) is not None:
            inverted.nprobe = max(1, inverted.nlist // 16)  # lists probed per query; the default is 1
        for file in files:
            vectors = np.load(file)
            index.add_with_ids(vectors, np.arange(len(vectors)) + int(file.stem[:10]))
        path.parent.mkdir(exist_ok=True)
        faiss.write_index(index, str(path))
        bow_mae.write_json(path.with_suffix(".json"), {
            "model": encoder.key, "passages": task.passages._fingerprint, "processes": dist.get_world_size()})
    return index

def merge(found: list) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several processes' (scores, rows), each (Q, k)."""
    scores, rows = (np.ascontiguousarray(np.stack(arrays)) for arrays in zip(*found))  # (shards, Q, k)
    return faiss.merge_knn_results(scores, rows, keep_max=True)

def retrieve(config: RetrievalConfig, task: Task, device: torch.device, k: int):
    """Scores and rows (Q, k) of the best passages and the seconds of the search, for the first process."""
    queries = list(task.queries.values())
    if config.model == "bm25":
        return together(lambda: bm25(task.texts(range(len(task.passages))), queries, k), first=True)
    encoder = together(Encoder, config, device)
    files = together(encode_passages, config, task, encoder)
    index = together(build_index, config, task, files, encoder)
    began, everyone = time.perf_counter(), [None] * dist.get_world_size()
    # in groups that do not depend on the number of processes, as padding changes the last bits of a vector
    starts = np.array_split(np.arange(0, len(queries), 256), len(everyone))[dist.get_rank()]
    vectors = together(lambda: [encoder(queries[at : at + 256], config.max_query_length) for at in starts])
    dist.all_gather_object(everyone, vectors)
    gathered = [None] * len(everyone) if dist.get_rank() == 0 else None
    dist.gather_object(index.search(np.concatenate(sum(everyone, [])), k), gathered)
    return (*merge(gathered), time.perf_counter() - began) if gathered else None

def ranking(hits: dict[str, float]) -> list[str]:
    """Passage ids by falling score (as float32), then by falling id, as trec_eval ranks them."""
    return sorted(hits, key=lambda name: (np.float32(hits[name]), name.encode()), reverse=True)

def make_run(task: Task, scores, rows, k: int):
    """Yield each query id with its k best passages {passage id: score}, of scores and rows (Q, more)."""
    ids = list(task.rows)
    for query_id, some_scores, some_rows in zip(task.queries, scores, rows):
        hits = {ids[row]: score for score, row in zip(some_scores.tolist(), some_rows.tolist()) if row >= 0}
        if task.same_ids:
            hits.pop(query_id, None)
        yield query_id, {name: hits[name] for name in ranking(hits)[:k]}

# ---- metrics

def evaluate_run(run: dict, qrels: dict, relevance_level: int = 1, keep_identical_ids: bool = False) -> dict:
    """Each metric of each query, {query id: {metric: value}}, to agree with trec_eval -c.

    run {query id: {passage id: score}}, qrels {query id: {passage id: grade}}. A query without a passage of a
    positive grade is left out, one that the run lacks scores 0. A passage is relevant from relevance_level
    on; nDCG has the grades as gains (trec_eval m_ndcg_cut.c), MAP is cut at 1000 (m_map.c). A passage with
    the id of its query is dropped, as in BEIR, unless keep_identical_ids.
    """
    results, dcg = {}, lambda gains: sum(gain / np.log2(rank + 1) for rank, gain in enumerate(gains, 1))
    for query_id, judged in qrels.items():
        if max(judged.values(), default=0) < 1:
            continue
        names = [name for name in ranking(run.get(query_id, {})) if keep_identical_ids or name != query_id]
        grades = [max(judged.get(name, 0), 0) for name in names[:10]]
        ideal = sorted((max(grade, 0) for grade in judged.values()), reverse=True)[:10]
        count = sum(grade >= relevance_level for grade in judged.values()) or 1
        ranks = [rank for rank, name in enumerate(names, 1) if judged.get(name, 0) >= relevance_level]
        precisions = [found / rank for found, rank in enumerate(ranks, 1) if rank <= 1000]
        results[query_id] = {
            "MRR@10": 1 / ranks[0] if ranks and ranks[0] <= 10 else 0.0,
            "nDCG@10": dcg(grades) / dcg(ideal),
            "MAP@1000": sum(precisions) / count,
            **{f"Recall@{k}": sum(rank <= k for rank in ranks) / count for k in (50, 100, 1000)},
            **{f"Hit@{k}": float(any(rank <= k for rank in ranks)) for k in (1, 10, 50, 1000)}}
    return results

def mean(results: dict) -> dict[str, float]:
    """The mean of each metric over queries."""
    names = next(iter(results.values()), {})
    return {name: float(np.mean([values[name] for values in results.values()])) for name in names}

def answer_tokens(text: str) -> list[str]:
    """DPR's words of a text: runs of letters, digits and marks, or single other visible characters."""
    tokens, kind = [], lambda character: unicodedata.category(character)[0]
    for word, run in groupby(unicodedata.normalize("NFD", text), lambda character: kind(character) in "LNM"):
        tokens += ["".join(run).lower()] if word else [one.lower() for one in run if kind(one) not in "ZC"]
    return tokens

def answer_hits(run: dict, answers: dict[str, list[str]], body) -> dict[str, dict[str, float]]:
    """AnswerHit@k of each query: whether one of its k best passages has an answer, by DPR's `has_answer`.

    body(passage id) is a passage's text without its title.
    """
    joined, results = lambda tokens: "\0" + "\0".join(tokens) + "\0", {}  # to seek a sequence of tokens in
    for query_id, wanted in answers.items():
        wanted = [joined(tokens) for tokens in map(answer_tokens, wanted) if tokens]
        texts = (joined(answer_tokens(body(name))) for name in ranking(run.get(query_id, {}))[:100])
        ranks = (rank for rank, text in enumerate(texts, 1) if any(answer in text for answer in wanted))
        first = next(ranks, np.inf)
        results[query_id] = {f"AnswerHit@{k}": float(first <= k) for k in (5, 20, 100)}
    return results

def permutation_test(differences: np.ndarray, seed: int = 0, draws: int = 10_000) -> float:
    """The two-sided p-value of paired differences (Q,): how often random signs give as large a mean."""
    rng, observed = np.random.default_rng(seed), abs(differences.sum())
    signs = (rng.integers(0, 2, (100, len(differences))) * 2 - 1 for _ in range(draws // 100))
    larger = sum(int((abs(some @ differences) >= observed - 1e-9).sum()) for some in signs)
    return (larger + 1) / (draws + 1)

def read_run(path: str) -> dict[str, dict[str, float]]:
    """A TREC run file, `qid Q0 docid rank score tag` a line."""
    run = defaultdict(dict)
    for number, fields in read_records(Path(path)):
        with blame(f"{path}, line {number}: give qid Q0 docid rank score tag"):
            run[fields[0]][fields[2]] = float(fields[4])
    return dict(run)

# ---- fine-tuning

def judged_examples(config: RetrievalConfig, task: Task) -> list[dict]:
    """The training queries with the rows of their relevant passages and of their mined negatives, if any."""
    path, negatives, examples = config.negatives_file, {}, []
    for number, record in read_records(Path(path)) if path else []:
        query_id, names = str(record.get("query_id")), record.get("negatives")
        known = query_id in task.queries and isinstance(names, list)
        if not known or not task.rows.keys() >= {*map(str, names)}:
            raise UserError(f"--negatives_file {path}, line {number}: query {query_id!r} is not in "
                            f"--train_split {config.train_split}, or a negative is not in --data")
        negatives[query_id] = np.array([task.rows[str(name)] for name in names
                                        if task.qrels[query_id].get(str(name), 0) < 1], np.int32)
    for query_id, judged in task.qrels.items():
        positives = [task.rows[name] for name in judged if judged[name] >= config.relevance_level]
        examples.append({"query": task.queries[query_id], "positives": positives,
                         "negatives": negatives.get(query_id, [])})
    return [example for example in examples if example["positives"]]

def read_examples(path: str):
    """Yield the examples of a .jsonl in Tevatron's format; a `score` in a passage is a teacher's."""
    for number, record in read_records(Path(path)):
        sides = [record.get("positive_passages"), record.get("negative_passages") or []]
        if not isinstance(record.get("query"), str) or not sides[0] or not all(
                isinstance(side, list) and all(isinstance(p, dict) for p in side) for side in sides):
            raise UserError(f"--train_data {path}, line {number}: give a query and positive_passages, a list")
        example = {"query": record["query"]}
        for side, passages in zip(("positives", "negatives"), sides):
            example[side] = [f"{p.get('title') or ''} {p.get('text') or ''}".strip() for p in passages]
            example[f"{side}_scores"] = [p.get("score") for p in passages]
        yield example

class FinetuningSteps(torch.utils.data.Dataset):
    """This process's micro-batches of a step, by (seed, step) alone; an epoch drops its incomplete batch."""

    def __init__(self, config: RetrievalConfig, tokenizer, examples, task: Task | None):
        self.config, self.tokenizer, self.examples, self.task = config, tokenizer, examples, task
        share = config.batch_size // dist.get_world_size()
        self.starts = range(dist.get_rank() * share, (dist.get_rank() + 1) * share, config.micro_batch_size)

    def __getitem__(self, step: int) -> list[dict]:
        config, cut = self.config, {"truncation": True, "padding": True, "return_tensors": "pt"}
        epoch, at = divmod(step - 1, len(self.examples) // config.batch_size)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(self.examples))
        batches, chosen = [], order[at * config.batch_size : (at + 1) * config.batch_size]
        for first in self.starts:
            queries, passages, scores = zip(*(self.draw(int(i), epoch)
                                              for i in chosen[first : first + config.micro_batch_size]))
            batches.append({
                "queries": self.tokenizer(list(queries), max_length=config.max_query_length, **cut),  # (b, L)
                "passages": self.tokenizer(sum(passages, []), max_length=config.max_passage_length, **cut),
                "teacher": torch.tensor(np.array(scores, np.float32)),                 # (b, 1+n), NaN: none
                "seed": hash((config.seed, step, first))})  # of integers: the same in every process
        return batches

    def draw(self, i: int, epoch: int) -> tuple[str, list[str], list]:
        """A query, one of its positives and --negatives of its negatives, drawn each epoch; their scores."""
        example, count = self.examples[i], self.config.negatives
        rng = np.random.default_rng([self.config.seed, epoch, i])
        positive, pool = rng.integers(len(example["positives"])), example["negatives"]
        if not len(pool):  # passages of other queries
            others = map(int, rng.integers(len(self.examples), size=count + 64))
            found = (self.examples[other]["positives"][0] for other in others)
            pool = list(islice((one for one in found if one not in example["positives"]), count))
            if count and not pool:
                raise UserError(f"--negatives {count}: no passage of another query can be one")
        picks = rng.choice(len(pool), count, replace=len(pool) < count)
        passages = [example["positives"][positive], *(pool[pick] for pick in picks)]
        scores, given = [None] * len(passages), example.get("negatives_scores")
        if given:
            scores = [example["positives_scores"][positive], *(given[pick] for pick in picks)]
        return example["query"], self.task.texts(passages) if self.task else passages, scores

class BiEncoder(nn.Module):
    """InfoNCE of queries against the passages of all queries in the step, on all processes (paper §4.2)."""

    def __init__(self, encoder, config: RetrievalConfig):
        super().__init__()
        self.encoder, self.config = encoder, config

    def forward(self, batches: list[dict]) -> dict:
        """The losses over all queries of the step, by name, from this process's micro-batches.

        Each process back-propagates through its own vectors: over processes the gradients sum to that of one.
        All passages of other queries are negatives, as in DPR.
        """
        encoded = []
        for batch in batches:
            torch.manual_seed(batch["seed"])  # the dropout does not depend on who encodes the micro-batch
            encoded.append([cls_vectors(self.encoder, batch[side], self.config.similarity)
                            for side in ("queries", "passages")] + [batch["teacher"].to(self.encoder.device)])
        queries, passages, teacher = (gather(torch.cat(rows)) for rows in zip(*encoded))
        with torch.autocast(queries.device.type, enabled=False):  # bf16 keeps 3 digits of a score
            scores = queries @ passages.T / self.config.temperature                    # (B, B·(1+n))
        group = teacher.shape[1]
        own = torch.arange(len(passages), device=scores.device).view(-1, group)        # (B, 1+n) columns
        losses = {"contrastive_loss": F.cross_entropy(scores, own[:, 0])}
        scored = ~teacher.isnan().any(1)                                               # (B,)
        if scored.any():
            student = scores.gather(1, own)[scored].log_softmax(1)
            losses["teacher_loss"] = F.kl_div(student, teacher[scored].softmax(1), reduction="batchmean")
        return losses

def gather(rows):
    """The rows of all processes, in order, from those of this one (b, ...), which keep their gradient."""
    everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, rows.detach())
    everyone[dist.get_rank()] = rows
    return torch.cat(everyone)                                                         # (B, ...)

def load_examples(config: RetrievalConfig):
    """The training examples and, unless --train_data has their texts, the task whose passages they name."""
    if config.train_data:
        text, number = datasets.Value("string"), datasets.Value("float32")
        examples, task = cached(read_examples, Path(config.train_data), datasets.Features({
            "query": text, "positives": [text], "positives_scores": [number],
            "negatives": [text], "negatives_scores": [number]})), None
    else:
        task = load_task(config, config.train_split)
        examples = judged_examples(config, task)
    if len(examples) < config.batch_size:
        raise UserError(f"--batch_size {config.batch_size} is above the {len(examples)} training queries")
    return examples, task

def finetune(config: RetrievalConfig, device: torch.device) -> None:
    """Fine-tune --model on the training queries, from the newest checkpoint or the start, into --output."""
    dtype = bow_mae.compute_dtype(config.precision, device)
    examples, task = together(load_examples, config, first=True)
    config = replace(config, steps=config.steps or len(examples) // config.batch_size * config.epochs)
    checkpoint = together(bow_mae.find_checkpoint, config, first=True)
    source, longest = checkpoint or config.model, max(config.max_query_length, config.max_passage_length)
    tokenizer = together(bow_mae.load_tokenizer, source, first=True)
    lm = together(bow_mae.load_lm, source, tokenizer, longest, config.seed).to(device).train()
    model = BiEncoder(lm.base_model, config)
    optimizer, scaler, state = bow_mae.load_optimizer(config, model, checkpoint, device)
    stream = FinetuningSteps(config, tokenizer, examples, task)
    loader = iter(torch.utils.data.DataLoader(
        stream, batch_size=None, sampler=range(state["step"] + 1, config.steps + 1),
        num_workers=config.workers, worker_init_fn=bow_mae.leave_signals))
    ddp = bow_mae.wrap_ddp(model, together(stream.__getitem__, 1), device, dtype)
    together(bow_mae.write_run, config, device, state.get("logged", 0), first=True)

    def _step(step):
        began = time.perf_counter()
        batches = together(next, loader)
        waited, lr = time.perf_counter() - began, bow_mae.learning_rate(config, step)
        masks = [batch[side]["attention_mask"] for batch in batches for side in ("queries", "passages")]
        sizes = [sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)]
        tokens, positions = bow_mae.agree(numbers=sizes)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = ddp(batches)
        loss = sum(losses.values())
        scaler.scale(loss * dist.get_world_size()).backward()  # DDP divides by the number of processes
        grad_norm = bow_mae.update(ddp, optimizer, scaler, lr)
        logged = {name: value.detach() for name, value in ({"loss": loss} | losses).items()}
        counts = {"tokens": tokens, "positions": positions, "waited": waited}
        return logged | {"grad_norm": grad_norm, "lr": lr}, counts

    def _save(step):
        state = {"step": step, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        together(bow_mae.save_checkpoint, config, lm, tokenizer, state, config.max_passage_length,
                 {"dot": "dot", "cos": "cosine"}[config.similarity], first=True)

    if dist.get_rank() == 0:
        print(f"fine-tuning {config.model}: {len(examples):,} queries | {config.batch_size} a step, with "
              f"1 + {config.negatives} passages, on {dist.get_world_size()} process(es) | "
              f"{config.steps} steps | {device} {dtype}", flush=True)
    bow_mae.run_steps(config, device, state["step"], _step, _save)
    together(bow_mae.finish, config, first=True)

# ---- negatives mining

def mine(config: RetrievalConfig, device: torch.device) -> None:
    """Write output/negatives.jsonl: for each training query, passages not relevant, of ranks --depth."""
    together(bow_mae.find_checkpoint, config, first=True)
    task = together(load_task, config, config.train_split, first=True)
    together(bow_mae.write_run, config, device, first=True)
    found = retrieve(config, task, device, config.depth[1] + 1)
    together(write_negatives, config, task, found, first=True)

def write_negatives(config: RetrievalConfig, task: Task, found) -> None:
    """Draw --sample of the ranks --depth of each query, without its own positives and near-positives."""
    scores, rows, _ = found
    path, kept, empty = Path(config.output, "negatives.jsonl"), 0, 0
    with blame(f"--output {path} cannot be written"), path.with_suffix(".tmp").open("w") as file:
        for i, (query_id, hits) in enumerate(make_run(task, scores, rows, config.depth[1])):
            positives = {name for name, grade in task.qrels[query_id].items() if grade > 0}
            names = [name for name in list(hits)[config.depth[0] - 1 :] if name not in positives]
            if config.max_positive_ratio and hits:  # an unretrieved positive gets the last score
                best = max((hits[name] for name in positives & hits.keys()), default=min(hits.values()))
                most = best - (1 - config.max_positive_ratio) * abs(best)
                names = [name for name in names if hits[name] <= most]
            rng, count = np.random.default_rng([config.seed, i]), min(config.sample, len(names))
            chosen = [names[pick] for pick in sorted(rng.choice(len(names), count, replace=False))]
            kept, empty = kept + len(chosen), empty + (not chosen)
            file.write(json.dumps({"query_id": query_id, "negatives": chosen,
                                   "scores": [hits[name] for name in chosen]}) + "\n")
    path.with_suffix(".tmp").replace(path)
    print(f"{kept:,} negatives of {len(task.queries):,} queries in {path}, none of {empty:,}")

# ---- commands

def evaluate(config: RetrievalConfig, device: torch.device) -> dict | None:
    """Retrieve for the queries of --split and write the metrics; returns their means, on the first."""
    together(bow_mae.find_checkpoint, config, first=True)
    task = together(load_task, config, config.split, first=True)
    other = together(read_run, config.compare, first=True) if config.compare else None
    together(bow_mae.write_run, config, device, first=True)
    found = retrieve(config, task, device, config.top_k + 17)  # some more, for ties and identical ids
    return together(report, config, task, found, other, first=True)

def report(config: RetrievalConfig, task: Task, found, other: dict | None = None) -> dict:
    """Write run.trec, qrels.trec, per_query.jsonl and metrics.json; returns the means of the metrics."""
    scores, rows, seconds = found
    run, output = dict(make_run(task, scores, rows, config.top_k)), Path(config.output)
    tag = Path(config.model).resolve().name.replace(" ", "_")  # a space would end the field
    results = evaluate_run(run, task.qrels, config.relevance_level, not task.same_ids)
    answered = answer_hits(run, task.answers, lambda name: task.passages[task.rows[name]]["text"] or "")
    means = mean(results) | mean(answered) | {"queries/s": len(run) / seconds}
    with blame(f"--output {output} cannot be written"):
        with (output / "run.trec").open("w") as file:
            file.writelines(f"{query_id} Q0 {name} {rank} {hits[name]!r} {tag}\n"
                            for query_id, hits in run.items() for rank, name in enumerate(hits, 1))
        (output / "qrels.trec").write_text("".join(
            f"{query_id} 0 {name} {grade}\n" for query_id in task.qrels
            for name, grade in task.qrels[query_id].items()))
        (output / "per_query.jsonl").write_text("".join(
            json.dumps({"query_id": name} | results.get(name, {}) | answered.get(name, {})) + "\n"
            for name in results | answered))
        bow_mae.write_json(output / "metrics.json", means)
    bow_mae.print_table({name: {"": value} for name, value in means.items()}, [""], config.model)
    if other is not None:
        compare(config, results, evaluate_run(other, task.qrels, config.relevance_level, not task.same_ids))
    return means

def compare(config: RetrievalConfig, results: dict, others: dict) -> None:
    """Print the mean difference of each metric from --compare, with the p-value of a permutation test."""
    rows = {}
    for name, ours in mean(results).items():
        differences = np.array([results[query_id][name] - others[query_id][name] for query_id in results])
        rows[name] = {"ours": ours, "theirs": ours - differences.mean(), "difference": differences.mean(),
                      "p": permutation_test(differences, config.seed)}
    bow_mae.print_table(rows, ["ours", "theirs", "difference", "p"])
    bow_mae.write_json(Path(config.output, "compare.json"), rows)

def recipe(config: RetrievalConfig, device: torch.device) -> None:
    """The paper's two stages, each command in a folder of its own under --output, and a table of them."""
    output, table, model, folder = Path(config.output), {}, config.model, "zero_shot"
    on = lambda folder, **flags: replace(config, output=str(output / folder), **flags)
    table["BM25"] = evaluate(on("bm25", model="bm25"), device)
    table["zero-shot"] = evaluate(on(folder), device)
    for stage in ("stage1", "stage2"):  # each from the pre-trained model, its negatives from the one before
        mine(on(folder, model=model), device)
        negatives = str(output / folder / "negatives.jsonl")
        finetune(on(f"{stage}/model", negatives_file=negatives), device)
        folder, model = f"{stage}/test", str(output / stage / "model")
        table[stage] = evaluate(on(folder, model=model), device)
    if dist.get_rank() == 0:
        bow_mae.print_table(table, ["MRR@10", "nDCG@10", "Recall@100", "Hit@10", "queries/s"])
        bow_mae.write_json(output / "table.json", table)

def search(config: RetrievalConfig, device: torch.device, text: str) -> None:
    """Print the ten best passages for a text, or for each line typed, from the index of `evaluate`."""
    encoder, task = Encoder(config, device), load_task(config, config.split)
    folder, indexes = Path(config.output, "index"), []
    for path in sorted(folder.glob("*.json")):
        with blame(f"--output {path} cannot be read; run `evaluate` again"):
            saved, index = json.loads(path.read_text()), faiss.read_index(str(path.with_suffix(".faiss")))
        if (saved.get("model"), saved.get("passages")) != (encoder.key, task.passages._fingerprint):
            raise UserError(f"--output {path} (dimension {index.d}) is of another --data, --model or its "
                            f"flags: give those, or run `evaluate` again")
        indexes.append(index)
    if not indexes or len(indexes) != saved["processes"]:
        raise UserError(f"--output {folder} holds no complete index: run `evaluate` with these flags first")
    with contextlib.suppress(EOFError, KeyboardInterrupt, UnicodeDecodeError):
        for line in [text] if text else iter(lambda: input("search: ").strip(), ""):
            vectors = encoder([line], config.max_query_length)
            scores, rows = merge([index.search(vectors, 10) for index in indexes])
            for score, row in zip(scores[0].tolist(), rows[0].tolist()):
                if row >= 0:
                    passage = " ".join(task.texts([row])[0].split())
                    print(f"{score:8.3f}  {task.passages[row]['_id']}\n          {passage[:150]}")

def explain(config: RetrievalConfig, device: torch.device, text: str) -> None:
    """Print a text with the terms its [CLS] holds in colour, the 20 best terms of [CLS] and the coverage."""
    encoder = Encoder(config, device)
    tokens = encoder.tokenizer(text, truncation=True, max_length=config.max_passage_length,
                               return_offsets_mapping=True)
    input_ids = torch.tensor([tokens["input_ids"]], device=device)
    special = bow_mae.special_table(encoder.tokenizer, encoder.lm.config.vocab_size).to(device)
    with torch.no_grad():
        hidden = encoder.lm.base_model(input_ids).last_hidden_state[:, 0]
        logits = bow_mae.mlm_head(encoder.lm, hidden).float()                          # (1, V)
    terms = bow_mae.bag_of_words(input_ids, special)[0]                                # (V,)
    covered = set(logits[0].topk(int(terms.sum())).indices.tolist())
    shown, end = "", 0
    for token, (first, last) in zip(tokens["input_ids"], tokens["offset_mapping"]):
        piece = text[max(first, end) : last]  # byte-level BPE gives some characters to two tokens
        held = piece and token in covered and sys.stdout.isatty()
        shown += text[end:first] + (f"\033[32m{piece}\033[0m" if held else piece)
        end = max(end, last)
    print(f"{shown}{text[end:]}\n\n{'term':<20}{'weight':>8}  in the text")
    weights, best = logits[0].softmax(0).topk(20)
    for weight, term in zip(weights.tolist(), best.tolist()):
        name = encoder.tokenizer.convert_ids_to_tokens(term) or "(no token)"
        print(f"{name:<20}{weight:>8.4f}  {'yes' if terms[term] else ''}")
    coverage = bow_mae.term_coverage(logits, input_ids, special).item()
    print(f"\n{coverage:.1%} of the {int(terms.sum())} terms are among the {int(terms.sum())} best")

COMMANDS = {"evaluate": evaluate, "mine": mine, "finetune": finetune, "search": search, "explain": explain}

def main(argv: list[str] | None = None) -> None:
    """Run a command, or all of the recipe; exits with 2 and one line on an error that the user can fix."""
    argv = sys.argv[1:] if argv is None else argv
    words = list(takewhile(lambda word: not word.startswith("-"), argv))  # a command, and perhaps its text

    def _parse():
        if words and words[0] not in COMMANDS:
            raise UserError(f"{words[0]}: the commands are {' '.join(COMMANDS)}, or none for all")
        if len(words) > 1 + (words[:1] in (["search"], ["explain"])):
            raise UserError(f"{words[-1]!r} is no flag; a text to search or explain needs quotation marks")
        if words[:1] == ["explain"] and not "".join(words[1:]).strip():
            raise UserError("explain needs a text, in quotation marks")
        return bow_mae.parse_config(argv[len(words) :], RetrievalConfig, words[:1] in ([], ["finetune"]))

    with bow_mae.process_group() as device:
        config, command = together(_parse), COMMANDS[words[0]] if words else recipe
        if command in (search, explain):
            together(command, config, device, clean("".join(words[1:])), first=True)
        else:
            command(config, device)

if __name__ == "__main__":
    main()
    bow_mae.leave()
