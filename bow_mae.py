# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""BoW-MAE: pre-training for dense retrieval by bag-of-word prediction (arXiv 2401.11248).

A masked language model becomes a good retriever when its [CLS] vector must also predict, through
the model's own masked-LM head, the set of tokens in its input. No decoder and no new parameter are
needed. The same script trains two baselines: `mlm` without this loss, and RetroMAE's `enhanced`.

    torchrun bow_mae.py  # a tiny BERT from scratch, on the documentation of Python packages
    torchrun --nproc_per_node 8 bow_mae.py --model bert-base-uncased --data corpus.jsonl
"""

import ast
import contextlib
import functools
import gc
import glob
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections import ChainMap, Counter, defaultdict
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from datasets.distributed import split_dataset_by_node
from safetensors import SafetensorError
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer, BatchEncoding, BertConfig
from transformers.hf_argparser import HfArg, HfArgumentParser

# ---- Config

# Defaults that depend on the model: the paper's values, and those for a new model.
DEFAULTS = {"max_length": (144, 64), "steps": (80_000, 1800), "batch_size": (256, 64)}
DEFAULTS |= {"micro_batch_size": (32, 32), "lr": (3e-4, "2e-3 (tiny) to 3e-4 (base)")}
DEFAULTS |= {"lr_final_ratio": (0.1, 0.03), "adam_beta2": (0.999, 0.98), "workers": (1, 0)}


def flag(default, meaning):
    """A flag with its default and its line in --help."""
    return HfArg(default=default, help=meaning)


def unset(name, meaning):
    """A flag whose default depends on the model; `complete_config` fills it in from DEFAULTS."""
    pretrained, fresh = DEFAULTS[name]
    return flag(None, f"{meaning}; {pretrained} for a pre-trained model, {fresh} for a new one")


@dataclass
class Config:
    """Pre-train an encoder for dense retrieval by bag-of-word prediction."""

    # Data and model.
    data: str = flag("python-docs", "python-docs, file, folder, glob or hub dataset")
    text_columns: list[str] = HfArg(default_factory=lambda: ["text"], help="columns to join")
    model: str = flag("tiny", "hub name, folder, or new: tiny, mini, small, base")
    objective: Literal["bow", "mlm", "enhanced"] = flag("bow", "bow, or a baseline")
    max_length: int | None = unset("max_length", "tokens in a sequence, with [CLS] and [SEP]")
    mask_ratio: float = flag(0.3, "fraction of the words to mask")
    bow_weight: float = flag(1.0, "weight of the bag-of-word loss at the start")
    bow_weight_final: float = flag(0.1, "its final weight, along a cosine")
    # Optimization.
    steps: int | None = unset("steps", "optimizer steps")
    batch_size: int | None = unset("batch_size", "sequences in a step, over all processes")
    micro_batch_size: int | None = unset("micro_batch_size", "sequences in a forward pass")
    lr: float | None = unset("lr", "peak learning rate")
    lr_final_ratio: float | None = unset("lr_final_ratio", "final lr as a fraction of the peak")
    warmup_steps: int | None = flag(None, "linear warm-up; unset: --steps / 20")
    weight_decay: float = flag(0.01, "AdamW's; none on biases and LayerNorm")
    adam_beta2: float | None = unset("adam_beta2", "AdamW's beta2")
    # System.
    precision: Literal["auto", "bf16", "fp16", "fp32"] = flag("auto", "dtype of autocast")
    seed: int = flag(0, "seed of the weights, data order, masks and dropout")
    workers: int | None = unset("workers", "data-loader workers of each process")
    output: str = flag("out/bow_mae", "folder for checkpoints, logs and the model")
    save_every: int = flag(500, "steps between checkpoints")
    keep: int = flag(2, "number of newest checkpoints to keep")
    log_every: int = flag(10, "steps between lines of metrics.jsonl")
    eval_every: int = flag(300, "steps between evaluations on held-out texts")

    @property
    def num_shards(self) -> int:
        """Micro-batches in a step; micro-batch i always reads shard i of the data."""
        return self.batch_size // self.micro_batch_size


class UserError(Exception):
    """An error the user can fix. Its message says what is wrong, where, and how to fix it."""


# ---- 1. The method (paper §3)


def special_ids(tokenizer, vocab_size):
    """(V,) bool, true for special tokens and for ids that the tokenizer does not have."""
    special = torch.arange(vocab_size) >= len(tokenizer)
    special[tokenizer.all_special_ids] = True
    return special


def whole_word_mask(input_ids, word_ids, tokenizer, mask_ratio=0.3, generator=None):
    """Mask a fraction of the words of each sequence, all tokens of a word together (paper §3.1).

    Of the chosen tokens 80 % become [MASK], 10 % a random token that is not special, and 10 % stay
    as they are. At least one word of a sequence is chosen; special tokens never are.
    input_ids (B, L) long; word_ids (B, L) long numbers the words of a sequence from 1; special
    tokens and padding have 0. Returns masked_ids (B, L) long and chosen (B, L) bool.
    """
    device = input_ids.device
    is_ordinary = ~special_ids(tokenizer, len(tokenizer)).to(device)  # (V,)
    is_word = is_ordinary[input_ids] & (word_ids > 0)  # (B, L)

    # In scripts without spaces, many tokenizers take a whole clause for one word. Words of more
    # than 8 tokens are therefore masked token by token: each token is a unit of its own.
    word_sizes = word_ids.new_zeros(len(word_ids), int(word_ids.max()) + 1)  # (B, 1 + words)
    word_sizes = word_sizes.scatter_add(1, word_ids, torch.ones_like(word_ids))
    is_long = word_sizes.gather(1, word_ids) > 8  # (B, L)
    previous_word_ids = F.pad(word_ids * is_word, (1, 0))[:, :-1]  # (B, L), of the token before
    starts_unit = is_word & (is_long | (word_ids != previous_word_ids))
    units = starts_unit.cumsum(1) * is_word  # (B, L), counts the units from 1

    # Each unit draws a random number, and the lowest are chosen.
    num_units = starts_unit.sum(1, keepdim=True)  # (B, 1)
    num_chosen = (mask_ratio * num_units).round().clamp(min=1)
    unit_ids = torch.arange(input_ids.shape[1] + 1, device=device)  # 0 means "in no unit"
    unit_draws = torch.rand(len(input_ids), len(unit_ids), generator=generator, device=device)
    unit_draws = unit_draws.masked_fill((unit_ids == 0) | (unit_ids > num_units), 2.0)  # last
    is_chosen_unit = unit_draws.argsort(1).argsort(1) < num_chosen  # argsort twice: the rank
    chosen = is_chosen_unit.gather(1, units) & is_word  # (B, L)

    # Replace 80 % of the chosen tokens by [MASK] and 10 % by random ones.
    ordinary_ids = is_ordinary.nonzero().squeeze(1)
    picks = torch.randint(len(ordinary_ids), input_ids.shape, generator=generator, device=device)
    token_draws = torch.rand(input_ids.shape, generator=generator, device=device)  # (B, L)
    masked_ids = input_ids.masked_fill(chosen & (token_draws < 0.8), tokenizer.mask_token_id)
    masked_ids = torch.where(chosen & (token_draws >= 0.9), ordinary_ids[picks], masked_ids)
    return masked_ids, chosen


def bag_of_words(input_ids, special):
    """The set T of each sequence's non-special tokens, as (B, V) bool.

    input_ids (B, L) long, of the unmasked text; special (V,) bool, see `special_ids`.
    """
    bag = torch.zeros(len(input_ids), len(special), dtype=torch.bool, device=input_ids.device)
    return bag.scatter(1, input_ids, True) & ~special


def bow_loss(cls_logits, input_ids, special):
    """L_bow (paper §3.2): the mean over sequences of -1/|T| Σ_{t in T} log softmax(f(h_CLS))_t.

    cls_logits (B, V); input_ids (B, L) long, of the unmasked text; special (V,) bool. Returns a
    float32 scalar. A sequence that has only special tokens contributes 0.
    """
    bag = bag_of_words(input_ids, special)  # (B, V)
    log_probabilities = cls_logits.float().log_softmax(1)  # (B, V)
    mean_over_bag = (log_probabilities * bag).sum(1) / bag.sum(1).clamp(min=1)  # (B,)
    return -mean_over_bag.mean()


def term_coverage(cls_logits, input_ids, special):
    """The fraction of a text's |T| terms among the |T| highest logits of its [CLS]: (B,) float.

    cls_logits (B, V); input_ids (B, L) long, of the unmasked text; special (V,) bool. A text
    without terms has coverage 0. This measure is ours, not the paper's.
    """
    bag = bag_of_words(input_ids, special)  # (B, V)
    num_terms = bag.sum(1, keepdim=True)  # (B, 1)
    most_terms = max(int(num_terms.max()), 1)
    top_ids = cls_logits.topk(most_terms, dim=1).indices  # (B, K)
    ranks = torch.arange(most_terms, device=top_ids.device)
    is_hit = bag.gather(1, top_ids) & (ranks < num_terms)
    return is_hit.sum(1) / num_terms.squeeze(1).clamp(min=1)


def mlm_head(lm, hidden):
    """f: the model's own masked-LM head, (..., D) to (..., V); TypeError if none is known."""
    if hasattr(lm, "cls"):  # BERT
        return lm.cls(hidden)
    if hasattr(lm, "lm_head") and not lm.config.is_encoder_decoder:  # RoBERTa, XLM-R
        return lm.lm_head(hidden)
    if hasattr(lm, "vocab_projector"):  # DistilBERT
        hidden = lm.activation(lm.vocab_transform(hidden))
        return lm.vocab_projector(lm.vocab_layer_norm(hidden))
    if hasattr(lm, "head") and hasattr(lm, "decoder"):  # ModernBERT
        return lm.decoder(lm.head(hidden))
    raise TypeError(f"{type(lm).__name__} has no BERT, RoBERTa, DistilBERT or ModernBERT head")


class EnhancedDecoder(nn.Module):
    """RetroMAE's one-layer decoder (arXiv 2205.12035 §3.3), the baseline.

    Queries are h_CLS + positions; keys and values are the unmasked tokens' embeddings (h_CLS in
    place of [CLS]) + positions. Token i sees position 0 and a random half of the other positions,
    never itself. The original builds this mask in Python, which takes most of its time; here it is
    a single draw on the device.
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
    """A masked LM and its losses, which `train` adds up. Only `enhanced` adds parameters."""

    def __init__(self, lm, special, objective, max_length):
        super().__init__()
        self.lm, self.objective = lm, objective
        self.register_buffer("special", special, persistent=False)  # (V,)
        self.decoder = EnhancedDecoder(lm, max_length) if objective == "enhanced" else nn.Identity()

    def encode(self, input_ids, attention_mask):
        """The last hidden states h (B, L, D) of input_ids (B, L)."""
        return self.lm.base_model(input_ids, attention_mask=attention_mask).last_hidden_state

    def forward(self, original_ids, input_ids, attention_mask, masked_positions, word_positions):
        """A micro-batch's losses by name; vocabulary logits are computed only where needed.

        original_ids (B, L) is the text, input_ids (B, L) its masked copy, which the encoder reads;
        attention_mask (B, L) is None if nothing is padded. masked_positions (M,) and
        word_positions (N,) index the masked and the non-special tokens of the flattened (B·L,).
        """
        hidden = self.encode(input_ids, attention_mask)  # (B, L, D)
        flat_ids, flat_hidden = original_ids.flatten(), hidden.flatten(0, 1)  # (B·L,), (B·L, D)
        logits = mlm_head(self.lm, flat_hidden[masked_positions]).float()  # (M, V)
        losses = {"mlm_loss": F.cross_entropy(logits, flat_ids[masked_positions])}
        if self.objective == "bow" or not self.training:  # evaluation reports it for any objective
            cls_logits = mlm_head(self.lm, hidden[:, 0])  # (B, V)
            losses["bow_loss"] = bow_loss(cls_logits, original_ids, self.special)
        if self.objective == "enhanced" and self.training:
            embeddings = self.lm.get_input_embeddings()(original_ids)  # (B, L, D)
            decoded = self.decoder(hidden[:, 0], embeddings, attention_mask)  # (B, L, D)
            logits = mlm_head(self.lm, decoded.flatten(0, 1)[word_positions]).float()  # (N, V)
            losses["enhanced_loss"] = F.cross_entropy(logits, flat_ids[word_positions])
        return losses


# ---- 2. Training (paper §4.1)


def train(config, device):
    """Pre-train for --steps, resuming from the newest checkpoint; write the model to --output."""
    # Checkpoint and data.
    rank, world_size = dist.get_rank(), dist.get_world_size()
    checkpoint, state = load_checkpoint(config)
    files = list_files(config)
    files_hash = zlib.crc32(repr([(file, os.path.getsize(file)) for file in files]).encode())
    if state.get("files_hash", files_hash) != files_hash:
        raise UserError(f"--data {config.data} has changed: begin anew in another --output")
    sample, held_out_fraction = sample_texts(config, files)
    held_out_fraction = state.get("held_out_fraction", held_out_fraction)

    # Model, optimizer and loader.
    tokenizer, model = prepare_model(config, checkpoint, sample)
    model.to(device).train()
    optimizer = build_optimizer(config, model)
    dtype = compute_dtype(config.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        model.decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    held_out = held_out_batches(config, tokenizer, sample, held_out_fraction)
    del sample  # before workers inherit it
    loader = iter(make_loader(config, tokenizer, files, held_out_fraction, state))

    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    print_once(f"{config.objective}: {millions:.2f} M parameters, {world_size} x {device}, {dtype}")
    if rank == 0:
        start_logs(config, device, state)
    if rank == 0 and held_out and not checkpoint:
        append_metrics(config, {"step": 0} | evaluate(model, held_out, device, autocast))

    step = last_step = state.get("step", 0)
    num_micro_batches = config.num_shards // world_size
    resume_points = {}  # this process's, by shard
    should_stop = False
    num_tokens, start = 0, time.perf_counter()  # since the last log line
    bar = tqdm(total=config.steps, initial=last_step, unit="step", disable=rank > 0)
    with catch_signals() as signals, bar:
        for step in range(last_step + 1, config.steps + 1):
            # Forward and backward, over this process's micro-batches of the step.
            bow_weight = cosine(config.bow_weight, config.bow_weight_final, step / config.steps)
            step_losses = defaultdict(float)
            for index in range(num_micro_batches):
                info, batch = next(loader)
                resume_points[info["shard"]] = info["resume_point"]
                num_tokens += info["num_tokens"]

                torch.manual_seed(info["seed"])  # so dropout depends on (seed, step, shard) only
                # DDP averages gradients over processes, in the last backward pass only.
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

            should_stop = sum_over_processes({"signals": len(signals)})["signals"] > 0
            is_last = step == config.steps
            should_save = is_last or should_stop or step % config.save_every == 0
            should_evaluate = is_last or step % config.eval_every == 0
            if not (should_save or should_evaluate or step % config.log_every == 0):
                continue

            # Log this step's losses. Summing them waits for the device, so the time is all work's.
            sums = sum_over_processes({**step_losses, "tokens": num_tokens})
            record = {"step": step, "epoch": info["resume_point"]["epoch"]}
            record |= {name: sums[name] / world_size for name in step_losses}
            record |= {"bow_weight": bow_weight, "lr": lr, "grad_norm": float(grad_norm)}
            record["tokens_per_second"] = sums["tokens"] / (time.perf_counter() - start)
            append_metrics(config, record)
            bar.set_postfix(loss=record["loss"], epoch=record["epoch"])

            # Evaluate.
            if should_evaluate and held_out and rank == 0:
                metrics = {"step": step} | evaluate(model, held_out, device, autocast)
                append_metrics(config, metrics)
                bar.write(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
                if is_last:
                    compare_with_frequent_terms(metrics, held_out, model.special)

            # Save.
            if should_save:
                everyone = [None] * world_size
                dist.all_gather_object(everyone, resume_points)
                state = {"step": step, "resume_points": dict(ChainMap(*everyone))}
                state |= {"files_hash": files_hash, "held_out_fraction": held_out_fraction}
                state["decoder"] = model.decoder.state_dict()
                state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                if rank == 0:
                    save_checkpoint(config, state, model.lm, tokenizer, config.max_length)
            if should_stop:
                break
            num_tokens, start = 0, time.perf_counter()

    end_run(config, step, should_stop, signals)


def cosine(first, last, progress):
    """From first at progress 0 to last at progress 1, along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(config, step):
    """The learning rate at a step, 1 to --steps: linear warm-up, then cosine decay."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return cosine(config.lr, config.lr * config.lr_final_ratio, progress)


def build_optimizer(config, model):
    """AdamW, with weight decay on matrices only: biases and LayerNorm have none."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas = (0.9, config.adam_beta2)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True
    )


def held_out_batches(config, tokenizer, texts, held_out_fraction):
    """The first 1,024 sequences of held-out texts, batched by length and masked once."""
    texts = [text for text in texts if text_hash(text) < held_out_fraction]
    sequences = cut_sequences(texts, tokenizer, config.max_length)[:1024]
    sequences.sort(key=lambda sequence: len(sequence[0]))
    batches = [sequences[start : start + 64] for start in range(0, len(sequences), 64)]
    return [collate(batch, tokenizer, config.mask_ratio, i) for i, batch in enumerate(batches)]


@torch.no_grad()
def evaluate(model, batches, device, autocast):
    """Held-out means: masked-LM loss per masked token, L_bow and coverage per sequence."""
    model.eval()
    means, weights = [], []
    for batch in tqdm(batches, "evaluate", leave=False):
        batch = batch.to(device)
        original_ids = batch["original_ids"]
        with autocast:
            losses = model(**batch)
            cls = model.encode(original_ids, batch["attention_mask"])[:, 0]  # of the unmasked text
            coverage = term_coverage(mlm_head(model.lm, cls), original_ids, model.special).mean()
        means.append([float(losses["mlm_loss"]), float(losses["bow_loss"]), float(coverage)])
        weights.append([len(batch["masked_positions"]), len(original_ids), len(original_ids)])
    model.train()
    names = ("eval_mlm_loss", "eval_bow_loss", "eval_term_coverage")
    return dict(zip(names, np.average(means, axis=0, weights=weights).tolist(), strict=True))


def compare_with_frequent_terms(metrics, batches, special):
    """Print a note if the most frequent terms, named for every text, cover as much."""
    all_ids, special = [batch["original_ids"] for batch in batches], special.cpu()
    counts = sum(bag_of_words(ids, special).sum(0) for ids in all_ids)  # (V,), texts per term
    coverages = [term_coverage(counts.expand(len(ids), -1), ids, special) for ids in all_ids]
    frequent = float(torch.cat(coverages).mean())
    if metrics["eval_term_coverage"] <= frequent:
        tqdm.write(f"note: coverage is not above that of the most frequent terms, {frequent:.4g}")


def sum_over_processes(values):
    """The sums over all processes of {name: number}, as Python floats."""
    sums = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


# ---- 3. Data

BUFFER_TEXTS, BUFFER_CHARACTERS = 2048, 2_000_000  # per shard, tokenized and shuffled together
SAMPLE_TEXTS, SAMPLE_CHARACTERS = 200_000, 100_000_000  # for the vocabulary and the held-out texts
FORMATS = (".jsonl", ".txt", ".parquet")  # the first two also as .gz
OTHER_FILES = re.compile(r"(^|/)\.|(^|[^a-z])(test|dev|val|valid|validation|eval)([^a-z]|$)", re.I)


def make_loader(config, tokenizer, files, held_out_fraction, state):
    """A DataLoader of this process's micro-batches, starting after the checkpoint."""
    count = config.num_shards // dist.get_world_size()  # shards of each process
    shards = range(dist.get_rank() * count, (dist.get_rank() + 1) * count)
    stream = PretrainingStream(config, tokenizer, files, held_out_fraction, shards, state)
    # Workers are read in turn, so each must have equally many shards.
    num_workers = math.gcd(config.workers, count) if config.workers else 0
    # A worker makes all batches of its shards' buffers at once; room for two such rounds keeps
    # training from waiting. A buffer has about a sequence per text, plus one per max_length tokens.
    sequences = BUFFER_TEXTS + BUFFER_CHARACTERS // (4 * config.max_length)
    num_batches = count * sequences // config.micro_batch_size
    return torch.utils.data.DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=2 + 2 * num_batches // num_workers if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=init_worker,
    )


def init_worker(worker_id):
    """In a data-loader worker: ignore signals, and exit when the training process has exited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # By default training would wait for this busy process to hand over each tensor's descriptor.
    torch.multiprocessing.set_sharing_strategy("file_system")

    def watch(parent):
        """Exit with the parent: with torch alone, a worker waits forever on a pipe nobody reads."""
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=[os.getppid()], daemon=True).start()


class PretrainingStream(torch.utils.data.IterableDataset):
    """The micro-batches of some shards of the data, one from each shard in turn, endlessly.

    What a shard yields depends only on (data, seed, step, shard), not on the process. A micro-batch
    carries its shard's resume point: where its buffer of texts began.
    """

    def __init__(self, config, tokenizer, files, held_out_fraction, shards, state):
        self.config, self.tokenizer, self.files = config, tokenizer, files
        self.held_out_fraction, self.shards = held_out_fraction, shards
        self.resume_points = state.get("resume_points", {})
        self.first_step = state.get("step", 0) + 1

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        shards = self.shards[worker.id :: worker.num_workers] if worker else self.shards
        for batches in itertools.cycle([self.read_shard(shard) for shard in shards]):
            yield next(batches)

    def read_shard(self, shard):
        """Yield (info, batch) for each step from first_step on, epoch after epoch."""
        config = self.config
        start = {"epoch": 0, "stream": None, "step": 1}
        resume_point = self.resume_points.get(shard, start)
        while True:
            epoch, step = resume_point["epoch"], resume_point["step"]
            stream = open_stream(config, self.files, shard, config.num_shards, epoch)
            if resume_point["stream"] is not None:
                stream.load_state_dict(resume_point["stream"])
            for texts, buffer_end in self.read_buffers(stream):
                for sequences in self.make_batches(texts, shard, step):
                    if step >= self.first_step:  # a resumed run skips batches already trained on
                        seeds = np.random.SeedSequence([config.seed, step, shard])
                        mask_seed, dropout_seed = seeds.generate_state(2).tolist()
                        num_tokens = sum(len(token_ids) for token_ids, _ in sequences)
                        info = {"shard": shard, "resume_point": resume_point}
                        info |= {"seed": dropout_seed, "num_tokens": num_tokens}
                        yield info, collate(sequences, self.tokenizer, config.mask_ratio, mask_seed)
                    step += 1
                resume_point = {"epoch": epoch, "stream": buffer_end, "step": step}
            # Fewer empty epochs may be chance, as a shard's files change each epoch.
            if step == 1 and epoch == 9:
                message = f"--data {config.data}: no text for shard {shard} of {config.num_shards}"
                raise UserError(f"{message}: lower --batch_size or raise --micro_batch_size")
            resume_point = {"epoch": epoch + 1, "stream": None, "step": step}

    def read_buffers(self, stream):
        """Yield (texts to train on, state of the stream after them), a buffer at a time."""
        texts, num_characters = [], 0
        for text in read_texts(self.config, self.files, stream):
            if text_hash(text) >= self.held_out_fraction:
                # A text longer than a buffer is cut, so a book does not fill memory.
                starts = range(0, len(text), BUFFER_CHARACTERS)
                texts += [text[start : start + BUFFER_CHARACTERS] for start in starts]
                num_characters += len(text)
            if len(texts) >= BUFFER_TEXTS or num_characters >= BUFFER_CHARACTERS:
                yield texts, stream.state_dict()
                texts, num_characters = [], 0
        if texts:
            yield texts, stream.state_dict()

    def make_batches(self, texts, shard, buffer_step):
        """Yield a buffer's batches, grouped by length, in random order."""
        config = self.config
        sequences = cut_sequences(texts, self.tokenizer, config.max_length)
        if not sequences:
            return
        order = np.random.default_rng([config.seed, shard, buffer_step]).permutation(len(sequences))
        sequences = sorted((sequences[i] for i in order), key=lambda sequence: len(sequence[0]))
        count = math.ceil(len(sequences) / config.micro_batch_size)
        bounds = [len(sequences) * i // count for i in range(count + 1)]
        batches = [sequences[start:end] for start, end in itertools.pairwise(bounds)]
        for step in range(buffer_step, buffer_step + count):
            # All shards use the same draw, so their batches match in length and no process waits.
            draw = np.random.default_rng([config.seed, step]).random()
            yield batches.pop(int(draw * len(batches)))


def cut_sequences(texts, tokenizer, max_length):
    """Cut texts into sequences of at most max_length tokens, [CLS] and [SEP] included.

    Returns a list of (token_ids, word_ids), L integers each; word_ids count the words of the
    sequence from 1, with 0 at special tokens. Sequences without a word are left out.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts, truncation=True, max_length=max_length, return_overflowing_tokens=True
    )
    special = set(tokenizer.all_special_ids)
    sequences = []
    for index, token_ids in enumerate(encoded["input_ids"]):
        numbers = encoded.word_ids(index)  # of words in the text, None at special tokens
        own = [number for number in numbers if number is not None]
        if own and not special.issuperset(token_ids):
            word_ids = [0 if number is None else number - own[0] + 1 for number in numbers]
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
    # Given a mask, transformers looks for padding in it, which synchronizes the GPU.
    batch["attention_mask"] = None if attention_mask.all() else attention_mask
    batch["masked_positions"] = chosen.flatten().nonzero().squeeze(1)  # (M,)
    batch["word_positions"] = is_word.flatten().nonzero().squeeze(1)  # (N,)
    return BatchEncoding(batch)


def text_hash(text):
    """A number in [0, 1) that depends only on the text."""
    return zlib.crc32(text.encode()) / 2**32


def read_texts(config, files, stream):
    """Yield the text of each record of a stream: its columns, joined by a space.

    A record without text is skipped; UserError quotes one that is malformed or lacks a column.
    """
    is_jsonl = bool(files) and file_format(files[0]) == ".jsonl"
    record = None
    try:
        for row in stream.iter(batch_size=1):  # plain iteration would split a worker's shard again
            record = {name: values[0] for name, values in row.items()}
            if is_jsonl:
                line = record["text"]
                record = json.loads(line) if line.strip() else dict.fromkeys(config.text_columns)
            values = [record[column] for column in config.text_columns]
            text = " ".join(value for value in values if value not in (None, "")).strip()
            if text:
                yield text.encode(errors="replace").decode()  # JSON may hold half a surrogate pair
    except (ValueError, TypeError, KeyError, OSError, EOFError, zlib.error) as error:
        reason = f"{type(error).__name__}: {short_reason(error)}, at or after {str(record)[:100]}"
        raise UserError(f"--data {config.data}: {reason}") from error


def open_stream(config, files, shard=0, num_shards=1, epoch=0):
    """The records of one shard of --data in one epoch, as an IterableDataset of `datasets`.

    If there are enough files, a shard has its own; otherwise it keeps one record in num_shards.
    """
    load = functools.partial(datasets.load_dataset, streaming=True)
    if files:  # reordered each epoch, so that not all epochs end on the same kind of text
        files = np.random.default_rng([config.seed, epoch]).permutation(files).tolist()
        files = [glob.escape(file) for file in files]  # `datasets` takes names for patterns
    if config.data == "python-docs":
        stream = python_docs().to_iterable_dataset(num_shards)
    elif files and file_format(files[0]) == ".parquet":
        stream = load("parquet", data_files=files, columns=config.text_columns, split="train")
    elif files:
        stream = load("text", data_files=files, encoding="utf-8-sig", split="train")
    else:
        name, subset, split = (config.data.split(":") + ["", ""])[:3]
        stream = load(name, subset or None, split=split or "train")
        stream.set_epoch(epoch)
    if stream.num_shards >= num_shards:
        return stream.shard(num_shards, shard, contiguous=False)
    return split_dataset_by_node(stream, rank=shard, world_size=num_shards)


def list_files(config):
    """The files of --data, all of one format; [] for python-docs and for a hub dataset."""
    path, output = Path(config.data), Path(config.output)
    corpora = [*path.glob("corpus.jsonl"), *path.glob("corpus.jsonl.gz")]
    if corpora:  # BEIR's layout
        files = corpora[:1]
    elif path.is_dir():
        if output.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--output {output} lies inside --data {path}: use another folder")
        found = [file for file in path.rglob("*") if file.is_file()]
        files = [file for file in found if file_format(file) in FORMATS and file.stat().st_size]
        files = [file for file in files if not OTHER_FILES.search(str(file.relative_to(path)))]
        reasons = "are left out: hidden, empty, in another format, or a test or validation split"
        print_once(f"{len(files)} files of {path} are read; {len(found) - len(files)} {reasons}")
    else:
        found = [config.data] if path.is_file() else glob.glob(config.data, recursive=True)
        files = [Path(file) for file in found]
        if not files and not glob.has_magic(config.data) and file_format(path) not in FORMATS:
            return []
    formats = {file_format(file) for file in files}
    if len(formats) != 1 or not formats <= {*FORMATS}:
        found = " and ".join(sorted(name or "no ending" for name in formats)) or "no file"
        raise UserError(f"--data {config.data}: found {found}, need one of {' '.join(FORMATS)}")
    return sorted(map(str, files))


def file_format(path):
    """A file's format, by suffix: ".jsonl" for a.jsonl and a.jsonl.gz."""
    return Path(str(path).removesuffix(".gz")).suffix


def sample_texts(config, files):
    """Texts from the start of up to 64 files, and the fraction of all texts to hold out."""
    try:
        stream = open_stream(config, files)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--data {config.data} cannot be read: {short_reason(error)}") from error
    texts, count = [], min(stream.num_shards, 64)
    for shard in range(count):
        num_characters = 0
        records = read_texts(config, files, stream.shard(count, shard, contiguous=False))
        for text in itertools.islice(records, SAMPLE_TEXTS // count):
            texts.append(text)
            num_characters += len(text)
            if num_characters >= SAMPLE_CHARACTERS // count:
                break
    if not texts:
        raise UserError(f"--data {config.data} has no text")
    if len(texts) < 100:
        print_once(f"note: nothing is held out, as there are only {len(texts)} texts")
        return texts, 0.0
    return texts, float(np.clip(100 / len(texts), 1 / 1000, 1 / 10))


PACKAGES = "pandas numpy networkx transformers torch sympy datasets huggingface_hub"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def python_docs():
    """Some 24,000 distinct rows of _id, query and text, shuffled.

    The cache of `datasets` has a lock: one process builds the corpus while the others wait.
    """
    print_once("building the python-docs corpus (a minute), or reading it from the cache")
    versions = {name: metadata.version(name) for name in PACKAGES.split()}
    arguments = {"versions": {"python": sys.version} | versions}
    cache = os.environ.get("HF_DATASETS_CACHE", "out/cache")
    gc.freeze()  # otherwise each garbage collection rescans torch's objects: 3 times slower
    rows = datasets.Dataset.from_generator(docstrings, gen_kwargs=arguments, cache_dir=cache)
    gc.unfreeze()
    table = rows.to_pandas().drop_duplicates("_id").drop_duplicates("text")
    table = table.drop_duplicates("query", keep=False)
    table = table.sort_values("text", key=lambda texts: texts.map(text_hash), kind="stable")
    return datasets.Dataset.from_pandas(table, rows.features, preserve_index=False)


def docstrings(versions):
    """Yield _id (a name), query (first paragraph) and text (the rest) of packages' docstrings."""
    for package in versions:  # {package: version}, as new versions must not use an old cache
        root = Path(os.__file__ if package == "python" else util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            # A tuple, not a set: the cache's key is a hash of this code, and a set's order varies.
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
            for name, node in nodes:  # the loop appends to the list it walks
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.stmt):
                        suffix = f".{child.name}" if isinstance(child, DOCUMENTED) else ""
                        nodes.append((name + suffix, child))
                docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
                query, _, text = (docstring or "").partition("\n\n")
                if query.strip() and text.strip():
                    yield {"_id": name, "query": " ".join(query.split()), "text": text.strip()}


# ---- 4. Tokenizer and model

FRESH_MODELS = {  # layers, width, vocabulary size, peak learning rate
    "tiny": (2, 128, 2048, 2e-3),
    "mini": (4, 256, 8192, 1e-3),
    "small": (4, 512, 16384, 5e-4),
    "base": (12, 768, 30522, 3e-4),
}


def prepare_model(config, checkpoint, texts):
    """The tokenizer and `BowMAE` of a checkpoint or --model, or new ones from --seed."""
    torch.manual_seed(config.seed)
    if checkpoint is None and config.model in FRESH_MODELS:
        print_once(f"learning the vocabulary from {len(texts):,} texts")
        tokenizer = learn_tokenizer(config, texts)
        lm = fresh_lm(config, tokenizer)
    else:
        tokenizer, lm = load_masked_lm(checkpoint or config.model, config.max_length)
    if config.max_length <= 128 and not torch.cuda.is_available():
        lm.set_attn_implementation("eager")  # a CPU's fused attention is slow in the backward pass
    special = special_ids(tokenizer, lm.config.vocab_size)
    return tokenizer, BowMAE(lm, special, config.objective, config.max_length)


def load_masked_lm(source, max_length):
    """The tokenizer and masked LM of a folder or hub name; UserError if a trial run fails."""
    tokenizer = load_tokenizer(source)
    try:
        lm, report = AutoModelForMaskedLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        input_ids = torch.tensor([[tokenizer.mask_token_id, len(tokenizer) - 1] * 4])  # (1, 8)
        logits = mlm_head(lm, lm.base_model(input_ids).last_hidden_state)  # (1, 8, V)
        torch.testing.assert_close(logits, lm(input_ids).logits, atol=1e-3, rtol=1e-3)
        logits.sum().backward()
        unused = [name for name, weight in lm.named_parameters() if weight.grad is None]
        for name in [*report["missing_keys"], *unused]:
            raise ValueError(f"{name} is missing or gets no gradient")
    except Exception as error:  # damaged or unfit models raise all kinds of exceptions
        reason = f"is damaged, or no masked LM that this script can train: {short_reason(error)}"
        raise UserError(f"--model {source} {reason}") from error
    lm.zero_grad()
    check_length(source, lm, tokenizer, max_length)
    return tokenizer, lm


def load_tokenizer(source):
    """The tokenizer of a model's folder or hub name; UserError if it is unfit."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"--model {source} has no tokenizer: {short_reason(error)}") from error
    has_words = len(tokenizer) > len(tokenizer.all_special_ids)  # without files it is empty
    has_tokens = tokenizer.is_fast and None not in (tokenizer.mask_token, tokenizer.pad_token)
    starts_with_cls = tokenizer("a")["input_ids"][:1] == [tokenizer.cls_token_id]
    has_gaps = max(tokenizer.get_vocab().values()) >= len(tokenizer)
    if has_gaps or not (has_words and has_tokens and starts_with_cls):
        needs = "be fast, have words, [MASK] and [PAD], put [CLS] first, and have ids without gaps"
        raise UserError(f"--model {source}: its tokenizer must {needs}")
    return tokenizer


@torch.no_grad()
def check_length(source, lm, tokenizer, max_length):
    """UserError if the encoder cannot read sequences of max_length tokens."""
    try:
        lm.base_model(torch.full((1, max_length), tokenizer.mask_token_id))
    except (IndexError, RuntimeError) as error:
        limit = getattr(lm.config, "max_position_embeddings", "not known")
        reason = f"{max_length} tokens (its max_position_embeddings is {limit})"
        raise UserError(f"--model {source} cannot read sequences of {reason}") from error


def learn_tokenizer(config, texts):
    """An uncased WordPiece tokenizer learnt from texts; the same texts give the same vocabulary.

    Its alphabet covers 99.95 % of the characters, accents and vowel signs included. Where that
    exceeds half the vocabulary, as in Chinese, the vocabulary grows to twice the alphabet.
    """
    # Words of over 100 letters, as in base64, become [UNK] anyway and would take hours to learn.
    texts = [re.sub("[A-Za-z0-9]{101,}", " ", text) for text in texts]
    wordpiece = BertWordPieceTokenizer(strip_accents=False, lowercase=True)
    counts = Counter(itertools.chain.from_iterable(map(wordpiece.normalize, texts)))
    del counts[" "]
    characters = sorted(counts, key=lambda character: (-counts[character], character))
    covered = np.cumsum([counts[character] for character in characters]) / counts.total()
    alphabet = characters[: int(np.searchsorted(covered, 0.9995)) + 1]
    # A character that always stands alone, as a Chinese one does, never continues a word.
    split = wordpiece.pre_tokenizer.pre_tokenize_str
    inner = [f"##{c}" for c in alphabet if len(split(wordpiece.normalize(f"a{c}a"))) == 1]
    size = max(FRESH_MODELS[config.model][2], 2 * len(alphabet + inner))
    # The trainer numbers new pieces in random hash order. Given all characters, and all
    # that continue a word, it finds no new ones, so that the vocabulary depends on the texts alone.
    wordpiece.train_from_iterator(
        texts,
        vocab_size=size,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    # Rebuild it from the vocabulary, so that it adds [CLS] and [SEP] and no piece is special.
    wordpiece = BertWordPieceTokenizer(wordpiece.get_vocab(), strip_accents=False)
    backend, longest = Tokenizer.from_str(wordpiece.to_str()), max(512, config.max_length)
    return transformers.BertTokenizerFast(
        tokenizer_object=backend, strip_accents=False, model_max_length=longest
    )


def fresh_lm(config, tokenizer):
    """A new BERT of --model's size, without dropout."""
    layers, width, _, _ = FRESH_MODELS[config.model]
    # tiny starts with larger weights than BERT's 0.02, so that a short run suffices. With its 0.05
    # wider models never learn more than word frequencies, so it falls with the width.
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=max(512, config.max_length),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05 * math.sqrt(128 / width),
    )
    return AutoModelForMaskedLM.from_config(bert)


# ---- 5. Checkpoints and logs

# These flags of both scripts affect no loss, so they may change when a run resumes.
FREE_FLAGS = ("workers", "output", "save_every", "keep", "log_every", "eval_every")
FREE_FLAGS += ("index", "split", "top_k", "relevance_level", "keep_identical_ids", "compare")


def load_checkpoint(config):
    """The newest checkpoint in --output and its state, or (None, {}); UserError if flags differ."""
    checkpoints = [str(path) for path in list_checkpoints(config.output)]
    newest = checkpoints[-1:] or [None]
    dist.broadcast_object_list(newest)  # the first process decides: others may see another disk
    checkpoint = newest[0]
    if checkpoint is None:
        if Path(config.output, "model.safetensors").exists():
            raise UserError(f"--output {config.output} has a model but no checkpoints: use another")
        return None, {}
    path = Path(checkpoint, "training_state.pt")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in asdict(config).items():
        before = state["config"].get(name)
        if name not in FREE_FLAGS and value != before:
            message = f"--output {config.output} has a run of --{name} {before}, not {value}"
            raise UserError(f"{message}: give the same --{name}, or another --output")
    return checkpoint, state


def save_checkpoint(config, state, lm, tokenizer, max_length, *retrieval_settings):
    """Write output/checkpoint-STEP whole or not at all, and keep the newest --keep of them."""
    temporary = Path(config.output, ".checkpoint.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    target = Path(config.output, f"checkpoint-{state['step']}")
    log_size = Path(config.output, "metrics.jsonl").stat().st_size
    state = {**state, "config": asdict(config), "log_size": log_size}
    try:
        write_model(temporary, lm, tokenizer, max_length, *retrieval_settings)
        torch.save(state, temporary / "training_state.pt")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written: {short_reason(error)}") from error
    os.sync()
    temporary.rename(target)
    for old in list_checkpoints(config.output)[: -config.keep]:
        shutil.rmtree(old)


def write_model(folder, lm, tokenizer, max_length, pooling="cls", similarity="dot", prompts=None):
    """Write a model and its tokenizer, for transformers and SentenceTransformer."""
    lm.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    if similarity == "cos":
        paths["Normalize"] = "2_Normalize"
    modules = []
    for index, (name, path) in enumerate(paths.items()):
        module_type = f"sentence_transformers.models.{name}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": module_type})
        (folder / path).mkdir(exist_ok=True)
    pooling_config = {"word_embedding_dimension": lm.config.hidden_size}
    pooling_config["pooling_mode_cls_token"] = pooling == "cls"
    pooling_config["pooling_mode_mean_tokens"] = pooling == "mean"  # true where it is missing
    transformer = {"max_seq_length": max_length, "do_lower_case": False}
    if "add_pooling_layer" in inspect.signature(type(lm.base_model)).parameters:
        transformer["model_args"] = {"add_pooling_layer": False}
    similarity_name = {"dot": "dot", "cos": "cosine"}[similarity]
    settings = {"similarity_fn_name": similarity_name, "prompts": prompts or {}}
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", pooling_config)
    write_json(folder / "sentence_bert_config.json", transformer)
    write_json(folder / "config_sentence_transformers.json", settings)


def start_logs(config, device, state):
    """Write run.json, cut metrics.jsonl back to the checkpoint, and announce a resume."""
    write_run_json(config, device, "train")
    with Path(config.output, "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.truncate(min(state.get("log_size", 0), file.tell()))
    step = state.get("step")
    if step == config.steps:
        print(f"this run is finished: {step} steps", flush=True)
    elif step:
        print(f"resuming from step {step}", flush=True)


def write_run_json(config, device, command):
    """Write how this run was started: command, flags, versions, device and processes."""
    packages = ("torch", "transformers", "datasets", "tokenizers", "numpy")
    versions = {"python": sys.version} | {name: metadata.version(name) for name in packages}
    content = {"command": command, "config": asdict(config), "versions": versions}
    content |= {"device": str(device), "world_size": dist.get_world_size()}
    Path(config.output).mkdir(parents=True, exist_ok=True)
    write_json(Path(config.output, "run.json"), content)


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def append_metrics(config, record):
    """Append a line to metrics.jsonl; UserError for a value that is not finite."""
    for name, value in record.items():
        # With fp16 the scaler skips a step whose gradient overflows.
        is_skipped = name == "grad_norm" and config.precision == "fp16"
        if not math.isfinite(value) and not is_skipped:
            cure = "lower --lr or set --precision fp32, with a new --output"
            raise UserError(f"{name} is {value} at step {record['step']}: {cure}")
    if dist.get_rank() == 0:
        record = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with Path(config.output, "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def end_run(config, step, should_stop, signals):
    """Copy the newest checkpoint's model into --output, or exit with the code of a signal."""
    output = Path(config.output)
    if should_stop:
        print_once(f"stopped by a signal; step {step} is saved, and the same command resumes")
    elif dist.get_rank() == 0:
        ignore = shutil.ignore_patterns("training_state.pt")
        shutil.copytree(list_checkpoints(output)[-1], output, ignore=ignore, dirs_exist_ok=True)
        print(f"model saved in {output}", flush=True)
    dist.barrier()  # torchrun ends all processes when the first one exits
    if should_stop:
        sys.exit(128 + max(signals, default=signal.SIGTERM))


def list_checkpoints(output):
    """A run's checkpoint-STEP folders, newest last."""
    folders = Path(output).glob("checkpoint-*")
    folders = [path for path in folders if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]))


def print_once(message):
    """Print a line on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def print_table(rows, columns, title=""):
    """Print an aligned table of numbers, {row: {column: value}}."""
    table = pd.DataFrame.from_dict(rows, orient="index")[columns].rename_axis(columns=title)
    print("\n" + table.to_string(float_format="{:,.4f}".format), flush=True)


# ---- 6. Processes


def init_distributed():
    """Join torchrun's processes, or form a group of one; returns this process's device."""
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # the first process may read or search for hours while others wait
        dist.init_process_group(backend, timeout=timedelta(days=7))
    elif not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def compute_dtype(precision, device):
    """The autocast dtype of --precision; `auto` is bfloat16 where the device supports it."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    elif precision == "auto":
        precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


@contextlib.contextmanager
def catch_signals():
    """Collect SIGTERM and Ctrl-C in a list instead of dying, so that a run can save first."""
    received, handlers = [], {}
    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- 7. Command line


def fill_in(config, defaults):
    """Fill in the flags that were left unset, and print them."""
    filled = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    vars(config).update(filled)
    if filled:
        print_once("by default " + " ".join(f"--{name} {filled[name]}" for name in filled))


def check_counts(config, least):
    """UserError for a flag below its minimum, {flag: minimum}."""
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UserError(f"--{name} {getattr(config, name)} must be at least {value}")


def complete_config(config):
    """Fill in the flags that were left unset; UserError for impossible values."""
    is_fresh = config.model in FRESH_MODELS
    defaults = {name: values[is_fresh] for name, values in DEFAULTS.items()}
    if is_fresh:
        defaults["lr"] = FRESH_MODELS[config.model][3]
    defaults["warmup_steps"] = (config.steps or defaults["steps"]) // 20
    fill_in(config, defaults)
    counts = ("steps", "batch_size", "micro_batch_size", "save_every", "keep", "log_every")
    least = dict.fromkeys(counts, 1) | {"eval_every": 1, "max_length": 3}
    least |= {"warmup_steps": 0, "workers": 0, "seed": 0, "lr": 0, "weight_decay": 0}
    check_counts(config, least)
    if not 0 < config.mask_ratio <= 1:
        raise UserError(f"--mask_ratio {config.mask_ratio} must be above 0 and at most 1")
    if config.warmup_steps >= config.steps:
        raise UserError(f"--warmup_steps {config.warmup_steps} is not below --steps {config.steps}")
    multiple = config.micro_batch_size * dist.get_world_size()
    if config.batch_size % multiple:
        factors = f"{multiple} (--micro_batch_size x processes)"
        raise UserError(f"--batch_size {config.batch_size} is not a multiple of {factors}")


def short_reason(error):
    """One line about an error. From a data-loader worker, the last line has the cause."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1].partition(": ")[2] if lines[0].startswith("Caught ") else lines[0]


@contextlib.contextmanager
def errors_in_one_line():
    """Print an error that is the user's to fix in one line, and exit with code 2."""
    try:
        yield
    except BaseException as error:
        # Clearing the frames frees the loader, or Python would wait for its workers.
        traceback.clear_frames(error.__traceback__)
        is_expected = isinstance(error, UserError | OSError)
        # The process at fault prints its error, and torchrun ends the others while they wait here.
        is_first = is_expected and os.environ.get("RANK", "0") == "0"
        if isinstance(error, Exception) and "RANK" in os.environ and not is_first:
            time.sleep(5)
        if not is_expected:
            raise
        print(f"error: {short_reason(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


@errors_in_one_line()
def main(argv=None):
    """Pre-train, as the flags of a command line say."""
    parser = HfArgumentParser(Config, description=Config.__doc__, allow_abbrev=False)
    config = Config(**vars(parser.parse_args(argv)))
    device = init_distributed()
    complete_config(config)
    train(config, device)
    can_evaluate = config.data == "python-docs" or any(Path(config.data).glob("queries*"))
    data = config.data if can_evaluate else "BEIR_FOLDER"
    print_once(f"next: python eval_retrieval.py --data {data} --model {config.output}")


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()  # these would break up the run's own bar
    datasets.disable_progress_bars()
    main()
    # All work is done. At Python's exit, leftover gloo threads abort some runs.
    sys.stdout.flush()
    os._exit(0)
