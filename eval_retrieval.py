# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""Evaluate, fine-tune and search with dense retrievers (arXiv 2401.11248, §4).

The paper's recipe on the documentation of the installed Python packages, after `bow_mae.py`:

    torchrun eval_retrieval.py

Its steps one by one, and two commands that look inside:

    torchrun eval_retrieval.py evaluate --data BeIR/scifact --output out/scifact
    torchrun eval_retrieval.py mine --data mydata --model bm25 --output out/mined
    torchrun eval_retrieval.py finetune --data mydata --negatives_file out/mined/negatives.jsonl
    python eval_retrieval.py search "how to read a csv file" --output out/scifact
    python eval_retrieval.py explain "Read a comma-separated values file."
"""

import gzip
import itertools
import json
import math
import os
import re
import shutil
import sys
import unicodedata
import zlib
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import faiss
import numpy as np
import pandas as pd
import regex
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from datasets.fingerprint import Hasher
from faiss.contrib.evaluation import knn_intersection_measure
from faiss.contrib.exhaustive_search import knn_ground_truth
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForMaskedLM
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.utils import cached_file

import bow_mae
from bow_mae import UserError, flag, print_once

# ---- Config

# Defaults of flags that depend on --data: the paper's values, and those of a short run.
DEFAULTS = {"max_passage_length": (144, 96), "negatives": (15, 1), "epochs": (3, 1)}
DEFAULTS |= {"micro_batch_size": (16, 64), "lr": (2e-5, 5e-4), "weight_decay": (0.0, 0.01)}


def unset(name, meaning):
    """A flag whose default depends on --data; `complete_config` fills it in from DEFAULTS."""
    paper, short = DEFAULTS[name]
    return flag(None, f"{meaning}; {paper}, or {short} for python-docs")


@dataclass
class RetrievalConfig:
    """Evaluate, fine-tune and search with dense retrievers. Without a command: the whole recipe."""

    # Data and encoder.
    data: str = flag("python-docs", "python-docs, BEIR folder or hub dataset")
    model: str = flag("out/bow_mae", "encoder (folder or hub name), or bm25")
    output: str = flag("out/retrieval", "folder for everything that is written")
    pooling: Literal["auto", "cls", "mean"] = flag("auto", "auto: as its files say")
    similarity: Literal["auto", "dot", "cos"] = flag("auto", "auto: as its files say")
    query_prefix: str | None = flag(None, "unset: the prompt that its files name")
    passage_prefix: str | None = flag(None, "unset: the prompt that its files name")
    max_query_length: int = flag(32, "tokens in a query, without the prefix")
    max_passage_length: int | None = unset("max_passage_length", "tokens in a passage, likewise")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = flag("auto", "for autocast")
    seed: int = flag(0, "seed of sampling, dropout and the order of queries")
    # Search and evaluation.
    index: str = flag("Flat", "FAISS index, such as 'IVF1024,Flat nprobe=64'")
    split: str = flag("test", "split to evaluate")
    top_k: int = flag(1000, "passages per query; no metric is cut deeper")
    relevance_level: int = flag(1, "lowest relevant grade; nDCG uses all grades")
    keep_identical_ids: bool = flag(False, "keep a passage that has its query's id")
    compare: str = flag("", "run.trec of another run, for a permutation test")
    # Mining.
    train_split: str = flag("train", "split to train on, or to mine for")
    depth: list[int] = HfArg(default_factory=lambda: [3, 200], help="first and last rank to mine")
    sample: int = flag(128, "negatives to draw from these ranks")
    # Fine-tuning.
    negatives_file: list[str] = HfArg(default_factory=list, help="files that `mine` has written")
    negatives: int | None = unset("negatives", "hard negatives per query in a step")
    temperature: float | None = flag(None, "of the softmax; 1 for dot, 0.05 for cos")
    batch_size: int = flag(64, "queries in a step, over all processes")
    epochs: int | None = unset("epochs", "passes over the training queries")
    steps: int | None = flag(None, "optimizer steps; unset: those of --epochs")
    micro_batch_size: int | None = unset("micro_batch_size", "queries to encode at a time")
    lr: float | None = unset("lr", "peak learning rate")
    lr_final_ratio: float = flag(0.1, "final lr as a fraction of the peak")
    warmup_steps: int | None = flag(None, "linear warm-up; a twentieth of --steps")
    weight_decay: float | None = unset("weight_decay", "AdamW's")
    adam_beta2: float = flag(0.999, "AdamW's beta2")
    save_every: int = flag(500, "steps between checkpoints")
    keep: int = flag(1, "number of newest checkpoints to keep")
    log_every: int = flag(10, "steps between lines of metrics.jsonl")


# ---- 1. The encoder


class Encoder(nn.Module):
    """Vectors of texts by any encoder. `lm` is what gets saved, with its head if it has one."""

    def __init__(self, config, device):
        super().__init__()
        source = config.model
        self.tokenizer = bow_mae.load_tokenizer(source)
        try:
            lm, report = AutoModelForMaskedLM.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # damaged or unfit models raise all kinds of exceptions
            reason = bow_mae.short_reason(error)
            raise UserError(f"--model {source} cannot be loaded: {reason}") from error
        missing = report["missing_keys"]
        if lm.config.is_encoder_decoder:
            raise UserError(f"--model {source} is an encoder-decoder, not an encoder")
        if any(name.startswith(f"{lm.base_model_prefix}.") for name in missing):
            raise UserError(f"--model {source} lacks weights of its encoder")
        self.lm = lm.base_model if missing else lm  # if the head is missing, keep the encoder alone
        self.device, self.dtype = device, bow_mae.compute_dtype(config.precision, device)
        self.pooling, self.similarity, self.prefixes = saved_settings(source, config)
        # Tokens of a text, [CLS] and [SEP] included; those of its prefix come on top.
        self.lengths = {"queries": config.max_query_length, "passages": config.max_passage_length}
        for side, prefix in self.prefixes.items():
            self.lengths[side] += len(self.tokenizer.tokenize(prefix))
        bow_mae.check_length(source, self.lm.base_model, self.tokenizer, max(self.lengths.values()))
        self.to(device).eval()
        weights, tokenizer = self.lm.base_model.state_dict(), self.tokenizer.backend_tokenizer
        architecture = read_model_file(source, "config.json")
        self.content_hash = Hasher.hash([weights, tokenizer.to_str(), architecture])
        settings = f"{self.dtype} on {device}, {self.pooling} pooling, {self.similarity} similarity"
        print_once(f"{source}: {settings}, prefixes {self.prefixes}, at most {self.lengths} tokens")

    def forward(self, batch):
        """Vectors (B, D), float32 and of norm 1 for `cos`, of B texts' tokens."""
        batch = self.tokenizer.pad(batch, return_tensors="pt").to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outputs = self.lm.base_model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            )
        hidden = outputs.last_hidden_state.float()  # (B, L, D)
        vectors = hidden[:, 0]  # (B, D)
        if self.pooling == "mean":
            weights = batch["attention_mask"][:, :, None].float()  # (B, L, 1)
            vectors = (hidden * weights).sum(1) / weights.sum(1)
        return F.normalize(vectors, dim=1) if self.similarity == "cos" else vectors

    def tokenize(self, texts, side):
        """Token ids of queries or passages, after their prefix, cut to their length."""
        texts = [self.prefixes[side] + text for text in texts]
        return self.tokenizer(texts, truncation=True, max_length=self.lengths[side])

    @torch.no_grad()
    def encode(self, texts, side):
        """The vectors (N, D), float32, of queries or passages, in batches of like length."""
        tokens = self.tokenize(texts, side)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        vectors = np.empty((len(texts), self.lm.config.hidden_size), np.float32)
        for start in range(0, len(texts), 64):
            rows = order[start : start + 64]
            vectors[rows] = self({"input_ids": [tokens[i] for i in rows]}).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise UserError("a vector is not finite: set --precision fp32")
        return vectors


def read_model_file(source, name):
    """The content of a JSON file of a model's folder or hub name; {} if there is none."""
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def saved_settings(source, config):
    """Pooling, similarity and prefixes: those of the flags, else of sentence-transformers' files.

    UserError for whatever else these files ask for, as vectors without it would be wrong.
    """
    modules = read_model_file(source, "modules.json")
    settings = read_model_file(source, "config_sentence_transformers.json")
    transformer = read_model_file(source, "sentence_bert_config.json")
    paths = {module["type"].split(".")[-1]: module["path"] for module in modules}
    saved = read_model_file(source, f"{paths.get('Pooling', '1_Pooling')}/config.json")
    modes = [name for name in saved if name.startswith("pooling_mode_") and saved[name]]
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    pooling = "+".join(names.get(name, name) for name in modes) or saved.get("pooling_mode", "cls")
    pooling = pooling if config.pooling == "auto" else config.pooling
    similarity = "cosine" if "Normalize" in paths else settings.get("similarity_fn_name") or "dot"
    similarity = similarity if config.similarity == "auto" else config.similarity
    prompts = settings.get("prompts") or {}
    prefixes = {"queries": config.query_prefix, "passages": config.passage_prefix}
    if config.query_prefix is None:
        prefixes["queries"] = prompts.get("query") or ""
    if config.passage_prefix is None:
        prefixes["passages"] = prompts.get("document") or prompts.get("passage") or ""
    has_prefix = any(prefixes.values())
    refused = {
        f"the modules {' '.join(paths)}": paths.keys() - {"Transformer", "Pooling", "Normalize"},
        "a Pooling without its config.json": "Pooling" in paths and not saved,
        f"pooling {pooling}": pooling not in ("cls", "mean"),
        "include_prompt: false": has_prefix and saved.get("include_prompt") is False,
        "do_lower_case: true": transformer.get("do_lower_case"),
        f"similarity {similarity}": similarity not in ("dot", "cosine", "cos"),
        "a default prompt": settings.get("default_prompt_name") and not has_prefix,
    }
    for request, is_asked_for in refused.items():
        if is_asked_for:
            raise UserError(f"--model {source} asks for {request}, which is not supported")
    return pooling, similarity.removesuffix("ine"), prefixes


def encode_collection(config, encoder, texts, side):
    """Write the vectors of texts, CHUNK_SIZE per file, split over processes; returns all files.

    The folder is named by all that the vectors depend on, so that the files of an interrupted run
    are reused. Folders of other vectors are removed at the end.
    """
    how = [encoder.content_hash, str(encoder.dtype), encoder.pooling, encoder.similarity]
    how += [encoder.prefixes[side], encoder.lengths[side], CHUNK_SIZE, texts._fingerprint]
    folder = Path(config.output, "vectors", side, Hasher.hash(how))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{start:010}.npy" for start in range(0, len(texts), CHUNK_SIZE)]
    rank = dist.get_rank()
    own = files[rank :: dist.get_world_size()]
    for file in tqdm(own, f"encode {side}", unit="file", disable=rank > 0):
        if not file.exists():
            rows = range(int(file.stem), len(texts))[:CHUNK_SIZE]
            unfinished = file.with_suffix(".tmp.npy")
            np.save(unfinished, encoder.encode(passage_texts(texts, rows), side))
            unfinished.replace(file)
    dist.barrier()
    for outdated in set(folder.parent.iterdir()) - {folder} if rank == 0 else ():
        shutil.rmtree(outdated, ignore_errors=True)
    return files


def passage_texts(passages, rows):
    """Title and text of passages, by row; either may be null or missing."""
    table = passages[list(map(int, rows))]
    titles = table.get("title", [""] * len(rows))
    pairs = zip(titles, table["text"], strict=True)
    return [f"{title or ''} {text or ''}".strip() for title, text in pairs]


# ---- 2. Fine-tuning (paper §4.2)


def finetune(config, device):
    """Fine-tune --model, from the newest checkpoint or the start; the model ends in --output.

    Gradients are cached at the vectors (GradCache, arXiv 2101.06983): the vectors of a step are
    computed without a graph, the loss is back-propagated to them, and each micro-batch is encoded
    again with a graph, to back-propagate its part. Loss and gradient are those of one big batch.
    """
    # Model, data and checkpoint.
    rank, world_size = dist.get_rank(), dist.get_world_size()
    encoder = Encoder(config, device)
    passages, examples, content_hash = load_examples(config)
    config = plan_steps(config, encoder.similarity, len(examples))
    checkpoint, state = bow_mae.load_checkpoint(config)
    inputs = {"--model": encoder.content_hash, "--data": content_hash}
    for name, value in inputs.items():
        if state.get(name, value) != value:
            raise UserError(f"--output {config.output} was begun with other content of {name}")
    if checkpoint:
        encoder = Encoder(replace(config, model=checkpoint), device)
    encoder.train()
    parameters = list(encoder.lm.base_model.parameters())
    optimizer = bow_mae.build_optimizer(config, encoder.lm.base_model)
    scaler = torch.amp.GradScaler(device.type, enabled=encoder.dtype == torch.float16)
    if checkpoint:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])

    print_once(
        f"{config.steps} steps, {config.warmup_steps} of them warm-up; in each {config.batch_size} "
        f"of the {len(examples):,} queries, with a positive and {config.negatives} negatives each; "
        f"temperature {config.temperature}"
    )
    if rank == 0:
        bow_mae.start_logs(config, device, state)

    step = last_step = state.get("step", 0)
    should_stop = False
    bar = tqdm(total=config.steps, initial=last_step, unit="step", disable=rank > 0)
    with bow_mae.catch_signals() as signals, bar:
        for step in range(last_step + 1, config.steps + 1):
            micro_batches, false_negatives = make_step(config, encoder, passages, examples, step)

            # Encode. A single micro-batch keeps its graph; several are encoded again below.
            encodes_again = len(micro_batches) > 1
            with torch.set_grad_enabled(not encodes_again):
                pairs = [encode_pair(encoder, batch) for batch in micro_batches]
            cached = [[vectors.detach().requires_grad_() for vectors in pair] for pair in pairs]

            # Loss, and its gradient at the vectors.
            vectors = [gather(torch.cat(side)) for side in zip(*cached, strict=True)]
            loss = contrastive_loss(*vectors, false_negatives.to(device), config.temperature)
            scaler.scale(loss).backward()

            # Backward through the encoder, one micro-batch at a time.
            for batch, pair, own in zip(micro_batches, pairs, cached, strict=True):
                if encodes_again:
                    pair = encode_pair(encoder, batch)
                torch.autograd.backward(pair, [vectors.grad for vectors in own])
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

            # Log.
            should_stop = bow_mae.sum_over_processes({"signals": len(signals)})["signals"] > 0
            should_save = step == config.steps or should_stop or step % config.save_every == 0
            if should_save or step % config.log_every == 0:
                epoch = step / (len(examples) // config.batch_size)
                record = {"step": step, "epoch": epoch, "loss": loss.item()}
                record |= {"lr": lr, "grad_norm": grad_norm.item()}
                bow_mae.append_metrics(config, record)
                bar.set_postfix(loss=record["loss"], epoch=record["epoch"])

            # Save.
            if should_save and rank == 0:
                state = {"step": step, **inputs, "optimizer": optimizer.state_dict()}
                state["scaler"] = scaler.state_dict()
                prompts = {"query": encoder.prefixes["queries"]}
                prompts["document"] = encoder.prefixes["passages"]
                model = (encoder.lm, encoder.tokenizer, max(encoder.lengths.values()))
                settings = (encoder.pooling, encoder.similarity, prompts)
                bow_mae.save_checkpoint(config, state, *model, *settings)
            if should_stop:
                break

    bow_mae.end_run(config, step, should_stop, signals)


def contrastive_loss(queries, passages, false_negatives, temperature):
    """InfoNCE over all passages of a step (§4.2): 1+n of each query, its positive first.

    queries (B, D), passages (B·(1+n), D); false_negatives (B, B·(1+n)) bool are the passages that
    are relevant to a query beside its positive, and so are left out.
    """
    scores = queries @ passages.T / temperature  # (B, B·(1+n))
    scores = scores.masked_fill(false_negatives, -math.inf)
    group_size = len(passages) // len(queries)
    targets = torch.arange(len(queries), device=scores.device) * group_size  # (B,)
    return F.cross_entropy(scores, targets)


def encode_pair(encoder, batch):
    """Vectors of queries (b, D) and passages (b·(1+n), D); the same dropout at each call."""
    torch.manual_seed(batch["seed"])
    return encoder(batch["queries"]), encoder(batch["passages"])


def gather(vectors):
    """The vectors of all processes in order (B, D); only this one's (b, D) carry a gradient."""
    everyone = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, vectors.detach())
    everyone[dist.get_rank()] = vectors
    return torch.cat(everyone)


def make_step(config, encoder, passages, examples, step):
    """This process's micro-batches of a step, and the step's false negatives (B, B·(1+n)) bool.

    They depend only on (seed, step). An epoch has whole steps only: the queries left over at its
    end are skipped.
    """
    epoch, place = divmod(step - 1, len(examples) // config.batch_size)
    order = np.random.default_rng([config.seed, epoch]).permutation(len(examples))
    numbers = order[place * config.batch_size :][: config.batch_size]  # (B,)
    rows = np.stack([draw_passages(config, passages, examples[i], epoch, i) for i in numbers])
    false_negatives = np.stack([np.isin(rows, examples[i].relevant).ravel() for i in numbers])
    false_negatives[:, :: rows.shape[1]] &= ~np.eye(len(rows), dtype=bool)  # but its own positive

    micro_batches = []
    size = config.batch_size // dist.get_world_size()  # of this process's part
    first = dist.get_rank() * size
    end = first + size
    for start in range(first, end, config.micro_batch_size):
        own = slice(start, min(start + config.micro_batch_size, end))
        queries = [examples[i].query for i in numbers[own]]
        texts = passage_texts(passages, rows[own].ravel())
        seeds = np.random.SeedSequence([config.seed, step, start]).generate_state(1)
        batch = {"seed": int(seeds[0]), "queries": encoder.tokenize(queries, "queries")}
        batch["passages"] = encoder.tokenize(texts, "passages")
        micro_batches.append(batch)
    return micro_batches, torch.from_numpy(false_negatives)


def draw_passages(config, passages, example, epoch, i):
    """The rows of a positive and of n negatives of query i (1+n,), others in each epoch."""
    rng = np.random.default_rng([config.seed, epoch, i])
    positive = rng.choice(example.positives)
    pool = example.negatives
    if len(pool) == 0:
        pool = rng.integers(len(passages), size=config.negatives)  # any passages
    negatives = rng.choice(pool, config.negatives, replace=len(pool) < config.negatives)
    return np.append(positive, negatives)


class Example(NamedTuple):
    """A training query, and rows of passages."""

    query: str
    positives: list[int]
    negatives: np.ndarray
    relevant: list[int]  # the positives of all queries of the same text


def load_examples(config):
    """The passages, the examples of --train_split, and a hash of both.

    An example needs a positive and, if there are any --negatives_file, a line in one of them.
    """
    task = load_task(config, config.train_split)
    negatives = defaultdict(list)  # rows by query id
    for path in config.negatives_file:
        for query_id, rows in read_lines(Path(path), lambda line: parse_negatives(line, task)):
            negatives[query_id] += rows
    positives, relevant = {}, defaultdict(list)
    for query_id, query in task.queries.items():
        grades = task.qrels.get(query_id, {})
        known = [name for name, grade in grades.items() if grade > 0 and name in task.rows]
        positives[query_id] = [task.rows[name] for name in known]
        relevant[query] += positives[query_id]

    examples = []
    for query_id, query in task.queries.items():
        if positives[query_id] and (query_id in negatives or not config.negatives_file):
            rows = np.array(negatives[query_id], np.int32)
            rows = rows[~np.isin(rows, relevant[query])]
            examples.append(Example(query, positives[query_id], rows, relevant[query]))
    num_lost = len(task.queries) - len(examples)
    if num_lost:
        print_once(f"{num_lost:,} queries without a positive or a line of negatives are left out")
    num_random = sum(len(example.negatives) == 0 for example in examples)
    if num_random and config.negatives:
        print_once(f"{num_random:,} queries get random passages as negatives")
    content = Hasher()
    content.update([task.rows, [tuple(example) for example in examples]])
    for start in range(0, len(task.passages), 1000):
        rows = range(start, len(task.passages))[:1000]
        content.update(passage_texts(task.passages, rows))
    return task.passages, examples, content.hexdigest()


def parse_negatives(line, task):
    """The query id and the rows of its negatives in a line that `mine` has written."""
    record = json.loads(line)
    query_id = str(record["query_id"])
    names = [str(name) for name in record["negatives"]]
    unknown = [name for name in names if name not in task.rows]
    if query_id not in task.queries or unknown:
        raise ValueError(f"query {query_id} or passages {unknown[:3]} are not in --data")
    return query_id, [task.rows[name] for name in names]


def plan_steps(config, similarity, num_queries):
    """The config with --steps, --warmup_steps and --temperature filled in."""
    if config.batch_size > num_queries or config.batch_size % dist.get_world_size():
        most = f"at most {num_queries}, the training queries, and a multiple of the processes"
        raise UserError(f"--batch_size {config.batch_size} must be {most}")
    steps = num_queries // config.batch_size * config.epochs
    steps = steps if config.steps is None else config.steps
    warmup_steps = steps // 20 if config.warmup_steps is None else config.warmup_steps
    if not 0 <= warmup_steps < steps:
        raise UserError(f"--warmup_steps {warmup_steps} must be below the {steps} steps of the run")
    if config.train_split == config.split:
        print_once(f"warning: training on the split that is evaluated, {config.split}")
    temperature = {"dot": 1.0, "cos": 0.05}[similarity]
    temperature = temperature if config.temperature is None else config.temperature
    if temperature <= 0:
        raise UserError(f"--temperature {temperature} must be above 0")
    return replace(config, steps=steps, warmup_steps=warmup_steps, temperature=temperature)


# ---- 3. Evaluation (paper §4.1)

CHUNK_SIZE = 1024  # vectors in a file
MOST_TRAINING_VECTORS = 300_000  # of an index, in each process
SPARE_HITS = 17  # searched beyond --top_k, for ties and for a passage that is dropped


def evaluate(config, device):
    """Retrieve for the queries of --split; write ranking and metrics, return mean metrics."""
    other = read_run(config.compare) if config.compare else {}
    task, encoder = prepare(config, config.split, device, "evaluate")
    if not task.qrels and config.top_k < 5:
        raise UserError(f"--top_k {config.top_k} is below 5, where answers are first counted")
    output = Path(config.output)
    for name in ("metrics.json", "compare.json"):  # of another ranking
        (output / name).unlink(missing_ok=True)
    ranked = retrieve(config, task, encoder, config.top_k)
    if not ranked:
        return None
    run = dict(ranked)
    with (output / "run.trec").open("w", encoding="utf-8") as file:
        for query_id, hits in run.items():
            for rank, (name, score) in enumerate(hits.items(), 1):
                file.write(f"{query_id} Q0 {name} {rank} {score!r} bow_mae\n")
    with (output / "qrels.trec").open("w", encoding="utf-8") as file:
        for query_id, grades in task.qrels.items():
            file.writelines(f"{query_id} 0 {name} {grade}\n" for name, grade in grades.items())
    results = measure_run(config, task, run)
    with (output / "per_query.jsonl").open("w", encoding="utf-8") as file:
        for query_id, values in results.items():
            file.write(json.dumps({"query_id": query_id} | values) + "\n")
    means = pd.DataFrame.from_dict(results, orient="index").mean().to_dict()
    bow_mae.write_json(output / "metrics.json", means)
    title = f"{config.model}, {len(results):,} queries, {len(task.rows):,} passages"
    bow_mae.print_table({name: {"": means[name]} for name in means}, [""], title)
    num_lost = sum(max(grades.values()) < 1 for grades in task.qrels.values())
    if num_lost:
        print(f"{num_lost} queries without a relevant passage are left out; trec_eval counts 0")
    if config.compare:
        compare(config, task, results, other)
    print(f"ranking and metrics saved in {output}", flush=True)
    return means


def prepare(config, split, device, command):
    """The task and the encoder (None for bm25) of a command, which are refused here if unfit."""
    path = Path(config.output, "run.json")
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))["config"]
        for name in ("model", "data", "split", "train_split"):
            before = saved.get(name)
            if before != getattr(config, name):
                message = f"--output {config.output} has results of --{name} {before}"
                raise UserError(f"{message}: give another --output")
    encoder = None if config.model == "bm25" else Encoder(config, device)
    if encoder:
        build_index(config, encoder.lm.config.hidden_size, [])  # refuses a wrong --index
    task = load_task(config, split)
    dist.barrier()  # all processes have read run.json
    if dist.get_rank() == 0 and not (command == "search" and path.exists()):
        bow_mae.write_run_json(config, device, command)
    return task, encoder


def retrieve(config, task, encoder, k):
    """The k best passages of each query, see `ranked_hits`; on the first process alone, else []."""
    rank, queries, depth = dist.get_rank(), list(task.queries.values()), k + SPARE_HITS
    if encoder is None:
        found = bm25(task.passages, queries, depth) if rank == 0 else None
        return ranked_hits(config, task, *found, k) if found else []
    tokens = encoder.tokenize(queries, "queries")
    num_cut = sum(len(encoding.overflowing) > 0 for encoding in tokens.encodings)
    if num_cut:
        limit = f"--max_query_length {config.max_query_length}"
        print_once(f"note: {num_cut} of {len(queries)} queries are cut to {limit} tokens")
    files = encode_collection(config, encoder, task.passages, "passages")
    texts = datasets.Dataset.from_dict({"text": queries})
    query_files = encode_collection(config, encoder, texts, "queries")
    vectors = np.concatenate([np.load(file) for file in query_files])
    own = files[rank :: dist.get_world_size()]
    width = encoder.lm.config.hidden_size
    index = build_index(config, width, own) if own else faiss.IndexFlatIP(width)
    if config.index != "Flat" and rank == 0:
        check_recall(config, index, own, vectors[:100], depth)
    found = search_index(index, vectors, depth)
    return ranked_hits(config, task, *found, k) if found else []


def build_index(config, width, files):
    """A FAISS index of --index, by inner product, of files of vectors, by row number."""
    factory, _, parameters = config.index.partition(" ")
    try:
        index = faiss.index_factory(width, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index, parameters)
        if files and not index.is_trained:
            print_once("training the index")
            every = math.ceil(len(files) * CHUNK_SIZE / MOST_TRAINING_VECTORS)
            index.train(np.concatenate([np.load(file)[::every] for file in files]))
    except RuntimeError as error:  # such as too few vectors to train it on
        raise UserError(f"--index {config.index}: {str(error).split('Error: ')[-1]}") from error
    for file in files:
        vectors = np.load(file)
        index.add_with_ids(vectors, np.arange(len(vectors)) + int(file.stem))
    return index


def check_recall(config, index, files, queries, depth):
    """Print how much of what exact search finds the index finds too, in the first process."""
    depth = min(depth, index.ntotal)
    blocks = (np.load(file) for file in files)
    _, positions = knn_ground_truth(queries, blocks, depth, faiss.METRIC_INNER_PRODUCT)
    starts = np.array([int(file.stem) for file in files])
    exact = starts[positions // CHUNK_SIZE] + positions % CHUNK_SIZE  # rows of the collection
    _, found = index.search(queries, depth)
    recalls = {k: knn_intersection_measure(exact[:, :k], found[:, :k]) for k in (10, depth)}
    shown = ", ".join(f"{recall:.3f} at {k}" for k, recall in recalls.items())
    level = "warning" if min(recalls.values()) < 0.9 else "note"
    where = " (first process's share)" if dist.get_world_size() > 1 else ""
    print(f"{level}: --index {config.index} has recall {shown} against exact search{where}")


def search_index(index, vectors, k):
    """Scores and rows (Q, k) of the best passages of all processes; None but on the first."""
    batches = np.split(vectors, range(256, len(vectors), 256))
    found = [
        index.search(batch, k) for batch in tqdm(batches, "search", disable=dist.get_rank() > 0)
    ]
    found = [np.concatenate(parts) for parts in zip(*found, strict=True)]  # scores, rows
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, everyone)
    if everyone is None:
        return None
    all_scores = np.stack([scores for scores, _ in everyone])  # (processes, Q, k)
    all_rows = np.stack([rows for _, rows in everyone])
    return faiss.merge_knn_results(all_scores, all_rows, keep_max=True)


def ranked_hits(config, task, scores, rows, k):
    """Yield each query id and its k best passages {passage id: score}, of at least k candidates."""
    ids, num_dropped = list(task.rows), 0
    for query_id, query_scores, query_rows in zip(task.queries, scores, rows, strict=True):
        found = zip(query_scores.tolist(), query_rows.tolist(), strict=True)
        hits = {ids[row]: score for score, row in found if row >= 0}
        num_dropped += drop_identical(config, task, query_id, hits)
        yield query_id, {name: hits[name] for name in ranking(hits)[:k]}
    if num_dropped:
        print_once(f"{num_dropped} hits had the id of their query and were dropped, as in BEIR")


def drop_identical(config, task, query_id, hits):
    """Drop a passage with its query's id, as BEIR does; returns whether there was one."""
    is_relevant = task.qrels.get(query_id, {}).get(query_id, 0) > 0
    if is_relevant or config.keep_identical_ids:
        return False
    return hits.pop(query_id, None) is not None


def ranking(hits):
    """Passage ids by falling score (as float32), then by falling id, as trec_eval ranks them."""
    keys = {name: (np.float32(score), name.encode()) for name, score in hits.items()}
    return sorted(keys, key=keys.get, reverse=True)


def measure_run(config, task, run):
    """Each metric of each query, by the judgements and by the answers."""
    results = evaluate_run(run, task.qrels, config.relevance_level, config.top_k)
    for query_id in task.answers:
        found = find_answers(task, query_id, ranking(run.get(query_id, {}))[:100])
        ranks = [k for k in (5, 20, 100) if k <= config.top_k]
        answered = {f"AnswerHit@{k}": float(any(found[:k])) for k in ranks}
        results[query_id] = results.get(query_id, {}) | answered
    return results


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


def dcg(grades):
    """Discounted cumulative gain of grades by rank; the gain is linear (trec_eval m_ndcg_cut.c)."""
    return sum(max(grade, 0) / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))


def find_answers(task, query_id, names):
    """Whether the text (without title) of each passage has an answer of a query."""
    texts = {}
    known = [name for name in names if name in task.rows]
    if known:
        rows = task.passages[[task.rows[name] for name in known]]
        texts = dict(zip(known, rows["text"], strict=True))
    return [has_answer(texts.get(name) or "", task.answers[query_id]) for name in names]


def has_answer(text, answers):
    """Whether a text has the words of an answer in a row, as in DPR; no words match nothing."""
    body = answer_words(text)
    return any(words.strip() and words in body for words in map(answer_words, answers))


def answer_words(text):
    """DPR's words of a text: runs of letters, digits and marks, or single visible characters."""
    text = unicodedata.normalize("NFD", text).lower()
    return " ".join(["", *regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", text), ""])


def compare(config, task, results, other):
    """Print by how much the mean of each metric is above that of --compare, with its p-value."""
    num_missing = len(results.keys() - other.keys())
    if num_missing:
        print(f"warning: {num_missing} queries are not in {config.compare} and count 0 there")
    depth = max(map(len, other.values()), default=0)
    if depth < min(config.top_k, len(task.rows)):
        reason = f"has at most {depth} passages per query: deeper metrics favour this run"
        print(f"warning: {config.compare} {reason}")
    for query_id, hits in other.items():
        drop_identical(config, task, query_id, hits)
    differences = pd.DataFrame(results) - pd.DataFrame(measure_run(config, task, other))
    table = {}
    for name, row in differences.iterrows():  # a column per query
        row = row.dropna().to_numpy()  # some queries have judgements, some answers
        table[name] = {"difference": row.mean(), "p": permutation_test(row, config.seed)}
    bow_mae.print_table(table, ["difference", "p"], f"against {config.compare}")
    bow_mae.write_json(Path(config.output, "compare.json"), table)


def permutation_test(differences, seed=0):
    """The two-sided p-value of paired differences (Q,): how often random signs give as much."""
    rng = np.random.default_rng(seed)
    draws = [rng.choice([-1, 1], len(differences)) @ differences for _ in range(10_000)]
    is_larger = np.abs(draws) >= abs(differences.sum()) - 1e-9
    return (is_larger.sum() + 1) / (len(draws) + 1)


def read_run(path):
    """A TREC run file, `qid Q0 docid rank score tag` per line; trec_eval ignores the rank."""
    run = defaultdict(dict)

    def parse(line):
        """Put a line into the run; ValueError if it is malformed."""
        query_id, _, passage_id, _, score, _ = line.split()
        if math.isnan(float(score)) or passage_id in run[query_id]:
            raise ValueError("the score is no number, or the passage occurs twice")
        run[query_id][passage_id] = float(score)

    for _ in read_lines(Path(path), parse):
        pass
    return dict(run)


# ---- 4. Mining (paper §4.2)


def mine(config, device):
    """Write output/negatives.jsonl: --sample passages of the ranks --depth for each query.

    A query's positives are taken out before ranks are counted, and passages with an answer after.
    """
    task, encoder = prepare(config, config.train_split, device, "mine")
    first, last = config.depth
    most_judged = max(map(len, task.qrels.values()), default=0)
    ranked = retrieve(config, task, encoder, last + most_judged)
    if ranked:  # on the first process
        path, num_negatives = Path(config.output, "negatives.jsonl"), 0
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("w", encoding="utf-8") as file:
            for i, (query_id, hits) in enumerate(tqdm(ranked, "mine", len(task.queries))):
                grades = task.qrels.get(query_id, {})
                names = [name for name in hits if grades.get(name, 0) < 1][first - 1 : last]
                if query_id in task.answers:
                    has_one = find_answers(task, query_id, names)
                    names = [name for name, has in zip(names, has_one, strict=True) if not has]
                picks = np.random.default_rng([config.seed, i]).permutation(len(names))
                negatives = [names[pick] for pick in sorted(picks[: config.sample])]
                num_negatives += len(negatives)
                file.write(json.dumps({"query_id": query_id, "negatives": negatives}) + "\n")
        unfinished.replace(path)
        print(f"{num_negatives:,} negatives of {len(task.queries):,} queries in {path}")
    dist.barrier()  # all processes may read what the first has written


# ---- 5. Recipe, search, explain


def recipe(config, device):
    """The paper's two stages, with negatives of BM25 and then of the first stage's model."""
    if config.model == "bm25" or config.negatives_file:
        raise UserError("the recipe mines its own negatives, and fine-tunes --model, not bm25")
    output, table = Path(config.output), {}
    for name, model in {"bm25": "bm25", "zero_shot": config.model}.items():
        table[name] = evaluate(replace(config, model=model, output=str(output / name)), device)
    miner = "bm25"
    for stage in ("stage1", "stage2"):
        mined, tuned, tested = (str(output / stage / name) for name in ("mined", "model", "test"))
        # Do not mine again once training has begun: another number of processes could change the
        # negatives.
        if not bow_mae.list_checkpoints(tuned):
            mine(replace(config, model=miner, output=mined), device)
        dist.barrier()
        negatives_file = [f"{mined}/negatives.jsonl"]
        finetune(replace(config, negatives_file=negatives_file, output=tuned), device)
        table[stage] = evaluate(replace(config, model=tuned, output=tested), device)
        miner = tuned
    if dist.get_rank() == 0:
        bow_mae.write_json(output / "table.json", table)
        names = ("MRR@10", "nDCG@10", "Recall@100", "Hit@10")
        columns = [name for name in names if name in table["bm25"]]
        bow_mae.print_table(table, columns or list(table["bm25"]))


def search(config, device, text):
    """Print the ten best passages for a text; passages are encoded if that is still to be done."""
    task, encoder = prepare(config, "", device, "search")
    task.queries["the question"] = text
    for _, hits in retrieve(config, task, encoder, 10):
        for name, score in hits.items():
            passage = " ".join(passage_texts(task.passages, [task.rows[name]])[0].split())
            print(f"{score:8.3f}  {name}\n          {passage[:150]}")


def explain(config, device, text):
    """Print the 20 best terms of a text's [CLS], with those in the text, and the coverage."""
    encoder = Encoder(config, device)
    if encoder.lm.base_model is encoder.lm:
        raise UserError(f"--model {config.model} has no masked-LM head to explain with")
    input_ids = encoder.tokenize([text], "passages")["input_ids"]
    input_ids = torch.tensor(input_ids, device=device)  # (1, L)
    special = bow_mae.special_ids(encoder.tokenizer, encoder.lm.config.vocab_size).to(device)
    with torch.no_grad():
        logits = encoder.lm(input_ids=input_ids).logits[:, 0].float()  # (1, V)
    terms = bow_mae.bag_of_words(input_ids, special)[0]  # (V,)
    coverage = bow_mae.term_coverage(logits, input_ids, special).item()
    count = int(terms.sum())
    print(f"{coverage:.1%} of the {count} terms of the text are among the {count} best of [CLS]:")
    for term in logits[0].topk(20).indices:
        name = encoder.tokenizer.convert_ids_to_tokens(term.item())
        print(f"{name!s:<20}{'in the text' if terms[term] else ''}")


# ---- 6. Tasks


@dataclass
class Task:
    """Passages (on disk), the queries of a split, their judgements and answers (in memory)."""

    passages: datasets.Dataset  # _id, text, perhaps title
    rows: dict[str, int]  # the row of each passage id
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]  # grades by query id and passage id
    answers: dict[str, list[str]]  # of NQ and TriviaQA


def load_task(config, split):
    """Read --data, with the queries that a split judges or, without judgements, those with answers.

    A missing passage stays judged, as in trec_eval; a judged query without a text is left out.
    """
    if config.data == "python-docs":
        passages, records, judgements = read_python_docs(split)
    elif Path(config.data).is_dir():
        passages, records, judgements = read_folder(Path(config.data), split)
    else:
        passages, records, judgements = read_hub(config.data, split)
    rows = {str(name): row for row, name in enumerate(passages["_id"])}
    queries, answers, qrels = {}, {}, defaultdict(dict)
    for record in records:
        if record["_id"] in queries:
            raise UserError(f"--data {config.data}: query {record['_id']} occurs twice")
        queries[record["_id"]] = record["text"]
        if record["answers"]:
            answers[record["_id"]] = record["answers"]
    for query_id, passage_id, grade in judgements:
        if qrels[query_id].setdefault(passage_id, grade) != grade:
            raise UserError(f"--data {config.data}: {query_id} {passage_id} has two grades")
    asked = [name for name in qrels or answers if queries.get(name, "").strip()]
    queries = {name: queries[name] for name in asked}
    judged = list(itertools.chain.from_iterable(qrels.values()))
    missing = {"judged passages": [name for name in judged if name not in rows]}
    missing["judged queries"] = [name for name in qrels if name not in queries]
    for what, names in missing.items():
        if names:
            print_once(f"warning: {len(names)} {what} are missing, the first is {names[0]!r}")
    if len(rows) < len(passages):
        name = Counter(passages["_id"]).most_common(1)[0][0]
        raise UserError(f"--data {config.data}: passage id {name!r} occurs twice")
    for name in itertools.chain(rows, queries, judged, qrels):
        if name.split() != [name]:
            raise UserError(f"--data {config.data}: the id {name!r} is empty or has white space")
    qrels = {name: qrels[name] for name in asked if name in qrels}
    answers = {name: answers[name] for name in asked if name in answers}
    grades = itertools.chain.from_iterable(own.values() for own in qrels.values())
    if split and not asked:
        raise UserError(f"--data {config.data} has no query of {split}")
    if qrels and (max(grades) < 1 or len(missing["judged passages"]) == len(judged)):
        raise UserError(f"--data {config.data} has no relevant passage for a query of {split}")
    return Task(passages, rows, queries, qrels, answers)


def read_python_docs(split):
    """Passages, queries and judgements of python-docs: a summary asks for the text after it."""
    numbers = {"train": range(2, 10), "dev": [1], "test": [0]}.get(split, [])
    passages = bow_mae.python_docs()
    records, judgements = [], []
    for row in passages.select_columns(["_id", "query"]):
        if zlib.crc32(row["_id"].encode()) % 10 in numbers:
            query_id = f"query:{row['_id']}"
            records.append({"_id": query_id, "text": row["query"], "answers": []})
            judgements.append((query_id, row["_id"], 1))
    return passages, records, judgements


def read_folder(folder, split):
    """Passages, queries and judgements of a folder in BEIR's layout."""
    corpus = find_file(folder, "corpus.jsonl")
    asked = find_file(folder, f"queries.{split}.jsonl", "queries.jsonl")
    judged = find_file(folder, f"qrels/{split}.tsv")
    if corpus is None:
        raise UserError(f"--data {folder} has no corpus.jsonl")
    passages = cached_passages(corpus)
    if not split:
        return passages, [], []
    if asked is None:
        raise UserError(f"--data {folder} has no queries.{split}.jsonl or queries.jsonl")
    records = list(read_lines(asked, parse_record))
    if judged is None and not any(record["answers"] for record in records):
        raise UserError(f"--data {folder} has no qrels/{split}.tsv, and its queries no answers")
    return passages, records, read_lines(judged, parse_judgement) if judged else []


def find_file(folder, *names):
    """The first of these files that is there, as it is or with .gz."""
    paths = [folder / f"{name}{ending}" for name in names for ending in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def read_lines(path, parse, version=None):
    """Yield parse(line) for each line but blank ones and BEIR's header of qrels.

    UserError names the file and the line that cannot be read. The version keys the cache.
    """
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                number += 1
                if line.strip() and not line.startswith("query-id\t"):
                    yield parse(line.rstrip("\r\n"))
    except (ValueError, TypeError, KeyError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, line {number}: {type(error).__name__}: {error}") from error


def cached_passages(path):
    """The passages of a corpus.jsonl, on disk in the cache of `datasets`, which locks it."""
    stat = path.stat()
    arguments = {"path": path, "parse": parse_record, "version": (stat.st_size, stat.st_mtime_ns)}
    cache = os.environ.get("HF_DATASETS_CACHE", "out/cache")
    try:
        return datasets.Dataset.from_generator(read_lines, gen_kwargs=arguments, cache_dir=cache)
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(f"{path}: {error.__cause__ or error}") from error


def parse_record(line):
    """_id, title, text and answers of a line of corpus.jsonl or queries.jsonl."""
    given = json.loads(line)
    record = {"_id": given["_id"], "title": given.get("title"), "text": given["text"]}
    for name, value in record.items():
        if not isinstance(value, str | int | None):
            raise ValueError(f"{name} is no text")
        value = "" if value is None else str(value)
        record[name] = value.encode(errors="replace").decode()  # JSON may hold half a surrogate
    answers = record["answers"] = given.get("answers") or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("answers must be a list of texts")
    return record


def parse_judgement(line):
    """Query id, passage id and grade; TREC has a fourth column between the two ids."""
    fields = line.split("\t") if "\t" in line else line.split()
    if len(fields) not in (3, 4) or not re.fullmatch(r"-?\d+(\.0*)?", fields[-1].strip()):
        raise ValueError(f"expected query-id, corpus-id and an integer grade, not {fields}")
    return fields[0], fields[-2], int(float(fields[-1]))


def read_hub(name, split):
    """Passages, queries and judgements of BEIR, MTEB or NanoBEIR on the hub.

    BEIR has judgements in NAME-qrels, MTEB and NanoBEIR in a configuration `default` or `qrels`.
    """
    records, judgements = [], []
    try:
        own = datasets.get_dataset_config_names(name)
        judged = [(name, config) for config in ("qrels", "default") if config in own]
        qrels = datasets.load_dataset(*(judged or [(f"{name}-qrels",)])[0])
        (passages,) = datasets.load_dataset(name, "corpus").values()
        (queries,) = datasets.load_dataset(name, "queries").values()
        if len(qrels) == 1:  # a single split is for evaluation, though NanoBEIR calls it train
            qrels = {"test": qrels[next(iter(qrels))]}
        if split and split not in qrels:
            raise ValueError(f"its splits are {' '.join(qrels)}, not {split}")
        for row in qrels[split] if split else []:
            line = f"{row['query-id']}\t{row['corpus-id']}\t{row.get('score', 1)}"
            judgements.append(parse_judgement(line))
        for row in queries if split else []:
            records.append({"_id": str(row["_id"]), "text": row["text"] or "", "answers": []})
    except (OSError, ValueError, KeyError) as error:
        reason = bow_mae.short_reason(error)
        raise UserError(f"--data {name} is no folder, and the hub says: {reason}") from error
    return passages, records, judgements


# ---- 7. BM25

# Those that Lucene's EnglishAnalyzer leaves out.
STOP_WORDS = """a an and are as at be but by for if in into is it no not of on or such that the
their then there these they this to was will with"""
STOP_WORDS = frozenset(STOP_WORDS.split())
# Scripts that are written without spaces, and words as in Unicode's annex 29: a dot or apostrophe
# joins letters, a dot or comma digits.
SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}ー"
SPACELESS_RUN = regex.compile(rf"[{SPACELESS}][{SPACELESS}\p{{M}}]*")
WORD = regex.compile(r"(?:[\w\p{M}]|(?<=[^\W\d])[.'’](?=[^\W\d])|(?<=\d)[.,](?=\d))+")


def bm25_terms(text):
    """Words without stop words; pairs of characters, as Lucene's, where a script has no spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    words = WORD.findall(SPACELESS_RUN.sub(" ", text))
    terms = [word for word in words if word not in STOP_WORDS]
    for run in SPACELESS_RUN.findall(text):
        characters = regex.findall(r".\p{M}*", run)
        last = max(1, len(characters) - 1)
        terms += ["".join(characters[i : i + 2]) for i in range(last)]
    return terms


def bm25(passages, queries, k):
    """Scores and rows of the best passages of each query, at most k, by BM25.

    Robertson's BM25 as in Lucene, k1 = 0.9 and b = 0.4, without a stemmer. Its inverted index is
    in memory, some 20 bytes per posting: meant for up to a few million passages.
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


# ---- 8. Command line

COMMANDS = {"recipe": recipe, "evaluate": evaluate, "mine": mine, "finetune": finetune}
COMMANDS |= {"search": search, "explain": explain}


def parse_command(argv):
    """The command of a command line, its text, and its config.

    The flags of `search` come from the run.json of an earlier `evaluate` or `search` in --output.
    """
    description = RetrievalConfig.__doc__
    parser = HfArgumentParser(RetrievalConfig, description=description, allow_abbrev=False)
    parser.add_argument("command", nargs="?", default="recipe", choices=COMMANDS)
    parser.add_argument("text", nargs="?", default="", help="for search and explain")
    given = vars(parser.parse_args(argv))
    path = Path(given["output"], "run.json")
    if given["command"] == "search" and path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.get("command") in ("evaluate", "search"):
            parser.set_defaults(**saved["config"])
            given = vars(parser.parse_args(argv))
    command, text = given.pop("command"), given.pop("text")
    if bool(text) != (command in ("search", "explain")):
        raise UserError(f'{command}: search and explain need a text, as "..."; no other has one')
    return command, text, complete_config(RetrievalConfig(**given))


def complete_config(config):
    """The config with flags filled in that were left unset; UserError for impossible values."""
    is_short = config.data == "python-docs"
    bow_mae.fill_in(config, {name: values[is_short] for name, values in DEFAULTS.items()})
    counts = ("batch_size", "epochs", "micro_batch_size", "save_every", "keep", "log_every")
    least = dict.fromkeys((*counts, "top_k", "relevance_level", "sample"), 1)
    least |= {"seed": 0, "negatives": 0, "max_query_length": 3, "max_passage_length": 3}
    bow_mae.check_counts(config, least)
    if len(config.depth) != 2 or not 1 <= config.depth[0] <= config.depth[1]:
        raise UserError("--depth needs two ranks, the first and the last, such as 3 200")
    return config


@bow_mae.errors_in_one_line()
def main(argv=None):
    """Run the command of a command line, or the recipe."""
    command, text, config = parse_command(argv)
    device = bow_mae.init_distributed()
    COMMANDS[command](config, device, *([text] if text else []))


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # else it reports a head that an encoder lacks
    main()
    # All work is done. At Python's own exit, threads that gloo leaves behind abort some runs.
    sys.stdout.flush()
    os._exit(0)
