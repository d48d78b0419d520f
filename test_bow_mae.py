# SPDX-License-Identifier: MIT
"""Tests of bow_mae.py and eval_retrieval.py, to be read as documentation. They need no network and no GPU.

    pip install -r requirements.txt pytest
    pytest test_bow_mae.py
Most runs are `bow_mae.main([...])` in this process, of a tiny model on a made-up corpus. Those of several
processes, and those that are killed, are started as a user starts them. All files go to temporary folders.
"""

import dataclasses
import gzip
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

CACHE = tempfile.TemporaryDirectory(prefix="test_bow_mae_")  # the libraries read these when they are imported
os.environ |= {"HF_HOME": CACHE.name, "HF_DATASETS_CACHE": CACHE.name, "HF_HUB_OFFLINE": "1",
               "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

import bow_mae
import eval_retrieval
from bow_mae import BowMAE, Config, PretrainingStream, bow_loss, special_table, term_coverage
from eval_retrieval import RetrievalConfig, evaluate_run

torch.set_num_threads(1)
SCRIPT = Path(bow_mae.__file__).resolve()
SMALL = ("--model tiny --max_length 32 --steps 20 --batch_size 8 --micro_batch_size 4 --workers 0 "
         "--precision fp32 --lr 2e-3 --lr_final_ratio 0.1 --warmup_steps 4 --bow_weight 1 "
         "--bow_weight_final 0.1 --log_every 1 --save_every 5 --keep 2 --eval_every 10").split()
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["".join(pair) for pair in itertools.product("ba ke di lo mu sta pri ven tor gal".split(), repeat=2)]


# ---------------------------------------------------------------------------------------------------- helpers


def held_out(text):
    """Whether a text is kept for evaluation."""
    return zlib.crc32(text.encode()) % 1000 == 0


def make_texts(count, seed=0, evaluated=12, longest=40):
    """Texts of random words; the first `evaluated` end with three words that make them held-out ones."""
    rng, texts = random.Random(seed), []
    for i in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(3, longest)))
        ends = itertools.product(WORDS, repeat=3) if i < evaluated else []
        texts.append(next((new for end in ends if held_out(new := f"{text} {' '.join(end)}")), text))
    return texts


def write_jsonl(path, texts):
    """A corpus with one {"title": "a", "text": ...} a line; returns its --data."""
    Path(path).write_text("".join(json.dumps({"title": "a", "text": text}) + "\n" for text in texts))
    return str(path)


def main(*flags, script=bow_mae):
    """A run of SMALL, or of another script, in this process, which then has its signal handlers back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        script.main([*(SMALL if script is bow_mae else []), *map(str, flags)])
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def error_of(capfd, *flags, script=bow_mae):
    """The line "error: ..." of a run that ends with exit code 2, and how many lines stderr has."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(*flags, script=script)
    lines = capfd.readouterr().err.replace("\x1b[A", "").splitlines()  # tqdm moves up where bars are left
    errors = [line.strip() for line in lines if line.strip().startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1, lines
    return errors[0], len(lines)


def run(*flags, processes=1, code=None, **options):
    """A run of SMALL in processes of its own, by `python` or `torchrun`; `code` replaces the script."""
    start = [sys.executable, "-c", code] if code else [sys.executable, str(SCRIPT), *SMALL]
    if processes > 1:
        start[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    options = {"cwd": CACHE.name, "env": os.environ | {"PYTHONPATH": str(SCRIPT.parent)}} | options
    return subprocess.run([*start, *map(str, flags)], capture_output=True, text=True, timeout=200, **options)


def run_with_signal(number, event, name, count, *flags, script="bow_mae"):
    """A run that gets a signal the count-th time that it opens, or renames, a file of this name."""
    code = """if True:
        import importlib, os, sys
        number, event, name, count = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
        def hook(what, args):
            global count
            if what == event and name in " ".join(map(str, args)):
                count -= 1
                if count == 0:
                    os.kill(os.getpid(), number)
        sys.addaudithook(hook)
        importlib.import_module(sys.argv[5]).main(sys.argv[6:])
        """
    return run(number.value, event, name, count, script, *(SMALL if script == "bow_mae" else []), *flags,
               code=code)


def records(output, field):
    """The records of metrics.jsonl that have a field."""
    lines = Path(output, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if field in record]


def losses(output):
    """{step: (loss, mlm_loss, bow_loss)}, as logged."""
    return {row["step"]: (row["loss"], row["mlm_loss"], row["bow_loss"]) for row in records(output, "loss")}


def same_weights(one, other):
    """Whether two saved models are equal bit for bit."""
    one, other = (load_file(Path(output, "model.safetensors")) for output in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_run(one, other):
    """Whether two runs have the same losses, evaluations and weights, bit for bit."""
    evaluations = [records(output, "eval_mlm_loss") for output in (one, other)]
    return losses(one) == losses(other) and evaluations[0] == evaluations[1] and same_weights(one, other)


def close(one, other, tolerance=1e-4):
    """Whether two runs have the same losses at each step, but for this share of them."""
    one, other = losses(one), losses(other)
    return one.keys() == other.keys() and all(one[i] == pytest.approx(other[i], rel=tolerance) for i in one)


def word_tokenizer(words):
    """A WordPiece tokenizer of these words and pieces."""
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIALS, *words])})


def read_epochs(config, tokenizer, count=1):
    """The batches of the first epochs of all parts, as (epoch, batch)."""
    done = set()
    for batch in PretrainingStream(config, tokenizer, range(config.parts), {}, 1):
        done |= {batch["part"]} if batch["position"][0] >= count else set()
        if len(done) == config.parts:
            return
        if batch["part"] not in done:
            yield batch["position"][0], batch


def windows_of(batch):
    """The windows of a batch as lists of token ids, without padding."""
    rows, mask = batch["input_ids"], batch["attention_mask"]
    mask = torch.ones_like(rows) if mask is None else mask
    return [row[keep].tolist() for row, keep in zip(rows, mask.bool())]


def texts_of(config, tokenizer):
    """The windows of an epoch as texts, sorted."""
    return sorted(tokenizer.decode(window[1:-1]) for _, batch in read_epochs(config, tokenizer)
                  for window in windows_of(batch))


# --------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder for what several tests share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def corpus(folder):
    """A .jsonl of 600 texts."""
    return write_jsonl(folder / "corpus.jsonl", make_texts(600))


@pytest.fixture(scope="session")
def trained(folder, corpus):
    """The unbroken run of SMALL that others are compared with: its output and its model in memory."""
    made = []

    class Kept(BowMAE):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bow_mae, "BowMAE", Kept)
        main("--data", corpus, "--output", folder / "unbroken")
    return folder / "unbroken", made[0]


@pytest.fixture
def unbroken(trained):
    """The output of the unbroken run."""
    return trained[0]


@pytest.fixture(scope="session")
def stopped(folder, corpus):
    """A run of SMALL that gets SIGTERM between steps 5 and 10: its output and how it ended."""
    flags = "--data", corpus, "--output", folder / "stopped", "--workers", 1
    return folder / "stopped", run_with_signal(signal.SIGTERM, "open", "metrics.jsonl", 9, *flags)


@pytest.fixture
def unfinished(unbroken, tmp_path):
    """A copy of the unbroken run as it was before its model was written, with checkpoints 15 and 20."""
    shutil.copytree(unbroken, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    return tmp_path / "out"


# ----------------------------------------------------------------------------------------------------- losses


def test_bow_loss_and_its_gradient_are_those_of_a_loop():
    """-1/|T| Σ log softmax; with repeats, special tokens (ids 0 to 2), and a sequence of these alone."""
    torch.manual_seed(0)
    logits, input_ids = (torch.randn(5, 50) * 3).requires_grad_(), torch.randint(0, 20, (5, 30))
    input_ids[-1] = torch.randint(0, 3, (30,))
    looped = torch.tensor(0.0)
    for row, ids in zip(logits, input_ids.tolist()):
        terms = {i for i in ids if i > 2}
        for term in terms:
            looped = looped - (row[term] - row.exp().sum().log()) / len(terms) / 5
    loss = bow_loss(logits, input_ids, torch.arange(50) < 3)
    torch.testing.assert_close(loss, looped)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, looped)))


def test_an_empty_bag_counts_nothing_and_divides_by_nothing():
    logits = torch.randn(2, 8, requires_grad=True)
    loss = bow_loss(logits, torch.zeros(2, 4, dtype=torch.long), torch.arange(8) < 1)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_bow_loss_of_bfloat16_logits_is_computed_in_float32():
    logits, rest = torch.randn(2, 50).bfloat16(), (torch.randint(0, 50, (2, 9)), torch.arange(50) < 3)
    loss = bow_loss(logits, *rest)
    assert loss.dtype == torch.float32 and torch.equal(loss, bow_loss(logits.float(), *rest))


def test_term_coverage_by_hand():
    special = torch.tensor([True, True, False, False, False, False])
    input_ids = torch.tensor([[0, 2, 3, 3, 1], [0, 2, 3, 4, 1], [0, 2, 2, 2, 1], [0, 1, 1, 1, 1]])
    logits = torch.tensor([[0.0, 0, 5, 1, 4, 0],    # T = {2, 3}, the top 2 are {2, 4}: 1/2
                           [9.0, 0, 5, 6, 4, 0],    # T = {2, 3, 4}, the top 3 are {0, 3, 2}: 2/3
                           [0.0, 0, 5, 1, 4, 0],    # T = {2}, the top 1 is {2}: 1
                           [0.0, 0, 5, 1, 4, 0]])   # T is empty: 0
    assert term_coverage(logits, input_ids, special).tolist() == pytest.approx([1 / 2, 2 / 3, 1, 0])


# ---------------------------------------------------------------------------------------------------- masking


def mask(tokenizer, input_ids, ratio=0.3, seed=0):
    """Masked ids and the chosen positions."""
    tables = special_table(tokenizer, len(tokenizer)), bow_mae.word_table(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    return bow_mae.whole_word_mask(input_ids, *tables, tokenizer.mask_token_id, ratio, generator)


@pytest.fixture(scope="module")
def masked():
    """200 draws over 300 words of one to three pieces, then 50 of padding.

    Returns the tokenizer, input_ids, masked_ids, chosen, and the word of each token.
    """
    tokenizer, rng = word_tokenizer([*WORDS, *(f"##{word}" for word in WORDS)]), random.Random(0)
    text = " ".join("".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(300))
    encoded = tokenizer(text)
    input_ids = torch.tensor([encoded.input_ids + [tokenizer.pad_token_id] * 50]).expand(200, -1)
    return tokenizer, input_ids, *mask(tokenizer, input_ids), encoded.word_ids()


def test_30_percent_of_the_words_are_masked(masked):
    *_, chosen, words = masked
    first = [i for i, word in enumerate(words) if word is not None and word != words[i - 1]]
    assert len(first) == 300 and chosen[:, first].float().mean().item() == pytest.approx(0.3, abs=0.005)


def test_of_the_masked_tokens_80_become_mask_10_random_10_stay(masked):
    tokenizer, input_ids, masked_ids, chosen, _ = masked
    before, after = input_ids[chosen], masked_ids[chosen]
    assert (after == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (after == before).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(masked_ids[~chosen], input_ids[~chosen])


def test_special_tokens_are_neither_masked_nor_drawn(masked):
    tokenizer, input_ids, masked_ids, chosen, _ = masked
    drawn = masked_ids[chosen & (masked_ids != tokenizer.mask_token_id)]
    assert not chosen[torch.isin(input_ids, torch.tensor(tokenizer.all_special_ids))].any()
    assert len(drawn) > 1000 and not torch.isin(drawn, torch.tensor(tokenizer.all_special_ids)).any()


def test_at_least_one_word_of_each_sequence_is_masked():
    tokenizer = word_tokenizer(WORDS)
    input_ids = torch.tensor(tokenizer([WORDS[0], " ".join(WORDS[:9])], padding=True).input_ids)
    assert mask(tokenizer, input_ids, ratio=0.001)[1].sum(1).tolist() == [1, 1]


def test_masks_are_a_function_of_the_generator(masked):
    tokenizer, input_ids, masked_ids, *_ = masked
    assert torch.equal(mask(tokenizer, input_ids)[0], masked_ids)
    assert not torch.equal(mask(tokenizer, input_ids, seed=1)[0], masked_ids)


TOKENIZERS = {
    "WordPiece": (models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(), None,
                  trainers.WordPieceTrainer(vocab_size=140, special_tokens=SPECIALS)),
    "SentencePiece": (models.Unigram(), pre_tokenizers.Metaspace(), None,
                      trainers.UnigramTrainer(vocab_size=140, special_tokens=SPECIALS, unk_token="[UNK]")),
    "byte-level BPE": (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(),
                       trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIALS,
                                           initial_alphabet=pre_tokenizers.ByteLevel.alphabet())),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_pieces_of_a_word_are_masked_together_by_any_tokenizer(kind):
    """Over 400 draws, neighbours in a word (see `word_ids`) are chosen alike, those of two words are not."""
    model, splitter, decoder, trainer = TOKENIZERS[kind]
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = splitter
    if decoder:
        backend.decoder = decoder
    backend.train_from_iterator([*make_texts(200), *["x, (x 2024) x! (x 3.5); — x"] * 300], trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]",
                                        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    encoded = tokenizer("bakelodi stapri, (galvenmu 2024) pristagal; x — baba! galgaltor 3.5 ke")
    chosen = mask(tokenizer, torch.tensor([encoded.input_ids]).expand(400, -1))[1]
    neighbours = [(i - 1, i) for i in range(2, len(encoded.input_ids) - 1)]
    alike = [torch.equal(chosen[:, i], chosen[:, j]) for i, j in neighbours]
    assert alike == [encoded.word_ids()[i] == encoded.word_ids()[j] for i, j in neighbours]
    assert sum(alike) > 5 and not all(alike)


@pytest.mark.parametrize("kind", ["SentencePiece", "byte-level BPE"])
def test_a_chinese_sentence_is_not_one_word(kind):
    """It has no spaces, so each of its pieces is a word: some 30 % of them are masked, not all or none."""
    model, splitter, decoder, trainer = TOKENIZERS[kind]
    backend = tokenizers.Tokenizer(type(model)())
    backend.pre_tokenizer, rng = splitter, random.Random(0)
    if decoder:
        backend.decoder = decoder
    sentences = ["".join(rng.choices("我们今天学习模型的文字", k=40)) for _ in range(200)]
    backend.train_from_iterator(sentences, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]",
                                        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    input_ids = torch.tensor([tokenizer(sentences[0]).input_ids]).expand(400, -1)
    shares = mask(tokenizer, input_ids)[1].float().mean(1)
    assert shares.mean().item() == pytest.approx(0.3, abs=0.05) and shares.max() < 0.6


# ------------------------------------------------------------------------------------------------------ model

TINY = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
FAMILIES = {
    "BERT": transformers.BertConfig(**TINY),
    "RoBERTa": transformers.RobertaConfig(**TINY),
    "XLM-R": transformers.XLMRobertaConfig(**TINY),
    "DistilBERT": transformers.DistilBertConfig(vocab_size=200, dim=32, hidden_dim=64, n_layers=2, n_heads=2),
    "ModernBERT": transformers.ModernBertConfig(**TINY, **IDS),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_chosen_positions_are_the_full_logits(family):
    torch.manual_seed(0)
    lm = AutoModelForMaskedLM.from_config(FAMILIES[family]).eval()
    for parameter in lm.parameters():  # biases too, which begin at 0
        torch.nn.init.normal_(parameter, std=0.1)
    input_ids, chosen = torch.randint(5, 200, (3, 12)), torch.rand(3, 12) < 0.3
    logits = bow_mae.mlm_head(lm, lm.base_model(input_ids).last_hidden_state[chosen])
    torch.testing.assert_close(logits, lm(input_ids).logits[chosen], atol=1e-6, rtol=0)


def random_model(objective):
    """A random BERT with an objective."""
    torch.manual_seed(0)
    lm = AutoModelForMaskedLM.from_config(FAMILIES["BERT"])
    config = Config(objective=objective, max_length=32)
    return BowMAE(lm, config, special_table(word_tokenizer(WORDS), 200)).eval()


@pytest.fixture
def batch(corpus):
    """A micro-batch with padding."""
    config = Config(data=corpus, max_length=32, batch_size=8, micro_batch_size=8)
    batches = read_epochs(config, word_tokenizer(WORDS))
    return next(batch for _, batch in batches if batch["attention_mask"] is not None)


def test_mlm_loss_is_that_of_transformers(batch):
    model, labels = random_model("bow"), torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["chosen"]] = batch["input_ids"].view(-1)[batch["chosen"]]
    theirs = model.lm(batch["masked_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    torch.testing.assert_close(model(batch)["mlm_loss"], theirs)


def test_bow_loss_is_between_the_cls_vector_of_the_masked_text_and_the_unmasked_words(batch):
    model = random_model("bow")
    logits = model.lm(batch["masked_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(model(batch)["bow_loss"], bow_loss(logits, batch["input_ids"], model.special))


def test_bow_adds_no_parameter_and_enhanced_does():
    mlm, bow, enhanced = (sum(parameter.numel() for parameter in random_model(objective).parameters())
                          for objective in ("mlm", "bow", "enhanced"))
    assert mlm == bow < enhanced


def test_the_enhanced_decoder_does_not_see_the_token_it_predicts():
    """What position i gives depends on the embeddings of about half of the others, and not on that of i."""
    embeddings = torch.randn(8, 16, 32, requires_grad=True)
    decoded = random_model("enhanced").decoder(torch.randn(8, 32), embeddings, None)
    gradients = [torch.autograd.grad(decoded[:, i].square().sum(), embeddings, retain_graph=True)[0]
                 for i in range(1, 16)]
    seen = torch.stack(gradients, 1)[:, :, 1:].any(3)                                      # (B, L-1, L-1)
    itself = torch.eye(15, dtype=torch.bool).expand(8, -1, -1)
    assert not seen[itself].any() and seen[~itself].float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("objective, logged", [
    ("mlm", {"mlm_loss"}), ("enhanced", {"mlm_loss", "enhanced_loss"})])
def test_a_baseline_logs_its_losses_and_saves_the_same_model(objective, logged, unbroken, corpus, tmp_path):
    main("--data", corpus, "--output", tmp_path / "out", "--objective", objective, "--steps", 2)
    ours, theirs = (load_file(output / "model.safetensors") for output in (unbroken, tmp_path / "out"))
    assert {name: ours[name].shape for name in ours} == {name: theirs[name].shape for name in theirs}
    assert {name for name in records(tmp_path / "out", "loss")[0] if name.endswith("_loss")} == logged


def test_learning_rate_and_bow_weight_follow_the_cosine(unbroken):
    """SMALL: a peak of 2e-3 at step 4, a cosine to 2e-4 at step 20; λ from 1 to 0.1 over the 20 steps."""
    rows = {row["step"]: row for row in records(unbroken, "lr")}
    up, down = 1 + math.sqrt(0.5), 1 - math.sqrt(0.5)  # 1 + cos at a quarter and at three quarters
    rates = {1: 5e-4, 2: 1e-3, 4: 2e-3, 8: 2e-4 + 9e-4 * up, 12: 1.1e-3, 16: 2e-4 + 9e-4 * down, 20: 2e-4}
    weights = {5: 0.1 + 0.45 * up, 10: 0.55, 15: 0.1 + 0.45 * down, 20: 0.1}
    assert {step: rows[step]["lr"] for step in rates} == pytest.approx(rates)
    assert {step: rows[step]["bow_weight"] for step in weights} == pytest.approx(weights)


def test_the_loss_is_mlm_plus_weighted_bow(unbroken):
    for row in records(unbroken, "loss"):
        assert row["loss"] == pytest.approx(row["mlm_loss"] + row["bow_weight"] * row["bow_loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def named(folder):
    """9000 texts with a word of their own, two blocks for each of 4 parts: config, tokenizer, texts."""
    rng = random.Random(1)
    texts = [" ".join([f"name{i}", *rng.choices(WORDS, k=rng.randint(0, 30))]) for i in range(9000)]
    data = write_jsonl(folder / "named.jsonl", texts)
    config = Config(data=data, max_length=64, batch_size=64, micro_batch_size=16)
    return config, word_tokenizer([*WORDS, *(text.split()[0] for text in texts)]), texts


def test_each_text_appears_once_in_each_epoch_and_a_held_out_one_never(named):
    config, tokenizer, texts = named
    seen = [[], []]
    for epoch, batch in read_epochs(config, tokenizer, 2):
        seen[epoch] += [tokenizer.decode(window[1:-1]) for window in windows_of(batch)]
    training = Counter(text for text in texts if not held_out(text))
    assert Counter(seen[0]) == training == Counter(seen[1]) and len(training) < len(texts)
    assert seen[0] != seen[1]  # the order is another


def test_the_micro_batches_of_a_step_are_of_like_length_and_size(named):
    """At a step the longest windows of the parts differ by at most 3 tokens, where texts differ by 30."""
    config, tokenizer, _ = named
    batches = [batch for _, batch in read_epochs(config, tokenizer)]
    assert [batch["part"] for batch in batches[:512]] == [0, 1, 2, 3] * 128
    assert {len(batch["input_ids"]) for batch in batches} == {15, 16}
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    steps = [lengths[i : i + 4] for i in range(0, 512, 4)]  # the first block of each part
    assert max(max(step) - min(step) for step in steps) <= 3
    assert max(map(max, steps)) - min(map(min, steps)) > 25 and steps != sorted(steps)


def test_a_stream_goes_on_from_the_positions_of_its_batches(named):
    """These are plain data, here of step 150, in the second block; the masks go on too."""
    config, tokenizer, _ = named
    batches = list(itertools.islice(PretrainingStream(config, tokenizer, range(4), {}, 1), 4 * 200))
    positions = json.dumps([(batch["part"], batch["position"]) for batch in batches[4 * 149 : 4 * 150]])
    again = PretrainingStream(config, tokenizer, range(4), dict(json.loads(positions)), 151)
    for batch, other in zip(batches[4 * 150 :], again):
        assert torch.equal(batch["masked_ids"], other["masked_ids"])


def test_a_stream_goes_on_from_the_end_of_an_epoch(tmp_path):
    """Of every step of two epochs of one block, the last of an epoch among them."""
    config = Config(data=write_jsonl(tmp_path / "a.jsonl", make_texts(60)), batch_size=16, micro_batch_size=8)
    tokenizer = word_tokenizer(WORDS)
    batches = list(itertools.islice(PretrainingStream(config, tokenizer, range(2), {}, 1), 2 * 20))
    assert batches[-1]["position"][0] >= 2
    for step in range(1, 20):
        positions = {batch["part"]: batch["position"] for batch in batches[2 * step - 2 : 2 * step]}
        again = next(iter(PretrainingStream(config, tokenizer, range(2), positions, step + 1)))
        assert torch.equal(batches[2 * step]["masked_ids"], again["masked_ids"])


def test_a_window_without_a_word_is_left_out():
    tokenizer = word_tokenizer(WORDS)
    windows = bow_mae.cut_windows(["", "unknown words", "baba"], tokenizer, 8)
    assert windows == [tokenizer("baba").input_ids]


def test_long_texts_are_cut_into_windows_that_give_them_back():
    tokenizer, texts = word_tokenizer(WORDS), [" ".join(WORDS[i:] + WORDS[:i]) for i in range(5)]
    windows = bow_mae.cut_windows(texts, tokenizer, 16)
    assert {(window[0], window[-1]) for window in windows} == {(2, 3)}  # [CLS], [SEP]
    assert max(map(len, windows)) == 16
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    assert sum((window[1:-1] for window in windows), []) == sum(ids, [])


def test_every_window_of_a_learnt_vocabulary_begins_with_cls_and_ends_with_sep(unbroken, corpus):
    tokenizer = AutoTokenizer.from_pretrained(unbroken)
    batches = read_epochs(Config(data=corpus, max_length=64), tokenizer)
    windows = [window for _, batch in batches for window in windows_of(batch)]
    assert {(window[0], window[-1]) for window in windows} == {(2, 3)}  # [CLS], [SEP]
    assert tokenizer.convert_ids_to_tokens([2, 3]) == ["[CLS]", "[SEP]"]
    assert len(windows) == sum(not held_out(text) for text in make_texts(600))


def write_formats(root, texts):
    """The same texts in each format: a list of --data."""
    rows = [{"number": i, "text": text} for i, text in enumerate(texts)]
    lines = [json.dumps(row) + "\n" for row in rows]
    for name in ("folder", "beir"):
        (root / name).mkdir()
    (root / "a.jsonl").write_text("".join(lines))
    (root / "a.json").write_text(json.dumps(rows, indent=1))
    (root / "lines.json").write_text("".join(lines))
    (root / "a.txt").write_text("\n".join(texts) + "\n")
    (root / "a.csv").write_text("number,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)))
    (root / "beir" / "corpus.jsonl").write_text("".join(lines))
    (root / "beir" / "queries.jsonl").write_text('{"text": "ba"}\n')
    (root / "folder" / "1.jsonl").write_text("".join(lines[:9]))
    (root / "folder" / "2.jsonl").write_text("".join(lines[9:]))
    for name in ("a.jsonl", "a.csv", "a.txt"):
        (root / f"{name}.gz").write_bytes(gzip.compress((root / name).read_bytes()))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(root / "a.parquet")
    table.save_to_disk(root / "saved")
    datasets.DatasetDict({"test": table.select(range(3)), "train": table}).save_to_disk(root / "saved_splits")
    return [*root.iterdir(), root / "folder" / "*.jsonl"]


def test_every_format_gives_the_same_texts(tmp_path):
    texts = [*make_texts(40, evaluated=0, longest=10), "na", "1", "null"]
    tokenizer, found = word_tokenizer([*WORDS, "na", "1", "null"]), {}
    for data in write_formats(tmp_path, texts):
        found[data.name] = texts_of(Config(data=str(data), batch_size=8, micro_batch_size=4), tokenizer)
    assert len(found) == 14 and [name for name in found if found[name] != sorted(texts)] == []


def test_a_name_may_have_the_characters_of_a_glob(tmp_path):
    texts = make_texts(40, evaluated=0, longest=10)
    (tmp_path / "[new] a?").mkdir()
    write_jsonl(tmp_path / "[new] a?" / "c[1].jsonl", texts)
    for data in "[new] a?", "[new] a?/c[1].jsonl":
        config = Config(data=str(tmp_path / data), batch_size=8, micro_batch_size=4)
        assert texts_of(config, word_tokenizer(WORDS)) == sorted(texts)


def test_docstrings_are_split_into_query_and_text_and_tests_left_out(tmp_path, monkeypatch):
    package = tmp_path / "spoons"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text('"""Spoons of  all\nkinds.\n\nThey hold soup."""')
    (package / "big.py").write_text('class Ladle:\n  def fill(self):\n    """Fill it.\n\n    With soup."""')
    (package / "short.py").write_text('def stir():\n    """No more than a summary."""')
    (package / "bad.py").write_text("def broken(:")
    (package / "tests" / "some.py").write_text('"""A test.\n\nOf spoons."""')
    monkeypatch.syspath_prepend(tmp_path)
    assert list(bow_mae.docstrings(["spoons"])) == [
        {"_id": "spoons", "query": "Spoons of all kinds.", "text": "They hold soup."},
        {"_id": "spoons.big.Ladle.fill", "query": "Fill it.", "text": "With soup."}]


def test_python_docs_name_each_text_once_and_are_cached(monkeypatch, capfd):
    monkeypatch.setattr(bow_mae, "PACKAGES", ["python", "huggingface_hub"])
    documentation = bow_mae.python_docs()
    assert len(documentation) > 2000 and documentation.column_names == ["_id", "query", "text"]
    assert all(len(set(documentation[column])) == len(documentation) for column in documentation.column_names)
    assert any(name.startswith("json") for name in documentation["_id"])
    monkeypatch.setattr(bow_mae, "docstrings", lambda packages: iter([]))  # so read from the cache
    assert bow_mae.python_docs()[:] == documentation[:]


def test_columns_that_are_not_read_may_hold_anything(tmp_path):
    """Even beyond the first rows, from which a reader of tables would learn their types."""
    texts = make_texts(12_000, evaluated=0, longest=3)
    others = [None if i < 11_000 else {"a": [i]} if i % 2 else "x" * i for i in range(len(texts))]
    rows = [json.dumps({"text": text, "other": other}) + "\n" for text, other in zip(texts, others)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    rows = [f"{'?' if i > 11_000 else i},{text}\n" for i, text in enumerate(texts)]
    (tmp_path / "a.csv").write_text("other,text\n" + "".join(rows))
    for name in "a.jsonl", "a.csv":
        config = Config(data=str(tmp_path / name), batch_size=8, micro_batch_size=4)
        assert Counter(texts_of(config, word_tokenizer(WORDS))) == Counter(
            text for text in texts if not held_out(text))


def test_hidden_folders_and_subfolders_of_a_glob_are_passed_over(tmp_path):
    for folder in ".hidden", "sub":
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "b.jsonl", ["di lo"])
    write_jsonl(tmp_path / "a.jsonl", ["ba ke"])
    found = [bow_mae.find_files(str(data)) for data in (tmp_path, tmp_path / "*")]
    assert [[str(Path(file).relative_to(tmp_path)) for file in files] for files in found] == [
        ["a.jsonl", "sub/b.jsonl"], ["a.jsonl"]]


def test_text_columns_are_joined_and_may_be_null(tmp_path):
    (tmp_path / "a.jsonl").write_text("""{"title": "ba", "text": "ke di"}\n{"title": null, "text": "lo"}
        {"title": "", "text": "mu"}\n{"title": "gal", "text": null}\n{"text": "ven"}""")
    columns, data = ["title", "text"], str(tmp_path / "a.jsonl")
    config = Config(data=data, text_columns=columns, batch_size=2, micro_batch_size=2)
    found = texts_of(config, word_tokenizer("ba ke di lo mu gal ven".split()))
    assert found == ["ba ke di", "gal", "lo", "mu", "ven"]


@pytest.mark.parametrize("data, asked", [
    ("team/name", ("team/name", None, "train")), ("team/name:2023.en", ("team/name", "2023.en", "train")),
    ("name:config:validation", ("name", "config", "validation")), ("name::test", ("name", None, "test"))])
def test_a_hub_name_is_streamed(data, asked, monkeypatch):
    calls = set()

    def load_dataset(path, name=None, *, split=None, streaming=False):
        calls.add((path, name, split, streaming))
        return datasets.Dataset.from_dict({"text": ["ba ke", "di lo"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = Config(data=data, batch_size=2, micro_batch_size=2)
    assert texts_of(config, word_tokenizer("ba ke di lo".split())) == ["ba ke", "di lo"]
    assert calls == {(*asked, True)}


# ------------------------------------------------------------------------------ processes, workers, precision


def test_two_processes_give_the_losses_of_one(corpus, tmp_path):
    """Over 20 steps, of a model with dropout, whose draws do not depend on the process either."""
    tokenizer = word_tokenizer(WORDS)
    config = transformers.BertConfig(**TINY | {"vocab_size": len(tokenizer)}, hidden_dropout_prob=0.1)
    for part in (transformers.BertForMaskedLM(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    flags = "--data", corpus, "--model", tmp_path / "model"
    main(*flags, "--output", tmp_path / "one")
    ended = run(*flags, "--output", tmp_path / "two", processes=2)
    assert ended.returncode == 0, ended.stderr
    assert len(losses(tmp_path / "one")) == 20 and close(tmp_path / "two", tmp_path / "one")


def test_two_loader_workers_give_the_losses_of_none(unbroken, corpus, tmp_path):
    main("--data", corpus, "--output", tmp_path / "out", "--workers", 2)
    assert same_run(tmp_path / "out", unbroken)


def test_without_workers_no_process_is_started(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(BaseProcess, "start", lambda self: pytest.fail("a process was started"))
    main("--data", corpus, "--output", tmp_path / "out", "--workers", 0, "--steps", 2)
    with pytest.raises(pytest.fail.Exception):
        main("--data", corpus, "--output", tmp_path / "other", "--workers", 2, "--steps", 2)


def test_a_compiled_model_gives_the_same_losses(unbroken, corpus, tmp_path):
    result = run("--data", corpus, "--output", tmp_path / "run", "--steps", 1, "--compile", "True")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run")[1][1:] == pytest.approx(losses(unbroken)[1][1:], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_in_half_precision_are_near_those_in_float32(precision, unbroken, corpus, tmp_path):
    """To 1 part in 1000 at the first step; later less so, as fp16 skips a step when its scale is too high."""
    main("--data", corpus, "--output", tmp_path / "out", "--precision", precision)
    assert losses(tmp_path / "out")[1] == pytest.approx(losses(unbroken)[1], rel=1e-3)
    assert close(tmp_path / "out", unbroken, 0.06) and losses(tmp_path / "out") != losses(unbroken)


@pytest.mark.parametrize("processes", [1, 2])
def test_bench_compares_the_costs_of_the_objectives(processes, corpus, tmp_path):
    result = run("--bench", "--data", corpus, "--output", tmp_path / "out", processes=processes)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.bench.json"]
    report = json.loads((tmp_path / "out.bench.json").read_text())
    assert list(report["rows"]) == ["mlm", "bow", "enhanced", "paper"]
    for name, row in report["rows"].items():
        assert 0 < row["least"] <= row["x mlm"] <= row["most"] and row["samples/s"] < row["tokens/s"]
        assert 0 <= row["waiting"] < 1 and row["MFU"] > 0 and row["MB"] > 0
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(name)]
        shown = [float(number.replace(",", "")) for number in line.split()[1:4]]
        assert shown == pytest.approx([row["samples/s"], row["tokens/s"], row["x mlm"]], abs=0.5, rel=1e-3)
    assert report["rows"]["mlm"]["least"] == report["rows"]["mlm"]["most"] == 1
    assert report["loader_tokens_per_second"] > 0


def test_the_reference_of_the_bench_has_the_losses_of_bow(batch):
    """So what it costs more is for logits that no loss needs."""
    model = random_model("bow")
    reference = bow_mae.PaperMAE(model.lm, Config(), model.special)
    for name, loss in model(batch).items():
        torch.testing.assert_close(reference(batch)[name], loss)


# ----------------------------------------------------------------------------------- checkpoints and resuming


def test_a_killed_run_goes_on_bit_for_bit(unbroken, corpus, tmp_path):
    """SIGKILL at four moments, each time further on the way that the killed run before it has begun."""
    for event, name, count in [
            ("open", "metrics.jsonl", 10),            # between steps 5 and 10
            ("open", ".saving/trainer_state", 1),     # while a checkpoint is written
            ("os.rename", "checkpoint-", 1),          # after that, before it has its name
            ("shutil.copyfile", "model.safetensors", 1)]:  # when the trained model takes its place
        flags = "--data", corpus, "--output", tmp_path / "out", "--workers", 1
        ended = run_with_signal(signal.SIGKILL, event, name, count, *flags)
        assert ended.returncode == -signal.SIGKILL, (event, name, ended.stderr)
        assert not (tmp_path / "out" / "model.safetensors").exists()
    main("--data", corpus, "--output", tmp_path / "out")
    assert same_run(tmp_path / "out", unbroken)


def test_sigterm_saves_and_leaves_with_a_message(stopped):
    output, ended = stopped
    step = max(losses(output))
    assert ended.returncode == 128 + signal.SIGTERM
    assert 5 < step < 10 and (output / f"checkpoint-{step}").is_dir()
    assert f"after step {step}" in ended.stderr and "Traceback" not in ended.stderr


def test_a_stopped_run_goes_on_bit_for_bit(stopped, unbroken, corpus, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "out")
    main("--data", corpus, "--output", tmp_path / "out")
    assert same_run(tmp_path / "out", unbroken)


def test_a_run_begun_on_one_process_goes_on_with_two(stopped, unbroken, corpus, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "out")
    ended = run("--data", corpus, "--output", tmp_path / "out", processes=2)
    assert ended.returncode == 0, ended.stderr
    assert close(tmp_path / "out", unbroken)


def test_two_processes_may_be_stopped_twice_and_go_on_bit_for_bit(corpus, tmp_path):
    """The second time from a checkpoint that was written after the first."""
    flags = ["--data", corpus, "--output", tmp_path / "out", "--keep", 9, "--objective", "enhanced"]
    assert run(*flags, processes=2).returncode == 0
    shutil.copytree(tmp_path / "out", tmp_path / "never stopped")
    for last in 5, 10:
        for step in range(last + 5, 25, 5):
            shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
        assert run(*flags, processes=2).returncode == 0
    one, other = (records(tmp_path / name, "loss") for name in ("out", "never stopped"))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]
    assert same_weights(tmp_path / "out", tmp_path / "never stopped")


def test_the_newest_checkpoints_are_kept(unbroken):
    assert sorted(path.name for path in unbroken.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-20"]
    assert not (unbroken / ".saving").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.pt", "trainer_state.json"])
def test_a_truncated_checkpoint_is_passed_over_with_a_warning(file, unbroken, unfinished, corpus, capfd):
    torn = unfinished / "checkpoint-20" / file
    os.truncate(torn, torn.stat().st_size // 2)
    capfd.readouterr()
    main("--data", corpus, "--output", unfinished)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "checkpoint-20" in warnings[0]
    assert same_run(unfinished, unbroken)


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(unbroken, unfinished, corpus):
    """No file may grow beyond 100 kB, less than the model; once there is room the same command goes on."""
    shutil.rmtree(unfinished / "checkpoint-20")
    before = {path: path.read_bytes() for path in (unfinished / "checkpoint-15").glob("*.*")}
    limit = 100_000, 100_000
    ended = run("--data", corpus, "--output", unfinished,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2 and len(errors) == 1 and "checkpoint-20" in errors[0], ended.stderr
    assert "Traceback" not in ended.stderr and not (unfinished / "checkpoint-20").exists()
    assert len(before) > 5 and all(path.read_bytes() == content for path, content in before.items())
    main("--data", corpus, "--output", unfinished)
    assert same_run(unfinished, unbroken)


def test_a_run_may_go_on_in_another_folder(unbroken, corpus, tmp_path):
    main("--data", corpus, "--output", tmp_path / "out", "--resume", unbroken / "checkpoint-15")
    assert losses(tmp_path / "out") == {step: loss for step, loss in losses(unbroken).items() if step > 15}
    assert [row["step"] for row in records(tmp_path / "out", "eval_mlm_loss")] == [15, 20]
    assert same_weights(tmp_path / "out", unbroken)


def test_a_run_that_goes_on_from_the_end_of_another_leaves_its_model(unbroken, corpus, tmp_path):
    main("--data", corpus, "--output", tmp_path / "out", "--resume", unbroken / "checkpoint-20")
    assert same_weights(tmp_path / "out", unbroken)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(corpus, tmp_path, capfd):
    message, _ = error_of(capfd, "--data", corpus, "--output", tmp_path / "out", "--lr", 1e30)
    last = max(losses(tmp_path / "out"))
    assert f"at step {last + 1}" in message and all(map(math.isfinite, losses(tmp_path / "out")[last]))


def test_weights_that_the_last_step_spoilt_are_not_saved(corpus, tmp_path, capfd):
    flags = "--lr 1e30 --steps 1 --warmup_steps 0".split()
    message, _ = error_of(capfd, "--data", corpus, "--output", tmp_path / "out", *flags)
    assert "held-out loss is not finite" in message and not list(tmp_path.glob("out/checkpoint-*"))


# ------------------------------------------------------------------------------------------ what a run leaves


@pytest.fixture
def vectors(trained):
    """Three texts and their [CLS] vectors by the model in memory."""
    texts, tokenizer = make_texts(3, seed=5, evaluated=0), AutoTokenizer.from_pretrained(trained[0])
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        return texts, tokens, trained[1].eval().lm.base_model(**tokens).last_hidden_state[:, 0]


def test_transformers_loads_the_trained_model_without_a_warning(unbroken, vectors, capfd, recwarn):
    capfd.readouterr()
    lm, report = AutoModelForMaskedLM.from_pretrained(unbroken, output_loading_info=True)
    assert not any(report.values()) and not recwarn.list and "warn" not in capfd.readouterr().err.lower()
    _, tokens, expected = vectors
    with torch.no_grad():
        found = lm.base_model(**tokens).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_folder_says_cls_and_dot_product_to_sentence_transformers(unbroken):
    names = "modules", "1_Pooling/config", "config_sentence_transformers", "sentence_bert_config"
    modules, pooling, own, module = (json.loads((unbroken / f"{name}.json").read_text()) for name in names)
    assert [(module["type"].split(".")[-1], module["path"]) for module in modules] == [
        ("Transformer", ""), ("Pooling", "1_Pooling")]
    assert pooling["pooling_mode_cls_token"] is True and pooling["word_embedding_dimension"] == 128
    assert own["similarity_fn_name"] == "dot" and module["max_seq_length"] == 32


def test_sentence_transformers_gives_our_vectors(unbroken, vectors):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(unbroken), device="cpu")
    found = model.encode(vectors[0], convert_to_tensor=True)
    torch.testing.assert_close(found, vectors[2], atol=1e-5, rtol=0)
    assert model.similarity_fn_name == "dot"


def test_metrics_has_the_documented_fields(unbroken):
    fields = sorted("step loss mlm_loss bow_loss bow_weight lr grad_norm tokens_per_second padding_share "
                    "data_wait_share peak_memory_mb".split())
    evaluated = sorted("step eval_mlm_loss eval_bow_loss eval_term_coverage".split())
    rows = records(unbroken, "step")
    assert [sorted(row) for row in rows] == [evaluated, *2 * [*[fields] * 10, evaluated]]
    assert [row["step"] for row in rows] == [*range(11), 10, *range(11, 21), 20]
    shares = [row[name] for row in records(unbroken, "loss") for name in ("padding_share", "data_wait_share")]
    assert all(0 <= share < 1 for share in shares) and max(shares) > 0


def test_losses_are_logged_with_all_their_digits(unbroken):
    values = [value for loss in losses(unbroken).values() for value in loss]
    assert all(torch.tensor(value, dtype=torch.float32).item() == value for value in values)


def test_run_json_tells_how_the_run_was_made(unbroken, corpus):
    content = json.loads((unbroken / "run.json").read_text())
    flags = [*SMALL, "--data", corpus, "--output", str(unbroken)]
    git = subprocess.run(["git", "-C", SCRIPT.parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert content.keys() == {"config", "versions", "git_commit", "device", "world_size", "argv"}
    assert content["config"] == dataclasses.asdict(bow_mae.parse_config(flags))
    assert content["versions"]["torch"] == torch.__version__ and content["argv"] == sys.argv
    assert content["git_commit"] == (git.stdout.strip() or None) and content["world_size"] == 1


def test_a_run_prints_one_line_before_and_a_table_after(corpus, tmp_path, capfd):
    capfd.readouterr()
    main("--data", corpus, "--output", tmp_path / "out", "--steps", 2)
    first, *_, header, mlm, bow, coverage, saved = capfd.readouterr().out.splitlines()
    for part in ("bow", "parameters", "8 windows", "2 steps", "256 tokens", "float32"):
        assert part in first
    assert header.split() == ["held-out", "before", "after"] and str(tmp_path / "out") in saved
    for line, name in ((mlm, "mlm_loss"), (bow, "bow_loss"), (coverage, "term_coverage")):
        values = [f"{row[f'eval_{name}']:.4f}" for row in records(tmp_path / "out", f"eval_{name}")]
        assert len(values) == 2 and line.split() == [name, *values]


@pytest.mark.parametrize("kind", [Config, RetrievalConfig])
def test_help_lists_every_field_with_its_help(kind, capsys):
    with pytest.raises(SystemExit) as stop:
        bow_mae.parse_config(["--help"], kind)
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(kind):
        assert f"--{field.name} " in shown and len(field.metadata["help"]) > 5
        assert " ".join(field.metadata["help"].split())[:40] in shown


# ------------------------------------------------------------------------------------------------- the README

README = SCRIPT.with_name("README.md").read_text()


def test_every_flag_in_the_readme_exists():
    flags = {field.name for kind in (Config, RetrievalConfig) for field in dataclasses.fields(kind)}
    others = {"help", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}  # the last of torchrun
    assert set(re.findall(r"--(\w+)", README)) <= flags | others


def test_the_commands_of_the_paper_parse_under_their_number_of_processes(monkeypatch):
    readme = README.replace("\\\n", " ")
    lines = re.findall(r"^    torchrun --nproc_per_node (\d+) (.*)$", readme, re.MULTILINE)
    assert len(lines) >= 8
    for processes, command in lines:
        script, *words = shlex.split(command)
        kind = {"bow_mae.py": Config, "eval_retrieval.py": RetrievalConfig}[script]
        task = [words.pop(0)] if words and not words[0].startswith("-") else []
        monkeypatch.setenv("WORLD_SIZE", processes)
        bow_mae.parse_config(words, kind, trains=task in ([], ["finetune"]))


def test_every_flag_is_used():
    code = SCRIPT.read_text() + SCRIPT.with_name("eval_retrieval.py").read_text()
    for kind in (Config, RetrievalConfig):
        for field in dataclasses.fields(kind):
            assert re.search(rf"(config|self)\.{field.name}\b", code), field.name


def test_the_commands_of_the_quick_start_run(corpus, tmp_path):
    """As they stand there, but for the installation, which .ci/run does, and with small runs of both."""
    section = README.split("## Quick start")[1].split("\n## ")[0]
    commands = re.findall(r"^    pip install .* && (\w.*)$", section, re.MULTILINE)
    assert commands == ["torchrun bow_mae.py", "pytest"]
    small = [f"{' '.join(SMALL)} --data {corpus} --output {tmp_path}", "--collect-only --quiet"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                                "PYTEST_ADDOPTS": ""}
    for command, flags in zip(commands, small):
        ended = subprocess.run(f"{command} {flags}".split(), cwd=SCRIPT.parent, env=environment, timeout=200)
        assert ended.returncode == 0


def test_the_training_loop_of_the_readme_teaches_the_bag_of_words():
    """The loop as it stands there, with a fresh model and a collator of transformers."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.model_max_length = 32
    model = bow_mae.load_lm("tiny", tokenizer, 32, seed=0).train()
    rows = [tokenizer(text, truncation=True, max_length=32) for text in make_texts(2000, longest=6)]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    names = {"tokenizer": tokenizer, "model": model, "optimizer": torch.optim.AdamW(model.parameters(), 1e-3),
             "loader": torch.utils.data.DataLoader(rows * 6, batch_size=64, collate_fn=collator)}
    torch.manual_seed(0)
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    unmasked = tokenizer.pad(rows[:64], return_tensors="pt")
    with torch.no_grad():
        cls = model.eval().base_model(**unmasked).last_hidden_state[:, 0]
    coverage = term_coverage(bow_mae.mlm_head(model, cls), unmasked["input_ids"], names["special"]).mean()
    assert coverage > 0.3  # by chance: 5 of 100 words


# -------------------------------------------------------------------------------------------------- bad input

BAD_FLAGS = {  # what the message must say
    "--stesp 5": "--stesp",
    "--objective bag": "objective",
    "--steps ten": "steps",
    "--steps 0": "--steps 0",
    "--lr nan": "--lr",
    "--mask_ratio 0": "--mask_ratio",
    "--mask_ratio 1": "--mask_ratio",
    "--mask_ratio -0.5": "--mask_ratio",
    "--micro_batch_size 3": "--batch_size 8 is not a multiple of --micro_batch_size 3",
    "--data nowhere.jsonl": "nowhere.jsonl",
    "--data nowhere/*.jsonl": "nowhere/*.jsonl",
    "--data nobody/nothing": "nobody/nothing",
    "--data models/short": "models/short",
    "--text_columns body": "the columns are 'title' 'text'",
    "--model nobody/nothing": "nobody/nothing",
    "--model models/short": "--max_length 32",
    "--model models/headless": "models/headless",
    "--model models/maskless": "mask",
    "--model models/clsless": "[CLS]",
    "--model models/electra": "Electra",
    "--model models/bart": "Bart",
    "--output good.jsonl/out": "good.jsonl/out",
    "--output models": "models",
    "--resume nowhere": "--resume nowhere",
}
GOOD = "".join(json.dumps({"title": "a", "text": text}) + "\n" for text in make_texts(50, evaluated=1))
BAD_FILES = {  # name, content, what the message must say
    "empty": ("a.jsonl", b"", "a.jsonl, line 0: no record in it"),
    "malformed": ("a.jsonl", GOOD + '{"text": "ba ke"\n' + GOOD, "a.jsonl, line 51"),
    "null": ("a.jsonl", GOOD + '{"title": "b", "text": null}\n', "a.jsonl, line 51: column 'text' is null"),
    "number": ("a.jsonl", GOOD + '{"title": "b", "text": 7}\n', "a.jsonl, line 51: column 'text' is 7"),
    "list": ("a.jsonl", GOOD + '{"title": "b", "text": ["ba"]}\n', "a.jsonl, line 51"),
    "nothing": ("a.jsonl", GOOD + '{"title": "b"}\n', "a.jsonl, line 51: column 'text'"),
    "numbers alone": ("a.jsonl", '{"text": 1}\n{"text": 2}\n', "a.jsonl, line 1: column 'text' is 1"),
    "no object": ("a.jsonl", GOOD + "[1, 2]\n", "a.jsonl, line 51"),
    "null in a list": ("a.json", '[\n {"text": "ba"},\n {"text": null}\n]', "a.json, line 4: column 'text'"),
    "blank": ("a.jsonl", "\n\n", "a.jsonl, line 2: no record in it"),
    "latin-1 json": ("a.jsonl", (GOOD + '{"text": "café"}\n').encode("latin-1"), "a.jsonl, line 51"),
    "latin-1 text": ("a.txt", "ba ke\ncafé\n".encode("latin-1"), "a.txt, line 2"),
    "latin-1 csv": ("a.csv", "text\ncafé\n".encode("latin-1"), "a.csv, line 2"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-200], "a.jsonl.gz"),
    "no gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz"),
    "no parquet": ("a.parquet", GOOD, "a.parquet"),
    "unknown format": ("a.pdf", GOOD, "a.pdf"),
}


@pytest.fixture(scope="session")
def bad_models(folder):
    """Models that cannot be trained: few positions, no head, no mask token, no [CLS], an unknown head."""
    bert = transformers.BertConfig(**TINY, max_position_embeddings=20)
    electra = transformers.ElectraConfig(**TINY, embedding_size=32)
    bart = transformers.BartConfig(vocab_size=200, d_model=32, encoder_layers=1, decoder_layers=1)
    vocab = models.WordPiece({word: i for i, word in enumerate([*SPECIALS, *WORDS])}, unk_token="[UNK]")
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    backend = tokenizers.Tokenizer(vocab)
    maskless = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    clsless = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens, mask_token="[MASK]")
    for name, model, tokenizer in [
            ("short", AutoModelForMaskedLM.from_config(bert), word_tokenizer(WORDS)),
            ("headless", transformers.BertModel(bert), word_tokenizer(WORDS)),
            ("maskless", AutoModelForMaskedLM.from_config(bert), maskless),
            ("clsless", AutoModelForMaskedLM.from_config(bert), clsless),
            ("electra", AutoModelForMaskedLM.from_config(electra), word_tokenizer(WORDS)),
            ("bart", AutoModelForMaskedLM.from_config(bart), word_tokenizer(WORDS))]:
        model.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    return folder / "models"


@pytest.fixture
def workplace(tmp_path, monkeypatch, bad_models):
    """A current folder with a good corpus and the models above."""
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(GOOD)
    Path("models").symlink_to(bad_models)
    return tmp_path


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items(), ids=BAD_FLAGS)
def test_a_bad_flag_gives_one_line_and_leaves_nothing(flags, message, workplace, capfd):
    error, lines = error_of(capfd, "--data", "good.jsonl", "--output", "out", *flags.split())
    assert message in error and lines == 1
    assert not any(path.is_file() for path in Path("out").rglob("*"))


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_gives_one_line_and_leaves_nothing(name, content, message, workplace, capfd):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    error, lines = error_of(capfd, "--data", name, "--output", "out")
    assert message in error and lines == 1
    assert not any(path.is_file() for path in Path("out").rglob("*"))


def test_a_number_in_a_later_file_is_refused(workplace, capfd):
    """Whose texts `datasets` would else turn into JSON from there on, as the first file has the type."""
    Path("folder").mkdir()
    Path("folder/a.jsonl").write_text(GOOD)
    Path("folder/b.jsonl").write_text(GOOD + '{"title": "b", "text": 7}\n' + GOOD)
    error, lines = error_of(capfd, "--data", "folder", "--output", "out")
    assert "b.jsonl, line 51: column 'text' is 7" in error and lines == 1


def test_a_column_that_no_record_has_is_refused(workplace, capfd):
    """Also beside one that they have: a slip in one name must not train on half of the text."""
    datasets.Dataset.from_dict({"text": ["ba ke"]}).to_parquet("a.parquet")
    for data in "good.jsonl", "a.parquet":
        flags = "--data", data, "--output", "out", "--text_columns", "text", "boddy"
        assert "column 'boddy'" in error_of(capfd, *flags)[0]


def test_a_corpus_with_fewer_texts_than_parts_is_refused(workplace, capfd):
    flags = "--data good.jsonl --output out --batch_size 800"
    assert "200 parts" in error_of(capfd, *flags.split())[0]


def test_two_formats_in_a_folder_are_refused(workplace, capfd):
    Path("other.txt").write_text("ba ke\n")
    assert "one format" in error_of(capfd, "--data", ".", "--output", "out")[0]


def test_a_mended_command_starts_in_the_same_folder(workplace, capfd):
    error_of(capfd, "--data", "nowhere.jsonl", "--output", "out", "--steps", 2)
    main("--data", "good.jsonl", "--output", "out", "--steps", 2)
    assert max(losses("out")) == 2


def test_a_corpus_without_held_out_texts_is_trained_on(workplace):
    texts = [text for text in make_texts(50, evaluated=0) if not held_out(text)]
    main("--data", write_jsonl("a.jsonl", texts), "--output", "out", "--steps", 2)
    assert max(losses("out")) == 2 and Path("out/model.safetensors").exists()


@pytest.mark.parametrize("flags, message", [
    ("--lr 0.1", "--lr 0.002, not 0.1"), ("--seed 1 --max_length 16", "--max_length 32, not 16"),
    ("--seed 1 --objective mlm", "--objective bow, not mlm"), ("--resume never", "holds a run")])
def test_the_folder_of_another_run_is_refused_and_left_alone(flags, message, unbroken, corpus, capfd):
    before = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()}
    error, lines = error_of(capfd, "--data", corpus, "--output", unbroken, *flags.split())
    assert message in error and lines == 1
    assert {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()} == before


def test_the_checkpoint_of_another_model_is_refused(unbroken, corpus, workplace, capfd):
    flags = ["--data", corpus, "--output", "out", "--resume", unbroken / "checkpoint-20", "--model", "mini"]
    assert "--model tiny, not mini" in error_of(capfd, *flags)[0]
    assert not any(path.is_file() for path in Path("out").rglob("*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_line_in_the_middle_of_a_stream_stops_the_run(workers, tmp_path):
    """Beyond the first 10 MB, which `datasets` parses at once, and the texts that the vocabulary is of."""
    lines = [json.dumps({"text": text, "unused": "x" * 2000}) for text in make_texts(6000, longest=10)]
    lines[5432] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = "--data a.jsonl --output out --batch_size 128 --micro_batch_size 64 --steps 100 --workers"
    code = "import sys, bow_mae; bow_mae.SAMPLE_BLOCKS = 1; bow_mae.main(sys.argv[1:])"
    ended = run(*SMALL, *flags.split(), workers, code=code, cwd=tmp_path)
    last = max(losses(tmp_path / "out"))
    assert ended.returncode == 2 and ended.stderr.count("error: ") == 1 and "Traceback" not in ended.stderr
    assert "error: --data a.jsonl, line 5433: " in ended.stderr and 5 < last < 100
    assert (tmp_path / f"out/checkpoint-{last // 5 * 5}/trainer_state.json").exists()


def test_with_two_processes_the_message_appears_once(workplace):
    ended = run("--data", "good.jsonl", "--output", "out", "--batch_size", 12, processes=2, cwd=workplace)
    errors = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert ended.returncode != 0 and len(errors) == 1 and "2 processes" in errors[0], ended.stderr


# --------------------------------------------------------------------------------------------------- learning


def test_bow_teaches_the_cls_vector_its_words_and_mlm_does_not(tmp_path):
    """Term coverage of held-out texts of random words, after runs that differ in the objective alone."""
    corpus, coverage = write_jsonl(tmp_path / "a.jsonl", make_texts(2000, evaluated=20, longest=6)), {}
    flags = ("--steps 250 --warmup_steps 20 --batch_size 64 --micro_batch_size 64 --log_every 250 "
             "--save_every 250 --eval_every 250").split()
    for objective in ("bow", "mlm"):
        main("--data", corpus, "--output", tmp_path / objective, "--objective", objective, *flags)
        evaluations = records(tmp_path / objective, "eval_term_coverage")
        coverage[objective] = [row["eval_term_coverage"] for row in evaluations]
    assert coverage["bow"][0] == coverage["mlm"][0] < 0.15
    assert coverage["mlm"][1] < 0.35 and coverage["bow"][1] > 0.6


# =============================================================================== retrieval: eval_retrieval.py

# ---------------------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand():
    """Ranked: b (grade 0), a (2), c (not judged), d (1); ideal: 2, 1, 1 (e is not found)."""
    run = {"1": {"a": 2.0, "b": 3.0, "c": 1.0, "d": 0.5}}
    qrels = {"1": {"a": 2, "b": 0, "d": 1, "e": 1}}
    found = evaluate_run(run, qrels)["1"]
    dcg = 2 / math.log2(3) + 1 / math.log2(5)
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found == pytest.approx({
        "MRR@10": 1 / 2, "nDCG@10": dcg / ideal, "MAP@1000": (1 / 2 + 2 / 4) / 3, "Recall@50": 2 / 3,
        "Recall@100": 2 / 3, "Recall@1000": 2 / 3, "Hit@1": 0, "Hit@10": 1, "Hit@50": 1, "Hit@1000": 1})


def test_of_equal_scores_the_greater_id_is_first_whatever_the_order_of_the_run():
    """Equal as float32, compared by bytes: "9" > "10"; as in trec_eval."""
    for names in (["10", "9"], ["9", "10"]):
        run = {"1": {name: 1 + 1e-9 * int(name) for name in names}}
        assert evaluate_run(run, {"1": {"9": 1}})["1"]["MRR@10"] == 1
        assert evaluate_run(run, {"1": {"10": 1}})["1"]["MRR@10"] == 1 / 2


def test_metrics_are_cut_at_their_rank():
    run = {"1": {f"{i:04}": -float(i) for i in range(1, 1200)}}  # passage i has rank i
    found = evaluate_run(run, {"1": {"0011": 1, "0051": 1, "1001": 1}})["1"]
    assert found == pytest.approx({
        "MRR@10": 0, "nDCG@10": 0, "MAP@1000": (1 / 11 + 2 / 51) / 3, "Recall@50": 1 / 3, "Recall@100": 2 / 3,
        "Recall@1000": 2 / 3, "Hit@1": 0, "Hit@10": 0, "Hit@50": 1, "Hit@1000": 1})


def test_a_missing_query_scores_0_and_one_without_relevant_passages_is_left_out():
    qrels = {"1": {"a": 1}, "2": {"a": 1}, "3": {"a": 0}, "4": {}}
    found = evaluate_run({"1": {"a": 1.0}, "3": {"a": 1.0}, "5": {"a": 1.0}}, qrels)
    assert found.keys() == {"1", "2"} and set(found["2"].values()) == {0}
    assert eval_retrieval.mean(found)["MRR@10"] == 1 / 2


def test_at_relevance_level_2_only_ndcg_sees_grade_1():
    found = evaluate_run({"1": {"a": 2.0, "b": 1.0}}, {"1": {"a": 1, "b": 2}}, relevance_level=2)["1"]
    assert found["MRR@10"] == found["MAP@1000"] == 1 / 2 and found["Hit@1"] == 0 and found["Recall@50"] == 1
    assert found["nDCG@10"] == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)))


def test_a_passage_with_the_id_of_its_query_is_dropped_unless_kept():
    run, qrels = {"1": {"1": 2.0, "a": 1.0}}, {"1": {"a": 1}}
    assert evaluate_run(run, qrels)["1"]["MRR@10"] == 1
    assert evaluate_run(run, qrels, keep_identical_ids=True)["1"]["MRR@10"] == 1 / 2


def test_answers_are_sought_word_for_word_as_dpr_does():
    bodies = {"a": "In 1969, Neil\nARMSTRONG walked.", "b": "Neil, Armstrong", "c": "O\u0301scar won $5."}
    run = {"1": {"b": 3.0, "a": 2.0, "c": 1.0}}
    def rank(answer):
        """The first rank of an answer, of which AnswerHit tells whether it is within 5."""
        return eval_retrieval.answer_hits(run, {"1": [answer]}, bodies.get)["1"]["AnswerHit@5"]
    found = [rank(text) for text in ("neil armstrong", "\u00d3scar", "$5", "arm", "5 $", "", " ")]
    assert found == [1, 1, 1, 0, 0, 0, 0]
    tokens = eval_retrieval.answer_tokens("L'\u00c9t\u00e9 3.5%")
    assert tokens == ["l", "'", "e\u0301te\u0301", "3", ".", "5", "%"]


def test_answer_hits_count_to_their_rank():
    bodies = {f"{i:03}": "yes" if i == 20 else "no" for i in range(1, 101)}
    run = {"1": {name: -float(name) for name in bodies}}
    hits = eval_retrieval.answer_hits(run, {"1": ["Yes"], "2": ["no"]}, bodies.get)
    assert hits == {"1": {"AnswerHit@5": 0, "AnswerHit@20": 1, "AnswerHit@100": 1},
                    "2": {"AnswerHit@5": 0, "AnswerHit@20": 0, "AnswerHit@100": 0}}


def test_the_permutation_test_agrees_with_all_signs():
    differences = np.array([0.5, 0.1, -0.2, 0.4, 0.3, 0.25, -0.1, 0.6])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=8)]
    exact = np.mean([total >= abs(differences.sum()) - 1e-9 for total in sums])
    assert eval_retrieval.permutation_test(differences) == pytest.approx(exact, abs=0.01)
    assert eval_retrieval.permutation_test(np.zeros(9)) == 1


def test_bm25_is_the_sum_of_the_textbook():
    texts = ["a b b c", "b c d", "", "a A a, e", "f"]
    scores, rows, _ = eval_retrieval.bm25(texts, ["B a unknown", "unknown"], 5)
    words, expected = [text.lower().replace(",", "").split() for text in texts], []
    for document in words:
        score = 0
        for term in ("b", "a"):
            n, tf = sum(term in other for other in words), document.count(term)
            idf = math.log(1 + (5 - n + 0.5) / (n + 0.5))
            score += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(document) / (12 / 5)))
        expected.append(score)
    assert rows.tolist() == [[0, 3, 1, -1, -1], [-1] * 5]
    assert scores[0, :3] == pytest.approx([expected[row] for row in rows[0, :3]])


# ----------------------------------------------------------------------------------------------- task formats

PASSAGES = [{"_id": f"d{i}", "title": "" if i % 3 else "ba", "text": text}
            for i, text in enumerate(make_texts(70, seed=3, evaluated=0, longest=12))]


def write_beir(folder, passages=PASSAGES):
    """A BEIR folder whose query i, of passage i, is its first words: 40 in train, 30 in test."""
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    with (folder / "queries.jsonl").open("w") as queries:
        for i, passage in enumerate(passages):
            queries.write(json.dumps({"_id": f"q{i}", "text": " ".join(passage["text"].split()[:3])}) + "\n")
    for split, rows in (("train", range(40)), ("test", range(40, len(passages)))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def beir(folder):
    """The --data of 70 passages."""
    return write_beir(folder / "beir_task")


def load(data, split="test"):
    """A task."""
    return eval_retrieval.load_task(RetrievalConfig(data=str(data)), split)


def test_queries_with_answers_need_no_qrels(beir, unfinetuned, tmp_path):
    """One is answered by its own passage, the other by none."""
    shutil.copytree(beir, tmp_path / "task")
    shutil.rmtree(tmp_path / "task/qrels")
    text = PASSAGES[40]["text"]
    queries = [{"_id": name, "text": text, "answers": [answer]}
               for name, answer in (("q", text), ("p", "no"))]
    (tmp_path / "task/queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    flags = "--model", unfinetuned, "--data", tmp_path / "task", "--output", tmp_path / "out"
    retrieval("evaluate", *flags)
    rows = [json.loads(line) for line in (tmp_path / "out/per_query.jsonl").read_text().splitlines()]
    assert [(row["query_id"], row["AnswerHit@100"]) for row in rows] == [("q", 1), ("p", 0)]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["AnswerHit@100"] == 1 / 2


def test_equal_ids_mean_nothing_between_the_numbers_of_ms_marco(tmp_path):
    (tmp_path / "collection.tsv").write_text("1\tba ke\n2\tdi lo\n")
    (tmp_path / "queries.test.tsv").write_text("1\tba ke\n")
    (tmp_path / "qrels.test.tsv").write_text("1\t1\t1\n")
    retrieval("evaluate", "--model", "bm25", "--data", tmp_path, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out/metrics.json").read_text())["MRR@10"] == 1


def test_a_tab_in_a_passage_does_not_end_it(tmp_path):
    (tmp_path / "collection.tsv").write_text("1\tba ke\tdi lo\n")
    (passage,) = eval_retrieval.read_passages(str(tmp_path / "collection.tsv"))
    assert passage["text"] == "ba ke\tdi lo"


@pytest.mark.parametrize("iteration", ["", "0\t"])
def test_ms_marco_files_give_the_same_task_as_a_beir_folder(iteration, beir, tmp_path):
    task = load(beir)
    texts = task.texts(range(len(task.passages)))
    collection = "".join(f"{name}\t{text}\n" for name, text in zip(task.rows, texts))
    queries = "".join(f"{name}\t{text}\n" for name, text in task.queries.items())
    qrels = "".join(f"{query}\t{iteration}{name}\t{grade}\n"
                    for query, some in task.qrels.items() for name, grade in some.items())
    (tmp_path / "collection.tsv.gz").write_bytes(gzip.compress(collection.encode()))
    (tmp_path / "queries.test.tsv").write_text(queries)
    (tmp_path / "qrels.test.tsv").write_text(qrels)
    other = load(tmp_path)
    assert len(task.queries) == 30 and other.texts(range(len(texts))) == texts
    assert (other.rows, other.queries, other.qrels) == (task.rows, task.queries, task.qrels)


def test_titles_and_texts_may_be_null_or_missing(beir, tmp_path):
    shutil.copytree(beir, tmp_path / "task")
    rows = [{"_id": "d40", "title": None, "text": "ba"}, {"_id": "d41", "title": "ke", "text": None},
            {"_id": 7}]
    (tmp_path / "task/corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task/qrels/test.tsv").write_text("q40\td40\t1\nq41\t7\t2\n")
    task = load(tmp_path / "task")
    assert task.texts([0, 1, 2]) == ["ba", "ke", ""] and task.qrels == {"q40": {"d40": 1}, "q41": {"7": 2}}


@pytest.mark.parametrize("passage, text", [
    ({"title": ["ba"], "text": ["ke"]}, "ba ke"), ({"text": ["ke"]}, "ke")])
def test_hub_names_are_loaded_as_those_of_beir(passage, text, monkeypatch):
    tables = {("BeIR/x", "corpus", "corpus"): {"_id": ["1"]} | passage,
              ("BeIR/x", "queries", "queries"): {"_id": ["2"], "title": [""], "text": ["di"]},
              ("BeIR/x-qrels", None, "test"): {"query-id": [2], "corpus-id": [1], "score": [1]}}

    def load_dataset(path, name=None, *, split):
        return datasets.Dataset.from_dict(tables[path, name, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load("BeIR/x")
    assert (task.texts([0]), task.queries, task.qrels) == ([text], {"2": "di"}, {"2": {"1": 1}})


def test_python_docs_splits_share_no_query_and_ids_differ_from_those_of_passages(monkeypatch):
    monkeypatch.setattr(bow_mae, "PACKAGES", ["python", "huggingface_hub"])
    tasks = [load("python-docs", split) for split in ("train", "dev", "test")]
    names = [name for task in tasks for name in task.queries]
    assert len(names) == len(set(names)) == len(tasks[0].passages) and not set(names) & set(tasks[0].rows)
    assert len(tasks[0].queries) > 5 * len(tasks[2].queries) > 100


# ---------------------------------------------------------------------------------------- encoding and search


def retrieval(*flags):
    """A run of eval_retrieval.py in this process."""
    main(*flags, script=eval_retrieval)


def torchrun(processes, script, *flags):
    """A run of a script in processes of its own, which must succeed."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes, script]
    ended = subprocess.run([*map(str, start), *map(str, flags)], capture_output=True, text=True, timeout=200,
                           env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)})
    assert ended.returncode == 0, ended.stderr


def retrieval_run(*flags, processes=1):
    """A run of eval_retrieval.py, with 16 passages a file of vectors, in processes of its own."""
    script = Path(CACHE.name, "run_retrieval.py")
    script.write_text("import sys, eval_retrieval\n"
                      "eval_retrieval.CHUNK = 16\n"
                      "eval_retrieval.main(sys.argv[1:])\n"
                      "eval_retrieval.bow_mae.leave()\n")
    torchrun(processes, script, *flags)


@pytest.fixture
def small_chunks(monkeypatch):
    """16 passages a file of vectors."""
    monkeypatch.setattr(eval_retrieval, "CHUNK", 16)


@pytest.fixture(scope="session")
def evaluated(folder, unfinetuned, beir):
    """The output of an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_retrieval, "CHUNK", 16)
        retrieval("evaluate", "--model", unfinetuned, "--data", beir, "--output", folder / "evaluated")
    return folder / "evaluated"


@pytest.fixture(scope="session")
def unfinetuned(trained):
    """The model of the unbroken run."""
    return trained[0]


def test_an_evaluation_is_that_of_a_loop_over_sentences(unfinetuned, beir, tmp_path):
    """Each text alone through `transformers`, all dot products, sorted."""
    flags = "--data", beir, "--output", tmp_path / "out", "--precision", "fp32"
    retrieval("evaluate", "--model", unfinetuned, *flags)
    tokenizer = AutoTokenizer.from_pretrained(unfinetuned)
    lm = AutoModelForMaskedLM.from_pretrained(unfinetuned)
    def encode(text, length):
        """[CLS] of one text."""
        with torch.no_grad():
            tokens = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
            return lm.base_model(**tokens).last_hidden_state[0, 0]
    task = load(beir)
    passages = torch.stack([encode(text, 32) for text in task.texts(range(70))])
    run = {query_id: dict(zip(task.rows, (passages @ encode(text, 32)).tolist()))
           for query_id, text in task.queries.items()}
    found = eval_retrieval.read_run(tmp_path / "out/run.trec")
    assert found.keys() == run.keys()
    for query_id, hits in found.items():  # approx compares the keys too
        assert hits == pytest.approx(run[query_id], rel=1e-5)


def test_an_evaluation_leaves_files_that_agree(evaluated, beir):
    run, task = eval_retrieval.read_run(evaluated / "run.trec"), load(beir)
    lines = [line.split() for line in (evaluated / "run.trec").read_text().splitlines()]
    assert {len(line) for line in lines} == {6} and [int(line[3]) for line in lines] == [*range(1, 71)] * 30
    qrels = [line.split() for line in (evaluated / "qrels.trec").read_text().splitlines()]
    assert qrels == [[query, "0", name, "1"] for query, some in task.qrels.items() for name in some]
    means = json.loads((evaluated / "metrics.json").read_text())
    expected = eval_retrieval.mean(evaluate_run(run, task.qrels))
    assert {name: means[name] for name in expected} == expected
    per_query = [json.loads(line) for line in (evaluated / "per_query.jsonl").read_text().splitlines()]
    assert np.mean([row["MRR@10"] for row in per_query]) == pytest.approx(means["MRR@10"])


def test_two_processes_give_the_same_run_file_as_one(evaluated, unfinetuned, beir, tmp_path, small_chunks):
    output = tmp_path / "out"
    retrieval_run("evaluate", "--model", unfinetuned, "--data", beir, "--output", output, processes=2)
    assert (output / "run.trec").read_bytes() == (evaluated / "run.trec").read_bytes()
    assert len(list((output / "index").glob("*.faiss"))) == 2
    retrieval("evaluate", "--model", unfinetuned, "--data", beir, "--output", output)  # once more, by one
    assert len(list((output / "index").glob("*.faiss"))) == 1


def test_query_vectors_do_not_depend_on_the_number_of_processes(unfinetuned, beir, monkeypatch, tmp_path):
    """They are encoded in groups of 256, whoever encodes them; here 300, after the 70 passages."""
    task = load(beir, "train")
    task.queries = {str(i): " ".join(WORDS[: 1 + i % 25]) for i in range(300)}
    task.qrels = {name: {} for name in task.queries}
    encoded = []

    class Noted(eval_retrieval.Encoder):
        def __call__(self, texts, max_length):
            encoded.append(texts)
            return super().__call__(texts, max_length)

    monkeypatch.setattr(eval_retrieval, "Encoder", Noted)
    with bow_mae.process_group() as device:
        config = RetrievalConfig(model=str(unfinetuned), output=str(tmp_path))
        eval_retrieval.retrieve(config, task, device, 5)
    assert [len(texts) for texts in encoded] == [70, 256, 44]


def test_no_more_passages_than_there_are_and_no_more_than_top_k(unfinetuned, beir, tmp_path):
    retrieval("evaluate", "--model", unfinetuned, "--data", beir, "--output", tmp_path / "out", "--top_k", 5)
    run = eval_retrieval.read_run(tmp_path / "out/run.trec")
    assert {len(hits) for hits in run.values()} == {5}


@pytest.mark.parametrize("index, least", [
    ("SQfp16", 0.8), ("HNSW32", 0.8), ("IVF2,Flat", 0.3), ("IVF2,PQ4x4", 0.05)])
def test_other_indexes_find_much_of_what_flat_finds(
        index, least, evaluated, unfinetuned, beir, tmp_path, small_chunks):
    output = tmp_path / "out"
    retrieval("evaluate", "--model", unfinetuned, "--data", beir, "--output", output, "--index", index)
    flat, other = (eval_retrieval.read_run(folder / "run.trec") for folder in (evaluated, output))
    assert all(hits and not hits.keys() - load(beir).rows.keys() for hits in other.values())
    same = [len(set([*hits][:10]) & set([*other[query_id]][:10])) / 10 for query_id, hits in flat.items()]
    assert np.mean(same) > least


def test_finished_vectors_are_used_again_and_others_refused(
        evaluated, unfinetuned, beir, tmp_path, small_chunks, monkeypatch, capfd):
    output = tmp_path / "out"
    shutil.copytree(evaluated, output)
    for path in (output / "vectors").glob("0000000016*"):
        path.unlink()  # as if it had not been finished
    counts, encode = [], eval_retrieval.cls_vectors

    def counted(*args):
        counts.append(len(args[1]["input_ids"]))
        return encode(*args)

    monkeypatch.setattr(eval_retrieval, "cls_vectors", counted)
    flags = ["evaluate", "--model", unfinetuned, "--data", beir, "--output", output]
    retrieval(*flags)
    assert sum(counts) == 16 + 30
    assert (output / "run.trec").read_bytes() == (evaluated / "run.trec").read_bytes()
    error, _ = error_of(capfd, *flags, "--max_passage_length", 16, script=eval_retrieval)
    assert "--max_passage_length 96, not 16" in error


def test_compare_finds_no_difference_from_itself_and_a_large_one_from_its_reverse(
        evaluated, unfinetuned, beir, tmp_path, capfd):
    rows = [line.split() for line in (evaluated / "run.trec").read_text().splitlines()]
    backwards = [f"{query} Q0 {passage} 1 {-float(score)} tag\n" for query, _, passage, _, score, _ in rows]
    (tmp_path / "backwards.trec").write_text("".join(backwards))
    found = {}
    for name, theirs in ("same", evaluated / "run.trec"), ("reverse", tmp_path / "backwards.trec"):
        flags = "--model", unfinetuned, "--data", beir, "--output", tmp_path / name
        retrieval("evaluate", *flags, "--compare", theirs)
        found[name] = json.loads((tmp_path / name / "compare.json").read_text())
    assert {row["p"] for row in found["same"].values()} == {1} and found["reverse"]["MRR@10"]["p"] < 0.001
    assert found["reverse"]["MRR@10"]["difference"] > 0.3 and "difference" in capfd.readouterr().out


def test_search_prints_the_passages_of_the_saved_index(evaluated, unfinetuned, beir, capfd):
    capfd.readouterr()
    retrieval("search", PASSAGES[50]["text"], "--model", unfinetuned, "--data", beir, "--output", evaluated)
    lines = capfd.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines[::2]]
    assert len(lines) == 20 and scores == sorted(scores, reverse=True)
    assert lines[0].split()[1] == "d50" and PASSAGES[50]["text"][:30] in lines[1]


def test_explain_prints_text_terms_and_coverage(unfinetuned, capfd):
    text = "baba keke dodo"
    capfd.readouterr()
    retrieval("explain", text, "--model", unfinetuned)
    shown = capfd.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(unfinetuned)
    lm = AutoModelForMaskedLM.from_pretrained(unfinetuned)
    input_ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        logits = lm(input_ids).logits[:, 0]
    coverage = term_coverage(logits, input_ids, special_table(tokenizer, logits.shape[1])).item()
    assert shown.startswith(text + "\n") and f"{coverage:.1%}" in shown and "\033" not in shown
    assert tokenizer.convert_ids_to_tokens(logits.argmax().item()) in shown


# ------------------------------------------------------------------------------------------------ fine-tuning

STEPS = ("finetune --batch_size 8 --micro_batch_size 4 --epochs 2 --lr 1e-3 --warmup_steps 2 --log_every 1 "
         "--save_every 4 --negatives 2 --precision fp32").split()


@pytest.fixture(scope="session")
def mined(folder, unfinetuned, beir):
    """Negatives of 3 or more ranks of the training queries."""
    flags = "--data", beir, "--output", folder / "mined", "--depth", 2, 20, "--sample", 5
    retrieval("mine", "--model", unfinetuned, *flags)
    return folder / "mined/negatives.jsonl"


@pytest.fixture(scope="session")
def finetuned(folder, unfinetuned, beir, mined):
    """The flags and the output of an unbroken fine-tuning of 10 steps."""
    flags = [*STEPS, "--model", unfinetuned, "--data", beir, "--negatives_file", mined]
    retrieval(*flags, "--output", folder / "finetuned")
    return flags, folder / "finetuned"


def random_encoder():
    """A random BERT of dropout 0."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return transformers.BertModel(config, add_pooling_layer=False)


@pytest.fixture
def alone():
    """A group of one process."""
    with bow_mae.process_group():
        yield


def contrastive_batch(teacher):
    """A micro-batch of 3 queries with 2 passages each."""

    def side(count):
        rows = torch.randint(5, 200, (count, 6))
        return transformers.BatchEncoding({"input_ids": rows, "attention_mask": torch.ones_like(rows)})

    torch.manual_seed(1)
    return {"seed": 0, "queries": side(3), "passages": side(6), "teacher": teacher}


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_the_contrastive_and_the_teacher_loss_are_those_of_a_loop(similarity, alone):
    teacher = torch.randn(3, 2)
    batch, encoder = contrastive_batch(teacher), random_encoder()
    config = RetrievalConfig(similarity=similarity, temperature=0.5)
    losses = eval_retrieval.BiEncoder(encoder, config)([batch])
    cls = {side: encoder(**batch[side]).last_hidden_state[:, 0] for side in ("queries", "passages")}
    if similarity == "cos":
        cls = {side: rows / rows.norm(dim=1, keepdim=True) for side, rows in cls.items()}
    contrastive = distilled = 0
    for i, query in enumerate(cls["queries"]):
        scores = torch.stack([query.dot(passage) for passage in cls["passages"]]) / 0.5
        contrastive = contrastive - torch.log(scores[2 * i].exp() / scores.exp().sum()) / 3
        ours, theirs = scores[2 * i : 2 * i + 2].softmax(0), teacher[i].softmax(0)
        distilled = distilled + (theirs * (theirs / ours).log()).sum() / 3
    torch.testing.assert_close(losses["contrastive_loss"], contrastive)
    torch.testing.assert_close(losses["teacher_loss"], distilled)


KEEP_GRADIENT = """
import sys, torch, bow_mae, eval_retrieval
update, path = bow_mae.update, sys.argv.pop(1)
def keep(ddp, *args):
    gradient = {name: parameter.grad.clone() for name, parameter in ddp.named_parameters()}
    bow_mae.update = update  # the gradient of the first step alone
    torch.save(gradient, path)
    return update(ddp, *args)
bow_mae.update = keep
eval_retrieval.main(sys.argv[1:])
bow_mae.leave()
"""


def test_scores_under_autocast_are_products_in_float32(alone):
    """Of the same vectors, which autocast rounds: bfloat16 would keep three digits of a score near 32."""
    batch, encoder = contrastive_batch(torch.full((3, 2), torch.nan)), random_encoder()
    with torch.autocast("cpu", torch.bfloat16):
        loss = eval_retrieval.BiEncoder(encoder, RetrievalConfig())([batch])["contrastive_loss"]
        sides = (eval_retrieval.cls_vectors(encoder, batch[side], "dot") for side in ("queries", "passages"))
        queries, passages = (rows.double() for rows in sides)
    expected = torch.nn.functional.cross_entropy(queries @ passages.T, torch.tensor([0, 2, 4]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_signals_are_as_before_once_the_steps_are_done(finetuned, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    eval_retrieval.main([*map(str, finetuned[0]), "--output", str(tmp_path / "out"), "--steps", "1"])
    assert signal.getsignal(signal.SIGTERM) == handler


def test_loader_processes_change_nothing_in_fine_tuning(finetuned, tmp_path):
    retrieval(*finetuned[0], "--output", tmp_path / "out", "--workers", 2)
    assert same_weights(tmp_path / "out", finetuned[1])


def test_two_processes_give_the_losses_and_the_gradient_of_one(finetuned, tmp_path):
    """With hard negatives, by the whole recipe of a step; the rest of the run only differs by rounding."""
    script = tmp_path / "keep_gradient.py"
    script.write_text(KEEP_GRADIENT)
    for processes in (1, 2):
        flags = [*finetuned[0], "--output", tmp_path / f"out{processes}"]
        torchrun(processes, script, tmp_path / f"{processes}.pt", *flags)
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-5 * one[name].norm()
    one, two = (records(tmp_path / f"out{processes}", "loss") for processes in (1, 2))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)


def test_a_killed_fine_tuning_goes_on_bit_for_bit(finetuned, tmp_path):
    """SIGKILL between checkpoints, while one is written, and while the trained model takes its place."""
    flags, output = finetuned
    for event, name, count in [("open", "metrics.jsonl", 8), ("open", ".saving/trainer_state", 1),
                               ("shutil.copyfile", "model.safetensors", 1)]:
        ended = run_with_signal(signal.SIGKILL, event, name, count, *flags, "--output", tmp_path / "out",
                                script="eval_retrieval")
        assert ended.returncode == -signal.SIGKILL, (event, name, ended.stderr)
        assert not (tmp_path / "out/model.safetensors").exists()
    retrieval(*flags, "--output", tmp_path / "out")
    assert same_weights(tmp_path / "out", output)
    one, other = (records(folder, "loss") for folder in (tmp_path / "out", output))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]


def test_an_example_has_a_positive_first_and_new_negatives_in_each_epoch(beir, mined):
    config = RetrievalConfig(data=str(beir), negatives_file=str(mined), negatives=3, batch_size=8)
    examples, task = eval_retrieval.load_examples(config)
    steps = eval_retrieval.FinetuningSteps.__new__(eval_retrieval.FinetuningSteps)
    steps.config, steps.examples, steps.task = config, examples, task
    drawn = [steps.draw(7, epoch) for epoch in (0, 1, 0)]
    mined_rows = examples[7]["negatives"]
    assert drawn[0] == drawn[2] != drawn[1] and drawn[0][1][0] == task.texts([7])[0]
    assert all(set(passages[1:]) <= set(task.texts(mined_rows)) for _, passages, _ in drawn)


def test_without_mined_negatives_an_example_has_passages_of_other_queries(beir):
    config = RetrievalConfig(data=str(beir), negatives=5, batch_size=8)
    examples, task = eval_retrieval.load_examples(config)
    steps = eval_retrieval.FinetuningSteps.__new__(eval_retrieval.FinetuningSteps)
    steps.config, steps.examples, steps.task = config, examples, task
    _, passages, _ = steps.draw(7, 0)
    assert len(passages) == 6 and len(set(passages[1:])) > 2 and passages[0] not in passages[1:]
    answered = [task.texts([row])[0] for row in (0, 1)]
    examples[7]["positives"] = [0, 1]
    examples[3]["positives"] = [1, 9]  # a passage that answers both queries is no negative of either
    for epoch in range(40):
        assert not set(steps.draw(7, epoch)[1][1:]) & set(answered)


def test_a_positive_in_the_negatives_file_is_left_out(beir, tmp_path):
    (tmp_path / "negatives.jsonl").write_text('{"query_id": "q7", "negatives": ["d7", "d9"]}\n')
    flags = {"negatives_file": str(tmp_path / "negatives.jsonl"), "batch_size": 8}
    examples, _ = eval_retrieval.load_examples(RetrievalConfig(data=str(beir), **flags))
    assert examples[7]["positives"] == [7] and examples[7]["negatives"].tolist() == [9]


def test_training_data_of_tevatron_with_teacher_scores(unfinetuned, tmp_path, capfd):
    with (tmp_path / "train.jsonl").open("w") as file:
        for passage in PASSAGES[:16]:
            row = {"query": passage["text"][:20], "positive_passages": [passage | {"score": 5.0}],
                   "negative_passages": [PASSAGES[20] | {"score": 1.0}]}
            file.write(json.dumps(row) + "\n")
    flags = [*STEPS, "--model", unfinetuned, "--train_data", tmp_path / "train.jsonl", "--negatives", 1]
    retrieval(*flags, "--output", tmp_path / "out")
    rows = records(tmp_path / "out", "teacher_loss")
    assert len(rows) == 4
    for row in rows:
        assert row["loss"] == pytest.approx(row["contrastive_loss"] + row["teacher_loss"])


def test_a_fine_tuned_folder_opens_elsewhere(finetuned):
    _, report = AutoModelForMaskedLM.from_pretrained(finetuned[1], output_loading_info=True)
    assert not any(report.values())
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, texts = str(finetuned[1]), ["baba keke", "dodo"]
    ours = eval_retrieval.Encoder(RetrievalConfig(model=model), torch.device("cpu"))(texts, 64)
    theirs = sentence_transformers.SentenceTransformer(model, device="cpu").encode(texts)
    assert np.abs(ours - theirs).max() < 1e-5


# ----------------------------------------------------------------------------------------------------- mining


def write_run_negatives(qrels, ranked, tmp_path, **flags):
    """The negatives of queries whose passages a, b, c ... are ranked so, with scores 10, 9, 8 ..."""
    rows = {name: row for row, name in enumerate("abcdefghij")}
    task = eval_retrieval.Task(None, rows, {query: "" for query in qrels}, qrels)
    scores = np.array([[10.0 - i for i in range(len(ranked[query]))] for query in qrels], np.float32)
    found = scores, np.array([[rows[name] for name in ranked[query]] for query in qrels]), 0
    eval_retrieval.write_negatives(RetrievalConfig(output=str(tmp_path), **flags), task, found)
    lines = (tmp_path / "negatives.jsonl").read_text().splitlines()
    return {row["query_id"]: row["negatives"] for row in map(json.loads, lines)}


def test_each_query_loses_its_own_positives_and_no_others(tmp_path):
    qrels = {"2": {"a": 1, "c": 2, "e": 0}, "1": {"b": 1}, "d": {"a": 1}}
    ranked = {"2": "abcdef", "1": "abcdef", "d": "abcdef"}
    negatives = write_run_negatives(qrels, ranked, tmp_path, depth=[1, 200])
    assert negatives == {"2": list("bdef"), "1": list("acdef"),
                         "d": list("bcef")}  # passage "d" has the id of its query


def test_negatives_come_from_the_ranks_between_and_are_a_sample(tmp_path):
    def sample(**flags):
        flags |= {"depth": [3, 8], "sample": 4}
        return write_run_negatives({"1": {"a": 1}}, {"1": "abcdefghij"}, tmp_path, **flags)["1"]

    first = sample()
    assert len(set(first)) == 4 and set(first) <= set("cdefgh")
    assert sample() == first
    assert len({tuple(sample(seed=seed)) for seed in range(9)}) > 3


def test_likely_positives_are_dropped(tmp_path):
    """The positive b scores 9: from 0.75 of it, 6.75, on a passage is left out; without b, from 0.75 on."""
    flags = {"depth": [1, 10], "max_positive_ratio": 0.75}
    negatives = write_run_negatives({"1": {"b": 1}}, {"1": "abcdefghij"}, tmp_path, **flags)
    assert negatives["1"] == list("efghij")


# ---------------------------------------------------------------------------------------- bad retrieval input


def spoil(name, change):
    """Change a file of a task."""
    def apply(task):
        path = task / name
        path.write_text(change(path.read_text()))
    return apply


def add(name, text):
    """Add to the end of a file of a task."""
    return spoil(name, lambda before: before + text)


def repeat(name):
    """Repeat line 5 of a file of a task at its end."""
    return spoil(name, lambda text: text + text.splitlines()[4] + "\n")


BAD_TASKS = {  # what spoils the task, flags, what the message must say
    "split": (None, "--split dev", "qrels of dev; its qrels are qrels/test.tsv qrels/train.tsv"),
    "unknown ids": (add("qrels/test.tsv", "q1\tnothing\t1\nq2\tnobody\t1\n"), "", "2 unknown ids: 'nothing'"),
    "duplicate passage": (repeat("corpus.jsonl"), "", "'d4' occurs twice"),
    "duplicate query": (repeat("queries.jsonl"), "", "queries.jsonl, line 71"),
    "malformed passage": (add("corpus.jsonl", "{"), "", "corpus.jsonl, line 71"),
    "passage without id": (add("corpus.jsonl", '{"text": "ba"}'), "", "corpus.jsonl, line 71"),
    "text is a number": (add("corpus.jsonl", '{"_id": "a", "text": 7}'), "", "corpus.jsonl, line 71"),
    "malformed query": (add("queries.jsonl", "[1]\n"), "", "queries.jsonl, line 71"),
    "grade": (add("qrels/test.tsv", "q1\td1\tgood\n"), "", "test.tsv, line 32"),
    "empty corpus": (spoil("corpus.jsonl", lambda text: ""), "", "corpus.jsonl"),
    "no hub": (None, "--data nobody/nothing", "nobody/nothing"),
    "no model": (None, "--model nowhere", "--model nowhere"),
    "index": (None, "--index Flot", "--index Flot"),
    "long passages": (None, "--max_passage_length 9999", "positions"),
    "unwritable": (None, "--output task/corpus.jsonl/out", "task/corpus.jsonl/out"),
    "other files": (None, "--output task", "--output task holds other files"),
    "depth": (None, "--depth 5 2", "--depth"),
    "temperature": (None, "--temperature 0", "--temperature 0"),
}
BAD_COMMANDS = {  # what the message must say
    "evalute": "evalute: the commands are",
    "evaluate ba": "'ba' is no flag",
    "explain": "explain needs a text",
    "evaluate --compare nothing.trec": "nothing.trec: [Errno 2] No such file",
    "search ba": "no complete index",
    "finetune --batch_size 64": "above the 40 training queries",
    "finetune --batch_size 9 --micro_batch_size 4": "--batch_size 9 is not a multiple",
    "finetune --negatives_file unknown.jsonl": "unknown.jsonl, line 1",
    "finetune --negatives_file gone.jsonl": "gone.jsonl, line 1",
    "finetune --train_data bad.jsonl": "bad.jsonl, line 2",
}


@pytest.mark.parametrize("change, flags, message", BAD_TASKS.values(), ids=BAD_TASKS)
def test_a_bad_task_gives_one_line(change, flags, message, beir, unfinetuned, workplace, capfd):
    shutil.copytree(beir, "task")
    if change:
        change(Path("task"))
    error, lines = error_of(capfd, "evaluate", "--model", unfinetuned, "--data", "task", "--output", "out",
                            *flags.split(), script=eval_retrieval)
    assert message in error and not list(Path("out").glob("*.trec"))


def test_a_mistyped_split_does_not_evaluate_all_queries_with_answers(beir, tmp_path, capfd):
    shutil.copytree(beir, tmp_path / "task")
    queries = [json.dumps({"_id": f"q{i}", "text": "ba", "answers": ["ba"]}) + "\n" for i in range(70)]
    (tmp_path / "task/queries.jsonl").write_text("".join(queries))
    flags = "--model", "bm25", "--data", tmp_path / "task", "--output", tmp_path / "out", "--split", "tset"
    assert "no qrels of tset" in error_of(capfd, "evaluate", *flags, script=eval_retrieval)[0]


@pytest.mark.parametrize("line, message", BAD_COMMANDS.items(), ids=BAD_COMMANDS)
def test_a_bad_command_gives_one_line(line, message, beir, unfinetuned, workplace, capfd):
    """The flags of a line stand after those that every command gets, and so override them."""
    Path("unknown.jsonl").write_text('{"query_id": "q69", "negatives": ["d1"]}\n')
    Path("gone.jsonl").write_text('{"query_id": "q1", "negatives": ["d999"]}\n')
    Path("bad.jsonl").write_text('{"query": "ba", "positive_passages": [{"text": "ke"}]}\n{"query": "ba"}\n')
    words, dashes, flags = line.partition("--")
    common = ["--model", unfinetuned, "--data", beir, "--output", "out",
              "--batch_size", 8, "--micro_batch_size", 8]
    error, _ = error_of(capfd, *words.split(), *common, *(dashes + flags).split(), script=eval_retrieval)
    assert message in error


def test_a_command_with_a_mended_flag_starts_in_the_same_folder(beir, workplace, capfd):
    flags = "evaluate", "--data", beir, "--output", "out", "--model"
    error_of(capfd, *flags, "nowhere", script=eval_retrieval)
    retrieval(*flags, "bm25")
    assert Path("out/metrics.json").exists()


def test_search_refuses_the_index_of_another_model(evaluated, finetuned, beir, capfd):
    flags = "search", "ba", "--model", finetuned[1], "--data", beir, "--output", evaluated
    error = error_of(capfd, *flags, script=eval_retrieval)[0]
    assert "dimension 128) is of another --data, --model or its flags" in error


def test_search_takes_an_index_by_another_path_to_its_data(evaluated, unfinetuned, beir, monkeypatch, capfd):
    monkeypatch.chdir(beir.parent)
    flags = "--model", unfinetuned, "--data", beir.name, "--output", evaluated
    error = error_of(capfd, "search", "ba", *flags, "--max_passage_length", 32, script=eval_retrieval)[0]
    assert "another --data, --model or its flags" in error
    retrieval("search", "ba", *flags)
    assert len(capfd.readouterr().out.splitlines()) == 20


def test_search_refuses_an_index_of_other_passages_or_half_written(
        evaluated, unfinetuned, beir, tmp_path, capfd):
    shutil.copytree(evaluated, tmp_path / "out")
    shutil.copytree(beir, tmp_path / "beir")
    flags = "search", "ba", "--model", unfinetuned, "--output", tmp_path / "out"
    with (tmp_path / "beir/corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "text": "ba"}\n')
    assert "another --data" in error_of(capfd, *flags, "--data", tmp_path / "beir", script=eval_retrieval)[0]
    path = tmp_path / "out/index/00000.json"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    assert "no complete index" in error_of(capfd, *flags, "--data", beir, script=eval_retrieval)[0]


# ------------------------------------------------------------------------------------------- the whole recipe


def test_the_recipe_prints_a_table_of_its_stages(unfinetuned, beir, tmp_path, capfd):
    flags = ["--model", unfinetuned, "--data", beir, "--output", tmp_path / "out", *STEPS[1:], "--steps", 2]
    capfd.readouterr()
    retrieval(*flags)
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert [*table] == ["BM25", "zero-shot", "stage1", "stage2"]
    lines = capfd.readouterr().out.splitlines()[-4:]
    for line, (name, values) in zip(lines, table.items()):
        assert line.split()[:2] == [name, f"{values['MRR@10']:.4f}"]
    stages = [json.loads((tmp_path / f"out/{name}/run.json").read_text())["config"]["model"]
              for name in ("zero_shot", "stage1/model", "stage1/test", "stage2/model")]
    start, stage1 = str(unfinetuned), str(tmp_path / "out/stage1/model")
    assert stages == [start, start, stage1, start]


def test_fine_tuning_teaches_to_find(unfinetuned, tmp_path):
    """On other queries than those it is trained on: a query is the first words of its passage."""
    texts = make_texts(300, seed=9, evaluated=0, longest=8)
    data = write_beir(tmp_path / "task", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    flags = ["--data", data, "--max_passage_length", 32]
    retrieval("evaluate", "--model", unfinetuned, *flags, "--output", tmp_path / "before")
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(200))]
    (data / "qrels/train.tsv").write_text("\n".join(lines) + "\n")
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(200, 300))]
    (data / "qrels/test.tsv").write_text("\n".join(lines) + "\n")
    retrieval("finetune", "--model", unfinetuned, *flags, "--output", tmp_path / "model", "--batch_size", 32,
              "--epochs", 20, "--lr", 1e-3, "--negatives", 0)
    retrieval("evaluate", "--model", tmp_path / "model", *flags, "--output", tmp_path / "after")
    retrieval("evaluate", "--model", unfinetuned, *flags, "--output", tmp_path / "zero_shot")
    before, after = (json.loads((tmp_path / name / "metrics.json").read_text())["MRR@10"]
                     for name in ("zero_shot", "after"))
    assert after > before + 0.1
