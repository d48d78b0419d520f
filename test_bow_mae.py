# SPDX-License-Identifier: MIT
"""Tests of bow_mae.py and eval_retrieval.py, to be read as documentation: no network, no GPU.

    pip install -r requirements.txt pytest
    pytest

Most runs are `main([...])` in this process, of a tiny model on made-up texts. Runs of several
processes, and those that are killed, are started as a user starts them.
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
os.environ |= {"HF_HOME": CACHE.name, "HF_DATASETS_CACHE": CACHE.name, "HF_HUB_OFFLINE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import datasets
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tokenizers import models, processors, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Metaspace
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

import bow_mae
import eval_retrieval
from bow_mae import BowMAE, Config, PretrainingStream, bow_loss, special_ids, term_coverage
from eval_retrieval import RetrievalConfig, evaluate_run

torch.set_num_threads(1)
eval_retrieval.CHUNK_SIZE = 16  # vectors a file, so that 70 passages make several
SCRIPT = Path(bow_mae.__file__).resolve()
TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
TOKENS |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
SYLLABLES = ["ba", "ke", "di", "lo", "mu", "sta", "pri", "ven", "tor", "gal"]
WORDS = [first + second for first, second in itertools.product(SYLLABLES, SYLLABLES)]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"hidden_size": 32, "vocab_size": 200}


# ---- helpers


def make_texts(count, seed=0, longest=40):
    """Texts of 3 to `longest` random words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, longest))) for _ in range(count)]


def write_jsonl(path, rows):
    """Write a file of records, or of {"text": ...} for texts; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def word_tokenizer(words):
    """A WordPiece tokenizer of these words and pieces."""
    vocab = {word: index for index, word in enumerate([*TOKENS.values(), *words])}
    backend = tokenizers.Tokenizer.from_str(BertWordPieceTokenizer(vocab).to_str())
    return transformers.BertTokenizerFast(tokenizer_object=backend)


TOKENIZER = word_tokenizer([*WORDS, *SYLLABLES, "na", "1", "null"])


def write_model(folder, has_head=True, pooling="cls", similarity="dot", seed=0):
    """A random BERT with dropout; returns its folder."""
    torch.manual_seed(seed)
    sizes = SIZES | {"vocab_size": len(TOKENIZER), "max_position_embeddings": 160}
    lm = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, initializer_range=0.1))
    model = lm if has_head else lm.base_model
    bow_mae.write_model(folder, model, TOKENIZER, 32, pooling, similarity)
    return str(folder)


FOLDER = Path(CACHE.name)
TEXTS = make_texts(3000)  # all different
CORPUS = write_jsonl(FOLDER / "corpus.jsonl", TEXTS[:600])
MODEL = write_model(FOLDER / "model")
SMALL = shlex.split(
    f"--data {CORPUS} --model tiny --max_length 32 --steps 20 --batch_size 8 --micro_batch_size 4 "
    "--precision fp32 --lr 2e-3 --lr_final_ratio 0.1 --warmup_steps 4 --adam_beta2 0.98 "
    "--workers 0 --log_every 1 --save_every 5 --keep 2 --eval_every 10"
)


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
    """A run of bow_mae.py in this process, of SMALL."""
    run_here(bow_mae.main, *SMALL, *flags)


def retrieval(*flags):
    """A run of eval_retrieval.py in this process."""
    run_here(eval_retrieval.main, *flags)


PATCHED = """import os, sys, {module}
{before}
{module}.main(sys.argv[1:])
sys.stdout.flush()
os._exit(0)  # as the scripts end
"""


def start(*flags, module="bow_mae", before="", processes=1, env=None, **options):
    """A run as a user starts it, by `python` or `torchrun`, perhaps after other lines of code."""
    script = SCRIPT.with_name(f"{module}.py")
    if before:
        script = FOLDER / "patched.py"
        script.write_text(PATCHED.format(module=module, before=before))
    small = SMALL if module == "bow_mae" else []
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", processes]
    command = [sys.executable, *(torchrun if processes > 1 else []), script, *small, *flags]
    options = {"cwd": FOLDER, "capture_output": True, "text": True} | options
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)} | (env or {})
    return subprocess.run([*map(str, command)], env=env, **options)


SIGNAL = """
left = {count}
def hook(what, arguments):
    global left
    if what == {event!r} and {name!r} in " ".join(map(str, arguments)):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), {number})
sys.addaudithook(hook)
"""


def signal_at(number, event, name, count):
    """Code for a run to get a signal the count-th time that it opens, or renames, such a file."""
    return SIGNAL.format(number=int(number), event=event, name=name, count=count)


def one_error(stderr, code):
    """The line "error: ..." that a run ended with, and exit code 2."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in stderr, stderr
    return errors[0]


def error_of(capfd, run, *flags):
    """That line of a run in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    return one_error(capfd.readouterr().err, stop.value.code)


def records(output, field):
    """The records of metrics.jsonl that have a field."""
    lines = Path(output, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if field in record]


def losses(output):
    """{step: {name: loss}}, as logged."""
    found = {}
    for row in records(output, "loss"):
        found[row["step"]] = {name: row[name] for name in row if name.endswith("loss")}
    return found


def close(one, other, tolerance=1e-4):
    """Whether two runs have the same losses at each step, but for this share of them."""
    one, other = losses(one), losses(other)
    assert one.keys() == other.keys()
    return all(one[step] == pytest.approx(other[step], rel=tolerance) for step in one)


def same_run(one, other):
    """Whether two runs have the same losses, evaluations and weights, bit for bit."""
    same_evaluations = records(one, "eval_mlm_loss") == records(other, "eval_mlm_loss")
    same_weights = same_file("model.safetensors", one, other)
    return losses(one) == losses(other) and same_evaluations and same_weights


def same_file(name, one, other):
    """Whether two folders have the same file."""
    return Path(one, name).read_bytes() == Path(other, name).read_bytes()


# ---- fixtures


@pytest.fixture(scope="session")
def unbroken():
    """The output of the run that others are compared with."""
    train("--output", FOLDER / "unbroken")
    return FOLDER / "unbroken"


@pytest.fixture
def unfinished(unbroken, tmp_path):
    """A copy of that run as it was before its model was written, with checkpoints 15 and 20."""
    shutil.copytree(unbroken, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    return tmp_path / "out"


@pytest.fixture(scope="session")
def on_two():
    """Flags and output of an unbroken run of two processes, of a model with dropout."""
    flags = ["--model", MODEL, "--objective", "enhanced"]
    flags += ["--micro_batch_size", 2, "--workers", 2]
    ended = start(*flags, "--output", FOLDER / "on_two", processes=2)
    assert ended.returncode == 0, ended.stderr
    return flags, FOLDER / "on_two"


# ---- the losses


def test_the_method_can_be_copied_alone():
    """The source of five functions runs in an empty module that has torch and F."""
    method = {"torch": torch, "F": F}
    for name in ("whole_word_mask", "bag_of_words", "bow_loss", "term_coverage", "mlm_head"):
        exec(inspect.getsource(getattr(bow_mae, name)), method)
    input_ids = torch.tensor([TOKENIZER("baba keke lodi")["input_ids"]])
    special = torch.arange(200) < 5
    _, chosen = method["whole_word_mask"](input_ids, torch.tensor([[0, 1, 2, 3, 0]]), TOKENIZER)
    lm = AutoModelForMaskedLM.from_config(FAMILIES["BERT"])
    logits = method["mlm_head"](lm, torch.randn(1, 32))
    assert chosen.sum() == 1
    assert method["bag_of_words"](input_ids, special).sum() == 3
    assert method["bow_loss"](logits, input_ids, special) > 0
    assert 0 <= method["term_coverage"](logits, input_ids, special) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bow_loss_and_its_gradient_are_those_of_a_loop(dtype):
    """-1/|T| Σ log softmax, with repeats, special tokens (ids 0 to 2) and a row of these alone."""
    torch.manual_seed(0)
    logits = (torch.randn(5, 50) * 3).to(dtype).requires_grad_()
    input_ids = torch.randint(0, 20, (5, 30))
    input_ids[-1] = torch.randint(0, 3, (30,))
    looped = torch.tensor(0.0)
    for row, ids in zip(logits.float(), input_ids.tolist(), strict=True):
        terms = {token for token in ids if token > 2}
        for term in terms:
            looped = looped - (row[term] - row.exp().sum().log()) / len(terms) / 5
    loss = bow_loss(logits, input_ids, torch.arange(50) < 3)
    torch.testing.assert_close(loss, looped)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (loss, looped))
    torch.testing.assert_close(ours, theirs)


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


def mask(tokenizer, texts, draws=1, ratio=0.3):
    """original_ids, masked ids and chosen positions of texts, each `draws` times."""
    sequences = bow_mae.cut_sequences(texts * draws, tokenizer, 512)
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad([torch.tensor(ids) for ids, _ in sequences], batch_first=True)
    word_ids = pad([torch.tensor(ids) for _, ids in sequences], batch_first=True)
    generator = torch.Generator().manual_seed(0)
    return input_ids, *bow_mae.whole_word_mask(input_ids, word_ids, tokenizer, ratio, generator)


def test_30_percent_of_the_words_are_masked_80_10_10_and_no_special_token():
    """In 200 draws over 200 words of one to three pieces and 9 unknown ones."""
    tokenizer = word_tokenizer([*WORDS, *(f"##{word}" for word in WORDS)])
    rng = random.Random(0)
    words = ["xx"] * 9
    for _ in range(200):
        words.append("".join(rng.choices(WORDS, k=rng.randint(1, 3))))
    text = " ".join(words)
    input_ids, masked_ids, chosen = mask(tokenizer, [text], draws=200)
    word_ids = tokenizer(text).word_ids()
    first = [word_ids.index(number) for number in range(209)]  # token of each word
    assert chosen[:, first].sum(1).tolist() == [60] * 200
    assert torch.equal(masked_ids[~chosen], input_ids[~chosen])
    before, after = input_ids[chosen], masked_ids[chosen]
    becomes_mask, stays = after == tokenizer.mask_token_id, after == before
    assert becomes_mask.sum().item() == pytest.approx(0.8 * len(after), rel=0.01)
    assert stays.sum().item() == pytest.approx(0.1 * len(after), rel=0.1)
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(before, special).any()
    assert not torch.isin(after[~becomes_mask], special).any()


def test_at_least_one_word_of_each_sequence_is_masked():
    texts = [WORDS[0], " ".join(WORDS[:9])]
    assert mask(TOKENIZER, texts, ratio=0.001)[2].sum(1).tolist() == [1, 1]


SPLIT, END = BertPreTokenizer(), {"end_of_word_suffix": "</w>"}
OPTIONS = {"vocab_size": 140, "special_tokens": [*TOKENS.values()]}
BYTES = OPTIONS | {"vocab_size": 360, "initial_alphabet": ByteLevel.alphabet()}
UNK = {"unk_token": "[UNK]"}
TOKENIZERS = {  # model, what splits words, trainer
    "WordPiece": (models.WordPiece(**UNK), SPLIT, trainers.WordPieceTrainer(**OPTIONS)),
    "SentencePiece": (models.Unigram(), Metaspace(), trainers.UnigramTrainer(**OPTIONS, **UNK)),
    "BPE of bytes": (models.BPE(), ByteLevel(add_prefix_space=False), trainers.BpeTrainer(**BYTES)),
    "BPE, </w>": (models.BPE(**UNK, **END), SPLIT, trainers.BpeTrainer(**OPTIONS, **END)),
}


def trained_tokenizer(kind, texts):
    """A tokenizer of a kind, with [CLS] and [SEP], whose vocabulary is learnt from texts."""
    model, splitter, trainer = TOKENIZERS[kind]
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = splitter
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokens_of_a_word_are_masked_together(kind):
    """By any tokenizer: over 400 draws, neighbours in a word are chosen alike, others are not."""
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
    assert shares.mean().item() == pytest.approx(0.3, abs=0.05)
    assert shares.max() < 0.6


# ---- the model

IDS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3}
DISTIL = {"vocab_size": 200, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
FAMILIES = {
    "BERT": transformers.BertConfig(**SIZES),
    "RoBERTa": transformers.RobertaConfig(**SIZES),
    "XLM-R": transformers.XLMRobertaConfig(**SIZES),
    "DistilBERT": transformers.DistilBertConfig(**DISTIL),
    "ModernBERT": transformers.ModernBertConfig(**SIZES, **IDS, sep_token_id=3),
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
    return BowMAE(lm, special_ids(TOKENIZER, 200), objective, 32).eval()


def test_the_losses_are_those_of_the_logits_of_transformers():
    """Of the masked text: at the masked positions, and at [CLS] for the unmasked words."""
    model = random_model("bow")
    sequences = bow_mae.cut_sequences(make_texts(8), TOKENIZER, 32)
    batch = bow_mae.collate(sequences, TOKENIZER, 0.3, seed=0)
    positions, original_ids = batch["masked_positions"], batch["original_ids"]
    labels = torch.full_like(original_ids, -100)
    labels.view(-1)[positions] = original_ids.view(-1)[positions]
    mask = batch["attention_mask"]  # some texts are padded
    theirs = model.lm(batch["input_ids"], attention_mask=mask, labels=labels)
    expected = bow_loss(theirs.logits[:, 0], original_ids, model.special)
    losses = model(**batch)
    torch.testing.assert_close(losses, {"mlm_loss": theirs.loss, "bow_loss": expected})


def test_bow_adds_no_parameter_and_enhanced_does():
    mlm, bow, enhanced = map(random_model, ("mlm", "bow", "enhanced"))
    counts = [len(list(model.parameters())) for model in (mlm, bow, enhanced)]
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


def write_parts(folder, texts, count, kind="txt"):
    """Write texts into so many files of a folder, or as a saved dataset; returns the folder."""
    folder.mkdir()
    for index in range(count):
        path, part = folder / f"part-{index:03}.{kind}", texts[index::count]
        table = datasets.Dataset.from_dict({"text": part})
        if kind == "txt":
            path.write_text("\n".join(part) + "\n")
        elif kind == "parquet":
            table.to_parquet(path, batch_size=250)
        else:
            table.save_to_disk(folder)
    return folder


def data_config(data, num_shards, micro_batch_size=4, **flags):
    """A configuration for so many shards."""
    flags |= {"batch_size": num_shards * micro_batch_size, "micro_batch_size": micro_batch_size}
    return Config(data=str(data), max_length=64, **flags)


def make_stream(config, shards, state=None, held_out_share=0.0):
    """The stream of some shards, perhaps from a state on."""
    files = bow_mae.list_files(config.data)
    return PretrainingStream(config, TOKENIZER, files, held_out_share, shards, state or {})


def read_epochs(config, count=1, held_out_share=0.0):
    """For each of the first epochs the texts of all shards."""
    found = [[] for _ in range(count)]
    for shard in range(config.num_shards):
        for info, batch in make_stream(config, [shard], held_out_share=held_out_share):
            epoch = info["resume_point"][0]
            if epoch == count:
                break
            found[epoch] += TOKENIZER.batch_decode(batch["original_ids"], skip_special_tokens=True)
    return found


def read_texts(data, num_shards=2, **flags):
    """The texts of one epoch of --data, sorted."""
    return sorted(read_epochs(data_config(data, num_shards, **flags))[0])


@pytest.mark.parametrize("count, kind", [(1, "txt"), (8, "txt"), (3, "parquet"), (41, "parquet")])
def test_each_text_once_in_each_epoch(count, kind, tmp_path):
    """Of one file, of as many as the 8 shards, of fewer, and of more."""
    config = data_config(write_parts(tmp_path / "data", TEXTS, count, kind), 8)
    first, second = read_epochs(config, 2)
    assert sorted(first) == sorted(TEXTS) == sorted(second)
    assert first != second


def test_a_shard_reads_its_own_files_and_row_groups_alone(tmp_path, monkeypatch):
    """Of 4 shards, each opens its own of 11 files, and reads its own of a file's 12 row groups."""
    opened, open_file = [], open

    def noted(file, *arguments):
        opened.append(file)
        return open_file(file, *arguments)

    monkeypatch.setattr(bow_mae, "open", noted, raising=False)
    parts = [TEXTS[index::11] for index in range(11)]
    row_groups = [TEXTS[start : start + 250] for start in range(0, 3000, 250)]
    for kind, count, pieces in (("txt", 11, parts), ("parquet", 1, row_groups)):
        config = data_config(write_parts(tmp_path / kind, TEXTS, count, kind), 4)
        files = bow_mae.list_files(config.data)
        for shard in range(4):
            read = [text for _, text in bow_mae.read_texts(config, files, shard, 4)]
            assert read == list(itertools.chain(*pieces[shard::4]))
        assert kind == "parquet" or sorted(opened) == files  # each file once


def test_the_order_of_files_is_another_in_each_epoch(tmp_path):
    """So that a folder of Wikipedia and books does not end on books in every epoch."""
    config = data_config(write_parts(tmp_path / "data", TEXTS[:12], 12), 1)
    files = bow_mae.list_files(config.data)
    epochs = [bow_mae.read_texts(config, files, epoch=epoch) for epoch in range(4)]
    orders = [[text for _, text in epoch] for epoch in epochs]
    assert len(set(map(tuple, orders))) == 4
    assert {len(set(order)) for order in orders} == {12}


@pytest.mark.parametrize("count, kind", [(3, "txt"), (3, "parquet"), (1, "saved")])
def test_a_stream_resumes_at_every_step(count, kind, tmp_path, monkeypatch):
    """Each time from where a resumed one stood, over three epochs of a few buffers."""
    monkeypatch.setattr(bow_mae, "BUFFER_TEXTS", 20)
    config = data_config(write_parts(tmp_path / "data", TEXTS[:90], count, kind), 2, 8)
    expected = list(itertools.islice(make_stream(config, range(2)), 2 * 26))
    state = {"step": 0, "resume_points": {}}
    for step in range(26):
        stream = make_stream(config, range(2), state)
        for (info, batch), (_, other) in zip(stream, expected[2 * step :][:2], strict=False):
            assert torch.equal(batch["input_ids"], other["input_ids"])
            state["resume_points"][info["shard"]] = info["resume_point"]
        state["step"] += 1
    assert expected[-1][0]["resume_point"][0] >= 3


def test_held_out_texts_are_not_trained_on(tmp_path):
    config = data_config(write_parts(tmp_path / "data", TEXTS, 1), 1)
    sample, share = bow_mae.sample_texts(config, bow_mae.list_files(config.data))
    held_out = [text for text in TEXTS if bow_mae.text_hash(text) < share]
    assert sample == TEXTS and share == 100 / 3000 and 70 < len(held_out) < 130
    (seen,) = read_epochs(config, held_out_share=share)
    assert sorted(seen) == sorted(set(TEXTS) - set(held_out))


def test_long_texts_are_cut_into_sequences_that_give_them_back():
    """Texts without a word are left out."""
    text = " ".join(WORDS)
    sequences = bow_mae.cut_sequences(["", text, "unknown words"], TOKENIZER, 16)
    token_ids, word_ids = zip(*sequences, strict=True)
    assert {(row[0], row[-1]) for row in token_ids} == {(2, 3)}  # [CLS], [SEP]
    assert [len(row) for row in token_ids] == [16] * 7 + [4]
    assert word_ids[1] == [0, *range(1, 15), 0]
    joined = itertools.chain.from_iterable(row[1:-1] for row in token_ids)
    assert list(joined) == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_book_does_not_fill_a_buffer(monkeypatch):
    """A text longer than a buffer is cut, and loses nothing but the whole of a word at the cut."""
    monkeypatch.setattr(bow_mae, "BUFFER_CHARACTERS", 5000)
    stream = PretrainingStream(Config(), TOKENIZER, [], 0.0, [0], {})
    book = " ".join(TEXTS)[:12_000]
    long_texts = enumerate(["a" * 4000, "b" * 4000, book])
    first, second = (texts for texts, _ in stream.read_buffers(long_texts))
    assert len(first) == 2
    assert second == [book[:5000], book[5000:10_000], book[10_000:]]


def write_formats(root, texts):
    """The same texts in each format: a list of --data."""
    rows = [{"number": i, "text": text} for i, text in enumerate(texts)]
    lines = [json.dumps(row) + "\n" for row in rows]
    for name, content in {
        "a.jsonl": ["\n", *lines, "\n"],  # with blank lines
        "lines.json": lines,
        "a.txt": [f"{text}\n" for text in texts],
        "a.tsv": [f"{i}\t{text}\n" for i, text in enumerate(texts)],
        "a.csv": ["number,text\n", *(f'{i},"{text}"\n' for i, text in enumerate(texts))],
        "beir/corpus.jsonl": lines,
        "beir/queries.jsonl": ['{"text": "ba"}\n'],
        "folder/train-1.jsonl": lines[:9],
        "folder/train-2.jsonl": lines[9:],
        "folder/train-3.jsonl": [],  # as Spark writes
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes("".join(content).encode())
        if name.startswith("a."):
            (root / f"{name}.gz").write_bytes(gzip.compress((root / name).read_bytes()))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(root / "a.parquet")
    table.save_to_disk(root / "saved")
    splits = {"test": table.select(range(3)), "train": table}
    datasets.DatasetDict(splits).save_to_disk(root / "saved_splits")
    return [*root.iterdir(), root / "folder" / "train*"]


def test_every_format_gives_the_same_texts(tmp_path):
    """Words that pandas takes for missing values among them, no text, and a carriage return."""
    texts = [*make_texts(40, longest=10), "na", "1", "null", "", "baba\rkeke"]
    found = {data.name: read_texts(data) for data in write_formats(tmp_path, texts)}
    expected = sorted([*texts[:-2], "baba keke"])
    assert len(found) == 15
    assert [name for name in found if found[name] != expected] == []


def test_what_is_no_training_data_is_left_out(unbroken, tmp_path, capfd):
    """Other splits, hidden files, links to folders, and what a run of ours has left: counted."""
    for name in ("a.jsonl", "deep/B.JSONL", "deep/TEST.jsonl", ".hidden.jsonl"):
        write_jsonl(tmp_path / name, make_texts(5))
    shutil.copytree(unbroken, tmp_path / "out")
    (tmp_path / "link.jsonl").symlink_to("nowhere")
    (tmp_path / "deep/folder").symlink_to(FOLDER)
    names = [str(tmp_path / name) for name in ("a.jsonl", "deep/B.JSONL")]
    assert bow_mae.list_files(str(tmp_path)) == names
    others = 4 + sum(path.is_file() for path in unbroken.rglob("*"))
    assert f"2 files are read; {others} are not (empty, hidden," in capfd.readouterr().out


def test_files_without_a_record_do_not_end_a_run(tmp_path):
    """Two of four, so that in some epochs a shard has only those."""
    data = write_parts(tmp_path / "data", make_texts(40, longest=5), 2, "csv")
    for name in ("y.csv", "z.csv"):
        (data / name).write_text("text\n")
    stream = make_stream(data_config(data, 2), [0, 1])
    infos = [info for info, _ in itertools.islice(stream, 60)]
    assert infos[-1]["resume_point"][0] > 2


@pytest.mark.parametrize("first", [[], [None] * 9], ids=["empty", "only nulls"])
def test_the_first_file_may_have_no_text(first, tmp_path):
    texts = make_texts(30, longest=10)
    data = write_parts(tmp_path / "data", texts, 1, "parquet")
    datasets.Dataset.from_dict({"text": first}).to_parquet(data / "a.parquet")
    assert read_texts(data, num_shards=1) == sorted(texts)


def test_a_parquet_file_without_the_column_is_refused(tmp_path):
    data = write_parts(tmp_path / "data", TEXTS[:9], 1, "parquet")
    datasets.Dataset.from_dict({"content": TEXTS[9:]}).to_parquet(data / "b.parquet")
    with pytest.raises(bow_mae.UserError, match="b.parquet has the columns .'content'., not text"):
        read_texts(data)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_columns_that_are_not_read_may_hold_anything(kind, tmp_path, capfd):
    """Even beyond the first rows or file, from which a reader of tables would learn their types."""
    texts, data = make_texts(3000, longest=3), tmp_path / f"a.{kind}"
    if kind == "jsonl":
        others = [None] * 2000 + [{"a": [i]} for i in range(1000)]
        pairs = zip(texts, others, strict=True)
        write_jsonl(data, [{"text": text, "other": other} for text, other in pairs])
    elif kind == "csv":
        lines = [f"{i if i < 2000 else '?'},{text}\n" for i, text in enumerate(texts)]
        data.write_text("other,text\n" + "".join(lines))
    else:
        data.mkdir()
        years = pa.array([2**58] * 1500, pa.timestamp("us"))  # beyond Python's dates
        for start, others in ((0, years), (1500, ["x"] * 1500)):
            table = pa.table({"text": texts[start : start + 1500], "other": others})
            pa.parquet.write_table(table, data / f"{start}.parquet")
    assert read_texts(data) == sorted(texts)
    config = Config(data=str(data))
    assert len(bow_mae.sample_texts(config, bow_mae.list_files(config.data))[0]) == 3000
    assert "columns that --text_columns leaves out: other\n" in capfd.readouterr().out


def test_text_columns_are_joined_and_may_be_null(tmp_path):
    """Half a surrogate pair in them is no text, so it is unknown."""
    pairs = [("ba", "ke di"), (None, "lo"), ("", "mu"), ("gal", None), (None, None)]
    pairs.append(("ke", "\ud83d"))
    rows = [{"title": title, "text": text} for title, text in pairs] + [{"text": "ven"}]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    found = read_texts(data, text_columns=["title", "text"])
    assert found == ["ba ke di", "gal", "ke", "lo", "mu", "ven"]


def test_a_hub_name_is_streamed(monkeypatch):
    calls = set()

    def load_dataset(path, name=None, *, split=None, streaming=False):
        calls.add((path, name, split, streaming))
        return datasets.Dataset.from_dict({"text": ["ba ke", "di lo"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for data in ("a/b", "a/b:c:test"):
        assert read_texts(data) == ["ba ke", "di lo"]
    assert calls == {("a/b", None, "train", True), ("a/b", "c", "test", True)}


def test_docstrings_are_split_into_query_and_text(tmp_path, monkeypatch):
    """One without a text is left out, and a file that Python cannot parse."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "spoons").mkdir()
    for name, code in {
        "__init__": '"""Spoons of  all\nkinds.\n\nThey hold soup."""',
        "big": 'class Ladle:\n  """No."""\n  def fill(self):\n    """Fill it.\n\n    With soup."""',
        "bad": "def broken(:",
    }.items():
        (tmp_path / f"spoons/{name}.py").write_text(code)
    spoons = {"_id": "spoons", "query": "Spoons of all kinds.", "text": "They hold soup."}
    fill = {"_id": "spoons.big.Ladle.fill", "query": "Fill it.", "text": "With soup."}
    assert list(bow_mae.docstrings({"spoons": "1.0"})) == [spoons, fill]


# ---- the vocabulary of a fresh model


def learn(texts):
    """The tokenizer of `tiny` on texts."""
    return bow_mae.learn_tokenizer(Config(model="tiny", max_length=64), texts)


MARKED = ["में मैं म के को क", "น้ำ นำ ไม่ ไม", "ma má mà mạ mã", "か が は ば ぱ"]


@pytest.mark.parametrize("words", MARKED)
def test_words_that_differ_in_a_mark_differ_in_tokens(words, tmp_path):
    learn([words] * 50).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    found = {tuple(tokenizer.tokenize(word)) for word in words.split()}
    assert len(found) == len(words.split())
    assert tokenizer.unk_token not in tokenizer.tokenize(words)


def test_the_vocabulary_grows_with_the_alphabet():
    """Of 3,000 Chinese characters each is known, though `tiny` has nominally 2,048 tokens."""
    characters = [chr(0x4E00 + i) for i in range(3000)]
    texts = ["".join(characters[i : i + 50]) for i in range(0, 3000, 50)]
    tokenizer = learn(texts)
    unknown = sum(tokenizer(text)["input_ids"].count(tokenizer.unk_token_id) for text in texts)
    assert unknown < 0.01 * 3000 and len(tokenizer) >= 3000


def test_a_word_of_many_letters_does_not_hold_up_the_vocabulary():
    """As base64 in data: a trainer that is given it takes hours."""
    assert len(learn([*make_texts(100), "abcdefghijkmlnop" * 60_000])) > 50


# ---- defaults, schedules and logs

EVALUATED = "step eval_mlm_loss eval_bow_loss eval_term_coverage"


def config_of(*flags):
    """The configuration of a command line, with what was not given filled in."""
    config = bow_mae.parse_config([*map(str, flags)], Config)
    bow_mae.complete_config(config)
    return config


PAPER = {"lr": 3e-4, "max_length": 144, "batch_size": 256, "adam_beta2": 0.999, "warmup_steps": 50}
SHORT = bow_mae.FRESH_DEFAULTS | {"steps": 1000, "warmup_steps": 50}


@pytest.mark.parametrize("kind, expected", [("some/folder", PAPER), ("tiny", SHORT)])
def test_a_pretrained_model_gets_the_papers_defaults_a_fresh_one_the_short_runs(kind, expected):
    config = dataclasses.asdict(config_of("--model", kind, "--steps", 1000))
    assert {name: config[name] for name in expected} == expected
    assert (config["bow_weight"], config["bow_weight_final"]) == (1.0, 0.1)


def test_a_run_says_what_was_filled_in_and_ends_with_a_table(tmp_path, capfd):
    run_here(bow_mae.main, "--data", CORPUS, "--output", tmp_path, "--steps", 2)
    shown = capfd.readouterr().out
    assert "--lr 0.002" in shown and "--warmup_steps 0" in shown and "--steps 2" not in shown
    assert "2 steps of 2 x 32 sequences" in shown and "1 process" in shown
    *_, header, before, after, saved = shown.splitlines()
    for line, row in zip((before, after), records(tmp_path, "eval_mlm_loss"), strict=True):
        assert line.split()[1:] == [f"{row[name]:.4f}" for name in header.split()[1:]]


def test_learning_rate_and_bow_weight_follow_the_cosine(unbroken):
    """A peak of 2e-3 at step 4, 2e-4 at step 20; λ from 1 to 0.1; the loss is mlm + λ·bow."""
    rows = {row["step"]: row for row in records(unbroken, "lr")}
    up, down = 1 + math.sqrt(0.5), 1 - math.sqrt(0.5)  # 1 + cos at a quarter and three quarters
    rates = {1: 5e-4, 2: 1e-3, 4: 2e-3, 8: 2e-4 + 9e-4 * up, 12: 1.1e-3}
    rates |= {16: 2e-4 + 9e-4 * down, 20: 2e-4}
    weights = {5: 0.1 + 0.45 * up, 10: 0.55, 15: 0.1 + 0.45 * down, 20: 0.1}
    assert {step: rows[step]["lr"] for step in rates} == pytest.approx(rates)
    assert {step: rows[step]["bow_weight"] for step in weights} == pytest.approx(weights)
    weighted = [row["mlm_loss"] + row["bow_weight"] * row["bow_loss"] for row in rows.values()]
    assert [row["loss"] for row in rows.values()] == pytest.approx(weighted, rel=1e-5)


def test_a_step_is_the_mean_of_the_means_of_its_micro_batches(unbroken):
    """The losses of the first step are those of its two micro-batches, computed by hand."""
    config = config_of(*SMALL)
    files = bow_mae.list_files(config.data)
    texts, share = bow_mae.sample_texts(config, files)
    tokenizer, model = bow_mae.prepare_model(config, None, texts, torch.device("cpu"))
    stream = PretrainingStream(config, tokenizer, files, share, range(2), {})
    one, other = (model(**batch) for _, batch in itertools.islice(stream, 2))
    for name in ("mlm_loss", "bow_loss"):
        expected = (one[name].item() + other[name].item()) / 2
        assert losses(unbroken)[1][name] == pytest.approx(expected, rel=1e-5)


def test_metrics_has_the_documented_fields(unbroken):
    fields = "step epoch loss mlm_loss bow_loss bow_weight lr grad_norm tokens_per_second "
    fields += "padding_share data_wait_share peak_memory_mb"
    for rows, steps, names in [
        (records(unbroken, "loss"), list(range(1, 21)), fields),
        (records(unbroken, "eval_mlm_loss"), [0, 10, 20], EVALUATED),
    ]:
        assert [row["step"] for row in rows] == steps
        assert all(row.keys() == set(names.split()) for row in rows)
    value = losses(unbroken)[1]["mlm_loss"]
    assert torch.tensor(value, dtype=torch.float32).item() == value  # with all its digits


def test_evaluation_is_that_of_a_loop(unbroken):
    """Held-out losses and coverage of the saved model, one sequence at a time."""
    config = config_of(*SMALL)
    texts, share = bow_mae.sample_texts(config, bow_mae.list_files(config.data))
    tokenizer = AutoTokenizer.from_pretrained(unbroken)
    lm = AutoModelForMaskedLM.from_pretrained(unbroken)
    special = special_ids(tokenizer, len(tokenizer))
    sums = {"eval_mlm_loss": [], "eval_bow_loss": [], "eval_term_coverage": []}
    for batch in bow_mae.held_out_batches(config, tokenizer, texts, share):
        is_masked = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        is_masked.view(-1)[batch["masked_positions"]] = True
        for i, length in enumerate((batch["original_ids"] != tokenizer.pad_token_id).sum(1)):
            original, own = batch["original_ids"][i : i + 1, :length], is_masked[i, :length]
            with torch.no_grad():
                logits = lm(batch["input_ids"][i : i + 1, :length]).logits
                unmasked = lm(original).logits[:, 0]
            mlm = F.cross_entropy(logits[0, own], original[0, own], reduction="none")
            sums["eval_mlm_loss"] += mlm.tolist()
            sums["eval_bow_loss"].append(bow_loss(logits[:, 0], original, special).item())
            sums["eval_term_coverage"] += term_coverage(unmasked, original, special).tolist()
    found = records(unbroken, "eval_mlm_loss")[-1]
    means = {name: np.mean(values) for name, values in sums.items()}
    assert found == pytest.approx({"step": 20} | means, rel=1e-4)


# ---- processes, workers, precision


def test_two_processes_give_the_losses_of_one(on_two, tmp_path):
    """Of a model with dropout, whose draws do not depend on the process."""
    flags, output = on_two
    train(*flags, "--workers", 0, "--output", tmp_path)
    assert close(tmp_path, output)


def test_items_are_fetched_ahead_in_order_and_none_is_lost():
    items = iter(range(9))
    fetched = bow_mae.fetch_ahead(items, 4)
    assert [next(fetched) for _ in range(3)] == [0, 1, 2]
    fetched.close()
    assert next(items) >= 3


def test_the_corpus_is_built_before_workers_start(tmp_path):
    """With two processes, a worker each, and an empty cache."""
    flags = ["--data", "python-docs", "--model", MODEL, "--workers", 1, "--steps", 5]
    options = {"before": "bow_mae.PACKAGES = 'huggingface_hub'", "processes": 2}
    options["env"] = {"HF_DATASETS_CACHE": str(tmp_path)}
    ended = start(*flags, "--output", tmp_path / "out", **options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("building the corpus") == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_in_half_precision_are_near_those_in_float32(precision, unbroken, tmp_path):
    """To 1 part in 1000 at the first step; then fp16 skips steps while its scale is too high."""
    train("--output", tmp_path, "--precision", precision)
    assert losses(tmp_path)[1] == pytest.approx(losses(unbroken)[1], rel=1e-3)
    assert close(tmp_path, unbroken, 0.1)
    assert losses(tmp_path) != losses(unbroken)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_gives_the_same_loss(tmp_path, monkeypatch):
    """Of one layer and in one short step, as compiling takes long."""
    monkeypatch.setitem(bow_mae.FRESH_MODELS, "tiny", (1, 64, 2048))
    one_layer = "bow_mae.FRESH_MODELS['tiny'] = (1, 64, 2048)"
    flags = ["--objective", "mlm", "--batch_size", 4, "--steps", 1, "--warmup_steps", 0]
    train(*flags, "--output", tmp_path / "plain")
    flags += ["--compile", "True", "--output", tmp_path / "compiled"]
    ended = start(*flags, before=one_layer)
    assert ended.returncode == 0, ended.stderr
    assert close(tmp_path / "compiled", tmp_path / "plain")


def test_bench_compares_the_costs_of_the_objectives(tmp_path):
    ended = start("--bench", "True", "--output", tmp_path / "out", processes=2)
    assert ended.returncode == 0, ended.stderr
    rows = [line.replace(",", "").split() for line in ended.stdout.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["mlm", "bow", "enhanced"]
    for row in rows:
        samples, tokens, ratio, least, most, _ = map(float, row[1:])
        assert 0 < least <= ratio <= most and samples < tokens
    assert rows[0][3:6] == ["1.0000"] * 3
    assert not (tmp_path / "out").exists()


# ---- stopping and resuming


def test_resume_after_kill_is_exact(unbroken, tmp_path):
    """SIGKILL at four moments, each further on the way that the run killed before has begun."""
    flags = ["--output", tmp_path, "--workers", 1]
    for event, name, count in [
        ("open", "metrics.jsonl", 10),  # between steps 5 and 10
        ("open", ".checkpoint.tmp/modules.json", 1),  # while a checkpoint is written
        ("os.rename", "checkpoint-", 1),  # after that, before it has its name
        ("shutil.copyfile", "model.safetensors", 1),  # while the model takes its place
    ]:
        ended = start(*flags, before=signal_at(signal.SIGKILL, event, name, count))
        assert ended.returncode == -signal.SIGKILL, (event, name, ended.stderr)
        assert not (tmp_path / "model.safetensors").exists()
    train(*flags)
    assert same_run(tmp_path, unbroken)
    names = sorted(path.name for path in tmp_path.glob("*checkpoint*"))
    assert names == ["checkpoint-15", "checkpoint-20"]  # the newest are kept


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resume_after_a_signal_is_exact(number, unbroken, tmp_path, capfd):
    """It saves at the next log step, and says so."""
    flags = ["--output", tmp_path, "--workers", 1]
    ended = start(*flags, before=signal_at(number, "open", "metrics.jsonl", 9))
    step = max(losses(tmp_path))
    assert ended.returncode == 128 + number and 5 < step < 10
    assert f"step {step} is saved" in ended.stdout and "Traceback" not in ended.stderr
    train(*flags)
    assert f"resuming from step {step}" in capfd.readouterr().out
    assert same_run(tmp_path, unbroken)


def test_two_processes_stopped_twice_resume_exactly(on_two, tmp_path):
    """By a SIGTERM and by a SIGKILL of one of them."""
    flags = [*on_two[0], "--output", tmp_path]
    for number, count in ((signal.SIGTERM, 9), (signal.SIGKILL, 10)):
        ended = start(*flags, processes=2, before=signal_at(number, "open", "metrics.jsonl", count))
        assert ended.returncode == 1 and not (tmp_path / "model.safetensors").exists()
    ended = start(*flags, processes=2)
    assert ended.returncode == 0 and "resuming from step" in ended.stdout
    assert same_run(tmp_path, on_two[1])


def test_a_run_begun_on_one_process_goes_on_with_two(unbroken, unfinished):
    shutil.rmtree(unfinished / "checkpoint-20")
    ended = start("--output", unfinished, processes=2)
    assert ended.returncode == 0 and "resuming from step 15" in ended.stdout
    assert close(unfinished, unbroken)


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.pt"])
def test_a_damaged_checkpoint_is_named(file, unbroken, unfinished, capfd):
    """Once it is removed the run resumes from the one before."""
    path = unfinished / "checkpoint-20" / file
    os.truncate(path, path.stat().st_size // 2)
    assert "checkpoint-20" in error_of(capfd, train, "--output", unfinished)
    (unfinished / "checkpoint-20").rename(unfinished / "checkpoint-20.bak")
    train("--output", unfinished)
    assert same_run(unfinished, unbroken)
    for checkpoint in unfinished.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert "has a model without checkpoints" in error_of(capfd, train, "--output", unfinished)


def test_a_full_disk_leaves_the_last_checkpoint_whole(unbroken, unfinished):
    """No file may grow beyond 100 kB, less than the model; with room the same command resumes."""
    shutil.rmtree(unfinished / "checkpoint-20")
    before = {path: path.read_bytes() for path in (unfinished / "checkpoint-15").glob("*.*")}
    limit = f"bow_mae.resource.setrlimit({resource.RLIMIT_FSIZE}, (100_000, 100_000))"
    ended = start("--output", unfinished, before=limit)
    assert "checkpoint-20" in one_error(ended.stderr, ended.returncode)
    assert not (unfinished / "checkpoint-20").exists()
    assert len(before) > 5 and all(path.read_bytes() == old for path, old in before.items())
    train("--output", unfinished)
    assert same_run(unfinished, unbroken)


def test_a_finished_run_says_so_and_which_data_has_changed(tmp_path, capfd):
    """It changes nothing."""
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS[:120])
    flags = ["--data", data, "--output", tmp_path / "out", "--steps", 5]
    train(*flags)
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    write_jsonl(data, TEXTS[:121])
    train(*flags)
    told = capfd.readouterr().out
    assert "this run is finished: 5 steps" in told
    assert f"has changed since the checkpoint: {data}\n" in told
    assert "the first texts of --data have changed" in told
    assert same_run(tmp_path / "out", tmp_path / "before")


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The second says who holds it. The lock ends with the process, so a killed run leaves none."""
    flags = ["--output", tmp_path, "--steps", 5]
    with (tmp_path / ".lock").open("w") as file:
        bow_mae.fcntl.lockf(file, bow_mae.fcntl.LOCK_EX)
        print("process 7 on mars", end="", file=file, flush=True)
        ended = start(*flags)
    assert "in use by process 7 on mars" in one_error(ended.stderr, ended.returncode)
    train(*flags)


SPOILT = {"--warmup_steps 4": "loss is nan at", "--steps 1 --warmup_steps 0": "eval_mlm_loss is"}


@pytest.mark.parametrize("flags, message", SPOILT.items())
def test_a_loss_that_is_not_finite_stops_the_run(flags, message, tmp_path, capfd):
    """With its step, and nothing is saved; also where the last step spoilt the weights."""
    flags = ["--output", tmp_path, "--lr", 1e30, *flags.split()]
    assert message in error_of(capfd, train, *flags) and not list(tmp_path.glob("checkpoint-*"))


def test_main_leaves_its_caller_as_it_was(tmp_path):
    """Signal handlers, logging and child processes that are not ours."""

    def state():
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
        return handlers, levels, transformers.logging.is_progress_bar_enabled()

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        before = state()
        train("--output", tmp_path, "--steps", 5, "--workers", 1)
        assert state() == before and child.poll() is None
        child.kill()


# ---- the saved folder


def test_the_folder_says_cls_and_dot_product_to_sentence_transformers(unbroken):
    names = ("modules", "1_Pooling/config", "config_sentence_transformers", "sentence_bert_config")
    modules, pooling, own, transformer = (read_json(unbroken, f"{name}.json") for name in names)
    found = [(module["type"].split(".")[-1], module["path"]) for module in modules]
    assert found == [("Transformer", ""), ("Pooling", "1_Pooling")]
    modes = {name: value for name, value in pooling.items() if name.startswith("pooling_mode")}
    assert modes.pop("pooling_mode_cls_token") is True
    assert list(modes.values()) == [False] * 5
    assert pooling["word_embedding_dimension"] == 128
    assert own["similarity_fn_name"] == "dot" and transformer["max_seq_length"] == 32
    tokenizer = read_json(unbroken, "tokenizer.json")
    assert tokenizer["truncation"] is None and tokenizer["padding"] is None


# ---- bad input

BAD_FLAGS = {  # what the message must say
    "--text_column body": "unknown flag --text_column",
    "--steps ten": "steps",
    "--steps 0": "--steps 0",
    "--lr nan": "--lr nan",
    "--mask_ratio 0": "--mask_ratio",
    "--micro_batch_size 3": "--batch_size 8 is no multiple of --micro_batch_size 3",
    "--warmup_steps 20": "--warmup_steps 20 is not below --steps 20",
    "--data nowhere.jsonl": "nowhere.jsonl: no such file or folder",
    "--data nowhere/*.jsonl": "nowhere/*.jsonl: no such file",
    "--data nobody/nothing": "nobody/nothing",
    "--data models/short": "models/short",
    "--data *.*": "found .jsonl and .txt",
    "--data twice": "good.jsonl twice",
    "--data parent": "give parent/beir, or a glob",
    "--data saved::test": "only a hub dataset has :config:split",
    "--text_columns text boddy": "columns ['text'], not text boddy",
    "--model nobody/nothing": "nobody/nothing",
    "--model models/nothing": "models/nothing: no such folder",
    "--model models/short": "--max_length 32",
    "--model models/headless": "models/headless",
    "--model models/maskless": "[MASK]",
    "--model models/clsless": "[CLS]",
    "--model models/bart": "models/bart",
    "--model models/saved": "models/saved has no tokenizer",
    "--model models/roformer": "models/roformer",
    "--output good.jsonl/out": "good.jsonl",
    "--output models": "models holds other files",
    "--output models/saved": "models/saved holds other files",
    "--batch_size 800": "no text for shard 0 of 200",
}
GOOD = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(120))
BAD_FILES = {  # name, content, what the message must say
    "empty": ("a.jsonl", "", "a.jsonl"),
    "malformed": ("a.jsonl", GOOD + '{"text": "ba ke"\n' + GOOD, "a.jsonl, line 121: Expecting"),
    "number": ("a.jsonl", GOOD + '{"text": 7}\n', "a.jsonl, line 121: [7] in text is not text"),
    "no object": ("a.jsonl", GOOD + "[1, 2]\n", "a.jsonl, line 121"),
    "an array": ("a.json", json.dumps([{"text": "ba"}] * 9, indent=1), "convert it to JSON lines"),
    "no text": ("a.jsonl", GOOD + '{"content": "ba"}\n', "a.jsonl, line 121: no text"),
    "a field too many": ("a.csv", "text\nba\nke,di\n", "a.csv, after line 3: more or fewer"),
    "a field too few": ("a.csv", "id,text\n1,ba\nke\n", "a.csv, after line 3: more or fewer"),
    "latin-1 json": ("a.jsonl", (GOOD + '{"text": "café"}\n').encode("latin-1"), "line 121"),
    "latin-1 text": ("a.txt", "ba ke\ncafé\n".encode("latin-1"), "a.txt, line 2"),
    "no tab": ("a.tsv", "1\tba\n2 ke\n", "a.tsv, line 2"),
    "a header": ("a.tsv", "text\tlabel\nba\t1\n", "a.tsv, line 1: a header"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-200], "a.jsonl.gz"),
    "no parquet": ("a.parquet", GOOD, "arquet"),
    "unknown format": ("a.pdf", GOOD, "a.pdf: found .pdf"),
    "gzipped parquet": ("a.parquet.gz", "PAR1", "a.parquet.gz: found .gz"),
}


@pytest.fixture(scope="session")
def bad_models():
    """Models that cannot be trained."""
    bert = transformers.BertConfig(**SIZES, max_position_embeddings=20)
    lm, good = AutoModelForMaskedLM.from_config(bert), TOKENIZER
    bart = transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=200)
    backend = tokenizers.Tokenizer(models.WordPiece(good.get_vocab(), unk_token="[UNK]"))
    clsless = PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS)
    maskless = PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS | {"mask_token": None})
    for name, model, tokenizer in [
        ("short", lm, good),
        ("headless", lm.base_model, good),
        ("maskless", lm, maskless),
        ("clsless", lm, clsless),
        ("bart", AutoModelForMaskedLM.from_config(bart), good),
        ("roformer", AutoModelForMaskedLM.from_config(transformers.RoFormerConfig(**SIZES)), good),
    ]:
        model.save_pretrained(FOLDER / "models" / name)
        tokenizer.save_pretrained(FOLDER / "models" / name)
    lm.save_pretrained(FOLDER / "models/saved")
    datasets.Dataset.from_dict({"text": ["ba"]}).save_to_disk(FOLDER / "models/saved")
    (FOLDER / "models/saved/run.json").write_text("[]")
    return FOLDER / "models"


@pytest.fixture
def workplace(tmp_path, monkeypatch, bad_models):
    """A current folder with a good corpus, one of another format, and the models above."""
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(GOOD)
    Path("other.txt").write_text("ba ke\n")
    Path("models").symlink_to(bad_models)
    Path("saved").symlink_to(bad_models / "saved")
    Path("twice").mkdir()
    for name in ("a", "b"):
        Path(f"twice/{name}.jsonl").symlink_to(tmp_path / "good.jsonl")
    write_jsonl(Path("parent/beir/corpus.jsonl"), ["ba"])
    return tmp_path


def wrote_nothing():
    """Whether out holds no file but the lock and the logs."""
    names = {path.name for path in Path("out").rglob("*")}
    return names <= {".lock", "run.json", "metrics.jsonl"}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items(), ids=BAD_FLAGS)
def test_a_bad_flag_gives_one_line(flags, message, workplace, capfd):
    flags = ["--data", "good.jsonl", "--output", "out", *flags.split()]
    assert message in error_of(capfd, train, *flags) and wrote_nothing()


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_gives_one_line(name, content, message, workplace, capfd):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in error_of(capfd, train, "--data", name, "--output", "out")
    assert wrote_nothing()


def test_a_small_corpus_trains_and_says_that_nothing_is_held_out(workplace, capfd):
    data = write_jsonl(workplace / "a.jsonl", [*make_texts(20), "", ""])
    train("--data", data, "--output", "out", "--steps", 5)
    shown = capfd.readouterr().out
    assert "nothing is held out" in shown
    assert max(losses("out")) == 5
    assert not records("out", "eval_mlm_loss")


OTHER_FLAGS = {"--lr 0.1": "--lr 0.002, not 0.1", "--seed 1 --objective mlm": "bow, not mlm"}


@pytest.mark.parametrize("flags, message", OTHER_FLAGS.items())
def test_the_folder_of_another_run_is_refused(flags, message, unbroken, capfd):
    before = {path: path.read_bytes() for path in unbroken.rglob("*.*") if path.is_file()}
    flags = ["--output", unbroken, *flags.split()]
    assert message in error_of(capfd, train, *flags)
    assert all(path.read_bytes() == old for path, old in before.items())


def test_two_processes_tell_an_error_once(workplace):
    flags = ["--data", "good.jsonl", "--output", "out", "--batch_size", 12]
    ended = start(*flags, processes=2, cwd=workplace)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode != 0 and len(errors) == 1 and "2 processes" in errors[0]


def test_an_error_of_the_second_process_alone_is_told(workplace):
    """Its shard holds a bad line that the first process does not read, beyond the sample."""
    lines = GOOD.splitlines()
    lines[101] = "{"  # of the second of two shards
    Path("a.jsonl").write_text("\n".join(lines))
    options = {"before": "bow_mae.SAMPLE_TEXTS = 100", "processes": 2, "cwd": workplace}
    ended = start("--data", "a.jsonl", "--output", "out", "--workers", 1, **options)
    assert ended.returncode != 0 and "error: a.jsonl, line 102: " in ended.stderr
    assert "bow_mae.py" not in ended.stderr.split("error: a.jsonl")[0]


def test_a_bug_of_ours_keeps_its_traceback(workplace):
    flags = ["--data", "good.jsonl", "--output", "out"]
    ended = start(*flags, before="bow_mae.cosine = None", cwd=workplace)
    assert ended.returncode == 1 and "TypeError: 'NoneType' object is not callable" in ended.stderr


@pytest.mark.parametrize("given, missing", [("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "RANK")])
def test_a_part_of_what_torchrun_sets_gives_one_line(given, missing, monkeypatch):
    monkeypatch.setenv(given, "3")
    with pytest.raises(bow_mae.UserError, match=f"{missing} is not set"):
        bow_mae.init_distributed()


# ---- learning


def test_bow_teaches_cls_its_words_and_mlm_does_not(tmp_path):
    """Term coverage of held-out texts of random words; the runs differ in the objective alone."""
    data = write_jsonl(tmp_path / "a.jsonl", make_texts(2000, longest=6))
    flags = "--steps 250 --warmup_steps 20 --batch_size 64 --micro_batch_size 64 --lr 2e-3 "
    flags += f"--log_every 250 --save_every 250 --eval_every 250 --data {data}"
    coverage = {}
    for objective in ("bow", "mlm"):
        train("--output", tmp_path / objective, "--objective", objective, *flags.split())
        rows = records(tmp_path / objective, "eval_term_coverage")
        coverage[objective] = [row["eval_term_coverage"] for row in rows]
    assert coverage["bow"][0] == coverage["mlm"][0] < 0.15
    assert coverage["mlm"][1] < 0.35
    assert coverage["bow"][1] > 0.6


# ==== eval_retrieval.py

# ---- helpers and fixtures

PASSAGES = [
    {"_id": f"d{i}", "title": [None, "", "ba"][i % 3], "text": text}
    for i, text in enumerate(make_texts(70, seed=3, longest=12))
]


def write_beir(folder, passages=PASSAGES, num_train=40):
    """A BEIR folder: query i is the first words of passage i; the first are those of train."""
    write_jsonl(folder / "corpus.jsonl", passages)
    queries = [" ".join(passage["text"].split()[:3]) for passage in passages]
    rows = [{"_id": f"q{i}", "text": query} for i, query in enumerate(queries)]
    write_jsonl(folder / "queries.jsonl", rows)
    lines = [f"q{i}\td{i}\t1\n" for i in range(len(passages))]
    (folder / "qrels").mkdir()
    for split, own in (("train", lines[:num_train]), ("test", lines[num_train:])):
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(own))
    return folder


BEIR = write_beir(FOLDER / "beir")
EVALUATE = ["evaluate", "--model", MODEL, "--data", BEIR, "--precision", "fp32", "--output"]
BM25 = ["evaluate", "--model", "bm25", "--data", BEIR, "--output"]


def read_json(*path):
    """The content of a JSON file."""
    return json.loads(Path(*path).read_text())


@pytest.fixture(scope="session")
def evaluated():
    """The output of an evaluation."""
    retrieval(*EVALUATE, FOLDER / "evaluated")
    return FOLDER / "evaluated"


def load(data, split="test"):
    """A task."""
    return eval_retrieval.load_task(RetrievalConfig(data=str(data)), split)


def read_run(output):
    """The ranking that an evaluation wrote."""
    return eval_retrieval.read_run(output / "run.trec")


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
    assert found == pytest.approx(expected)
    assert {*map(type, found.values())} == {float}


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
    expected = {"MRR@10": 0, "nDCG@10": 0, "MAP@1000": (1 / 11 + 2 / 51) / 3, "Hit@10": 0}
    expected |= {"Recall@50": 1 / 3, "Recall@100": 2 / 3, "Recall@1000": 2 / 3, "Hit@50": 1}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    short = evaluate_run(run, qrels, top_k=20)["1"]
    assert short.keys() == {"MRR@10", "nDCG@10", "Hit@1", "Hit@10"}


def test_missing_queries_score_0_and_those_without_a_relevant_passage_are_left_out():
    qrels = {"1": {"a": 1}, "2": {"a": 1}, "3": {"a": 0}, "4": {}}
    found = evaluate_run({"1": {"a": 1.0}, "3": {"a": 1.0}, "5": {"a": 1.0}}, qrels)
    assert found.keys() == {"1", "2"}
    assert set(found["2"].values()) == {0}


def test_at_relevance_level_2_only_ndcg_sees_grade_1():
    run, qrels = {"1": {"a": 2.0, "b": 1.0}}, {"1": {"a": 1, "b": 2}}
    found = evaluate_run(run, qrels, relevance_level=2)["1"]
    gain, ideal = 1 + 2 / math.log2(3), 2 + 1 / math.log2(3)
    expected = {"MRR@10": 1 / 2, "MAP@1000": 1 / 2, "Hit@1": 0, "nDCG@10": gain / ideal}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_answers_are_sought_word_for_word_as_dpr_does():
    text = "In 1969, Neil\nARMSTRONG walked. O\u0301scar won $5."
    yes = ["neil armstrong", "\u00d3scar", "$5", "1969,"]
    no = ["arm", "5 $", "", " ", "Neil walked"]
    assert all(eval_retrieval.has_answer(text, [answer]) for answer in yes)
    assert not any(eval_retrieval.has_answer(text, [answer]) for answer in no)


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


BM25_TERMS = {
    "The cat is in A.B.C. 1,000 don't": ["cat", "a.b.c", "1,000", "don't"],
    "BM25は検索 モデル": ["bm25", "は検", "検索", "モデ", "デル"],
    "字": ["字"],
    "मेरी किताब": ["मेरी", "किताब"],  # vowel signs belong to their word
    "ไปที่": ["ไป", "ปที่"],  # and to their character
    "Cafe\u0301 Caf\u00e9": ["caf\u00e9"] * 2,
}


@pytest.mark.parametrize("text, terms", BM25_TERMS.items())
def test_bm25_terms(text, terms):
    assert sorted(eval_retrieval.bm25_terms(text)) == sorted(terms)


# ---- task


def test_files_are_read_by_content_not_by_name(tmp_path):
    def read(path):
        return [record for _, record in eval_retrieval.read_file(path)]

    rows = [{"a": i, "text": "x" * 50_000} for i in range(4)]
    lines = "\n\n".join(map(json.dumps, rows))
    for text in (lines, json.dumps(rows), json.dumps(rows, indent=4)):
        (tmp_path / "a.json").write_text(text)
        (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(text.encode()))
        assert read(tmp_path / "a.json") == read(tmp_path / "a.tsv.gz") == rows
    (tmp_path / "g").write_text("\na\tb \r c\n\nd\t\n")
    assert [record["_fields"] for record in read(tmp_path / "g")] == [["a", "b \r c"], ["d", ""]]


def test_ms_marco_files(tmp_path):
    """With titles or without."""
    (tmp_path / "collection.tsv").write_text("1\tba ke\tba \rdi\n2\tdi lo\n3\t\n")
    (tmp_path / "queries.dev.tsv").write_text("1\tba ke\n")
    (tmp_path / "qrels.dev.tsv").write_text("1\t0\t2\t1\n")
    task = load(tmp_path, "dev")
    texts = eval_retrieval.passage_texts(task.passages, range(3))
    assert texts == ["ba ke ba \rdi", "di lo", ""]
    assert task.queries == {"1": "ba ke"} and task.qrels == {"1": {"2": 1}}
    assert not task.drop_identical  # query 1 and passage 1 only have the same number


def test_dpr_files(tmp_path):
    (tmp_path / "psgs_w100.tsv").write_text('id\ttext\ttitle\n1\t"a ""b"" c"\tT\n2\td\tU V\n')
    (tmp_path / "nq-test.qa.csv").write_text("who is it\t['b c', \"it's\"]\nwhat\t['d']\n")
    task = load(tmp_path)
    assert eval_retrieval.passage_texts(task.passages, [0, 1]) == ['T a "b" c', "U V d"]
    assert task.queries == {"nq-test:1": "who is it", "nq-test:2": "what"} and not task.qrels
    assert [*task.answers.values()] == [["b c", "it's"], ["d"]]
    flags = ["--model", "bm25", "--data", tmp_path, "--output", tmp_path / "out", "--top_k", 20]
    retrieval("evaluate", *flags)
    metrics = read_json(tmp_path / "out/metrics.json")
    assert metrics == {"AnswerHit@5": 0.0, "AnswerHit@20": 0.0}  # BM25 finds no word
    (tmp_path / "other.trec").write_text("nq-test:1 Q0 gone 1 2 x\nnq-test:2 Q0 2 1 1 x\n")
    retrieval("evaluate", *flags, "--compare", tmp_path / "other.trec")
    assert read_json(tmp_path / "out/compare.json")["AnswerHit@5"]["difference"] == -0.5


BAD_FOLDERS = [  # files of a folder, what the message must say
    ({"collection.tsv": "1\tba\n2 ke\n"}, "collection.tsv, line 2: no text"),
    ({"queries.dev.tsv": "1\tba\tnoun\n"}, "line 1: expected a query id and a text"),
    ({"nq-dev.qa.csv": "", "tqa-dev.qa.csv": ""}, "--split dev may be nq-dev or another"),
]


@pytest.mark.parametrize("files, message", BAD_FOLDERS)
def test_a_bad_folder_gives_one_line(files, message, tmp_path):
    good = {"collection.tsv": "1\tba\n", "queries.dev.tsv": "1\tba\n"}
    good["qrels.dev.tsv"] = "1\t0\t1\t1\n"
    for name, content in (good | files).items():
        (tmp_path / name).write_text(content)
    with pytest.raises(bow_mae.UserError, match=message):
        load(tmp_path, "dev")


def test_hub_names_are_loaded_as_those_of_beir(monkeypatch):
    tables = {
        ("BeIR/x", "corpus", "corpus"): {"_id": ["1"], "title": [None], "text": ["ke"]},
        ("BeIR/x", "queries", "queries"): {"_id": ["2"], "title": [""], "text": ["di"]},
        ("BeIR/x-qrels", None, "test"): {"query-id": [2], "corpus-id": [1], "score": [1.0]},
    }

    def load_dataset(path, name=None, *, split):
        return datasets.Dataset.from_dict(tables[path, name, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load("BeIR/x")
    assert eval_retrieval.passage_texts(task.passages, [0]) == ["ke"]
    assert task.queries == {"2": "di"}
    assert task.qrels == {"2": {"1": 1}}
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
    write_jsonl(data / "queries.jsonl", PASSAGES)  # queries with the ids of passages
    (data / "qrels/test.tsv").write_text("d1\td1\t1\nd2\td3\t1\n")
    flags = ["evaluate", "--model", "bm25", "--data", data]
    retrieval(*flags, "--output", tmp_path / "out")
    found = read_run(tmp_path / "out")
    assert next(iter(found["d1"])) == "d1" and "d2" not in found["d2"]
    assert "1 hits had the id of their query" in capfd.readouterr().out
    retrieval(*flags, "--output", tmp_path / "kept", "--keep_identical_ids")
    assert "d2" in read_run(tmp_path / "kept")["d2"]
    retrieval(*flags, "--output", tmp_path / "out", "--compare", tmp_path / "kept/run.trec")
    compared = read_json(tmp_path / "out/compare.json")
    assert {row["difference"] for row in compared.values()} == {0}  # dropped from both
    retrieval(*flags, "--output", tmp_path / "out")
    assert not (tmp_path / "out/compare.json").exists()  # it was of another ranking


BAD_LINES = [  # file, what is added to it, what the message must say
    ("corpus.jsonl", '{"_id": "d4", "text": ""}', "passage id 'd4' occurs twice"),
    ("corpus.jsonl", "{", "corpus.jsonl, line 71"),
    ("corpus.jsonl", '{"text": "ba"}', "the id '' is empty"),
    ("corpus.jsonl", '{"_id": "a", "contents": "b"}', "corpus.jsonl, line 71: no text"),
    ("corpus.jsonl", '{"_id": "a", "text": ["b"]}', "line 71: text is no text"),
    ("corpus.jsonl", '{"_id": "a b", "text": ""}', "the id 'a b' is empty or has white space"),
    ("queries.jsonl", '{"_id": "q4", "text": ""}', "line 71: query q4 occurs twice"),
    ("queries.jsonl", '{"_id": "a b", "text": "ba"}', "the id 'a b' is empty"),
    (
        "queries.jsonl",
        '{"_id": "a", "text": "", "answers": "b"}',
        "answers must be a list of texts",
    ),
    ("qrels/test.tsv", "q1\td1\t0.7", "test.tsv, line 32: the grade 0.7 is no integer"),
    ("qrels/test.tsv", "q41\td41\t0", "line 32: q41 d41 has another grade"),
    ("qrels/test.tsv", "q1\td1", "test.tsv, line 32: expected query-id"),
]


@pytest.mark.parametrize("name, line, message", BAD_LINES)
def test_a_bad_line_of_a_task_gives_one_line(name, line, message, tmp_path, capfd):
    data = write_beir(tmp_path / "beir")
    with (data / name).open("a") as file:
        file.write(f"{line}\n")
    flags = ["--model", "bm25", "--data", data, "--output", tmp_path / "out"]
    assert message in error_of(capfd, retrieval, "evaluate", *flags)


def test_a_collection_of_titles_alone_is_refused(tmp_path, capfd):
    data = write_beir(tmp_path / "beir")
    write_jsonl(data / "corpus.jsonl", [{"_id": "d1", "title": "ba", "contents": "ba ke"}])
    flags = ["--model", "bm25", "--data", data, "--output", tmp_path / "out"]
    assert "no passage has a text" in error_of(capfd, retrieval, "evaluate", *flags)


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


def our_vectors(folder, texts, **flags):
    """Those of eval_retrieval.py, and its encoder."""
    config = RetrievalConfig(model=folder, max_passage_length=32, precision="fp32", **flags)
    encoder = eval_retrieval.Encoder(config, torch.device("cpu"))
    return encoder.encode(texts, "passages"), encoder


KINDS = [(True, "cls", "dot"), (False, "mean", "cos")]


@pytest.mark.parametrize("has_head, pooling, similarity", KINDS)
def test_vectors_are_those_of_a_plain_loop(has_head, pooling, similarity, tmp_path):
    """With pooling and similarity of the folder, and of flags; padding is put to the right."""
    source = write_model(tmp_path, has_head, pooling, similarity)
    settings = read_json(tmp_path, "tokenizer_config.json") | {"padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = make_texts(99, longest=12)
    for flags in ({}, {"pooling": "mean", "similarity": "dot"}):
        expected = plain_vectors(source, texts, *(flags.values() or (pooling, similarity)))
        np.testing.assert_allclose(our_vectors(source, texts, **flags)[0], expected, atol=1e-5)


POOLINGS = {
    "mean": {"pooling_mode_mean_tokens": True, "include_prompt": True},
    "cls": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    "cls+mean": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
    "max": {"pooling_mode": "max"},
}


def test_pooling_is_what_the_sentence_transformers_files_say(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    for expected, content in POOLINGS.items():
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps(content))
        assert eval_retrieval.saved_pooling(str(tmp_path)) == (expected, "dot")
    module = {"type": "sentence_transformers.models.Pooling", "path": "2_Pooling"}
    write_jsonl(tmp_path / "2_Pooling/config.json", [POOLINGS["cls"]])
    write_jsonl(tmp_path / "modules.json", [[module]])
    write_jsonl(tmp_path / "config_sentence_transformers.json", [{"similarity_fn_name": "cosine"}])
    assert eval_retrieval.saved_pooling(str(tmp_path)) == ("cls", "cos")
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(bow_mae.UserError, match="module Dense is not supported"):
        eval_retrieval.saved_pooling(str(tmp_path))


def test_what_a_folder_asks_for_and_does_not_get_is_told(tmp_path, capfd):
    """Prompts without a prefix, and files of a hub that is out of reach."""
    source, prompts = write_model(tmp_path), {"query": "query: ", "passage": ""}
    settings = read_json(tmp_path, "config_sentence_transformers.json") | {"prompts": prompts}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    our_vectors(source, ["ba"], query_prefix="query: ")
    assert "warning" not in capfd.readouterr().out
    our_vectors(source, ["ba"])
    assert f"give them as prefixes: {prompts}" in capfd.readouterr().out
    assert eval_retrieval.model_file("nobody/nothing", "modules.json") == {}
    assert "modules.json of nobody/nothing is not in the cache" in capfd.readouterr().out


def test_an_evaluation_is_that_of_a_plain_loop(evaluated):
    """With all of its files in agreement."""
    task, found = load(BEIR), read_run(evaluated)
    texts = [f"{passage['title'] or ''} {passage['text']}".strip() for passage in PASSAGES]
    passages = plain_vectors(MODEL, texts, "cls", "dot")
    queries = plain_vectors(MODEL, task.queries.values(), "cls", "dot")
    for query_id, scores in zip(task.queries, queries @ passages.T, strict=True):
        assert found[query_id] == pytest.approx(dict(zip(task.rows, scores, strict=True)), abs=1e-4)
    rows = [json.loads(line) for line in (evaluated / "per_query.jsonl").open()]
    assert {row.pop("query_id"): row for row in rows} == evaluate_run(found, task.qrels)
    means = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    assert read_json(evaluated, "metrics.json") == pytest.approx(means)


def test_prefixes_stand_before_queries_and_passages(tmp_path):
    """A prefix of all passages is the same as a title of all passages."""
    flags = ["evaluate", "--model", MODEL, "--query_prefix", "ba "]
    for title, prefix in (("ke", ""), ("", "ke ")):
        data = write_beir(tmp_path / f"data{title}", [row | {"title": title} for row in PASSAGES])
        own = ["--data", data, "--passage_prefix", prefix, "--output", tmp_path / f"out{title}"]
        retrieval(*flags, *own)
    assert same_file("run.trec", tmp_path / "out", tmp_path / "outke")


def test_finished_vectors_are_used_again(tmp_path, monkeypatch):
    """Of the same model and flags; those of others are removed."""
    encoded, encode = [], eval_retrieval.Encoder.encode

    def counted(self, texts, *arguments):
        encoded.append(len(texts))
        return encode(self, texts, *arguments)

    monkeypatch.setattr(eval_retrieval.Encoder, "encode", counted)
    flags = [*EVALUATE, tmp_path / "out", "--model", write_model(tmp_path / "model")]
    retrieval(*flags)
    (file,) = (tmp_path / "out/vectors/passages").glob("*/0000000016.npy")
    file.unlink()  # as if it had not been finished
    retrieval(*flags)
    assert sum(encoded) == 100 + 16
    retrieval(*flags, "--max_passage_length", 8)
    assert sum(encoded) == 100 + 16 + 70 and not file.parent.exists()
    config = read_json(tmp_path, "model/config.json") | {"hidden_act": "relu"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    retrieval(*flags, "--max_passage_length", 8)
    assert sum(encoded) == 100 + 16 + 70 + 100
    write_model(tmp_path / "model", seed=1)
    retrieval(*flags, "--max_passage_length", 8)
    assert sum(encoded) == 100 + 16 + 70 + 100 + 100


# ---- search


def test_two_processes_give_the_run_file_of_one(evaluated, tmp_path):
    options = {"module": "eval_retrieval", "before": "eval_retrieval.CHUNK_SIZE = 16"}
    ended = start(*EVALUATE, tmp_path, processes=2, **options)
    assert ended.returncode == 0, ended.stderr
    assert same_file("run.trec", tmp_path, evaluated)


LEAST = {"SQfp16": 0.8, "HNSW32": 0.8, "IVF2,Flat": 0.3, "IVF2,PQ4x4": 0.05}


@pytest.mark.parametrize("index, least", LEAST.items())
def test_other_indexes_find_much_of_what_flat_finds(index, least, evaluated, tmp_path):
    retrieval(*EVALUATE, tmp_path, "--index", index, "--top_k", 10)
    flat, rows, shares = read_run(evaluated), load(BEIR).rows, []
    for query, hits in read_run(tmp_path).items():
        assert 0 < len(hits) <= 10 and hits.keys() <= rows.keys()
        best = list(flat[query])[:10]
        shares.append(len(hits.keys() & set(best)) / 10)
    assert np.mean(shares) > least


UNFIT = ["Flot", "LSH", "IDMap,Flat", "PQ7", "IVF71,Flat", "PQ4", "HNSW32,PQ4x4", "PCA32,Flat"]


def test_hnsw_finds_as_many_as_are_asked_for(evaluated, tmp_path):
    """Nearly all 70 passages."""
    retrieval(*EVALUATE, tmp_path, "--index", "HNSW4")
    assert min(map(len, read_run(tmp_path).values())) > 60


def test_a_search_of_few_lists_says_that_passages_are_lacking(tmp_path, capfd):
    retrieval(*EVALUATE, tmp_path, "--index", "IVF8,Flat")
    assert "get fewer than 1000 from --index IVF8,Flat" in capfd.readouterr().out


@pytest.mark.parametrize("index", UNFIT)
def test_an_index_that_cannot_serve_is_refused_before_encoding(index, tmp_path, capfd):
    assert f"--index {index}" in error_of(capfd, retrieval, *EVALUATE, tmp_path, "--index", index)
    assert not (tmp_path / "vectors").exists()


def test_a_corpus_alone_is_indexed_and_searched_with_output_alone(tmp_path, capfd):
    """Data and flags are those of the index; nothing is encoded again but the question."""
    write_jsonl(tmp_path / "data/corpus.jsonl", PASSAGES)
    model = write_model(tmp_path / "model")
    flags = ["--model", model, "--data", tmp_path / "data", "--similarity", "cos"]
    retrieval("index", *flags, "--output", tmp_path / "out")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/vectors/*/*/*")}
    capfd.readouterr()
    search = ["search", PASSAGES[50]["text"], "--output", tmp_path / "out"]
    retrieval(*search)
    lines = capfd.readouterr().out.splitlines()[1:]  # the first tells of the model
    scores = [float(line.split()[0]) for line in lines[::2]]
    assert len(lines) == 20 and scores == sorted(scores, reverse=True) and scores[0] < 1.01
    assert lines[0].split()[1] == "d50" and PASSAGES[50]["text"] in lines[1]
    assert len(files) == 5
    assert all(path.stat().st_mtime_ns == files[path] for path in files)
    write_model(tmp_path / "model", seed=1)
    assert "run `index` again" in error_of(capfd, retrieval, *search)


def test_each_process_and_each_start_finds_the_same_vectors(tmp_path):
    """The cache of the corpus is keyed by pickled code, in which no order may be random."""
    write_jsonl(tmp_path / "data/corpus.jsonl", PASSAGES)
    flags = ["--model", MODEL, "--data", tmp_path / "data"]
    for seed, processes in ((1, 1), (2, 2), (3, 1)):
        env = {"PYTHONHASHSEED": str(seed), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        options = {"module": "eval_retrieval", "processes": processes, "env": env}
        command = ["index", *flags] if seed < 3 else ["search", PASSAGES[50]["text"]]
        ended = start(*command, "--output", tmp_path / "out", **options)
        assert ended.returncode == 0, ended.stderr
    assert "d50" in ended.stdout and len(list(tmp_path.glob("cache/generator/*"))) == 1


def test_results_of_another_model_are_not_overwritten(evaluated, capfd):
    before = (evaluated / "run.trec").read_bytes()
    assert "give another --output" in error_of(capfd, retrieval, *BM25, evaluated)
    assert (evaluated / "run.trec").read_bytes() == before


def test_compare_prints_differences_and_their_p_values(evaluated, tmp_path, capfd):
    """And tells of queries that the run file lacks."""
    retrieval(*BM25, tmp_path, "--compare", evaluated / "run.trec")
    ours, theirs = (read_json(path, "metrics.json") for path in (tmp_path, evaluated))
    found = read_json(tmp_path, "compare.json")
    differences = {name: ours[name] - theirs[name] for name in ours}
    assert {name: found[name]["difference"] for name in found} == pytest.approx(differences)
    assert differences["MRR@10"] > 0.3 and found["MRR@10"]["p"] < 0.001
    retrieval(*BM25, tmp_path, "--compare", tmp_path / "run.trec")
    assert {row["p"] for row in read_json(tmp_path, "compare.json").values()} == {1}
    (tmp_path / "other.trec").write_text("q40 Q0 d40 1 1.0 tag\n")  # of 30 queries
    retrieval(*BM25, tmp_path, "--compare", tmp_path / "other.trec")
    assert "29 queries are not in" in capfd.readouterr().out


def test_explain_prints_the_terms_of_cls(capfd):
    retrieval("explain", "baba keke didi", "--model", MODEL)
    told = capfd.readouterr().out
    tokens = TOKENIZER("baba keke didi", return_tensors="pt")
    logits = AutoModelForMaskedLM.from_pretrained(MODEL)(**tokens).logits[0, 0]
    best = TOKENIZER.convert_ids_to_tokens(logits.topk(3).indices)
    coverage = len({"baba", "keke", "didi"} & {*best}) / 3
    assert f"{coverage:.1%} of the 3 terms" in told and best[0] in told


# ---- fine-tuning

STEPS = ["--batch_size", 8, "--micro_batch_size", 2, "--epochs", 2, "--lr", 1e-3, "--log_every", 1]
STEPS += ["--warmup_steps", 2, "--save_every", 4, "--negatives", 2, "--max_passage_length", 32]
STEPS += ["--precision", "fp32"]


@pytest.fixture(scope="session")
def finetuned():
    """The flags and the output of an unbroken fine-tuning of 10 steps."""
    flags = ["--model", MODEL, "--data", BEIR]
    retrieval("mine", *flags, "--output", FOLDER / "mined", "--depth", 2, 20, "--sample", 5)
    flags = ["finetune", *STEPS, *flags, "--negatives_file", FOLDER / "mined/negatives.jsonl"]
    retrieval(*flags, "--output", FOLDER / "finetuned")
    return flags, FOLDER / "finetuned"


@pytest.fixture(scope="session")
def finetuned_on_two(finetuned):
    """The output of the same on two processes."""
    options = {"module": "eval_retrieval", "processes": 2}
    ended = start(*finetuned[0], "--output", FOLDER / "finetuned_on_two", **options)
    assert ended.returncode == 0, ended.stderr
    return FOLDER / "finetuned_on_two"


def test_the_loss_is_that_of_a_loop_without_known_positives():
    torch.manual_seed(0)
    queries, passages = torch.randn(3, 4), torch.randn(6, 4)
    relevant = torch.zeros(3, 6, dtype=torch.bool)
    relevant[0, 2] = relevant[2, 1] = True
    expected = 0
    for i, query in enumerate(queries):
        scores = [query.dot(passage) / 0.5 for passage in passages]
        others = [score.exp() for j, score in enumerate(scores) if not relevant[i, j]]
        expected -= torch.log(scores[2 * i].exp() / sum(others)) / 3
    loss = eval_retrieval.contrastive_loss(queries, passages, relevant, 0.5)
    torch.testing.assert_close(loss, expected)


def test_cached_gradients_are_those_of_one_big_batch(finetuned, tmp_path, monkeypatch):
    """With dropout on, in a step of four micro-batches."""
    kept, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_and_keep(parameters, norm):
        kept.extend(parameter.grad.clone() for parameter in parameters)
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_keep)
    flags = [*map(str, finetuned[0]), "--steps", "1"]
    retrieval(*flags, "--output", tmp_path)
    config = eval_retrieval.parse_command(flags)[1]
    encoder = eval_retrieval.Encoder(config, torch.device("cpu")).train()
    training = eval_retrieval.load_training_set(config)
    micro_batches, known = eval_retrieval.FinetuningSteps(config, encoder.tokenizer, training)[1]
    pairs = [eval_retrieval.encode_pair(encoder, batch) for batch in micro_batches]
    queries, passages = (torch.cat(vectors) for vectors in zip(*pairs, strict=True))
    loss = eval_retrieval.contrastive_loss(queries, passages, known, 1.0)
    loss.backward()
    assert len(micro_batches) == 4 and encoder.lm.config.hidden_dropout_prob > 0
    assert losses(tmp_path)[1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for cached, parameter in zip(kept, encoder.lm.base_model.parameters(), strict=True):
        assert (cached - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


@pytest.mark.parametrize("size, passes", [(8, 1), (4, 4)])
def test_a_lone_micro_batch_is_encoded_once(size, passes, finetuned, tmp_path, monkeypatch):
    calls, encode = [], eval_retrieval.encode_pair
    monkeypatch.setattr(eval_retrieval, "encode_pair", lambda *a: calls.append(1) or encode(*a))
    flags = [*finetuned[0], "--steps", 1, "--micro_batch_size", size]
    retrieval(*flags, "--output", tmp_path)
    assert len(calls) == passes


def test_fine_tuning_on_two_processes_is_that_on_one(finetuned, finetuned_on_two):
    """In its losses and gradients."""
    one, two = (records(output, "grad_norm") for output in (finetuned[1], finetuned_on_two))
    for name in ("loss", "grad_norm"):
        ours, theirs = ([row[name] for row in rows] for rows in (one, two))
        assert theirs == pytest.approx(ours, rel=1e-4) and len(ours) == 10


def test_fine_tuning_resumes_exactly_after_sigterm(finetuned, finetuned_on_two, tmp_path):
    """Of the first of two processes, and with data-loader processes from there on."""
    flags = [*finetuned[0], "--output", tmp_path]
    options = {"module": "eval_retrieval", "processes": 2}
    stop = signal_at(signal.SIGTERM, "open", "metrics.jsonl", 6)
    ended = start(*flags, **options, before=stop)
    step = max(losses(tmp_path))
    assert ended.returncode == 1 and f"step {step} is saved" in ended.stdout and 4 < step < 8
    ended = start(*flags, "--workers", 1, **options)
    assert ended.returncode == 0 and f"resuming from step {step}" in ended.stdout
    assert same_run(tmp_path, finetuned_on_two)


def test_fine_tuning_does_not_resume_with_another_model_or_data(tmp_path, capfd):
    """In the same files: only their content is another."""
    model, data = tmp_path / "model", write_beir(tmp_path / "data")
    flags = ["finetune", *STEPS, "--steps", 2, "--model", model, "--data", data]
    flags += ["--output", tmp_path / "out"]
    write_model(model)
    retrieval(*flags)
    retrieval(*flags)
    assert "this run is finished: 2 steps" in capfd.readouterr().out
    qrels = data / "qrels/train.tsv"
    content = qrels.read_text()
    qrels.write_text(content + "q1\td2\t1\n")
    assert "with other content of --data, --train_data or" in error_of(capfd, retrieval, *flags)
    qrels.write_text(content)
    corpus = (data / "corpus.jsonl").read_text()
    (data / "corpus.jsonl").write_text(corpus.replace("ba", "ke"))  # of the same size
    assert "with other content of --data, --train_data or" in error_of(capfd, retrieval, *flags)
    (data / "corpus.jsonl").write_text(corpus)
    write_model(model, seed=1)
    assert "with other content of --model" in error_of(capfd, retrieval, *flags)


def make_steps(config, training):
    """The steps of a training set, with a tokenizer that only keeps the texts."""
    return eval_retrieval.FinetuningSteps(config, lambda texts, **_: {"texts": texts}, training)


def test_known_positives_are_no_negatives(tmp_path):
    """Passage x is relevant to a and to b, and comes into their step three times."""
    rows = []
    for query, positive, negative in (("a", "x", "n"), ("b", "x", "n"), ("c", "y", "x")):
        row = {"query": query, "positive_passages": [{"text": positive}]}
        rows.append(row | {"negative_passages": [{"text": negative}]})
    data = str(write_jsonl(tmp_path / "train.jsonl", rows))
    config = RetrievalConfig(train_data=[data], batch_size=3, micro_batch_size=3, negatives=1)
    (batch,), known = make_steps(config, eval_retrieval.load_training_set(config))[1]
    for i, query in enumerate(batch["queries"]["texts"]):
        for j, passage in enumerate(batch["passages"]["texts"]):
            is_own = j == 2 * i  # the positive that the query brings
            is_relevant = passage == "x" and query in ("a", "b")
            assert known[i, j] == (is_relevant and not is_own)


def test_an_epoch_has_each_query_once_with_new_negatives(finetuned):
    config = eval_retrieval.parse_command([*map(str, finetuned[0])])[1]
    training = eval_retrieval.load_training_set(config)
    steps, epochs = make_steps(config, training), [[], []]
    for step in range(1, 11):
        for batch in steps[step][0]:
            epochs[step // 6] += batch["queries"]["texts"]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(training.queries)
    first, second = steps.draw(7, 0), steps.draw(7, 1)
    assert epochs[0] != epochs[1]
    assert first.tolist() != second.tolist()
    assert first[0] == 7 and set(first[1:]) <= set(training.negatives[7])
    assert {len(rows) for rows in training.negatives} == {5}  # --sample 5


def load_training(**flags):
    """The queries of a training set, and the texts of their positives and negatives."""
    training = eval_retrieval.load_training_set(RetrievalConfig(negatives=1, **flags))
    sides = []
    for side in (training.positives, training.negatives):
        sides.append([eval_retrieval.passage_texts(training.passages, rows) for rows in side])
    return training.queries, *sides


def test_negatives_files_are_joined_and_positives_left_out(tmp_path):
    passages = [{"_id": f"d{i}", "text": f"p{i}"} for i in range(9)]
    passages[8]["text"] = "p1"  # the positive of q1, with another id
    data = write_beir(tmp_path / "beir", passages, num_train=3)
    rows = [{"query_id": "q1", "negatives": ["d1", "d4"]}]
    one, two = write_jsonl(tmp_path / "one.jsonl", rows), tmp_path / "two.tsv"
    two.write_text("q1\td5\nq1\td6\nq1\td8\nq2\td2\n")
    _, positives, negatives = load_training(data=str(data), negatives_file=[str(one), str(two)])
    assert positives == [["p0"], ["p1"], ["p2"]]
    assert negatives == [[], ["p4", "p5", "p6"], []]


def test_training_files_of_tevatron_and_dpr_are_joined_by_question(tmp_path, capfd):
    """The same passage, by id or else by text, is a positive of a query wherever it stands."""
    tevatron = {"query": "a", "positive_passages": [{"docid": "1", "title": "T", "text": "x"}]}
    tevatron["negative_passages"] = [{"docid": "1", "text": "X"}, {"docid": "2", "text": "y"}]
    tevatron["negative_passages"].append({"docid": "3", "title": "T", "text": "x"})
    empty = {"query": "none", "positive_passages": [], "negative_passages": [{"text": "x"}]}
    dpr = {"question": "a", "positive_ctxs": [{"title": "", "text": "same"}]}
    dpr["hard_negative_ctxs"] = [{"text": "same"}, {"psg_id": 1, "text": "x"}, {"text": "z \ud83d"}]
    one, two = write_jsonl(tmp_path / "one.json", [tevatron, empty]), tmp_path / "two.json.gz"
    two.write_bytes(gzip.compress(json.dumps([dpr], indent=4).encode()))
    queries, positives, negatives = load_training(train_data=[str(one), str(two)])
    assert queries == ["a"] and positives == [["T x", "same"]] and negatives == [["y", "z ?"]]
    assert "1 queries have no positive" in capfd.readouterr().out


def test_equal_questions_stay_apart_and_share_their_positives(tmp_path):
    """Each brings its own passage, which is no negative of the others."""
    rows = []
    for i in range(3):
        row = {"query_id": i, "query": "ke", "positive_passages": [{"docid": i, "text": f"ba {i}"}]}
        others = [{"docid": other, "text": f"ba {other}"} for other in (0, 1, 2, 3) if other != i]
        rows.append(row | {"negative_passages": others})
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    queries, positives, negatives = load_training(train_data=[str(data)])
    assert queries == ["ke"] * 3 and positives == [["ba 0"], ["ba 1"], ["ba 2"]]
    assert negatives == [["ba 3"]] * 3


def test_nq_joins_its_own_negatives_with_mined_ones(tmp_path):
    """Passages that hold an answer are not mined; a question is the same in both."""
    passages = [{"_id": f"{i}", "text": f"ba ke {i}"} for i in range(9)]
    write_jsonl(tmp_path / "nq/corpus.jsonl", passages)
    (tmp_path / "nq/nq-train.qa.csv").write_text("ba ke\t['3', '5']\n")
    flags = ["--data", tmp_path / "nq", "--model", "bm25", "--depth", 1, 9]
    retrieval("mine", *flags, "--output", tmp_path / "mined")
    dpr = {"question": "ba ke", "positive_ctxs": [{"passage_id": "3", "text": "ba ke 3"}]}
    dpr["hard_negative_ctxs"] = [{"passage_id": "11", "text": "lo"}]
    data = write_jsonl(tmp_path / "biencoder-nq-train.json", [dpr])
    files = {"train_data": [str(data)], "negatives_file": [str(tmp_path / "mined/negatives.jsonl")]}
    _, positives, negatives = load_training(data=str(tmp_path / "nq"), **files)
    mined = [f"ba ke {i}" for i in (0, 1, 2, 4, 6, 7, 8)]
    assert positives == [["ba ke 3"]] and sorted(negatives[0]) == [*mined, "lo"]


@pytest.mark.parametrize("has_head, pooling, similarity", KINDS)
def test_a_fine_tuned_folder_opens_again(has_head, pooling, similarity, tmp_path):
    """With the same vectors, also in SentenceTransformer, where that is installed."""
    source = write_model(tmp_path / "model", has_head, pooling, similarity)
    output, texts = str(tmp_path / "out"), make_texts(9, longest=12)
    flags = ["--model", source, "--data", BEIR, "--output", output]
    retrieval("finetune", *STEPS, "--steps", 2, *flags)
    vectors, encoder = our_vectors(output, texts)
    expected = plain_vectors(output, texts, pooling, similarity)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert (encoder.lm.base_model is not encoder.lm) == has_head
    assert not same_file("model.safetensors", source, output)
    sentence_transformers = pytest.importorskip("sentence_transformers")
    other = sentence_transformers.SentenceTransformer(output, device="cpu")
    np.testing.assert_allclose(vectors, other.encode(texts), atol=1e-5)


def test_fine_tuning_teaches_to_find(tmp_path):
    """On other queries than those it is trained on: a query is the first words of its passage."""
    texts = make_texts(300, seed=9, longest=8)
    passages = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    data = write_beir(tmp_path / "data", passages, num_train=200)
    flags = ["--data", data, "--max_passage_length", 16]
    retrieval("evaluate", "--model", MODEL, *flags, "--output", tmp_path / "before")
    training = ["--batch_size", 32, "--micro_batch_size", 32, "--epochs", 15, "--lr", 2e-3]
    training += ["--negatives", 0, "--output", tmp_path / "tuned"]
    retrieval("finetune", "--model", MODEL, *flags, *training)
    retrieval("evaluate", "--model", tmp_path / "tuned", *flags, "--output", tmp_path / "after")
    before, after = (read_json(tmp_path, name, "metrics.json") for name in ("before", "after"))
    assert after["MRR@10"] > before["MRR@10"] + 0.1


# ---- mining


def test_each_query_loses_its_own_positives_and_no_others(tmp_path):
    """Of the ranks 2 to 8 of BM25; a passage with grade 0 is a negative."""
    data = write_beir(tmp_path / "data")
    retrieval(*BM25, tmp_path / "run", "--split", "train")
    lines, expected = [], {}
    for query, hits in read_run(tmp_path / "run").items():
        names = list(hits)
        lines.append(f"{query}\t{names[3]}\t1\n{query}\t{names[1]}\t0\n")
        expected[query] = names[1:3] + names[4:8]
    (data / "qrels/train.tsv").write_text("".join(lines))
    flags = ["--data", data, "--output", tmp_path / "mined", "--depth", 2, 8]
    retrieval("mine", "--model", "bm25", *flags)
    rows = map(json.loads, (tmp_path / "mined/negatives.jsonl").open())
    assert {row["query_id"]: row["negatives"] for row in rows} == expected


# ---- commands

BAD_COMMANDS = {  # what the message must say
    "evalute": "evalute: the commands are evaluate index",
    "evaluate ba": "ba",
    "explain": "explain needs a text",
    "explain ba --model headless": "has no masked-LM head",
    "search": "search needs a text",
    "search ba --output nowhere": "nowhere has no vectors",
    "evaluate --lr 1": "--lr",
    "evaluate --model nowhere": "nowhere",
    "evaluate --output other": "other holds other files",
    "evaluate --data nobody/nothing --model bm25": "nobody/nothing",
    "evaluate --data nowhere --model bm25": "nowhere: no such folder",
    "evaluate --split dev": "no qrels of dev",
    "evaluate --max_passage_length 999": "999",
    "evaluate --compare nothing.trec": "nothing.trec",
    "evaluate --compare bad.trec": "bad.trec, line 1: expected qid Q0 docid rank score tag",
    "evaluate --compare empty.trec": "empty.trec is empty",
    "evaluate --compare twice.trec": "twice.trec, line 2: expected qid Q0 docid rank score",
    "evaluate --compare nan.trec": "nan.trec, line 1: expected qid Q0 docid rank score",
    "evaluate --model bart": "it is an encoder-decoder",
    "evaluate --max_query_length 1": "--max_query_length 1 must be a finite number, at least 3",
    "evaluate --model damaged": "--model damaged cannot encode",
    "evaluate --top_k 0": "--top_k 0 must be a finite number, at least 1",
    "mine --depth 5 2": "--depth needs two ranks",
    "finetune --batch_size 64": "--batch_size 64",
    "finetune --negatives_file gone.jsonl": "gone.jsonl",
    "finetune --negatives_file unknown.jsonl": "unknown.jsonl, line 1: query q69",
    "finetune --negatives_file missing.jsonl": "line 1: query q1 or passages ['d999'] are not in",
    "finetune --negatives_file ranks.tsv": "line 1: expected a query id and one passage id",
    "finetune --train_data bad.jsonl": "bad.jsonl, line 2: give a query",
    "finetune --train_data empty.trec": "empty.trec has no records",
    "--model bm25": "the recipe mines its own negatives",
    "--train_split dev": "no qrels of dev",  # the recipe checks all splits first
}


@pytest.mark.parametrize("line, message", BAD_COMMANDS.items(), ids=BAD_COMMANDS)
def test_a_bad_command_gives_one_line(line, message, bad_models, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_model(Path("headless"), has_head=False)
    write_model(Path("damaged"))
    Path("damaged/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    write_jsonl(Path("other/run.json"), [{}])
    Path("bad.trec").write_text("q1 d1 1\n")
    Path("empty.trec").write_text("\n")
    Path("twice.trec").write_text("q1 Q0 d1 1 1 tag\n" * 2)
    Path("nan.trec").write_text("q1 Q0 d1 1 nan tag\n")
    Path("ranks.tsv").write_text("q1\td1\t1\n")
    Path("bart").symlink_to(bad_models / "bart")
    write_jsonl(Path("unknown.jsonl"), [{"query_id": "q69", "negatives": ["d1"]}])
    write_jsonl(Path("missing.jsonl"), [{"query_id": "q1", "negatives": ["d999"]}])
    write_jsonl(Path("bad.jsonl"), [{"query": "ba", "positive_passages": []}, {"query": "ba"}])
    if line.split()[0] in ("evaluate", "mine", "finetune", "--train_split"):
        given = {"--model": MODEL, "--data": BEIR, "--output": "out"}
        for name in given.keys() - {*line.split()}:
            line += f" {name} {given[name]}"
    assert message in error_of(capfd, retrieval, *line.split())


HELPS = [(bow_mae, [], {field.name for field in dataclasses.fields(Config)})]
for command, (_, flags) in eval_retrieval.COMMANDS.items():
    HELPS.append((eval_retrieval, [command] if command else [], {*flags.split()}))


@pytest.mark.parametrize("module, command, flags", HELPS)
def test_help_lists_the_flags_of_a_command_alone(module, command, flags, capfd):
    with pytest.raises(SystemExit) as stop:
        run_here(module.main, *command, "--help")
    listed = set(re.findall(r"^  --(\w+)", capfd.readouterr().out, re.MULTILINE))
    assert stop.value.code == 0 and listed == flags


def test_defaults_are_the_papers_for_all_but_python_docs():
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


def test_the_recipe_prints_a_table_of_its_stages(tmp_path, capfd):
    retrieval("--model", MODEL, "--data", BEIR, "--output", tmp_path, *STEPS, "--steps", 2)
    table = read_json(tmp_path, "table.json")
    assert [*table] == ["bm25", "zero_shot", "stage1", "stage2"]
    lines = capfd.readouterr().out.splitlines()[-4:]
    for line, (name, values) in zip(lines, table.items(), strict=True):
        assert line.split()[:2] == [name, f"{values['MRR@10']:.4f}"]
    names = ("zero_shot", "stage1/mined", "stage1/model", "stage2/mined", "stage2/model")
    used = [read_json(tmp_path, name, "run.json")["config"]["model"] for name in names]
    assert used == [MODEL, "bm25", MODEL, str(tmp_path / "stage1/model"), MODEL]
    os.remove(tmp_path / "bm25/run.trec")
    flags = ["--model", MODEL, "--data", BEIR, "--output", tmp_path, *STEPS, "--steps", 3]
    assert "has a run of --steps 2, not 3" in error_of(capfd, retrieval, *flags)
    assert not (tmp_path / "bm25/run.trec").exists()  # refused before the first long stage


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


def test_the_commands_of_the_quick_start_run(tmp_path):
    """As they stand there, but for the installation, and with small runs of both."""
    commands = re.findall(r"^    pip install .* && (\w.*)$", SECTIONS["Quick start"], re.MULTILINE)
    assert commands == ["torchrun bow_mae.py", "pytest"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    flags = [*SMALL, "--output", tmp_path], ["--collect-only", "--quiet"]
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
