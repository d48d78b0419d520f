# SPDX-License-Identifier: MIT
"""Tests of bow_mae.py and eval_retrieval.py, to be read as documentation: no network, no GPU.

    pip install -r requirements.txt pytest
    pytest

Most runs are `bow_mae.main([...])` in this process, of a tiny model on made-up texts. Runs of
several processes, and those that are killed, are started as a user starts them.
"""

import dataclasses
import gzip
import inspect
import itertools
import json
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
from pathlib import Path

# ruff: noqa: E402

CACHE = tempfile.TemporaryDirectory(prefix="test_bow_mae_")  # read when the libraries are imported
os.environ |= {
    "HF_HOME": CACHE.name,
    "HF_DATASETS_CACHE": CACHE.name,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from tokenizers import models, pre_tokenizers, processors, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

import bow_mae
import eval_retrieval
from bow_mae import BowMAE, Config, PretrainingStream, bow_loss, special_ids, term_coverage
from eval_retrieval import RetrievalConfig, evaluate_run

torch.set_num_threads(1)
SCRIPT = Path(bow_mae.__file__).resolve()
SMALL = shlex.split(
    "--model tiny --max_length 32 --steps 20 --batch_size 8 --micro_batch_size 4 --workers 0 "
    "--precision fp32 --lr 2e-3 --lr_final_ratio 0.1 --warmup_steps 4 --adam_beta2 0.98 "
    "--log_every 1 --save_every 5 --keep 2 --eval_every 10"
)
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SYLLABLES = ["ba", "ke", "di", "lo", "mu", "sta", "pri", "ven", "tor", "gal"]
WORDS = [first + second for first, second in itertools.product(SYLLABLES, SYLLABLES)]


# ---- helpers


def make_texts(count, seed=0, longest=40):
    """Texts of 3 to `longest` random words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, longest))) for _ in range(count)]


def write_jsonl(path, texts):
    """Write a corpus of one {"title": "a", "text": ...} a line; returns its --data."""
    path = Path(path)
    path.write_text("".join(json.dumps({"title": "a", "text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def group_of_one():
    """The process group that functions expect, where no run of a script makes its own."""
    bow_mae.init_distributed()
    yield
    dist.destroy_process_group()


def run_here(main, *flags):
    """A run of a script in this process, outside that group."""
    dist.destroy_process_group()
    try:
        main([str(flag) for flag in flags])
    finally:
        bow_mae.init_distributed()


def train(*flags):
    """A run of SMALL in this process."""
    run_here(bow_mae.main, *SMALL, *flags)


def start(*flags, processes=1, script=SCRIPT, small=SMALL, **options):
    """A run of SMALL as a user starts it, by `python` or `torchrun`; its output as text."""
    command = [sys.executable, str(script), *small, *map(str, flags)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command[1:1] = torchrun
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    options = {"cwd": CACHE.name, "env": environment} | options
    return subprocess.run(command, capture_output=True, text=True, **options)


SIGNALLED = """
import importlib, os, sys
number, event, name, count, module = sys.argv[1:6]
left = int(count)
def hook(what, arguments):
    global left
    if what == event and name in " ".join(map(str, arguments)):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), int(number))
sys.addaudithook(hook)
importlib.import_module(module).main(sys.argv[6:])
"""


def start_with_signal(number, event, name, count, *flags, module="bow_mae", small=SMALL):
    """A run that gets a signal the count-th time that it opens, or renames, a file of this name."""
    script = Path(CACHE.name, "signalled.py")
    script.write_text(SIGNALLED)
    return start(number.value, event, name, count, module, *small, *flags, script=script, small=[])


def error_of(capfd, *flags, main=bow_mae.main):
    """The line "error: ..." of a run in this process that ends with exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_here(main, *(SMALL if main is bow_mae.main else []), *flags)
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1, lines
    assert not any("Traceback" in line for line in lines)
    return errors[0]


def records(output, field):
    """The records of metrics.jsonl that have a field."""
    lines = Path(output, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if field in record]


def losses(output):
    """{step: (loss, mlm_loss, bow_loss)}, as logged."""
    rows = records(output, "loss")
    return {row["step"]: (row["loss"], row["mlm_loss"], row["bow_loss"]) for row in rows}


def same_weights(one, other):
    """Whether two saved models are equal bit for bit."""
    one = load_file(Path(one, "model.safetensors"))
    other = load_file(Path(other, "model.safetensors"))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_run(one, other):
    """Whether two runs have the same losses, evaluations and weights, bit for bit."""
    same_evaluations = records(one, "eval_mlm_loss") == records(other, "eval_mlm_loss")
    return losses(one) == losses(other) and same_evaluations and same_weights(one, other)


def close(one, other, tolerance=1e-4):
    """Whether two runs have the same losses at each step, but for this share of them."""
    one, other = losses(one), losses(other)
    assert one.keys() == other.keys()
    return all(one[step] == pytest.approx(other[step], rel=tolerance) for step in one)


def word_tokenizer(words):
    """A WordPiece tokenizer of these words and pieces."""
    vocab = {word: index for index, word in enumerate([*SPECIALS, *words])}
    wordpiece = BertWordPieceTokenizer(vocab).to_str()
    backend = tokenizers.Tokenizer.from_str(wordpiece)
    return transformers.BertTokenizerFast(tokenizer_object=backend)


def read_epochs(config, tokenizer, count=1):
    """(epoch, info, batch) of the first epochs of all shards."""
    files = bow_mae.list_files(config.data)
    for shard in range(config.num_shards):
        stream = PretrainingStream(config, tokenizer, files, 0.0, [shard], {})
        for info, batch in stream:
            epoch = info["position"][0]
            if epoch >= count:
                break
            yield epoch, info, batch


def texts_of(batch, tokenizer):
    """The texts of a batch."""
    return tokenizer.batch_decode(batch["original_ids"], skip_special_tokens=True)


def read_texts(tokenizer, data, **flags):
    """The texts of one epoch of --data, over all shards, sorted."""
    flags = {"max_length": 64, "batch_size": 8, "micro_batch_size": 4} | flags
    config = Config(data=str(data), **flags)
    batches = [batch for _, _, batch in read_epochs(config, tokenizer)]
    return sorted(text for batch in batches for text in texts_of(batch, tokenizer))


# ---- fixtures


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder for what several tests share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def corpus(folder):
    """A .jsonl of 600 texts."""
    return write_jsonl(folder / "corpus.jsonl", make_texts(600))


@pytest.fixture(scope="session")
def unbroken(folder, corpus):
    """The output of the run that others are compared with."""
    train("--data", corpus, "--output", folder / "unbroken")
    return folder / "unbroken"


@pytest.fixture
def unfinished(unbroken, tmp_path):
    """A copy of that run as it was before its model was written, with checkpoints 15 and 20."""
    shutil.copytree(unbroken, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    return tmp_path / "out"


@pytest.fixture(scope="session")
def stopped(folder, corpus):
    """A run that got SIGTERM between steps 5 and 10: its output and how it ended."""
    output = folder / "stopped"
    flags = ["--data", corpus, "--output", output, "--workers", 1]
    return output, start_with_signal(signal.SIGTERM, "open", "metrics.jsonl", 9, *flags)


# ---- the losses


def test_the_method_can_be_copied_alone():
    """The source of five functions runs in an empty module that has torch and F."""
    names = ("whole_word_mask", "bag_of_words", "bow_loss", "term_coverage", "mlm_head")
    module = {"torch": torch, "F": F}
    for name in names:
        exec(inspect.getsource(getattr(bow_mae, name)), module)
    tokenizer = word_tokenizer(WORDS)
    encoded = tokenizer("baba keke lodi")
    input_ids = torch.tensor([encoded["input_ids"]])
    word_ids = torch.tensor([[0, 1, 2, 3, 0]])
    _, chosen = module["whole_word_mask"](input_ids, word_ids, tokenizer)
    special = torch.arange(len(tokenizer)) < 5
    lm = AutoModelForMaskedLM.from_config(FAMILIES["BERT"])
    logits = module["mlm_head"](lm, torch.randn(1, 32))[:, : len(tokenizer)]
    assert chosen.sum() == 1 and module["bag_of_words"](input_ids, special).sum() == 3
    assert module["bow_loss"](logits, input_ids, special) > 0
    assert 0 <= module["term_coverage"](logits, input_ids, special) <= 1


def test_bow_loss_and_its_gradient_are_those_of_a_loop():
    """-1/|T| Σ log softmax, with repeats, special tokens (ids 0 to 2) and a row of these alone."""
    torch.manual_seed(0)
    logits = (torch.randn(5, 50) * 3).requires_grad_()
    input_ids = torch.randint(0, 20, (5, 30))
    input_ids[-1] = torch.randint(0, 3, (30,))
    looped = torch.tensor(0.0)
    for row, ids in zip(logits, input_ids.tolist(), strict=True):
        terms = {token for token in ids if token > 2}
        for term in terms:
            looped = looped - (row[term] - row.exp().sum().log()) / len(terms) / 5
    loss = bow_loss(logits, input_ids, torch.arange(50) < 3)
    torch.testing.assert_close(loss, looped)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (loss, looped))
    torch.testing.assert_close(ours, theirs)


def test_an_empty_bag_counts_nothing():
    logits = torch.randn(2, 8, requires_grad=True)
    loss = bow_loss(logits, torch.zeros(2, 4, dtype=torch.long), torch.arange(8) < 1)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_bow_loss_is_computed_in_float32():
    logits = torch.randn(2, 50).bfloat16()
    rest = (torch.randint(0, 50, (2, 9)), torch.arange(50) < 3)
    loss = bow_loss(logits, *rest)
    assert loss.dtype == torch.float32 and torch.equal(loss, bow_loss(logits.float(), *rest))


def test_term_coverage_by_hand():
    special = torch.tensor([True, True, False, False, False, False])
    rows = [
        ([0, 2, 3, 3, 1], [0.0, 0, 5, 1, 4, 0], 1 / 2),  # T = {2, 3}, the top 2 are {2, 4}
        ([0, 2, 3, 4, 1], [9.0, 0, 5, 6, 4, 0], 2 / 3),  # T = {2, 3, 4}, the top 3 are {0, 3, 2}
        ([0, 2, 2, 2, 1], [0.0, 0, 5, 1, 4, 0], 1),  # T = {2}, the top 1 is {2}
        ([0, 1, 1, 1, 1], [0.0, 0, 5, 1, 4, 0], 0),  # T is empty
    ]
    input_ids, logits, expected = zip(*rows, strict=True)
    found = term_coverage(torch.tensor(logits), torch.tensor(input_ids), special)
    assert found.tolist() == pytest.approx(list(expected))


# ---- masking


def mask(tokenizer, texts, draws=1, ratio=0.3, seed=0):
    """original_ids, masked ids and chosen positions of texts, each `draws` times."""
    sequences = bow_mae.cut_sequences(texts * draws, tokenizer, 512)
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad([torch.tensor(ids) for ids, _ in sequences], batch_first=True)
    word_ids = pad([torch.tensor(ids) for _, ids in sequences], batch_first=True)
    generator = torch.Generator().manual_seed(seed)
    return input_ids, *bow_mae.whole_word_mask(input_ids, word_ids, tokenizer, ratio, generator)


@pytest.fixture(scope="module")
def masked():
    """200 draws over 200 words of one to three pieces: tokenizer, and what `mask` gives."""
    tokenizer = word_tokenizer([*WORDS, *(f"##{word}" for word in WORDS)])
    rng = random.Random(0)
    words = ["".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(200)]
    return tokenizer, words, *mask(tokenizer, [" ".join(words)], draws=200)


def test_30_percent_of_the_words_are_masked(masked):
    tokenizer, words, input_ids, _, chosen = masked
    word_ids = tokenizer(" ".join(words)).word_ids()
    first = [i for i, word in enumerate(word_ids) if word is not None and word != word_ids[i - 1]]
    assert len(first) == 200 and chosen[:, first].sum(1).tolist() == [60] * 200


def test_of_the_masked_80_become_mask_10_random_10_stay(masked):
    tokenizer, _, input_ids, masked_ids, chosen = masked
    before, after = input_ids[chosen], masked_ids[chosen]
    shares = (after == tokenizer.mask_token_id).float().mean(), (after == before).float().mean()
    assert shares[0].item() == pytest.approx(0.8, abs=0.01)
    assert shares[1].item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(masked_ids[~chosen], input_ids[~chosen])


def test_special_tokens_are_neither_masked_nor_drawn(masked):
    tokenizer, _, input_ids, masked_ids, chosen = masked
    special = torch.tensor(tokenizer.all_special_ids)
    drawn = masked_ids[chosen & (masked_ids != tokenizer.mask_token_id)]
    assert not torch.isin(input_ids[chosen], special).any()
    assert len(drawn) > 1000 and not torch.isin(drawn, special).any()


def test_an_unknown_word_is_not_masked():
    _, _, chosen = mask(word_tokenizer(WORDS), ["baba unknown"], draws=50)
    assert chosen[:, 1].all() and not chosen[:, 2].any()


def test_a_word_that_begins_with_an_unknown_character_is_a_word_of_its_own():
    tokenizer = word_tokenizer(WORDS)
    unknown, baba, keke = tokenizer("x baba keke")["input_ids"][1:-1]
    input_ids = torch.tensor([[2, unknown, baba, unknown, keke, 3]]).expand(50, -1)
    word_ids = torch.tensor([[0, 1, 1, 2, 2, 0]]).expand(50, -1)
    chosen = bow_mae.whole_word_mask(input_ids, word_ids, tokenizer, 0.5)[1]
    assert (chosen[:, 2] ^ chosen[:, 4]).all() and chosen[:, 2].any() and chosen[:, 4].any()


def test_at_least_one_word_of_each_sequence_is_masked():
    texts = [WORDS[0], " ".join(WORDS[:9])]
    assert mask(word_tokenizer(WORDS), texts, ratio=0.001)[2].sum(1).tolist() == [1, 1]


def test_masks_are_a_function_of_the_generator():
    tokenizer, text = word_tokenizer(WORDS), [" ".join(WORDS)]
    one, same, other = (mask(tokenizer, text, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


TOKENIZERS = {  # model, what splits words, decoder, trainer
    "WordPiece": (
        models.WordPiece(unk_token="[UNK]"),
        pre_tokenizers.BertPreTokenizer(),
        trainers.WordPieceTrainer(vocab_size=140, special_tokens=SPECIALS),
    ),
    "SentencePiece": (
        models.Unigram(),
        pre_tokenizers.Metaspace(),
        trainers.UnigramTrainer(vocab_size=140, special_tokens=SPECIALS, unk_token="[UNK]"),
    ),
    "byte-level BPE": (
        models.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    ),
    "BPE with ends of words": (
        models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"),
        pre_tokenizers.BertPreTokenizer(),
        trainers.BpeTrainer(vocab_size=140, special_tokens=SPECIALS, end_of_word_suffix="</w>"),
    ),
}


def trained_tokenizer(kind, texts):
    """A tokenizer of a kind, with [CLS] and [SEP], whose vocabulary is learnt from texts."""
    model, splitter, trainer = TOKENIZERS[kind]
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = splitter
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad", "unk", "cls", "sep", "mask")
    tokens = {f"{name}_token": f"[{name.upper()}]" for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokens_of_a_word_are_masked_together_by_any_tokenizer(kind):
    """Over 400 draws, neighbours in a word are chosen alike, those of two words are not."""
    tokenizer = trained_tokenizer(kind, [*make_texts(200), *["x, (x 2024) x! (x 3.5)"] * 300])
    text = "bakelodi stapri, (galvenmu 2024) pristagal; x baba! galgaltor 3.5 ke"
    chosen = mask(tokenizer, [text], draws=400)[2]
    word_ids = tokenizer(text).word_ids()
    unknown = [token == 1 for token in tokenizer(text)["input_ids"]]
    neighbours = [i for i in range(2, len(word_ids) - 1) if not unknown[i] and not unknown[i - 1]]
    alike = [torch.equal(chosen[:, i - 1], chosen[:, i]) for i in neighbours]
    assert alike == [word_ids[i - 1] == word_ids[i] for i in neighbours]
    assert sum(alike) > 3 and not all(alike)


def test_a_chinese_sentence_is_not_one_word():
    """It has no spaces: to SentencePiece it is one word, of which 30 % of the tokens are masked."""
    rng = random.Random(0)
    sentences = ["".join(rng.choices("我们今天学习模型的文字", k=40)) for _ in range(200)]
    tokenizer = trained_tokenizer("SentencePiece", sentences)
    assert set(tokenizer(sentences[0]).word_ids()) == {None, 0}
    shares = mask(tokenizer, sentences[:1], draws=400)[2].float().mean(1)
    assert shares.mean().item() == pytest.approx(0.3, abs=0.05) and shares.max() < 0.6


# ---- the model

TINY = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "intermediate_size": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3}
DISTIL = {"vocab_size": 200, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
FAMILIES = {
    "BERT": transformers.BertConfig(**TINY),
    "RoBERTa": transformers.RobertaConfig(**TINY),
    "XLM-R": transformers.XLMRobertaConfig(**TINY),
    "DistilBERT": transformers.DistilBertConfig(**DISTIL),
    "ModernBERT": transformers.ModernBertConfig(**TINY, **IDS, sep_token_id=3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_chosen_positions_are_the_models_own(family):
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
    return BowMAE(lm, special_ids(word_tokenizer(WORDS), 200), objective, 32).eval()


@pytest.fixture
def batch(corpus):
    """A micro-batch with padding."""
    tokenizer = word_tokenizer(WORDS)
    texts = make_texts(8)
    return bow_mae.collate(bow_mae.cut_sequences(texts, tokenizer, 32), tokenizer, 0.3, seed=0)


def test_mlm_loss_is_that_of_transformers(batch):
    model = random_model("bow")
    labels = torch.full_like(batch["input_ids"], -100)
    positions = batch["masked_positions"]
    labels.view(-1)[positions] = batch["original_ids"].view(-1)[positions]
    mask = batch["attention_mask"]
    theirs = model.lm(batch["input_ids"], attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(model(**batch)["mlm_loss"], theirs)


def test_bow_loss_is_between_cls_of_the_masked_text_and_the_unmasked_words(batch):
    model = random_model("bow")
    logits = model.lm(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    expected = bow_loss(logits, batch["original_ids"], model.special)
    torch.testing.assert_close(model(**batch)["bow_loss"], expected)


def test_bow_adds_no_parameter_and_enhanced_does():
    counts = []
    for objective in ("mlm", "bow", "enhanced"):
        counts.append(sum(weight.numel() for weight in random_model(objective).parameters()))
    assert counts[0] == counts[1] < counts[2]


def test_the_enhanced_decoder_does_not_see_the_token_it_predicts():
    """Position i depends on the embeddings of about half of the others, and not on its own."""
    embeddings = torch.randn(8, 16, 32, requires_grad=True)
    decoded = random_model("enhanced").decoder(torch.randn(8, 32), embeddings, None)
    seen = []
    for i in range(1, 16):
        loss = decoded[:, i].square().sum()
        gradient = torch.autograd.grad(loss, embeddings, retain_graph=True)[0]
        seen.append(gradient[:, 1:].any(2))  # (B, L - 1)
    seen = torch.stack(seen, 1)  # (B, L - 1, L - 1)
    itself = torch.eye(15, dtype=torch.bool).expand(8, -1, -1)
    assert not seen[itself].any()
    assert seen[~itself].float().mean().item() == pytest.approx(0.5, abs=0.1)


# ---- the data


NAMES = [f"name{i}" for i in range(3000)]


@pytest.fixture(scope="module")
def named():
    """3000 texts with a word of their own, and a tokenizer of their words."""
    rng = random.Random(1)
    texts = [" ".join([name, *rng.choices(WORDS, k=rng.randint(0, 30))]) for name in NAMES]
    return texts, word_tokenizer([*WORDS, *NAMES])


def write_parts(folder, texts, count, write):
    """Write texts into `count` files of a folder, by write(path, texts); returns the folder."""
    folder.mkdir(parents=True)
    for index in range(count):
        write(folder / f"part-{index:03}", texts[index::count])
    return folder


def write_text_file(path, texts):
    path.with_suffix(".txt").write_text("\n".join(texts) + "\n")


def write_parquet(path, texts):
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path.with_suffix(".parquet"))


def write_saved(path, texts):
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(path.parent)


@pytest.mark.parametrize("files, write", [(1, write_text_file), (8, write_text_file)])
def test_each_text_once_in_each_epoch(files, write, named, tmp_path):
    texts, tokenizer = named
    data = write_parts(tmp_path / "data", texts, files, write)
    config = Config(data=str(data), max_length=64, batch_size=64, micro_batch_size=8)
    seen = [[], []]
    for epoch, _, batch in read_epochs(config, tokenizer, 2):
        seen[epoch] += texts_of(batch, tokenizer)
    assert sorted(seen[0]) == sorted(texts) == sorted(seen[1])
    assert seen[0] != seen[1]


@pytest.mark.parametrize("files", [3, 41])
def test_each_text_of_parquet_once_in_each_epoch(files, named, tmp_path):
    """Of fewer files, and of more, than the 8 shards."""
    texts, tokenizer = named
    data = write_parts(tmp_path / "data", texts, files, write_parquet)
    found = read_texts(tokenizer, data, batch_size=64, micro_batch_size=8)
    assert found == sorted(texts)


def files_opened(config, tokenizer):
    """For each shard, the files that the first epoch opens."""
    files, opened = bow_mae.list_files(config.data), []
    for shard in range(config.num_shards):
        paths = []
        with pytest.MonkeyPatch.context() as patch:
            read = bow_mae.read_records

            def noted(piece, *arguments, read=read, paths=paths):
                paths.append(Path(piece[0]).name)
                return read(piece, *arguments)

            patch.setattr(bow_mae, "read_records", noted)
            assert len(list(bow_mae.read_texts(config, files, shard, config.num_shards))) > 0
        opened.append(paths)
    return opened


def test_a_shard_opens_its_own_files_alone(named, tmp_path):
    texts, tokenizer = named
    data = write_parts(tmp_path / "data", texts, 11, write_text_file)
    opened = files_opened(Config(data=str(data), batch_size=64, micro_batch_size=8), tokenizer)
    names = sorted(path.name for path in data.iterdir())
    assert sorted(itertools.chain(*opened)) == names  # each file once
    assert {len(paths) for paths in opened} == {1, 2}


def test_a_shard_reads_its_own_row_groups_alone(named, tmp_path):
    """With one parquet file of 12 row groups and 4 shards, each has 3 of them."""
    texts, _ = named
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path, batch_size=250)
    config = Config(data=str(path), batch_size=8, micro_batch_size=2)
    read = []
    for shard in range(4):
        read.append([text for _, text in bow_mae.read_texts(config, [str(path)], shard, 4)])
    row_groups = [texts[start : start + 250] for start in range(0, 3000, 250)]
    assert read == [list(itertools.chain(*row_groups[shard::4])) for shard in range(4)]


def test_the_order_of_files_is_another_in_each_epoch(named, tmp_path):
    """So that a folder of Wikipedia and books does not end on books in every epoch."""
    texts, tokenizer = named
    folder = write_parts(tmp_path / "data", texts[:120], 12, write_text_file)
    firsts = [path.read_text().split()[0] for path in sorted(folder.iterdir())]
    config = Config(data=str(folder), max_length=64, batch_size=4, micro_batch_size=4)
    orders = []
    for epoch in range(4):
        stream = bow_mae.read_texts(config, bow_mae.list_files(config.data), epoch=epoch)
        words = [text.split()[0] for _, text in stream]
        orders.append([word for word in words if word in firsts])
    assert all(sorted(order) == sorted(firsts) for order in orders)
    assert len(set(map(tuple, orders))) == 4


def test_the_micro_batches_of_a_step_are_of_like_length(named, tmp_path):
    """At a step the longest of the shards' texts differ by 3 tokens at most, texts by 30."""
    texts, tokenizer = named
    data = str(tmp_path / "a.txt")
    write_text_file(Path(data), texts)
    config = Config(data=data, max_length=64, batch_size=64, micro_batch_size=16)
    stream = PretrainingStream(config, tokenizer, [data], 0.0, range(4), {})
    lengths = [batch["input_ids"].shape[1] for _, batch in itertools.islice(stream, 4 * 40)]
    steps = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    assert max(max(step) - min(step) for step in steps) <= 3
    assert max(lengths) - min(lengths) > 25 and steps != sorted(steps)


def stream_of(tokenizer, data, num_shards, micro_batch_size):
    """A function of a state, which gives the stream of all shards from there on."""
    sizes = {"batch_size": num_shards * micro_batch_size, "micro_batch_size": micro_batch_size}
    config = Config(data=str(data), max_length=64, **sizes)
    files = bow_mae.list_files(config.data)
    shards = range(num_shards)
    return lambda state: PretrainingStream(config, tokenizer, files, 0.0, shards, state)


@pytest.mark.parametrize("write", [write_text_file, write_parquet])
def test_a_stream_resumes_at_every_step(write, named, tmp_path, monkeypatch):
    """Bit for bit, of three epochs of a few buffers each, the ends of epochs among them."""
    texts, tokenizer = named
    monkeypatch.setattr(bow_mae, "BUFFER_TEXTS", 20)
    stream = stream_of(tokenizer, write_parts(tmp_path / "data", texts[:90], 3, write), 2, 8)
    batches = list(itertools.islice(stream({}), 2 * 26))
    assert batches[-1][0]["position"][0] >= 3
    for step in range(1, 26):
        positions = {info["shard"]: info["position"] for info, _ in batches[: 2 * step]}
        again = stream({"step": step, "positions": positions})
        for (_, one), (_, other) in zip(batches[2 * step :][:2], again, strict=False):
            assert torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize("write", [write_text_file, write_parquet, write_saved])
def test_a_stream_resumes_twice_inside_a_buffer(write, named, tmp_path, monkeypatch):
    """The position that a resumed stream gives is right too."""
    texts, tokenizer = named
    monkeypatch.setattr(bow_mae, "BUFFER_TEXTS", 100)
    stream = stream_of(tokenizer, write_parts(tmp_path / "data", texts[:300], 1, write), 1, 2)
    expected = [batch["input_ids"] for _, batch in itertools.islice(stream({}), 100)]
    found, state = [], {}
    for step in (60, 65, 70, 100):
        for info, batch in itertools.islice(stream(state), step - len(found)):
            found.append(batch["input_ids"])
            state = {"step": step, "positions": {0: info["position"]}}
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_small_files_are_shared_by_all_shards(tmp_path):
    """Of 40 files of 3 lines and 64 shards, where each file would begin with the first shards."""
    data = write_parts(tmp_path / "data", make_texts(120, longest=5), 40, write_text_file)
    config = Config(data=str(data), batch_size=64, micro_batch_size=1)
    files = bow_mae.list_files(config.data)
    counts = [len(list(bow_mae.read_texts(config, files, shard, 64))) for shard in range(64)]
    assert sum(counts) == 120 and max(counts) < 10


def test_held_out_texts_are_not_trained_on(named, tmp_path):
    texts, tokenizer = named
    data = str(tmp_path / "a.txt")
    write_text_file(Path(data), texts)
    config = Config(data=data, max_length=64, batch_size=8, micro_batch_size=8)
    sample, share = bow_mae.sample_texts(config, [data])
    held_out = [text for text in texts if bow_mae.text_hash(text) < share]
    assert sample == texts and share == 100 / 3000 and 70 < len(held_out) < 130
    stream = PretrainingStream(config, tokenizer, [data], share, [0], {})
    first_epoch = itertools.takewhile(lambda pair: pair[0]["position"][0] == 0, stream)
    seen = [text for _, batch in first_epoch for text in texts_of(batch, tokenizer)]
    assert sorted(seen) == sorted(set(texts) - set(held_out))


def test_a_sequence_without_a_word_is_left_out():
    tokenizer = word_tokenizer(WORDS)
    sequences = bow_mae.cut_sequences(["", "unknown words", "baba"], tokenizer, 8)
    assert sequences == [(tokenizer("baba")["input_ids"], [0, 1, 0])]


def test_long_texts_are_cut_into_sequences_that_give_them_back():
    tokenizer = word_tokenizer(WORDS)
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(5)]
    sequences = bow_mae.cut_sequences(texts, tokenizer, 16)
    token_ids, word_ids = zip(*sequences, strict=True)
    assert {(row[0], row[-1]) for row in token_ids} == {(2, 3)}  # [CLS], [SEP]
    assert max(map(len, token_ids)) == 16 and word_ids[1] == [0, *range(1, 15), 0]
    whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [i for row in token_ids for i in row[1:-1]] == [i for row in whole for i in row]


def test_a_book_does_not_fill_a_buffer(named, monkeypatch, tmp_path):
    """A text longer than a buffer is cut, and loses nothing but the whole of a word at the cut."""
    texts, tokenizer = named
    monkeypatch.setattr(bow_mae, "BUFFER_CHARACTERS", 5000)
    stream = PretrainingStream(Config(), tokenizer, [], 0.0, [0], {})
    book = " ".join(texts[:400])
    long_texts = enumerate(["a" * 4000, "b" * 4000, book])
    buffers = [texts for texts, _ in stream.read_buffers(long_texts)]
    assert [len(buffer) for buffer in buffers] == [2, math.ceil(len(book) / 5000)]
    assert "".join(buffers[1]) == book and max(map(len, buffers[1])) == 5000


def write_formats(root, texts):
    """The same texts in each format: a list of --data."""
    rows = [{"number": i, "text": text} for i, text in enumerate(texts)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (root / "a.jsonl").write_text("\n" + "\n".join(lines))  # with blank lines
    (root / "lines.json").write_text("".join(lines))
    (root / "a.txt").write_text("\n".join(texts) + "\n")
    (root / "a.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    csv_lines = [f'{i},"{text}"\n' for i, text in enumerate(texts)]
    (root / "a.csv").write_text("number,text\n" + "".join(csv_lines))
    for name in ("beir", "folder", "glob"):
        (root / name).mkdir()
    (root / "beir" / "corpus.jsonl").write_text("".join(lines))
    (root / "beir" / "queries.jsonl").write_text('{"text": "ba"}\n')
    (root / "folder" / "train-1.jsonl").write_text("".join(lines[:9]))
    (root / "folder" / "train-2.jsonl").write_text("".join(lines[9:]))
    (root / "folder" / "test.jsonl").write_text('{"text": "test"}\n')
    (root / "folder" / "train-3.jsonl").write_text("")  # as Spark writes
    (root / "glob" / "[1].jsonl").write_text("".join(lines))
    for name in ("a.jsonl", "a.csv", "a.txt", "a.tsv"):
        (root / f"{name}.gz").write_bytes(gzip.compress((root / name).read_bytes()))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(root / "a.parquet")
    table.save_to_disk(root / "saved")
    splits = {"test": table.select(range(3)), "train": table}
    datasets.DatasetDict(splits).save_to_disk(root / "saved_splits")
    paths = [path for path in root.iterdir() if path.name != "glob"]
    return [*paths, root / "folder" / "train*", root / "glob" / "[1].jsonl"]


def test_every_format_gives_the_same_texts(tmp_path):
    """Words that pandas takes for missing values, or for numbers, among them."""
    texts = [*make_texts(40, longest=10), "na", "1", "null"]
    tokenizer = word_tokenizer([*WORDS, "na", "1", "null"])
    found = {data.name: read_texts(tokenizer, data) for data in write_formats(tmp_path, texts)}
    assert len(found) == 16
    assert [name for name in found if found[name] != sorted(texts)] == []


def test_what_a_run_left_in_the_folder_of_the_data_is_no_data(unbroken, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    shutil.copytree(unbroken, tmp_path / "out")
    assert bow_mae.list_files(str(tmp_path)) == [str(tmp_path / "a.jsonl")]


def test_files_that_are_left_out_are_counted(tmp_path, capfd):
    for name in ("a.jsonl", "TEST.jsonl", ".hidden.jsonl"):
        write_jsonl(tmp_path / name, make_texts(5))
    assert bow_mae.list_files(str(tmp_path)) == [str(tmp_path / "a.jsonl")]
    assert "2 hidden, test or validation files are left out" in capfd.readouterr().out


def test_a_glob_reaches_into_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    paths = [write_jsonl(tmp_path / name, make_texts(5)) for name in ("a.jsonl", "deep/b.jsonl")]
    assert bow_mae.list_files(f"{tmp_path}/**/*.jsonl") == paths


def test_an_empty_parquet_file_is_passed_over(tmp_path):
    texts = make_texts(30, longest=10)
    write_parquet(tmp_path / "part-1", texts)
    features = datasets.Features({"text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"text": []}, features)
    table.to_parquet(tmp_path / "part-0.parquet")
    assert read_texts(word_tokenizer(WORDS), tmp_path) == sorted(texts)


def test_a_carriage_return_in_a_passage_does_not_end_it(tmp_path):
    (tmp_path / "collection.tsv").write_bytes(b"0\tba ke\rlodi\n1\t\n2\tmu\tpri\n")
    path = str(tmp_path / "collection.tsv")
    records = [record["text"] for _, record in bow_mae.read_records((path, path, None))]
    assert records == ["ba ke\rlodi", "", "mu\tpri"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_columns_that_are_not_read_may_hold_anything(kind, tmp_path):
    """Even beyond the first rows, from which a reader of tables would learn their types."""
    texts = make_texts(3000, longest=3)
    if kind == "jsonl":
        others = [None] * 2000 + [{"a": [i]} for i in range(1000)]
        rows = [{"text": text, "other": other} for text, other in zip(texts, others, strict=True)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        lines = [f"{i if i < 2000 else '?'},{text}\n" for i, text in enumerate(texts)]
        (tmp_path / "a.csv").write_text("other,text\n" + "".join(lines))
    else:
        for i, others in enumerate(([None] * 1500, ["a"] * 1500)):
            table = {"text": texts[1500 * i :][:1500], "other": others}
            datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"{i}.parquet")
    assert read_texts(word_tokenizer(WORDS), tmp_path) == sorted(texts)


def test_text_columns_are_joined_and_may_be_null(tmp_path):
    rows = [("ba", "ke di"), (None, "lo"), ("", "mu"), ("gal", None), (None, None)]
    records = [{"title": title, "text": text} for title, text in rows]
    lines = [json.dumps(record) for record in records] + ['{"text": "ven"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = word_tokenizer(["ba", "ke", "di", "lo", "mu", "gal", "ven"])
    flags = {"text_columns": ["title", "text"], "batch_size": 2, "micro_batch_size": 2}
    found = read_texts(tokenizer, tmp_path / "a.jsonl", **flags)
    assert found == ["ba ke di", "gal", "lo", "mu", "ven"]


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ba \\ud83d ke"}\n')
    ((_, text),) = bow_mae.read_texts(Config(), [str(tmp_path / "a.jsonl")])
    assert text == "ba ? ke"


@pytest.mark.parametrize(
    "data, asked",
    [
        ("team/name", ("team/name", None, "train")),
        ("team/name:2023.en", ("team/name", "2023.en", "train")),
        ("name:config:validation", ("name", "config", "validation")),
        ("name::test", ("name", None, "test")),
    ],
)
def test_a_hub_name_is_streamed(data, asked, monkeypatch):
    calls = set()

    def load_dataset(path, name=None, *, split=None, streaming=False):
        calls.add((path, name, split, streaming))
        return datasets.Dataset.from_dict({"text": ["ba ke", "di lo"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokenizer = word_tokenizer(["ba", "ke", "di", "lo"])
    assert read_texts(tokenizer, data, batch_size=2, micro_batch_size=1) == ["ba ke", "di lo"]
    assert calls == {(*asked, True)}


def test_docstrings_are_split_into_query_and_text(tmp_path, monkeypatch):
    """Those of tests are left out, and files that Python cannot parse."""
    package = tmp_path / "spoons"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text('"""Spoons of  all\nkinds.\n\nThey hold soup."""')
    ladle = 'class Ladle:\n  def fill(self):\n    """Fill it.\n\n    With soup."""'
    (package / "big.py").write_text(ladle)
    (package / "short.py").write_text('def stir():\n    """No more than a summary."""')
    (package / "bad.py").write_text("def broken(:")
    (package / "tests" / "some.py").write_text('"""A test.\n\nOf spoons."""')
    monkeypatch.syspath_prepend(tmp_path)
    spoons = {"_id": "spoons", "query": "Spoons of all kinds.", "text": "They hold soup."}
    fill = {"_id": "spoons.big.Ladle.fill", "query": "Fill it.", "text": "With soup."}
    assert list(bow_mae.docstrings({"spoons": "1.0"})) == [spoons, fill]


@pytest.fixture
def small_docs(monkeypatch):
    """The documentation of Python and of one package."""
    monkeypatch.setattr(bow_mae, "PACKAGES", "huggingface_hub")
    bow_mae.python_docs.cache_clear()
    yield
    bow_mae.python_docs.cache_clear()


def test_python_docs_name_each_text_once_and_are_cached(small_docs, monkeypatch):
    rows = bow_mae.python_docs()
    assert len(rows) > 2000 and rows.column_names == ["_id", "query", "text"]
    assert all(len(set(rows[column])) == len(rows) for column in rows.column_names)
    assert any(name.startswith("json") for name in rows["_id"])
    monkeypatch.setattr(bow_mae.ast, "parse", lambda text: pytest.fail("built again"))
    bow_mae.python_docs.cache_clear()
    assert bow_mae.python_docs()[:] == rows[:]


# ---- the vocabulary of a fresh model


def learn(texts, tmp_path):
    """The tokenizer of `tiny` on texts, saved and opened again."""
    tokenizer = bow_mae.learn_tokenizer(Config(model="tiny", max_length=64), texts)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    "words", ["में मैं म के को क", "น้ำ นำ ไม่ ไม", "ma má mà mạ mã", "か が は ば ぱ"]
)
def test_words_that_differ_in_a_mark_differ_in_tokens(words, tmp_path):
    words = words.split()
    tokenizer = learn([" ".join(words)] * 50, tmp_path)
    assert len({tuple(tokenizer.tokenize(word)) for word in words}) == len(words)
    assert tokenizer.unk_token not in tokenizer.tokenize(" ".join(words))


def test_the_vocabulary_grows_with_the_alphabet(tmp_path):
    """Of 3,000 Chinese characters each is known, though `tiny` has nominally 2,048 tokens."""
    characters = [chr(0x4E00 + i) for i in range(3000)]
    texts = ["".join(characters[i : i + 50]) for i in range(0, 3000, 50)]
    tokenizer = learn(texts, tmp_path)
    unknown = sum(tokenizer(text)["input_ids"].count(tokenizer.unk_token_id) for text in texts)
    assert unknown < 0.01 * 3000 and len(tokenizer) >= 3000


def test_the_same_texts_give_the_same_vocabulary(tmp_path):
    texts = make_texts(300)
    one, other = (learn(texts, tmp_path / name).get_vocab() for name in "ab")
    assert one == other and len(one) <= 2048


# ---- defaults, schedules and logs


def resolved(*flags):
    """The configuration of a command line, with what was not given filled in."""
    config = bow_mae.parse_config([*map(str, flags)], Config)
    bow_mae.complete_config(config)
    return dataclasses.asdict(config)


def test_a_pretrained_model_gets_the_values_of_the_paper():
    config = resolved("--model", "some/folder", "--data", "some.jsonl", "--steps", 1000)
    expected = {"lr": 3e-4, "bow_weight": 1.0, "bow_weight_final": 0.1, "max_length": 144}
    expected |= {"batch_size": 256, "adam_beta2": 0.999, "warmup_steps": 50, "lr_final_ratio": 0.1}
    assert {name: config[name] for name in expected} == expected


def test_a_fresh_model_gets_the_values_of_the_short_run():
    config = resolved()
    expected = bow_mae.FRESH_DEFAULTS | {"bow_weight": 1.0, "bow_weight_final": 0.1}
    assert {name: config[name] for name in expected} == expected
    assert config["warmup_steps"] == config["steps"] // 20


def test_the_start_line_says_what_was_filled_in(corpus, tmp_path, capfd):
    flags = ["--data", corpus, "--output", tmp_path, "--model", "tiny", "--steps", 2]
    run_here(bow_mae.main, *flags)
    shown = capfd.readouterr().out
    assert "--lr 0.002" in shown and "--warmup_steps 0" in shown and "--steps 2" not in shown
    assert "bow: " in shown and "2 steps of 2 x 32 sequences" in shown and "1 process" in shown


def test_learning_rate_and_bow_weight_follow_the_cosine(unbroken):
    """A peak of 2e-3 at step 4, a cosine to 2e-4 at step 20; λ from 1 to 0.1 over the 20 steps."""
    rows = {row["step"]: row for row in records(unbroken, "lr")}
    up, down = 1 + math.sqrt(0.5), 1 - math.sqrt(0.5)  # 1 + cos at a quarter and three quarters
    rates = {1: 5e-4, 2: 1e-3, 4: 2e-3, 8: 2e-4 + 9e-4 * up, 12: 1.1e-3}
    rates |= {16: 2e-4 + 9e-4 * down, 20: 2e-4}
    weights = {5: 0.1 + 0.45 * up, 10: 0.55, 15: 0.1 + 0.45 * down, 20: 0.1}
    assert {step: rows[step]["lr"] for step in rates} == pytest.approx(rates)
    assert {step: rows[step]["bow_weight"] for step in weights} == pytest.approx(weights)


def test_the_loss_is_mlm_plus_weighted_bow(unbroken):
    for row in records(unbroken, "loss"):
        expected = row["mlm_loss"] + row["bow_weight"] * row["bow_loss"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_step_is_the_mean_of_the_means_of_its_micro_batches(corpus, tmp_path):
    """The loss of the first step is that of its two micro-batches, computed by hand."""
    flags = ["--data", corpus, "--output", tmp_path / "out", "--steps", 1, "--warmup_steps", 0]
    train(*flags)
    config = bow_mae.parse_config([*SMALL, *map(str, flags)], Config)
    files, texts, share = bow_mae.list_files(corpus), *bow_mae.sample_texts(config, [corpus])
    tokenizer = bow_mae.learn_tokenizer(config, texts)
    torch.manual_seed(0)
    lm = bow_mae.fresh_lm(config, tokenizer)
    model = BowMAE(lm, special_ids(tokenizer, len(tokenizer)), "bow", 32)
    stream = PretrainingStream(config, tokenizer, files, share, range(2), {})
    found = [model(**batch) for _, batch in itertools.islice(stream, 2)]
    for name in ("mlm_loss", "bow_loss"):
        expected = sum(losses[name].item() for losses in found) / 2
        assert records(tmp_path / "out", name)[0][name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective, logged", [("mlm", set()), ("enhanced", {"enhanced_loss"})])
def test_a_baseline_logs_its_losses_and_saves_the_same_model(
    objective, logged, unbroken, corpus, tmp_path
):
    train("--data", corpus, "--output", tmp_path, "--objective", objective, "--steps", 5)
    ours = load_file(unbroken / "model.safetensors")
    theirs = load_file(tmp_path / "model.safetensors")
    shapes = [{name: part.shape for name, part in model.items()} for model in (ours, theirs)]
    names = {name for name in records(tmp_path, "loss")[0] if name.endswith("_loss")}
    assert shapes[0] == shapes[1] and names == logged | {"mlm_loss"}


def test_metrics_has_the_documented_fields(unbroken):
    fields = "step epoch loss mlm_loss bow_loss bow_weight lr grad_norm tokens_per_second "
    fields += "padding_share data_wait_share peak_memory_mb"
    evaluated = "step eval_mlm_loss eval_bow_loss eval_term_coverage"
    rows = [(row["step"], sorted(row)) for row in records(unbroken, "step")]
    steps = [(step, sorted(fields.split())) for step in range(1, 21)]
    evaluations = [(step, sorted(evaluated.split())) for step in (0, 10, 20)]
    expected = evaluations[:1] + steps[:10] + evaluations[1:2] + steps[10:] + evaluations[2:]
    assert rows == expected
    for row in records(unbroken, "loss"):
        assert 0 <= row["padding_share"] < 1 and 0 <= row["data_wait_share"] < 1


def test_losses_are_logged_with_all_their_digits(unbroken):
    for value in itertools.chain(*losses(unbroken).values()):
        assert torch.tensor(value, dtype=torch.float32).item() == value


def test_run_json_tells_how_the_run_was_made(unbroken, corpus):
    content = json.loads((unbroken / "run.json").read_text())
    git = ["git", "-C", str(SCRIPT.parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    names = {"config", "argv", "git_commit", "versions", "device", "world_size"}
    assert content.keys() == names and content["git_commit"] == commit
    assert content["config"]["lr"] == 2e-3 and content["config"]["data"] == corpus
    assert content["versions"]["torch"] == torch.__version__ and content["world_size"] == 1


def test_a_run_ends_with_a_table(corpus, tmp_path, capfd):
    train("--data", corpus, "--output", tmp_path, "--steps", 5)
    *_, header, before, after, saved = capfd.readouterr().out.splitlines()
    names = ["eval_mlm_loss", "eval_bow_loss", "eval_term_coverage"]
    assert header.split() == ["held-out", *names] and str(tmp_path) in saved
    for line, row in zip((before, after), records(tmp_path, "eval_mlm_loss"), strict=True):
        assert line.split()[1:] == [f"{row[name]:.4f}" for name in names]


def test_evaluation_is_that_of_a_loop(unbroken, corpus):
    """Held-out losses and coverage of the saved model, one sequence at a time."""
    config = bow_mae.parse_config([*SMALL, "--data", corpus], Config)
    texts, share = bow_mae.sample_texts(config, [corpus])
    tokenizer = AutoTokenizer.from_pretrained(unbroken)
    lm = AutoModelForMaskedLM.from_pretrained(unbroken)
    special = special_ids(tokenizer, len(tokenizer))
    mlm, bow, coverage = [], [], []
    for batch in bow_mae.held_out_batches(config, tokenizer, texts, share):
        mask = batch["attention_mask"]
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        starts = torch.arange(len(mask))[:, None] * mask.shape[1]
        for i, length in enumerate(mask.sum(1).tolist()):
            original = batch["original_ids"][i : i + 1, :length]
            with torch.no_grad():
                logits = lm(batch["input_ids"][i : i + 1, :length]).logits
                unmasked = lm(original).logits[:, 0]
            own = batch["masked_positions"] - starts[i]
            own = own[(own >= 0) & (own < mask.shape[1])]
            mlm += F.cross_entropy(logits[0, own], original[0, own], reduction="none").tolist()
            bow.append(bow_loss(logits[:, 0], original, special).item())
            coverage += term_coverage(unmasked, original, special).tolist()
    expected = [np.mean(mlm), np.mean(bow), np.mean(coverage)]
    row = records(unbroken, "eval_mlm_loss")[-1]
    found = [row["eval_mlm_loss"], row["eval_bow_loss"], row["eval_term_coverage"]]
    assert found == pytest.approx(expected, rel=1e-4)


# ---- processes, workers, precision


@pytest.fixture(scope="session")
def with_dropout(folder):
    """The folder of a small BERT with dropout."""
    tokenizer = word_tokenizer(WORDS)
    config = transformers.BertConfig(**TINY | {"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    for part in (transformers.BertForMaskedLM(config), tokenizer):
        part.save_pretrained(folder / "with_dropout")
    return folder / "with_dropout"


def test_two_processes_give_the_losses_of_one(with_dropout, corpus, tmp_path):
    """Of a model with dropout, whose draws do not depend on the process; two workers each."""
    flags = ["--data", corpus, "--model", with_dropout, "--micro_batch_size", 2]
    train(*flags, "--output", tmp_path / "one")
    ended = start(*flags, "--output", tmp_path / "two", "--workers", 2, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert close(tmp_path / "two", tmp_path / "one")


def test_two_workers_give_the_losses_of_none(unbroken, corpus, tmp_path):
    train("--data", corpus, "--output", tmp_path / "out", "--workers", 2)
    assert same_run(tmp_path / "out", unbroken)


def test_the_corpus_is_built_before_workers_start(tmp_path):
    """With two processes, a worker each, and an empty cache."""
    tokenizer = word_tokenizer("abcdefghijklmnopqrstuvwxyz" + ".")
    model = tmp_path / "model"
    for part in (AutoModelForMaskedLM.from_config(FAMILIES["BERT"]), tokenizer):
        part.save_pretrained(model)
    code = "import sys, bow_mae; bow_mae.PACKAGES = 'huggingface_hub'; bow_mae.main(sys.argv[1:])"
    (tmp_path / "run.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    flags = ["--model", model, "--workers", 1, "--output", tmp_path / "out", "--steps", 5]
    script = tmp_path / "run.py"
    ended = start(*flags, processes=2, script=script, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("building the corpus") == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_in_half_precision_are_near_those_in_float32(precision, unbroken, corpus, tmp_path):
    """To 1 part in 1000 at the first step; then fp16 skips steps while its scale is too high."""
    train("--data", corpus, "--output", tmp_path / "out", "--precision", precision)
    assert losses(tmp_path / "out")[1] == pytest.approx(losses(unbroken)[1], rel=1e-3)
    assert close(tmp_path / "out", unbroken, 0.1)
    assert losses(tmp_path / "out") != losses(unbroken)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_gives_the_same_loss(corpus, tmp_path):
    flags = ["--data", corpus, "--objective", "mlm", "--batch_size", 4]
    flags += ["--steps", 1, "--warmup_steps", 0]
    train(*flags, "--output", tmp_path / "plain")
    ended = start(*flags, "--output", tmp_path / "compiled", "--compile", "True")
    assert ended.returncode == 0, ended.stderr
    (plain,), (compiled,) = (records(tmp_path / name, "loss") for name in ("plain", "compiled"))
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_bench_compares_the_costs_of_the_objectives(processes, corpus, tmp_path):
    flags = ["--bench", "True", "--data", corpus, "--output", tmp_path / "out"]
    ended = start(*flags, processes=processes)
    assert ended.returncode == 0, ended.stderr
    rows = [line.split() for line in ended.stdout.splitlines()]
    rows = {row[0]: row[1:] for row in rows if row and row[0] in ("mlm", "bow", "enhanced")}
    assert list(rows) == ["mlm", "bow", "enhanced:"[:-1]] and not (tmp_path / "out").exists()
    for samples, tokens, ratio, least, most, _ in rows.values():
        assert 0 < float(least) <= float(ratio) <= float(most)
        assert float(samples.replace(",", "")) < float(tokens.replace(",", ""))
    assert rows["mlm"][2:5] == ["1.0000"] * 3


# ---- stopping and resuming


def test_a_killed_run_resumes_bit_for_bit(unbroken, corpus, tmp_path):
    """SIGKILL at four moments, each further on the way that the run killed before has begun."""
    flags = ["--data", corpus, "--output", tmp_path / "out", "--workers", 1]
    for event, name, count in [
        ("open", "metrics.jsonl", 10),  # between steps 5 and 10
        ("open", ".checkpoint.tmp/modules.json", 1),  # while a checkpoint is written
        ("os.rename", "checkpoint-", 1),  # after that, before it has its name
        ("shutil.copyfile", "model.safetensors", 1),  # while the model takes its place
    ]:
        ended = start_with_signal(signal.SIGKILL, event, name, count, *flags)
        assert ended.returncode == -signal.SIGKILL, (event, name, ended.stderr)
        assert not (tmp_path / "out" / "model.safetensors").exists()
    train(*flags)
    assert same_run(tmp_path / "out", unbroken)


def test_sigterm_saves_and_says_so(stopped):
    output, ended = stopped
    step = max(losses(output))
    assert ended.returncode == 128 + signal.SIGTERM
    assert 5 < step < 10 and (output / f"checkpoint-{step}").is_dir()
    assert f"step {step} is saved" in ended.stdout and "Traceback" not in ended.stderr


def test_ctrl_c_saves_too(corpus, tmp_path):
    flags = ["--data", corpus, "--output", tmp_path / "out"]
    ended = start_with_signal(signal.SIGINT, "open", "metrics.jsonl", 9, *flags)
    step = max(losses(tmp_path / "out"))
    assert ended.returncode == 128 + signal.SIGINT and step < 10
    assert (tmp_path / "out" / f"checkpoint-{step}").is_dir()


def test_a_stopped_run_resumes_bit_for_bit(stopped, unbroken, corpus, tmp_path, capfd):
    shutil.copytree(stopped[0], tmp_path / "out")
    step = max(losses(tmp_path / "out"))
    train("--data", corpus, "--output", tmp_path / "out")
    assert f"resuming from step {step}" in capfd.readouterr().out
    assert same_run(tmp_path / "out", unbroken)


def test_a_run_begun_on_one_process_resumes_on_two(stopped, unbroken, corpus, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "out")
    ended = start("--data", corpus, "--output", tmp_path / "out", processes=2)
    assert ended.returncode == 0, ended.stderr
    assert close(tmp_path / "out", unbroken)


def test_two_processes_may_be_stopped_twice_and_resume_bit_for_bit(corpus, tmp_path):
    """The second time from a checkpoint that was written after the first."""
    flags = ["--data", corpus, "--output", tmp_path / "out", "--keep", 9]
    flags += ["--objective", "enhanced"]
    assert start(*flags, processes=2).returncode == 0
    shutil.copytree(tmp_path / "out", tmp_path / "never stopped")
    for last in (5, 10):
        for step in range(last + 5, 25, 5):
            shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
        assert start(*flags, processes=2).returncode == 0
    one = [row["loss"] for row in records(tmp_path / "out", "loss")]
    other = [row["loss"] for row in records(tmp_path / "never stopped", "loss")]
    assert one == other and same_weights(tmp_path / "out", tmp_path / "never stopped")


def test_the_newest_checkpoints_are_kept(unbroken):
    names = sorted(path.name for path in unbroken.glob("*checkpoint*"))
    assert names == ["checkpoint-15", "checkpoint-20"]


def test_a_finished_run_says_so_and_changes_nothing(unbroken, corpus, tmp_path, capfd):
    shutil.copytree(unbroken, tmp_path / "out")
    train("--data", corpus, "--output", tmp_path / "out")
    assert "this run is finished: 20 steps" in capfd.readouterr().out
    assert same_run(tmp_path / "out", unbroken)


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.pt"])
def test_a_damaged_checkpoint_is_named(file, unbroken, unfinished, corpus, capfd):
    """Once it is removed the run resumes from the one before."""
    path = unfinished / "checkpoint-20" / file
    os.truncate(path, path.stat().st_size // 2)
    message = error_of(capfd, "--data", corpus, "--output", unfinished)
    assert "checkpoint-20" in message
    shutil.rmtree(unfinished / "checkpoint-20")
    train("--data", corpus, "--output", unfinished)
    assert same_run(unfinished, unbroken)


def test_a_full_disk_leaves_the_last_checkpoint_whole(unbroken, unfinished, corpus):
    """No file may grow beyond 100 kB, less than the model; with room the same command resumes."""
    shutil.rmtree(unfinished / "checkpoint-20")
    before = {path: path.read_bytes() for path in (unfinished / "checkpoint-15").glob("*.*")}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    ended = start("--data", corpus, "--output", unfinished, preexec_fn=limit)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2 and len(errors) == 1 and "checkpoint-20" in errors[0]
    assert "Traceback" not in ended.stderr and not (unfinished / "checkpoint-20").exists()
    assert len(before) > 5 and all(path.read_bytes() == old for path, old in before.items())
    train("--data", corpus, "--output", unfinished)
    assert same_run(unfinished, unbroken)


def test_data_that_changed_since_the_checkpoint_is_named(stopped, tmp_path, capfd):
    shutil.copytree(stopped[0], tmp_path / "out")
    state_path = max((tmp_path / "out").glob("checkpoint-*")) / "training_state.pt"
    state = torch.load(state_path, weights_only=True)
    (data,) = state["file_sizes"]
    state["file_sizes"][data] += 1
    torch.save(state, state_path)
    train("--data", data, "--output", tmp_path / "out")
    assert f"has changed since the checkpoint: {data}" in capfd.readouterr().out


def test_two_runs_do_not_share_a_folder(corpus, tmp_path):
    """The second says who holds it. The lock ends with the process, so a killed run leaves none."""
    flags = ["--data", corpus, "--output", tmp_path / "out", "--steps", 5]
    (tmp_path / "out").mkdir()
    holder = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
    holder += "file.write('process 7 on mars'); file.flush(); print('locked', flush=True); input()"
    command = [sys.executable, "-c", holder, str(tmp_path / "out" / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"locked\n"
        ended = start(*flags)
        assert ended.returncode == 2 and "in use by process 7 on mars" in ended.stderr
        process.kill()
    train(*flags)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(corpus, tmp_path, capfd):
    message = error_of(capfd, "--data", corpus, "--output", tmp_path / "out", "--lr", 1e30)
    last = max(losses(tmp_path / "out"))
    assert f"at step {last + 1}" in message
    assert all(math.isfinite(value) for value in losses(tmp_path / "out")[last])


def test_weights_that_the_last_step_spoilt_are_not_saved(corpus, tmp_path, capfd):
    flags = ["--lr", "1e30", "--steps", "1", "--warmup_steps", "0"]
    message = error_of(capfd, "--data", corpus, "--output", tmp_path / "out", *flags)
    assert "eval_" in message and not list(tmp_path.glob("out/checkpoint-*"))


def test_main_leaves_its_caller_as_it_was(corpus, tmp_path):
    """Signal handlers, logging and child processes that are not ours."""
    libraries = (transformers.logging, datasets.logging)
    numbers = (signal.SIGTERM, signal.SIGINT)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        before = [library.get_verbosity() for library in libraries]
        handlers = [signal.getsignal(number) for number in numbers]
        train("--data", corpus, "--output", tmp_path / "out", "--steps", 5, "--workers", 1)
        assert [library.get_verbosity() for library in libraries] == before
        assert [signal.getsignal(number) for number in numbers] == handlers
        assert transformers.logging.is_progress_bar_enabled() and child.poll() is None
        child.kill()


# ---- the saved folder


@pytest.fixture
def vectors(unbroken):
    """Three texts and their [CLS] vectors by the saved weights."""
    texts, tokenizer = make_texts(3, seed=5), AutoTokenizer.from_pretrained(unbroken)
    lm = AutoModelForMaskedLM.from_pretrained(unbroken)
    found = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            found.append(lm(**tokens, output_hidden_states=True).hidden_states[-1][0, 0])
    return texts, torch.stack(found)


def test_transformers_opens_the_folder_with_nothing_missing(unbroken):
    for auto in (AutoModelForMaskedLM, transformers.AutoModel):
        _, report = auto.from_pretrained(unbroken, output_loading_info=True)
        missing = {name for name in report["missing_keys"] if not name.startswith("pooler")}
        assert not missing and not report["mismatched_keys"]


def test_the_folder_says_cls_and_dot_product_to_sentence_transformers(unbroken):
    names = ("modules", "1_Pooling/config", "config_sentence_transformers", "sentence_bert_config")
    contents = [json.loads((unbroken / f"{name}.json").read_text()) for name in names]
    modules, pooling, own, transformer = contents
    found = [(module["type"].split(".")[-1], module["path"]) for module in modules]
    assert found == [("Transformer", ""), ("Pooling", "1_Pooling")]
    modes = {name: value for name, value in pooling.items() if name.startswith("pooling_mode")}
    assert modes.pop("pooling_mode_cls_token") is True and set(modes.values()) == {False}
    assert len(modes) == 5 and pooling["word_embedding_dimension"] == 128
    assert own["similarity_fn_name"] == "dot" and transformer["max_seq_length"] == 32


def test_the_tokenizer_file_neither_cuts_nor_pads(unbroken):
    content = json.loads((unbroken / "tokenizer.json").read_text())
    assert content["truncation"] is None and content["padding"] is None


def test_sentence_transformers_gives_our_vectors(unbroken, vectors):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(unbroken), device="cpu")
    found = model.encode(vectors[0], convert_to_tensor=True)
    torch.testing.assert_close(found, vectors[1], atol=1e-5, rtol=0)
    assert getattr(model, "similarity_fn_name", "dot") == "dot"  # 2.7 has no such name


# ---- bad input

BAD_FLAGS = {  # what the message must say
    "--text_column body": "unknown flag --text_column",
    "--objective bag": "objective",
    "--steps ten": "steps",
    "--steps 0": "--steps 0",
    "--lr nan": "--lr nan",
    "--mask_ratio 0": "--mask_ratio",
    "--mask_ratio 1": "--mask_ratio",
    "--mask_ratio -0.5": "--mask_ratio",
    "--micro_batch_size 3": "--batch_size 8 is no multiple of --micro_batch_size 3",
    "--warmup_steps 20": "--warmup_steps 20 is not below --steps 20",
    "--data nowhere.jsonl": "nowhere.jsonl",
    "--data ./nowhere": "nowhere",
    "--data nowhere/*.jsonl": "nowhere/*.jsonl",
    "--data nobody/nothing": "nobody/nothing",
    "--data models/short": "models/short",
    "--text_columns body": "columns ['text', 'title'], not body",
    "--text_columns text boddy": "not text boddy",
    "--model nobody/nothing": "nobody/nothing",
    "--model models/nothing": "models/nothing: no such folder",
    "--model models/short": "--max_length 32",
    "--model models/headless": "models/headless",
    "--model models/maskless": "[MASK]",
    "--model models/clsless": "[CLS]",
    "--model models/electra": "Electra",
    "--model models/bart": "models/bart",
    "--model models/roformer": "models/roformer",
    "--output good.jsonl/out": "good.jsonl",
    "--output models": "models holds other files",
    "--batch_size 800": "200 shards",
}
GOOD = "".join(json.dumps({"title": "a", "text": text}) + "\n" for text in make_texts(120))
BAD_FILES = {  # name, content, what the message must say
    "empty": ("a.jsonl", "", "a.jsonl"),
    "malformed": ("a.jsonl", GOOD + '{"text": "ba ke"\n' + GOOD, "a.jsonl, line 121: Expecting"),
    "number": ("a.jsonl", GOOD + '{"text": 7}\n', "a.jsonl, line 121: [7] in text is not text"),
    "list": ("a.jsonl", GOOD + '{"text": ["ba"]}\n', "a.jsonl, line 121"),
    "no object": ("a.jsonl", GOOD + "[1, 2]\n", "a.jsonl, line 121"),
    "an array": ("a.json", json.dumps([{"text": "ba"}] * 9, indent=1), "convert it to JSON lines"),
    "a field too many": ("a.csv", "text\nba\nke,di\n", "a.csv"),
    "latin-1 json": ("a.jsonl", (GOOD + '{"text": "café"}\n').encode("latin-1"), "line 121"),
    "latin-1 text": ("a.txt", "ba ke\ncafé\n".encode("latin-1"), "a.txt, line 2"),
    "latin-1 csv": ("a.csv", "text\ncafé\n".encode("latin-1"), "a.csv"),
    "no tab": ("a.tsv", "1\tba\n2 ke\n", "a.tsv, line 2"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-200], "a.jsonl.gz"),
    "no gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz"),
    "no parquet": ("a.parquet", GOOD, "arquet"),
    "unknown format": ("a.pdf", GOOD, "a.pdf: found .pdf"),
    "gzipped parquet": ("a.parquet.gz", "PAR1", "a.parquet.gz: found .gz"),
}


@pytest.fixture(scope="session")
def bad_models(folder):
    """Models that cannot be trained."""
    bert = transformers.BertConfig(**TINY, max_position_embeddings=20)
    electra = transformers.ElectraConfig(**TINY, embedding_size=32)
    sizes = {"vocab_size": 200, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    bart = transformers.BartConfig(**sizes)
    roformer = transformers.RoFormerConfig(**TINY)
    vocab = {word: index for index, word in enumerate([*SPECIALS, *WORDS])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    names = ("pad", "unk", "cls", "sep")
    tokens = {f"{name}_token": f"[{name.upper()}]" for name in names}
    maskless = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    clsless = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens, mask_token="[MASK]")
    good = word_tokenizer(WORDS)
    for name, model, tokenizer in [
        ("short", AutoModelForMaskedLM.from_config(bert), good),
        ("headless", transformers.BertModel(bert), good),
        ("maskless", AutoModelForMaskedLM.from_config(bert), maskless),
        ("clsless", AutoModelForMaskedLM.from_config(bert), clsless),
        ("electra", AutoModelForMaskedLM.from_config(electra), good),
        ("bart", AutoModelForMaskedLM.from_config(bart), good),
        ("roformer", AutoModelForMaskedLM.from_config(roformer), good),
    ]:
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


def no_files(folder):
    """Whether a folder holds no file but the lock and how the run was started."""
    names = {path.name for path in Path(folder).rglob("*") if path.is_file()}
    return names <= {".lock", "run.json", "metrics.jsonl"}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items(), ids=BAD_FLAGS)
def test_a_bad_flag_gives_one_line(flags, message, workplace, capfd):
    error = error_of(capfd, "--data", "good.jsonl", "--output", "out", *flags.split())
    assert message in error and no_files("out")


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_gives_one_line(name, content, message, workplace, capfd):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in error_of(capfd, "--data", name, "--output", "out") and no_files("out")


def test_two_formats_in_a_folder_are_refused(workplace, capfd):
    Path("other.txt").write_text("ba ke\n")
    assert "found .jsonl and .txt" in error_of(capfd, "--data", ".", "--output", "out")


def test_a_mended_command_starts_in_the_same_folder(workplace, capfd):
    error_of(capfd, "--data", "nowhere.jsonl", "--output", "out", "--steps", 5)
    train("--data", "good.jsonl", "--output", "out", "--steps", 5)
    assert max(losses("out")) == 5


def test_of_20_texts_none_is_held_out(workplace, capfd):
    train("--data", write_jsonl("a.jsonl", make_texts(20)), "--output", "out", "--steps", 5)
    assert "nothing is held out" in capfd.readouterr().out and not records("out", "eval_mlm_loss")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lr 0.1", "--lr 0.002, not 0.1"),
        ("--seed 1 --max_length 16", "--max_length 32, not 16"),
        ("--seed 1 --objective mlm", "--objective bow, not mlm"),
    ],
)
def test_the_folder_of_another_run_is_refused(flags, message, unbroken, corpus, capfd):
    before = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()}
    error = error_of(capfd, "--data", corpus, "--output", unbroken, *flags.split())
    after = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()}
    assert message in error and after == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_line_in_the_middle_of_a_stream_stops_the_run(workers, tmp_path):
    """Beyond the sample that is read at the start; the last checkpoint stays whole."""
    lines = [json.dumps({"text": text}) for text in make_texts(6000, longest=10)]
    lines[5432] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    code = "import sys, bow_mae; bow_mae.SAMPLE_TEXTS = 200; bow_mae.main(sys.argv[1:])"
    (tmp_path / "run.py").write_text(code)
    flags = "--data a.jsonl --output out --batch_size 128 --micro_batch_size 64 --steps 100"
    script = tmp_path / "run.py"
    ended = start(*flags.split(), "--workers", workers, script=script, cwd=tmp_path)
    last = max(losses(tmp_path / "out"))
    assert ended.returncode == 2 and ended.stderr.count("error: ") == 1
    assert "error: a.jsonl, line 5433: " in ended.stderr and 5 < last < 100
    state = tmp_path / f"out/checkpoint-{last // 5 * 5}/training_state.pt"
    assert torch.load(state, weights_only=True)["step"] == last // 5 * 5


def test_two_processes_tell_an_error_once(workplace):
    flags = ["--data", "good.jsonl", "--output", "out", "--batch_size", 12]
    ended = start(*flags, processes=2, cwd=workplace)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode != 0 and len(errors) == 1 and "2 processes" in errors[0]


def test_an_error_of_the_second_process_alone_is_told(workplace):
    """Its shard holds a bad line that the first process does not read."""
    lines = GOOD.splitlines()
    lines[101] = "{"  # of the second of two shards
    Path("a.jsonl").write_text("\n".join(lines))
    code = "import sys, bow_mae; bow_mae.SAMPLE_TEXTS = 100; bow_mae.main(sys.argv[1:])"
    Path("run.py").write_text(code)
    flags = ["--data", "a.jsonl", "--output", "out"]
    ended = start(*flags, processes=2, script=workplace / "run.py", cwd=workplace)
    assert ended.returncode != 0 and "error: a.jsonl, line 102: " in ended.stderr
    assert "bow_mae.py" not in ended.stderr.split("error: a.jsonl")[0]


def test_a_bug_of_ours_keeps_its_traceback(workplace):
    code = "import sys, bow_mae; bow_mae.cosine = None; bow_mae.main(sys.argv[1:])"
    Path("run.py").write_text(code)
    flags = ["--data", "good.jsonl", "--output", "out"]
    ended = start(*flags, script=workplace / "run.py", cwd=workplace)
    assert ended.returncode == 1 and "TypeError: 'NoneType' object is not callable" in ended.stderr


@pytest.mark.parametrize(
    "given, message",
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "3"}, "RANK is not set"),  # --batch_size is not to blame
    ],
)
def test_a_part_of_what_torchrun_sets_gives_one_line(given, message, corpus, tmp_path):
    environment = os.environ | given
    ended = start("--data", corpus, "--output", tmp_path / "out", env=environment)
    assert ended.returncode == 2 and message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_lists_every_flag_with_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        bow_mae.parse_config(["--help"], Config)
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in shown and field.metadata["help"][:30] in shown


def test_every_flag_is_used():
    code = SCRIPT.read_text()
    for field in dataclasses.fields(Config):
        assert re.search(rf"(config|self)\.{field.name}\b", code), field.name


# ---- learning


def test_bow_teaches_cls_its_words_and_mlm_does_not(tmp_path):
    """Term coverage of held-out texts of random words; the runs differ in the objective alone."""
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(2000, longest=6))
    flags = "--steps 250 --warmup_steps 20 --batch_size 64 --micro_batch_size 64 --lr 2e-3 "
    flags += "--log_every 250 --save_every 250 --eval_every 250"
    coverage = {}
    for objective in ("bow", "mlm"):
        output = tmp_path / objective
        train("--data", corpus, "--output", output, "--objective", objective, *flags.split())
        rows = records(output, "eval_term_coverage")
        coverage[objective] = [row["eval_term_coverage"] for row in rows]
    assert coverage["bow"][0] == coverage["mlm"][0] < 0.15
    assert coverage["mlm"][1] < 0.35 and coverage["bow"][1] > 0.6


# ==== eval_retrieval.py

# ---- helpers and fixtures


def short_texts(count, seed=0, longest=12):
    """Texts of random words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, longest))) for _ in range(count)]


def write_lines(path, records):
    """A file of JSON lines; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


PASSAGES = [
    {"_id": f"d{i}", "title": "" if i % 3 else "ba", "text": text}
    for i, text in enumerate(short_texts(70, seed=3))
]


def write_beir(folder, passages=PASSAGES):
    """A BEIR folder: query i is the first words of passage i; 40 are in train, the rest in test."""
    write_lines(folder / "corpus.jsonl", passages)
    queries = [" ".join(passage["text"].split()[:3]) for passage in passages]
    rows = [{"_id": f"q{i}", "text": query} for i, query in enumerate(queries)]
    write_lines(folder / "queries.jsonl", rows)
    (folder / "qrels").mkdir()
    for split, rows in (("train", range(40)), ("test", range(40, len(passages)))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_model(folder, has_head=True, pooling="cls", similarity="dot"):
    """A random BERT with dropout."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder, model_max_length=160)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 160}
    config = transformers.BertConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes)
    lm = transformers.BertForMaskedLM(config)
    model = lm if has_head else lm.base_model
    bow_mae.write_model(folder, model, tokenizer, 32, pooling, similarity)
    return str(folder)


def retrieval(*argv):
    """A run of eval_retrieval.py in this process."""
    run_here(eval_retrieval.main, *argv)


def retrieval_error(capfd, *argv):
    """The line "error: ..." of a run that ends with exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        retrieval(*argv)
    lines = capfd.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def torchrun_retrieval(script, *argv):
    """A run of a script in two processes, which must succeed."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script, *argv]
    folder = str(Path(eval_retrieval.__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    ended = subprocess.run(list(map(str, start)), capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr


def read_json(*path):
    """The content of a JSON file."""
    return json.loads(Path(*path).read_text())


def read_log(output):
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def beir(folder):
    """The --data of 70 passages."""
    return write_beir(folder / "beir")


@pytest.fixture(scope="session")
def model(folder):
    """A masked LM."""
    return write_model(folder / "model")


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """16 vectors a file, so that 70 passages make several."""
    monkeypatch.setattr(eval_retrieval, "CHUNK_SIZE", 16)


@pytest.fixture(scope="session")
def evaluated(folder, model, beir):
    """The output of an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_retrieval, "CHUNK_SIZE", 16)
        output = folder / "evaluated"
        flags = ["--model", model, "--data", beir, "--output", output, "--precision", "fp32"]
        retrieval("evaluate", *flags)
    return output


def load(data, split="test", **flags):
    """A task."""
    return eval_retrieval.load_task(RetrievalConfig(data=str(data), **flags), split)


# ---- metrics


def test_metrics_by_hand():
    """Ranked: b (grade 0), a (2), c (not judged), d (1); ideal: 2, 1, 1 (e is not found)."""
    run = {"1": {"a": 2.0, "b": 3.0, "c": 1.0, "d": 0.5}}
    found = evaluate_run(run, {"1": {"a": 2, "b": 0, "d": 1, "e": 1}})["1"]
    gain = 2 / math.log2(3) + 1 / math.log2(5)
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    expected = {"MRR@10": 1 / 2, "nDCG@10": gain / ideal, "MAP@1000": (1 / 2 + 2 / 4) / 3}
    expected |= {"Recall@50": 2 / 3, "Recall@100": 2 / 3, "Recall@1000": 2 / 3}
    expected |= {"Hit@1": 0, "Hit@10": 1, "Hit@50": 1, "Hit@1000": 1}
    assert found == pytest.approx(expected) and {*map(type, found.values())} == {float}


@pytest.mark.parametrize("names", [["10", "9"], ["9", "10"]])
def test_of_equal_scores_the_greater_id_comes_first(names):
    """Equal as float32, compared by bytes: "9" > "10"; as in trec_eval."""
    run = {"1": {name: 1 + 1e-9 * int(name) for name in names}}
    assert evaluate_run(run, {"1": {"9": 1}})["1"]["MRR@10"] == 1
    assert evaluate_run(run, {"1": {"10": 1}})["1"]["MRR@10"] == 1 / 2


def test_metrics_are_cut_at_their_rank_and_none_is_deeper_than_top_k():
    run = {"1": {f"{i:04}": -float(i) for i in range(1, 1200)}}  # passage i has rank i
    qrels = {"1": {"0011": 1, "0051": 1, "1001": 1}}
    found = evaluate_run(run, qrels)["1"]
    expected = {"MRR@10": 0, "nDCG@10": 0, "MAP@1000": (1 / 11 + 2 / 51) / 3, "Recall@50": 1 / 3}
    expected |= {"Recall@100": 2 / 3, "Recall@1000": 2 / 3}
    expected |= {"Hit@1": 0, "Hit@10": 0, "Hit@50": 1, "Hit@1000": 1}
    assert found == pytest.approx(expected)
    short = evaluate_run(run, qrels, top_k=20)["1"]
    assert short.keys() == {"MRR@10", "nDCG@10", "Hit@1", "Hit@10"}


def test_missing_queries_score_0_and_those_without_a_relevant_passage_are_left_out():
    qrels = {"1": {"a": 1}, "2": {"a": 1}, "3": {"a": 0}, "4": {}}
    found = evaluate_run({"1": {"a": 1.0}, "3": {"a": 1.0}, "5": {"a": 1.0}}, qrels)
    assert found.keys() == {"1", "2"} and set(found["2"].values()) == {0}


def test_at_relevance_level_2_only_ndcg_sees_grade_1():
    run, qrels = {"1": {"a": 2.0, "b": 1.0}}, {"1": {"a": 1, "b": 2}}
    found = evaluate_run(run, qrels, relevance_level=2)["1"]
    assert found["MRR@10"] == found["MAP@1000"] == 1 / 2
    assert found["Hit@1"] == 0 and found["Recall@50"] == 1
    assert found["nDCG@10"] == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)))


def test_answers_are_sought_word_for_word_as_dpr_does():
    text = "In 1969, Neil\nARMSTRONG walked. O\u0301scar won $5."
    yes = ["neil armstrong", "\u00d3scar", "$5", "1969,"]
    no = ["arm", "5 $", "", " ", "Neil walked"]
    assert all(eval_retrieval.has_answer(text, [answer]) for answer in yes)
    assert not any(eval_retrieval.has_answer(text, [answer]) for answer in no)
    words = eval_retrieval.answer_words("L'\u00c9t\u00e9 3.5%")
    assert words == " l ' e\u0301te\u0301 3 . 5 % "


def test_the_permutation_test_agrees_with_all_signs():
    differences = np.array([0.5, 0.1, -0.2, 0.4, 0.3, 0.25, -0.1, 0.6])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=8)]
    exact = np.mean([total >= abs(differences.sum()) - 1e-9 for total in sums])
    assert eval_retrieval.permutation_test(differences) == pytest.approx(exact, abs=0.01)
    assert eval_retrieval.permutation_test(np.zeros(9)) == 1


# ---- BM25


def test_bm25_is_the_sum_of_the_textbook():
    texts = ["x b b c", "b c d", "", "e x X x", "f"]
    passages = datasets.Dataset.from_dict({"text": texts})
    scores, rows = eval_retrieval.bm25(passages, ["B x unknown", "unknown"], 5)
    documents, expected = [text.lower().split() for text in texts], []
    for document in documents:
        score = 0
        for term in ("b", "x"):
            n, count = sum(term in other for other in documents), document.count(term)
            idf = math.log(1 + (5 - n + 0.5) / (n + 0.5))
            score += idf * count / (count + 0.9 * (1 - 0.4 + 0.4 * len(document) / (12 / 5)))
        expected.append(score)
    assert [list(own) for own in rows] == [[0, 3, 1], []]
    assert scores[0] == pytest.approx([expected[row] for row in rows[0]])


@pytest.mark.parametrize(
    "text, terms",
    [
        ("The cat is in A.B.C. 1,000 don't", ["cat", "a.b.c", "1,000", "don't"]),
        ("BM25は検索 モデル", ["bm25", "は検", "検索", "モデ", "デル"]),
        ("字", ["字"]),
        ("मेरी किताब", ["मेरी", "किताब"]),  # vowel signs belong to their word
        ("ไปที่", ["ไป", "ปที่"]),  # and to their character
        ("Cafe\u0301 Caf\u00e9", ["caf\u00e9"] * 2),
    ],
)
def test_bm25_terms(text, terms):
    assert sorted(eval_retrieval.bm25_terms(text)) == sorted(terms)


# ---- task


def records_of(path):
    """What read_file gives, without where."""
    return [record for _, record in eval_retrieval.read_file(path)]


def test_files_are_read_by_content_not_by_name(tmp_path):
    rows = [{"a": i, "text": "x" * 50_000} for i in range(4)]
    lines = "\n\n".join(map(json.dumps, rows))
    for i, text in enumerate([lines, json.dumps(rows), json.dumps(rows, indent=4)]):
        (tmp_path / f"{i}.json").write_text(text)
        (tmp_path / f"{i}.tsv.gz").write_bytes(gzip.compress(text.encode()))
        assert records_of(tmp_path / f"{i}.json") == records_of(tmp_path / f"{i}.tsv.gz") == rows
    (tmp_path / "g").write_text("\na\tb \r c\n\nd\t\n")
    fields = [record["fields"] for record in records_of(tmp_path / "g")]
    assert fields == [["a", "b \r c"], ["d", ""]]


@pytest.mark.parametrize("title", ["", "ba ke\t"])
def test_ms_marco_files(title, tmp_path):
    (tmp_path / "collection.tsv").write_text(f"1\t{title}ba \rdi\n2\tdi lo\n3\t\n")
    (tmp_path / "queries.dev.tsv").write_text("1\tba ke\n")
    (tmp_path / "qrels.dev.tsv").write_text("1\t0\t2\t1\n")
    task = load(tmp_path, "dev")
    assert eval_retrieval.passage_texts(task.passages, [0, 1, 2]) == [
        title.replace("\t", " ") + "ba \rdi",
        "di lo",
        "",
    ]
    assert task.queries == {"1": "ba ke"} and task.qrels == {"1": {"2": 1}}
    assert not task.drop_identical  # query 1 and passage 1 only have the same number


def test_dpr_files(tmp_path):
    (tmp_path / "psgs_w100.tsv").write_text('id\ttext\ttitle\n1\t"a ""b"" c"\tT\n2\td\tU V\n')
    (tmp_path / "nq-test.qa.csv").write_text("who is it\t['b c', \"it's\"]\nwhat\t['d']\n")
    task = load(tmp_path)
    assert eval_retrieval.passage_texts(task.passages, [0, 1]) == ['T a "b" c', "U V d"]
    assert task.queries == {"question:1": "who is it", "question:2": "what"} and not task.qrels
    assert [*task.answers.values()] == [["b c", "it's"], ["d"]]
    output = tmp_path / "out"
    retrieval("evaluate", "--model", "bm25", "--data", tmp_path, "--output", output, "--top_k", 20)
    assert read_json(output, "metrics.json") == {"AnswerHit@5": 0.0, "AnswerHit@20": 0.0}


def test_titles_and_texts_may_be_null_and_half_a_surrogate_pair_is_replaced(tmp_path):
    data = write_beir(tmp_path / "beir")
    rows = [{"_id": "d40", "title": None, "text": "ba \ud83d"}, {"docid": 7, "title": "ke"}]
    write_lines(data / "corpus.jsonl", rows)
    (data / "qrels/test.tsv").write_text("q40\td40\t1\nq41\t7\t2.0\n")
    task = load(data)
    assert eval_retrieval.passage_texts(task.passages, [0, 1]) == ["ba ?", "ke"]
    assert task.qrels == {"q40": {"d40": 1}, "q41": {"7": 2}}


def test_hub_names_are_loaded_as_those_of_beir(monkeypatch):
    tables = {
        ("BeIR/x", "corpus", "corpus"): {"_id": ["1"], "text": ["ke"]},
        ("BeIR/x", "queries", "queries"): {"_id": ["2"], "title": [""], "text": ["di"]},
        ("BeIR/x-qrels", None, "test"): {"query-id": [2], "corpus-id": [1], "score": [1.0]},
    }

    def load_dataset(path, name=None, *, split):
        return datasets.Dataset.from_dict(tables[path, name, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load("BeIR/x")
    assert (task.rows, task.queries, task.qrels) == ({"1": 0}, {"2": "di"}, {"2": {"1": 1}})
    tables["BeIR/x-qrels", None, "test"]["score"] = [0.7]
    with pytest.raises(bow_mae.UserError, match="row 0: the grade 0.7 is no integer"):
        load("BeIR/x")


def test_missing_passages_stay_judged_and_missing_queries_are_left_out(tmp_path, capfd):
    data = write_beir(tmp_path / "beir")
    (data / "qrels/test.tsv").write_text("q1\td1\t1\nq1\tgone\t1\nnobody\td2\t1\n")
    retrieval("evaluate", "--model", "bm25", "--data", data, "--output", tmp_path / "out")
    assert read_json(tmp_path, "out/metrics.json")["Recall@100"] == 1 / 2
    told = capfd.readouterr().out
    assert "1 judged passages are missing, the first is 'gone'" in told
    assert "1 queries are missing, the first is 'nobody'" in told


def test_a_passage_with_the_id_of_its_query_is_dropped_unless_judged_relevant(tmp_path, capfd):
    data = write_beir(tmp_path / "beir")
    write_lines(data / "queries.jsonl", PASSAGES)  # queries with the ids of passages
    (data / "qrels/test.tsv").write_text("d1\td1\t1\nd2\td3\t1\n")
    flags = ["evaluate", "--model", "bm25", "--data", data]
    retrieval(*flags, "--output", tmp_path / "out")
    found = eval_retrieval.read_run(tmp_path / "out/run.trec")
    assert next(iter(found["d1"])) == "d1" and "d2" not in found["d2"]
    assert "1 hits had the id of their query" in capfd.readouterr().out
    retrieval(*flags, "--output", tmp_path / "kept", "--keep_identical_ids")
    assert "d2" in eval_retrieval.read_run(tmp_path / "kept/run.trec")["d2"]


CHANGES = {  # file, what is added to it, what the message must say
    "split": ("queries.jsonl", "", "no qrels of dev"),
    "passage twice": ("corpus.jsonl", '{"_id": "d4", "text": ""}', "passage id 'd4' occurs twice"),
    "query twice": ("queries.jsonl", '{"_id": "q4", "text": ""}', "line 71: query q4 occurs twice"),
    "malformed passage": ("corpus.jsonl", "{", "corpus.jsonl, line 71"),
    "no object": ("queries.jsonl", "[1]", "queries.jsonl, line 71"),
    "passage without id": ("corpus.jsonl", '{"text": "ba"}', "the id '' is empty"),
    "passage without text": (
        "corpus.jsonl",
        '{"_id": "a", "contents": "b"}',
        "corpus.jsonl, line 71: no text",
    ),
    "text is a list": ("corpus.jsonl", '{"_id": "a", "text": ["b"]}', "line 71: text is no text"),
    "passage id with a space": (
        "corpus.jsonl",
        '{"_id": "a b", "text": ""}',
        "the id 'a b' is empty or has white space",
    ),
    "query id with a space": ("queries.jsonl", '{"_id": "a b", "text": "ba"}', "the id 'a b' is"),
    "judged id with a space": ("qrels/test.tsv", "q1\ta b\t1", "the id 'a b' is empty or"),
    "grade": ("qrels/test.tsv", "q1\td1\t0.7", "test.tsv, line 32: the grade 0.7 is no integer"),
    "two grades": ("qrels/test.tsv", "q41\td41\t0", "line 32: q41 d41 has another grade"),
    "fields": ("qrels/test.tsv", "q1\td1", "test.tsv, line 32: expected query-id"),
}


@pytest.mark.parametrize("name, line, message", CHANGES.values(), ids=CHANGES)
def test_a_bad_task_gives_one_line(name, line, message, tmp_path, capfd):
    data = write_beir(tmp_path / "beir")
    with (data / name).open("a") as file:
        file.write(f"{line}\n")
    flags = ["--model", "bm25", "--data", data, "--output", tmp_path / "out"]
    flags += ["--split", "test" if line else "dev"]
    assert message in retrieval_error(capfd, "evaluate", *flags)


# ---- encoding


def plain_vectors(folder, texts, pooling, similarity):
    """Each text alone through transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]  # (L, D)
        vector = hidden[0] if pooling == "cls" else hidden.mean(0)
        vectors.append(vector / vector.norm() if similarity == "cos" else vector)
    return torch.stack(vectors).numpy()


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("pooling, similarity", [("cls", "dot"), ("mean", "cos")])
def test_vectors_are_those_of_a_plain_loop(has_head, pooling, similarity, tmp_path):
    folder = write_model(tmp_path / "model", has_head, pooling, similarity)
    texts = short_texts(100, seed=1)
    config = RetrievalConfig(model=folder, max_passage_length=32, precision="fp32")
    encoder = eval_retrieval.Encoder(config, torch.device("cpu"))
    expected = plain_vectors(folder, texts, pooling, similarity)
    np.testing.assert_allclose(encoder.encode(texts, 32), expected, atol=1e-5)
    forced = dataclasses.replace(config, pooling="mean", similarity="dot")
    encoder = eval_retrieval.Encoder(forced, torch.device("cpu"))
    np.testing.assert_allclose(
        encoder.encode(texts, 32), plain_vectors(folder, texts, "mean", "dot"), atol=1e-5
    )


@pytest.mark.parametrize(
    "pooling, expected",
    [
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls+mean"),
    ],
)
def test_pooling_is_what_the_sentence_transformers_files_say(pooling, expected, tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(pooling))
    assert eval_retrieval.saved_pooling(str(tmp_path)) == (expected, "dot")
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(bow_mae.UserError, match="module Dense is not supported"):
        eval_retrieval.saved_pooling(str(tmp_path))


def test_an_evaluation_is_that_of_a_plain_loop(evaluated, model, beir):
    """With all of its files in agreement."""
    task, found = load(beir), eval_retrieval.read_run(evaluated / "run.trec")
    texts = eval_retrieval.passage_texts(task.passages, range(70))
    passages = plain_vectors(model, texts, "cls", "dot")
    queries = plain_vectors(model, task.queries.values(), "cls", "dot")
    for query_id, scores in zip(task.queries, queries @ passages.T, strict=True):
        assert found[query_id] == pytest.approx(dict(zip(task.rows, scores, strict=True)), abs=1e-4)
    lines = [line.split() for line in (evaluated / "run.trec").read_text().splitlines()]
    assert [int(line[3]) for line in lines] == [*range(1, 71)] * 30
    qrels = eval_retrieval.collect_qrels(eval_retrieval.read_file(evaluated / "qrels.trec"))
    rows = [json.loads(line) for line in (evaluated / "per_query.jsonl").open()]
    assert {row.pop("query_id"): row for row in rows} == evaluate_run(found, qrels)
    means = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    assert read_json(evaluated, "metrics.json") == pytest.approx(means)


def test_prefixes_stand_before_queries_and_passages(model, beir, tmp_path):
    plain = write_beir(tmp_path / "plain", [row | {"title": ""} for row in PASSAGES])
    data = write_beir(tmp_path / "beir", [row | {"title": "ke"} for row in PASSAGES])
    shutil.copy(data / "queries.jsonl", plain / "queries.jsonl")
    retrieval("evaluate", "--model", model, "--data", data, "--output", tmp_path / "one")
    flags = ["--data", plain, "--passage_prefix", "ke ", "--output", tmp_path / "two"]
    retrieval("evaluate", "--model", model, *flags)
    assert (tmp_path / "one/run.trec").read_bytes() == (tmp_path / "two/run.trec").read_bytes()


def test_finished_vectors_are_used_again(evaluated, model, beir, tmp_path, monkeypatch):
    """And those of other flags are removed."""
    output = tmp_path / "out"
    shutil.copytree(evaluated, output, ignore=shutil.ignore_patterns(".lock"))
    (file,) = (output / "vectors/passages").glob("*/0000000016.npy")
    file.unlink()  # as if it had not been finished
    encoded, encode = [], eval_retrieval.Encoder.encode

    def counted(self, texts, *arguments):
        encoded.append(len(texts))
        return encode(self, texts, *arguments)

    monkeypatch.setattr(eval_retrieval.Encoder, "encode", counted)
    flags = ["evaluate", "--model", model, "--data", beir, "--output", output]
    flags += ["--precision", "fp32"]
    retrieval(*flags)
    assert encoded == [16]
    assert (output / "run.trec").read_bytes() == (evaluated / "run.trec").read_bytes()
    retrieval(*flags, "--max_passage_length", 8)
    assert sum(encoded) == 16 + 70 and not file.parent.exists()
    retrieval(*flags, "--pooling", "mean")
    assert sum(encoded) == 16 + 70 + 100


# ---- search

# They end as our scripts do: threads of gloo would abort some exits of Python.
TWO_PROCESSES = """
import os, sys, eval_retrieval
eval_retrieval.CHUNK_SIZE = 16
eval_retrieval.main(sys.argv[1:])
os._exit(0)
"""


def test_two_processes_give_the_run_file_of_one(evaluated, model, beir, tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    flags = ["--model", model, "--data", beir, "--output", tmp_path / "out", "--precision", "fp32"]
    torchrun_retrieval(tmp_path / "script.py", "evaluate", *flags)
    assert (tmp_path / "out/run.trec").read_bytes() == (evaluated / "run.trec").read_bytes()


@pytest.mark.parametrize(
    "index, least", [("SQfp16", 0.8), ("HNSW32", 0.8), ("IVF2,Flat", 0.3), ("IVF2,PQ4x4", 0.05)]
)
def test_other_indexes_find_much_of_what_flat_finds(index, least, evaluated, model, beir, tmp_path):
    flags = ["--model", model, "--data", beir, "--output", tmp_path, "--index", index]
    retrieval("evaluate", *flags, "--top_k", 10)
    flat, other = (eval_retrieval.read_run(f / "run.trec") for f in (evaluated, tmp_path))
    assert all(hits and hits.keys() <= load(beir).rows.keys() for hits in other.values())
    shares = [len({*list(flat[query])[:10]} & {*hits}) / 10 for query, hits in other.items()]
    assert np.mean(shares) > least
    assert {len(hits) for hits in other.values()} <= set(range(11))


@pytest.mark.parametrize(
    "index", ["Flot", "LSH", "IDMap,Flat", "PQ7", "IVF71,Flat", "PQ4", "HNSW32,PQ4x4"]
)
def test_an_index_that_cannot_serve_is_refused_before_encoding(index, model, beir, tmp_path, capfd):
    flags = ["--model", model, "--data", beir, "--output", tmp_path / "out", "--index", index]
    assert f"--index {index}" in retrieval_error(capfd, "evaluate", *flags)
    assert not (tmp_path / "out/vectors").exists()


def test_a_corpus_alone_is_indexed_and_searched_with_output_alone(model, tmp_path, capfd):
    """Data and flags are those of the index; nothing is encoded again but the question."""
    write_lines(tmp_path / "data/corpus.jsonl", PASSAGES)
    flags = ["--model", model, "--data", tmp_path / "data", "--similarity", "cos"]
    retrieval("index", *flags, "--output", tmp_path / "out")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/vectors/*/*/*")}
    capfd.readouterr()
    retrieval("search", PASSAGES[50]["text"], "--output", tmp_path / "out")
    lines = capfd.readouterr().out.splitlines()[1:]  # the first tells of the model
    scores = [float(line.split()[0]) for line in lines[::2]]
    assert len(lines) == 20 and scores == sorted(scores, reverse=True) and scores[0] < 1.01
    assert lines[0].split()[1] == "d50" and PASSAGES[50]["text"] in lines[1]
    assert len(files) == 5 and all(path.stat().st_mtime_ns == files[path] for path in files)


def test_search_after_a_change_of_the_model_encodes_again(model, beir, tmp_path, capfd):
    shutil.copytree(model, tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--data", beir, "--output", tmp_path / "out"]
    assert "has no index" in retrieval_error(capfd, "search", "ba", "--output", tmp_path / "out")
    retrieval("index", *flags)
    before = list(tmp_path.glob("out/vectors/*/*/*"))
    write_model(tmp_path / "other", similarity="cos")
    shutil.copytree(tmp_path / "other", tmp_path / "model", dirs_exist_ok=True)
    retrieval("search", "ba", "--output", tmp_path / "out")
    assert not {*before} & {*tmp_path.glob("out/vectors/*/*/*")}


def test_compare_with_the_same_run_and_with_its_reverse(evaluated, beir, tmp_path):
    rows = [line.split() for line in (evaluated / "run.trec").read_text().splitlines()]
    lines = [f"{row[0]} Q0 {row[2]} 1 {-float(row[4])} tag\n" for row in rows]
    (tmp_path / "reverse.trec").write_text("".join(lines))
    flags = ["evaluate", "--model", "bm25", "--data", beir, "--output"]
    retrieval(*flags, tmp_path / "bm25")
    retrieval(*flags, tmp_path / "same", "--compare", tmp_path / "bm25/run.trec")
    retrieval(*flags, tmp_path / "other", "--compare", tmp_path / "reverse.trec")
    same, other = (read_json(tmp_path, name, "compare.json") for name in ("same", "other"))
    assert {row["p"] for row in same.values()} == {1}
    assert other["MRR@10"]["p"] < 0.001 and other["MRR@10"]["difference"] > 0.3


def test_explain_prints_the_terms_of_cls(model, tmp_path, capfd):
    text = "baba keke didi"
    retrieval("explain", text, "--model", model)
    told = capfd.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lm = transformers.AutoModelForMaskedLM.from_pretrained(model)
    with torch.no_grad():
        logits = lm(**tokenizer(text, return_tensors="pt")).logits[0, 0]
    terms = tokenizer(text, add_special_tokens=False)["input_ids"]
    coverage = len({*logits.topk(3).indices.tolist()} & {*terms}) / 3
    assert f"{coverage:.1%} of the 3 terms" in told
    assert tokenizer.convert_ids_to_tokens(logits.argmax().item()) in told
    headless = write_model(tmp_path / "headless", has_head=False)
    assert "has no masked-LM head" in retrieval_error(capfd, "explain", text, "--model", headless)


# ---- fine-tuning

STEPS = ["--batch_size", 8, "--micro_batch_size", 2, "--epochs", 2, "--lr", 1e-3, "--log_every", 1]
STEPS += ["--warmup_steps", 2, "--save_every", 4, "--negatives", 2, "--max_passage_length", 32]
STEPS += ["--precision", "fp32"]


@pytest.fixture(scope="session")
def mined(folder, model, beir):
    """A file of negatives."""
    flags = ["--data", beir, "--output", folder / "mined", "--depth", 2, 20, "--sample", 5]
    retrieval("mine", "--model", model, *flags)
    return folder / "mined/negatives.jsonl"


@pytest.fixture(scope="session")
def finetuned(folder, model, beir, mined):
    """The flags and the output of an unbroken fine-tuning of 10 steps."""
    flags = ["finetune", *STEPS, "--model", model, "--data", beir, "--negatives_file", mined]
    retrieval(*flags, "--output", folder / "finetuned")
    return flags, folder / "finetuned"


def test_the_loss_is_that_of_a_loop_without_known_positives():
    torch.manual_seed(0)
    queries, passages = torch.randn(3, 4), torch.randn(6, 4)
    known = torch.zeros(3, 6, dtype=torch.bool)
    known[0, 2] = known[2, 1] = True
    expected = 0
    for i, query in enumerate(queries):
        scores = [query.dot(passage) / 0.5 for passage in passages]
        others = [score.exp() for j, score in enumerate(scores) if not known[i, j]]
        expected -= torch.log(scores[2 * i].exp() / sum(others)) / 3
    loss = eval_retrieval.contrastive_loss(queries, passages, known, 0.5)
    torch.testing.assert_close(loss, expected)


def keep_gradients(monkeypatch):
    """A list that gets the gradients of each step of a fine-tuning, before they are clipped."""
    kept, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_and_keep(parameters, norm):
        kept.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_keep)
    return kept


def test_cached_gradients_are_those_of_one_big_batch(finetuned, tmp_path, monkeypatch):
    """With dropout on, in a step of four micro-batches."""
    flags, _ = finetuned
    config = eval_retrieval.parse_command(list(map(str, [*flags, "--steps", 1])))[1]
    kept = keep_gradients(monkeypatch)
    retrieval(*flags, "--output", tmp_path, "--steps", 1)
    encoder = eval_retrieval.Encoder(config, torch.device("cpu")).train()
    training = eval_retrieval.load_training_set(config)
    steps = eval_retrieval.FinetuningSteps(config, encoder.tokenizer, training)
    micro_batches, known = steps[1]
    pairs = [eval_retrieval.encode_pair(encoder, batch) for batch in micro_batches]
    queries, passages = (torch.cat(vectors) for vectors in zip(*pairs, strict=True))
    loss = eval_retrieval.contrastive_loss(queries, passages, known, 1.0)
    loss.backward()
    assert len(micro_batches) == 4 and encoder.lm.config.hidden_dropout_prob > 0
    assert read_log(tmp_path)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for cached, parameter in zip(kept[0], encoder.lm.base_model.parameters(), strict=True):
        assert (cached - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


KEEP_GRADIENTS = """
import os, sys, torch, eval_retrieval
clip = torch.nn.utils.clip_grad_norm_
def clip_and_keep(parameters, norm):
    torch.save([parameter.grad for parameter in parameters], sys.argv[1])
    return clip(parameters, norm)
torch.nn.utils.clip_grad_norm_ = clip_and_keep
eval_retrieval.main(sys.argv[2:])
os._exit(0)
"""


def test_two_processes_give_the_losses_and_gradients_of_one(finetuned, tmp_path, monkeypatch):
    flags = [*finetuned[0], "--steps", 1]
    kept = keep_gradients(monkeypatch)
    retrieval(*flags, "--output", tmp_path / "one")
    (tmp_path / "script.py").write_text(KEEP_GRADIENTS)
    flags += ["--output", tmp_path / "two"]
    torchrun_retrieval(tmp_path / "script.py", tmp_path / "two.pt", *flags)
    one, two = (read_log(tmp_path / name)[0]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    for one, two in zip(kept[0], torch.load(tmp_path / "two.pt"), strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("micro_batch_size, passes", [(2, 8), (8, 1), (64, 1)])
def test_a_single_micro_batch_is_encoded_once(
    micro_batch_size, passes, finetuned, tmp_path, monkeypatch
):
    calls, encode = [], eval_retrieval.encode_pair

    def counted(*arguments):
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(eval_retrieval, "encode_pair", counted)
    flags = [*finetuned[0], "--steps", 1, "--micro_batch_size", micro_batch_size]
    retrieval(*flags, "--output", tmp_path)
    assert len(calls) == passes


def make_steps(config, training):
    """The steps of a training set, with a tokenizer that only keeps the texts."""
    return eval_retrieval.FinetuningSteps(config, lambda texts, **_: {"texts": texts}, training)


def training_set(positives, negatives, identity):
    """A training set of hand-made rows."""
    rows = [np.array(own) for own in positives], [np.array(own, int) for own in negatives]
    passages = datasets.Dataset.from_dict({"text": [f"p{i}" for i in range(len(identity))]})
    queries = [f"q{i}" for i in range(len(positives))]
    return eval_retrieval.TrainingSet(passages, np.array(identity), queries, *rows)


def test_known_positives_are_masked_by_identity(monkeypatch):
    """Rows 1 and 5 are the same passage; it is relevant to queries 0 and 1."""
    training = training_set([[0, 1], [5], [2]], [[3], [4], [4]], [0, 1, 2, 3, 4, 1])
    config = RetrievalConfig(batch_size=3, micro_batch_size=3, negatives=1, max_passage_length=8)
    steps = make_steps(config, training)
    steps.epoch, steps.order = 0, np.array([0, 1, 2])
    monkeypatch.setattr(steps, "draw", lambda i, epoch: np.array([[0, 3], [5, 4], [2, 4]][i]))
    (batch,), known = steps[1]
    assert batch["passages"]["texts"] == ["p0", "p3", "p5", "p4", "p2", "p4"]
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[0, 2] = True  # of query 0; passage 0 is no known positive of query 1
    assert known.equal(expected)


def test_an_epoch_has_each_query_once_with_new_negatives(finetuned):
    config = eval_retrieval.parse_command(list(map(str, finetuned[0])))[1]
    training = eval_retrieval.load_training_set(config)
    steps = make_steps(config, training)
    epochs = []
    for first in (1, 6):
        batches = [batch for step in range(first, first + 5) for batch in steps[step][0]]
        epochs.append([query for batch in batches for query in batch["queries"]["texts"]])
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(training.queries)
    assert epochs[0] != epochs[1]
    first, second, again = (steps.draw(7, epoch) for epoch in (0, 1, 0))
    assert first.tolist() == again.tolist() != second.tolist()
    assert first[0] == 7 and set(first[1:]) <= set(training.negatives[7])


def test_without_hard_negatives_any_passages_serve():
    training = training_set([[0], [1], [2]], [[], [], []], range(3))
    steps = make_steps(RetrievalConfig(batch_size=3, micro_batch_size=3, negatives=5), training)
    rows = np.stack([steps.draw(0, epoch) for epoch in range(9)])
    assert rows.shape == (9, 6) and set(rows[:, 0]) == {0} and set(rows.ravel()) == {0, 1, 2}


def test_a_broken_fine_tuning_goes_on_bit_for_bit(finetuned, tmp_path, monkeypatch, capfd):
    """Also with data-loader processes."""
    flags, output = finetuned
    rate = bow_mae.learning_rate

    def fail(config, step):
        if step == 7:
            raise OSError("broken")
        return rate(config, step)

    monkeypatch.setattr(bow_mae, "learning_rate", fail)
    assert "broken" in retrieval_error(capfd, *flags, "--output", tmp_path)
    monkeypatch.setattr(bow_mae, "learning_rate", rate)
    retrieval(*flags, "--output", tmp_path, "--workers", 2)
    assert "resuming from step 4" in capfd.readouterr().out
    assert same_weights(tmp_path, output)
    assert [row["loss"] for row in read_log(tmp_path)] == [row["loss"] for row in read_log(output)]
    retrieval(*flags, "--output", tmp_path)
    assert "this run is finished" in capfd.readouterr().out


def load_training(tmp_path, **flags):
    """A training set."""
    return eval_retrieval.load_training_set(RetrievalConfig(negatives=1, **flags))


def texts_at(training, rows):
    """The texts of some rows."""
    return eval_retrieval.passage_texts(training.passages, rows)


def test_negatives_files_are_joined_and_positives_left_out(beir, tmp_path):
    one = write_lines(tmp_path / "one.jsonl", [{"query_id": "q7", "negatives": ["d7", "d9"]}])
    (tmp_path / "two.tsv").write_text("q7\td11\td12\nq8\td8\n")
    files = [str(one), str(tmp_path / "two.tsv")]
    training = load_training(tmp_path, data=str(beir), negatives_file=files)
    assert training.positives[7].tolist() == [7] and training.negatives[7].tolist() == [9, 11, 12]
    assert training.negatives[8].tolist() == []


def test_training_files_of_tevatron_and_dpr_are_joined_by_question(tmp_path, capfd):
    """The same passage, by id or else by text, is a positive of a query wherever it stands."""
    tevatron = {"query": "a", "positive_passages": [{"docid": "1", "title": "T", "text": "x"}]}
    tevatron["negative_passages"] = [{"docid": "1", "text": "x"}, {"docid": "2", "text": "y"}]
    empty = {"query": "none", "positive_passages": [], "negative_passages": [{"text": "x"}]}
    dpr = {"question": "a", "positive_ctxs": [{"title": "", "text": "same"}]}
    dpr["hard_negative_ctxs"] = [{"text": "same"}, {"psg_id": 1, "text": "x"}, {"text": "z \ud83d"}]
    one = write_lines(tmp_path / "one.json", [tevatron, empty])
    (tmp_path / "two.json.gz").write_bytes(gzip.compress(json.dumps([dpr], indent=4).encode()))
    files = [str(one), str(tmp_path / "two.json.gz")]
    training = load_training(tmp_path, train_data=files)
    assert training.queries == ["a"]
    assert texts_at(training, training.positives[0]) == ["T x", "same"]
    assert texts_at(training, training.negatives[0]) == ["y", "z ?"]
    assert "1 queries have no positive" in capfd.readouterr().out


def test_equal_questions_of_a_training_file_with_ids_of_their_own_stay_apart(tmp_path):
    rows = []
    for i in range(3):
        passages = {"positive_passages": [{"docid": str(i), "text": f"ba {i}"}]}
        rows.append({"query_id": str(i), "query": "ke"} | passages)
    data = write_lines(tmp_path / "train.jsonl", rows)
    training = load_training(tmp_path, train_data=[str(data)])
    assert training.queries == ["ke"] * 3 and [*map(len, training.positives)] == [1] * 3


def test_nq_joins_its_own_negatives_with_mined_ones(tmp_path):
    """Passages that hold an answer are not mined; a question is the same in both."""
    passages = [{"_id": f"{i}", "text": f"ba ke {i}"} for i in range(9)]
    write_lines(tmp_path / "nq/corpus.jsonl", passages)
    (tmp_path / "nq/nq-train.qa.csv").write_text("ba ke\t['3', '5']\n")
    flags = ["--data", tmp_path / "nq", "--model", "bm25", "--depth", 1, 9]
    retrieval("mine", *flags, "--output", tmp_path / "mined")
    (row,) = map(json.loads, (tmp_path / "mined/negatives.jsonl").open())
    assert sorted(row["negatives"]) == ["0", "1", "2", "4", "6", "7", "8"]
    dpr = {"question": "ba ke", "positive_ctxs": [{"passage_id": "3", "text": "ba ke 3"}]}
    dpr["hard_negative_ctxs"] = [{"passage_id": "11", "text": "lo"}]
    data = write_lines(tmp_path / "biencoder-nq-train.json", [dpr])
    files = {"train_data": [str(data)], "negatives_file": [str(tmp_path / "mined/negatives.jsonl")]}
    training = load_training(tmp_path, data=str(tmp_path / "nq"), **files)
    assert texts_at(training, training.positives[0]) == ["ba ke 3"]
    assert sorted(texts_at(training, training.negatives[0]))[-2:] == ["ba ke 8", "lo"]


@pytest.mark.parametrize("has_head", [True, False])
def test_a_fine_tuned_folder_opens_again_with_the_same_vectors(has_head, beir, tmp_path, capfd):
    source = write_model(tmp_path / "model", has_head, "mean", "cos")
    flags = ["--model", source, "--data", beir, "--output", tmp_path / "out"]
    retrieval("finetune", *STEPS, "--steps", 2, *flags)
    assert f"model saved in {tmp_path / 'out'}" in capfd.readouterr().out
    texts = short_texts(9, seed=5)
    config = RetrievalConfig(model=str(tmp_path / "out"), max_passage_length=32, precision="fp32")
    encoder = eval_retrieval.Encoder(config, torch.device("cpu"))
    vectors = encoder.encode(texts, 32)
    expected = plain_vectors(config.model, texts, "mean", "cos")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert (encoder.lm.base_model is not encoder.lm) == has_head
    assert not same_weights(source, tmp_path / "out")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    other = sentence_transformers.SentenceTransformer(config.model, device="cpu")
    np.testing.assert_allclose(vectors, other.encode(texts), atol=1e-5)


def test_fine_tuning_teaches_to_find(model, tmp_path):
    """On other queries than those it is trained on: a query is the first words of its passage."""
    texts = short_texts(300, seed=9, longest=8)
    passages = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    data = write_beir(tmp_path / "data", passages)
    lines = [f"q{i}\td{i}\t1\n" for i in range(300)]
    (data / "qrels/train.tsv").write_text("".join(lines[:200]))
    (data / "qrels/test.tsv").write_text("".join(lines[200:]))
    flags = ["--data", data, "--max_passage_length", 16]
    retrieval("evaluate", "--model", model, *flags, "--output", tmp_path / "before")
    training = ["--batch_size", 32, "--micro_batch_size", 32, "--epochs", 15, "--lr", 2e-3]
    retrieval(
        "finetune",
        "--model",
        model,
        *flags,
        *training,
        "--negatives",
        0,
        "--output",
        tmp_path / "ft",
    )
    retrieval("evaluate", "--model", tmp_path / "ft", *flags, "--output", tmp_path / "after")
    before, after = (read_json(tmp_path, n, "metrics.json")["MRR@10"] for n in ("before", "after"))
    assert after > before + 0.1


# ---- mining


def mined_names(tmp_path, qrels, ranked, answers=None, **flags):
    """The negatives of queries whose passages a, b, c ... are ranked so."""
    names = "abcdefghij"
    passages = datasets.Dataset.from_dict({"text": [f"text {name}" for name in names]})
    rows, queries = {name: i for i, name in enumerate(names)}, dict.fromkeys(ranked, "")
    task = eval_retrieval.Task(passages, rows, queries, qrels, answers or {}, True)
    hits = [(query, dict.fromkeys(found, 1.0)) for query, found in ranked.items()]
    eval_retrieval.write_negatives(RetrievalConfig(output=str(tmp_path), **flags), task, hits)
    lines = map(json.loads, (tmp_path / "negatives.jsonl").open())
    return {line["query_id"]: "".join(line["negatives"]) for line in lines}


def test_each_query_loses_its_own_positives_and_no_others(tmp_path):
    qrels = {"2": {"a": 1, "c": 2, "e": 0}, "1": {"b": 1}}
    found = mined_names(tmp_path, qrels, {"2": "abcdef", "1": "abcdef"}, depth=[1, 200])
    assert found == {"2": "bdef", "1": "acdef"}


def test_passages_with_an_answer_are_no_negatives(tmp_path):
    found = mined_names(tmp_path, {}, {"1": "abcd"}, {"1": ["C", "text a"]}, depth=[1, 200])
    assert found == {"1": "bd"}


def test_negatives_come_from_the_ranks_between_and_are_a_sample(tmp_path):
    def sample(**flags):
        flags |= {"depth": [3, 8], "sample": 4}
        return mined_names(tmp_path, {"1": {"a": 1}}, {"1": "abcdefgh"}, **flags)["1"]

    first = sample()
    assert len(first) == 4 and set(first) <= set("cdefgh") and sample() == first
    assert len({sample(seed=seed) for seed in range(9)}) > 3


# ---- commands

BAD_COMMANDS = {  # what the message must say
    "evalute": "evalute: the commands are evaluate index",
    "evaluate ba": "ba",
    "explain": "explain needs a text",
    "search": "search needs a text",
    "evaluate --lr 1": "--lr",
    "evaluate --model nowhere": "nowhere",
    "evaluate --data nobody/nothing --model bm25": "nobody/nothing",
    "evaluate --max_passage_length 999": "999",
    "evaluate --compare nothing.trec": "nothing.trec",
    "evaluate --compare bad.trec": "bad.trec, line 1: expected qid Q0 docid rank score tag",
    "evaluate --top_k 0": "--top_k 0 must be a finite number, at least 1",
    "mine --depth 5 2": "--depth needs two ranks",
    "finetune --batch_size 64": "--batch_size 64",
    "finetune --negatives_file gone.jsonl": "gone.jsonl",
    "finetune --negatives_file unknown.jsonl": "unknown.jsonl, line 1: query q69",
    "finetune --negatives_file missing.jsonl": "line 1: query q1 or passages ['d999'] are not in",
    "finetune --train_data bad.jsonl": "bad.jsonl, line 2: give a query",
}


@pytest.mark.parametrize("line, message", BAD_COMMANDS.items(), ids=BAD_COMMANDS)
def test_a_bad_command_gives_one_line(line, message, beir, model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("bad.trec").write_text("q1 d1 1\n")
    write_lines(Path("unknown.jsonl"), [{"query_id": "q69", "negatives": ["d1"]}])
    write_lines(Path("missing.jsonl"), [{"query_id": "q1", "negatives": ["d999"]}])
    write_lines(Path("bad.jsonl"), [{"query": "ba", "positive_passages": []}, {"query": "ba"}])
    command, *flags = line.split()
    given = {"--model": model, "--data": beir, "--output": "out"} if len(line) > 7 else {}
    given = [word for flag in given.items() if flag[0] not in flags for word in flag]
    assert message in retrieval_error(capfd, command, *flags, *given)


@pytest.mark.parametrize("command", [command for command in eval_retrieval.COMMANDS if command])
def test_help_lists_the_flags_of_a_command_alone(command, capfd):
    texts = ["ba"] if command in ("search", "explain") else []
    with pytest.raises(SystemExit) as stop:
        retrieval(command, *texts, "--help")
    told = capfd.readouterr().out
    flags = set(eval_retrieval.COMMANDS[command][1].split())
    listed = {f.name for f in dataclasses.fields(RetrievalConfig) if f"--{f.name} " in told}
    assert stop.value.code == 0 and listed == flags


def test_defaults_are_the_papers_for_all_but_python_docs(capfd):
    def values(*argv):
        config = eval_retrieval.parse_command(["finetune", *argv])[1]
        return config.lr, config.negatives, config.epochs, config.max_passage_length

    assert values() == (5e-4, 1, 1, 96)
    assert values("--data", "x") == values("--train_data", "x") == (2e-5, 15, 3, 144)
    assert values("--data", "x", "--lr", "1") == (1, 15, 3, 144)


def test_a_long_warm_up_and_training_on_the_test_split_are_told(capfd):
    config = RetrievalConfig(steps=3, warmup_steps=5, train_split="test")
    eval_retrieval.plan_steps(config, 100)
    told = capfd.readouterr().out
    assert "3 steps, of which 5 are warm-up" in told and "the split that is evaluated" in told


def test_the_recipe_prints_a_table_of_its_stages(model, beir, tmp_path, capfd):
    flags = ["--model", model, "--data", beir, "--output", tmp_path / "out", *STEPS, "--steps", 2]
    retrieval(*flags)
    table = read_json(tmp_path, "out/table.json")
    assert [*table] == ["bm25", "zero_shot", "stage1", "stage2"]
    lines = capfd.readouterr().out.splitlines()[-4:]
    for line, (name, values) in zip(lines, table.items(), strict=True):
        assert line.split()[:2] == [name, f"{values['MRR@10']:.4f}"]
    names = ("zero_shot", "stage1/mined", "stage1/model", "stage2/mined", "stage2/model")
    models = [read_json(tmp_path, "out", name, "run.json")["config"]["model"] for name in names]
    assert models == [model, "bm25", model, str(tmp_path / "out/stage1/model"), model]


def test_the_recipe_checks_all_splits_first(model, tmp_path, capfd):
    data = write_beir(tmp_path / "data")
    (data / "qrels/train.tsv").unlink()
    flags = ["--model", model, "--data", data, "--output", tmp_path / "out"]
    assert "no qrels of train" in retrieval_error(capfd, *flags)
    assert not (tmp_path / "out/bm25").exists()


# ==== the README

README = SCRIPT.with_name("README.md").read_text()
SECTIONS = dict(section.split("\n", 1) for section in README.split("\n## ")[1:])
COMMANDS = re.findall(r"^    ((?:torchrun|python) .*?)(?:  #.*)?$", README, re.MULTILINE)


def test_the_readme_is_short():
    assert len(README.split()) <= 1900 and len(README.splitlines()) <= 250


def test_every_flag_of_the_readme_exists():
    kinds = (Config, RetrievalConfig)
    flags = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    torchruns = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    assert set(re.findall(r"--(\w+)", README)) <= flags | torchruns


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command, monkeypatch):
    """For its number of processes."""
    words = shlex.split(command)
    processes = re.search(r"--nproc_per_node (\d+)", command)
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.setenv("WORLD_SIZE", processes[1] if processes else "1")
    if words[script] == "bow_mae.py":
        bow_mae.complete_config(bow_mae.parse_config(words[script + 1 :], Config))
    else:
        eval_retrieval.parse_command(words[script + 1 :])


def test_the_commands_of_the_quick_start_run(corpus, tmp_path):
    """As they stand there, but for the installation, and with small runs of both."""
    commands = re.findall(r"^    pip install .* && (\w.*)$", SECTIONS["Quick start"], re.MULTILINE)
    assert commands == ["torchrun bow_mae.py", "pytest"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    flags = [*SMALL, "--data", corpus, "--output", tmp_path], ["--collect-only", "--quiet"]
    for command, own in zip(commands, flags, strict=True):
        words = [*command.split(), *map(str, own)]
        environment = os.environ | {"PATH": path, "PYTEST_ADDOPTS": ""}
        assert subprocess.run(words, cwd=SCRIPT.parent, env=environment).returncode == 0


def test_the_sample_records_of_the_readme_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```\n(# texts.*?)```", SECTIONS["Your own data"], re.DOTALL)[1]
    for name, content in re.findall(r"^# (\S+)\n((?:(?!# ).*\n)+)", block, re.MULTILINE):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    for name in ("texts.jsonl", "texts.csv", "texts.txt"):
        texts = [text for _, text in bow_mae.read_texts(Config(data=name), [name])]
        assert texts[-1].startswith("A table")
    for data, split in (("mydata", "test"), ("msmarco", "dev"), ("nq", "test")):
        task = eval_retrieval.load_task(RetrievalConfig(data=data), split)
        assert len(task.passages) == 1 and list(task.queries.values()) == ["what is csv"]
    for name in ("tevatron.jsonl", "dpr.json"):
        config = RetrievalConfig(train_data=[name])
        assert len(eval_retrieval.load_training_set(config).queries) == 1
    with open("mydata/corpus.jsonl", "a") as corpus:
        corpus.write('{"_id": "d2", "text": "x"}\n{"_id": "d3", "text": "y"}\n')
    flags = {"data": "mydata", "train_split": "test", "negatives_file": ["negatives.jsonl"]}
    training = eval_retrieval.load_training_set(RetrievalConfig(**flags))
    assert [len(negatives) for negatives in training.negatives] == [2]


def test_the_training_loop_of_the_readme_teaches_the_bag_of_words():
    """The loop as it stands there, with a fresh model and a collator of transformers."""
    tokenizer = word_tokenizer(WORDS)
    torch.manual_seed(0)
    model = bow_mae.fresh_lm(Config(model="tiny", max_length=64), tokenizer).train()
    rows = [tokenizer(text) for text in make_texts(2000, longest=6)]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    loader = torch.utils.data.DataLoader(rows * 6, batch_size=64, collate_fn=collator)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    names = {"tokenizer": tokenizer, "model": model, "optimizer": optimizer, "loader": loader}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    unmasked = tokenizer.pad(rows[:64], return_tensors="pt")
    with torch.no_grad():
        cls = model.eval().base_model(**unmasked).last_hidden_state[:, 0]
    logits = bow_mae.mlm_head(model, cls)
    coverage = term_coverage(logits, unmasked["input_ids"], names["special"]).mean()
    assert coverage > 0.3  # by chance: 5 of 100 words
