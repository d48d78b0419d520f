# SPDX-License-Identifier: MIT
"""Tests of bow_mae.py and eval_retrieval.py, to be read as documentation: no network, no GPU.

Most runs call `main([...])` in this process, with a tiny model and made-up texts. Runs of several
processes, and runs that get killed, are started the way a user starts them.
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
from unittest import mock

CACHE = tempfile.TemporaryDirectory(prefix="test_bow_mae_")  # the libraries read this on import
os.environ |= {"HF_HOME": CACHE.name, "HF_DATASETS_CACHE": CACHE.name, "HF_HUB_OFFLINE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import models, processors, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer, Metaspace
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

import bow_mae
import eval_retrieval
from bow_mae import BowMAE, Config, PretrainingStream, bow_loss, special_ids, term_coverage
from eval_retrieval import RetrievalConfig, evaluate_run, read_run

SCRIPT = Path(bow_mae.__file__).resolve()
FOLDER = Path(CACHE.name)
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
    """Write records to a file, a text as {"text": ...}; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_json(*path):
    """The content of a JSON file."""
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def read_jsonl(*path):
    """The records of a .jsonl file."""
    with Path(*path).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


VOCAB = [*TOKENS.values(), *WORDS, *SYLLABLES, "na", "1", "null"]
WORDPIECE = BertWordPieceTokenizer({word: index for index, word in enumerate(VOCAB)})
BACKEND = tokenizers.Tokenizer.from_str(WORDPIECE.to_str())
TOKENIZER = transformers.BertTokenizerFast(tokenizer_object=BACKEND)


def write_model(folder, has_head=True, pooling="cls", similarity="dot", seed=0):
    """Write a random BERT with dropout; returns its folder."""
    torch.manual_seed(seed)
    sizes = SIZES | {"vocab_size": len(TOKENIZER), "max_position_embeddings": 160}
    lm = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, initializer_range=0.1))
    model = lm if has_head else lm.base_model
    bow_mae.write_model(folder, model, TOKENIZER, 32, pooling, similarity)
    return str(folder)


bow_mae.init_distributed()  # the process group that functions expect without `main`
TEXTS = make_texts(3000)  # all different
CORPUS = write_jsonl(FOLDER / "corpus.jsonl", TEXTS[:600])
MODEL = write_model(FOLDER / "model")
SMALL = shlex.split(
    f"--data {CORPUS} --model tiny --max_length 32 --steps 20 --batch_size 8 --micro_batch_size 4 "
    "--precision fp32 --lr 2e-3 --lr_final_ratio 0.1 --warmup_steps 4 --adam_beta2 0.98 "
    "--workers 0 --log_every 1 --save_every 5 --keep 2 --eval_every 10"
)


def train(*flags):
    """A run of bow_mae.py in this process, with SMALL's flags unless others are given."""
    bow_mae.main([str(flag) for flag in (*SMALL, *flags)])


def start(*flags, module="bow_mae", before="", processes=1, small=SMALL, env=None, **options):
    """Run a script as a user does, by `python` or `torchrun`, perhaps after some lines of code.

    It returns when every process that holds the run's output has ended, workers included.
    """
    script = SCRIPT.with_name(f"{module}.py")
    if before:
        run = f"{module}.main(sys.argv[1:])\nsys.stdout.flush()\nos._exit(0)"  # as scripts end
        script = FOLDER / "patched.py"
        script.write_text(f"import os, sys, {module}\n{before}\n{run}\n")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", processes]
    command = [sys.executable, *(torchrun if processes > 1 else []), script]
    command += [*(small if module == "bow_mae" else []), *flags]
    options = {"cwd": FOLDER, "capture_output": True, "text": True} | options
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)} | (env or {})
    return subprocess.run([*map(str, command)], env=env, **options)


def signal_at(number, event, name, count):
    """Code that sends a run a signal when it opens, or renames, such a file the count-th time."""
    return f"""
import multiprocessing
countdown = iter(range({count}, 0, -1))
def hook(what, arguments):
    if what == {event!r} and {name!r} in str(arguments) and next(countdown, 0) == 1:
        print(len(multiprocessing.active_children()), "workers", flush=True)
        os.kill(os.getpid(), {int(number)})
sys.addaudithook(hook)
"""


def error_of(capfd, run, *flags):
    """The single line "error: ..." with which a run in this process ends, with exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    told = capfd.readouterr().err
    (error,) = re.findall("^error: .*", told, re.M)
    assert stop.value.code == 2 and "Traceback" not in told
    return error


def records(output, field):
    """The records of metrics.jsonl that have a field."""
    return [record for record in read_jsonl(output, "metrics.jsonl") if field in record]


def same_file(name, one, other):
    """Whether two folders have the same file."""
    return Path(one, name).read_bytes() == Path(other, name).read_bytes()


def losses(output):
    """{step: {name: loss}}, as logged."""
    rows = {row["step"]: row for row in records(output, "loss")}
    return {step: {k: row[k] for k in row if k.endswith("loss")} for step, row in rows.items()}


def close(one, other, tolerance=1e-4):
    """Whether two runs have the same losses at each step, up to a relative tolerance."""
    one, other = losses(one), losses(other)
    return all(one[step] == pytest.approx(other[step], rel=tolerance) for step in one | other)


def same_run(one, other):
    """Whether two runs have the same evaluations, weights and losses logged, bit for bit."""
    same_evaluations = records(one, "eval_mlm_loss") == records(other, "eval_mlm_loss")
    same_losses = losses(one).items() <= losses(other).items()
    return same_losses and same_evaluations and same_file("model.safetensors", one, other)


@pytest.fixture(scope="session")
def unbroken():
    """The output of the run that others are compared with."""
    train("--output", FOLDER / "unbroken")
    return FOLDER / "unbroken"


@pytest.fixture
def unfinished(unbroken, tmp_path):
    """A copy of that run from before its model was written, with checkpoints 15 and 20."""
    shutil.copytree(unbroken, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    return tmp_path / "out"


# ---- the losses


def test_the_method_can_be_copied_alone():
    """The source of its functions runs in an empty module that has torch and F."""
    method = {"torch": torch, "F": F}
    functions = [special_ids, bow_mae.whole_word_mask, bow_mae.bag_of_words]
    functions += [bow_loss, term_coverage, bow_mae.mlm_head, bow_mae.cosine]
    for function in functions:
        exec(inspect.getsource(function), method)
    input_ids = torch.tensor([[2, 10, 11, 12, 3]])
    special = method["special_ids"](TOKENIZER, 200)
    word_ids = torch.tensor([[0, 1, 1, 1, 0]])  # a single word, which is masked
    assert method["whole_word_mask"](input_ids, word_ids, TOKENIZER)[1].sum() == 3
    logits = method["mlm_head"](random_model("mlm").lm, torch.randn(1, 32))
    assert method["bow_loss"](logits, input_ids, special) > 0
    assert 0 <= method["term_coverage"](logits, input_ids, special) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bow_loss_and_its_gradient_equal_a_loop(dtype):
    """-1/|T| Σ log softmax, with repeats, special ids (0 to 2), and a row of special ids alone."""
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
        ([0, 1, 1, 1, 1], [0.0, 0, 5, 1, 4, 0], 0),  # T is empty
    ]
    input_ids, logits, expected = zip(*rows, strict=True)
    found = term_coverage(torch.tensor(logits), torch.tensor(input_ids), special)
    assert found.tolist() == pytest.approx(list(expected))


def test_a_coverage_that_frequent_terms_reach_is_noted(capfd):
    """Ids 2 and 3 are the most frequent; naming them covers 1, 1 and 1/2 of three texts."""
    batches = [{"original_ids": torch.tensor([[0, 2, 3], [0, 2, 3], [0, 2, 4]])}]
    special = torch.tensor([True, True, False, False, False])
    bow_mae.compare_with_frequent_terms({"eval_term_coverage": 0.84}, batches, special)
    assert not capfd.readouterr().out
    bow_mae.compare_with_frequent_terms({"eval_term_coverage": 0.83}, batches, special)
    assert "0.8333" in capfd.readouterr().out


# ---- masking


def test_30_percent_of_the_words_are_masked_80_10_10():
    """200 rows of three unknown words, which never are masked, and 200 words of two tokens."""
    torch.manual_seed(0)
    input_ids = torch.randint(5, len(TOKENIZER), (200, 403))  # 0 to 4 are special
    input_ids[:, :3] = TOKENIZER.unk_token_id
    word_ids = ((torch.arange(403) + 3) // 2).expand(200, -1)
    masked_ids, chosen = bow_mae.whole_word_mask(input_ids, word_ids, TOKENIZER)
    assert not chosen[:, :3].any()
    assert chosen[:, 3::2].sum(1).tolist() == [60] * 200
    assert torch.equal(masked_ids[~chosen], input_ids[~chosen])
    before, after = input_ids[chosen], masked_ids[chosen]
    becomes_mask, stays = after == TOKENIZER.mask_token_id, after == before
    assert becomes_mask.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert stays.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert after[~becomes_mask].min() > 4


SPLIT, END = BertPreTokenizer(), {"end_of_word_suffix": "</w>"}
OPTIONS = {"vocab_size": 140, "special_tokens": [*TOKENS.values()]}
UNK = {"unk_token": "[UNK]"}
TOKENIZERS = {  # model, pre-tokenizer, trainer
    "WordPiece": (models.WordPiece(**UNK), SPLIT, trainers.WordPieceTrainer(**OPTIONS)),
    "SentencePiece": (models.Unigram(), Metaspace(), trainers.UnigramTrainer(**OPTIONS, **UNK)),
    "BPE, </w>": (models.BPE(**UNK, **END), SPLIT, trainers.BpeTrainer(**OPTIONS, **END)),
}


@pytest.mark.parametrize("model, splitter, trainer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_tokens_of_a_word_are_masked_together(model, splitter, trainer):
    """Over 400 draws, neighbouring tokens are always chosen alike only if they share a word."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = splitter
    backend.train_from_iterator([*make_texts(200), *["x, (x 2024) x! (x 3.5)"] * 300], trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENS)
    text = "bakelodi stapri, (galvenmu 2024) pristagal; x baba! galgaltor 3.5 ke"
    ((ids, word_ids),) = bow_mae.cut_sequences([text], tokenizer, 512)
    input_ids, word_ids = torch.tensor([ids] * 400), torch.tensor([word_ids] * 400)
    chosen = bow_mae.whole_word_mask(input_ids, word_ids, tokenizer)[1]
    pairs = [i for i in range(2, len(ids) - 1) if 1 not in ids[i - 1 : i + 1]]  # 1 is [UNK]
    alike = [torch.equal(chosen[:, i - 1], chosen[:, i]) for i in pairs]
    assert alike == [word_ids[0, i - 1] == word_ids[0, i] for i in pairs]
    assert sum(alike) > 3 and not all(alike)


def test_a_sentence_without_spaces_is_masked_token_by_token():
    """Many tokenizers take a Chinese clause for one word: of its 40 tokens 30 % are masked."""
    input_ids = torch.randint(5, 100, (400, 40))
    chosen = bow_mae.whole_word_mask(input_ids, torch.ones_like(input_ids), TOKENIZER)[1]
    assert chosen.sum(1).tolist() == [12] * 400 and not chosen.all(0).any()


# ---- the model

IDS = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3}
DISTIL = {"vocab_size": 200, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
FAMILIES = {
    "BERT": transformers.BertConfig(**SIZES),
    "RoBERTa": transformers.RobertaConfig(**SIZES),
    "DistilBERT": transformers.DistilBertConfig(**DISTIL),
    "ModernBERT": transformers.ModernBertConfig(**SIZES, **IDS, sep_token_id=3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_mlm_head_gives_the_models_own_logits(family):
    torch.manual_seed(0)
    lm = AutoModelForMaskedLM.from_config(FAMILIES[family]).eval()
    for parameter in lm.parameters():  # biases too, which start at 0
        torch.nn.init.normal_(parameter, std=0.1)
    input_ids, chosen = torch.randint(5, 200, (3, 12)), torch.rand(3, 12) < 0.3
    logits = bow_mae.mlm_head(lm, lm.base_model(input_ids).last_hidden_state[chosen])
    torch.testing.assert_close(logits, lm(input_ids).logits[chosen], atol=1e-6, rtol=0)


def random_model(objective):
    """A random BERT with an objective."""
    torch.manual_seed(0)
    lm = AutoModelForMaskedLM.from_config(FAMILIES["BERT"])
    return BowMAE(lm, special_ids(TOKENIZER, 200), objective, 32).eval()


def test_the_enhanced_decoder_does_not_see_the_token_it_predicts():
    """Position 5 depends on the embeddings of half of the others. `bow` has no parameter more."""
    decoder = random_model("enhanced").decoder
    embeddings = torch.randn(64, 16, 32, requires_grad=True)
    decoded = decoder(torch.randn(64, 32), embeddings, None)
    decoded[:, 5].square().sum().backward()
    seen = embeddings.grad[:, 1:].any(2).float().mean(0)  # (L - 1,), over 64 draws
    assert seen[4] == 0
    assert seen.sum().item() / 14 == pytest.approx(0.5, abs=0.1)
    assert not list(random_model("bow").decoder.parameters())


# ---- the data, and the vocabulary that a new model learns from it


def write_files(folder, texts, count, ending):
    """Write texts into `count` files of a format; returns the folder."""
    folder.mkdir()
    for index in range(count):
        path, own = folder / f"{index}.{ending}", texts[index::count]
        if ending == "parquet":
            datasets.Dataset.from_dict({"n": range(len(own)), "text": own}).to_parquet(path)
            continue
        if ending.startswith("jsonl"):
            own = ["", *(json.dumps({"n": len(text), "text": text}) for text in own)]
        content = "".join(f"{line}\n" for line in own).encode()
        path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    return folder


def data_config(data, num_shards, micro_batch_size=4, **flags):
    """A configuration for data read in so many shards."""
    flags |= {"batch_size": num_shards * micro_batch_size, "micro_batch_size": micro_batch_size}
    return Config(data=str(data), max_length=64, **flags)


def make_stream(config, shards, state=None, held_out_fraction=0.0):
    """The stream of some shards, perhaps resumed from a state."""
    files = bow_mae.list_files(config)
    return PretrainingStream(config, TOKENIZER, files, held_out_fraction, shards, state or {})


def read_epochs(config, count=1, held_out_fraction=0.0):
    """For each of the first epochs, the texts of all shards."""
    epochs = [[] for _ in range(count)]
    for shard in range(config.num_shards):
        for info, batch in make_stream(config, [shard], held_out_fraction=held_out_fraction):
            epoch = info["resume_point"]["epoch"]
            if epoch == count:
                break
            epochs[epoch] += TOKENIZER.batch_decode(batch["original_ids"], skip_special_tokens=True)
    return epochs


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "txt", "txt.gz", "parquet"])
def test_each_text_comes_once_an_epoch(ending, tmp_path):
    """In 1, 2 and 5 shards. What pandas takes for missing values is text; "" is no text."""
    texts = [*make_texts(57, longest=10), "na", "1", "null"]
    one = write_files(tmp_path / "one", [*texts, ""], 1, ending)
    three = write_files(tmp_path / "three", [*texts, ""], 3, ending)
    for data in (one / f"0.{ending}", three, f"{three}/?.{ending}"):
        for num_shards in (1, 2, 5):
            first, second = read_epochs(data_config(data, num_shards), 2)
            assert sorted(first) == sorted(texts) == sorted(second)
            assert first != second


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_shard_opens_its_own_files_alone(ending, tmp_path):
    """Of 11 files in 4 shards, in another order each epoch, so that none always ends on books."""
    config = data_config(write_files(tmp_path / "data", TEXTS[:99], 11, ending), 4)
    files, opened = bow_mae.list_files(config), []
    for epoch, shard in itertools.product(range(3), range(4)):
        stream = bow_mae.open_stream(config, files, shard, 4, epoch)
        with mock.patch("builtins.open", wraps=open) as spy:
            assert list(bow_mae.read_texts(config, files, stream))
        opened += [call.args[0] for call in spy.call_args_list]
    epochs = [opened[:11], opened[11:22], opened[22:]]
    assert [sorted(epoch) for epoch in epochs] == [sorted(files)] * 3  # each file once
    assert len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize("ending", ["txt", "parquet"])
@pytest.mark.parametrize("num_shards", [2, 5])
def test_a_stream_resumes_at_every_step(ending, num_shards, tmp_path, monkeypatch):
    """Each time from where the resumed one stood, over three epochs of a few buffers."""
    monkeypatch.setattr(bow_mae, "BUFFER_TEXTS", 7)
    config = data_config(write_files(tmp_path / "data", TEXTS[:70], 3, ending), num_shards)
    shards = range(num_shards)
    expected = list(itertools.islice(make_stream(config, shards), 14 * num_shards))
    assert expected[-1][0]["resume_point"]["epoch"] >= 1
    state = {"step": 0, "resume_points": {}}
    for step in range(14):
        resumed = itertools.islice(make_stream(config, shards, state), num_shards)
        for (info, batch), other in zip(resumed, expected[step * num_shards :], strict=False):
            assert info["seed"] == other[0]["seed"]
            assert torch.equal(batch["input_ids"], other[1]["input_ids"])
            state["resume_points"][info["shard"]] = info["resume_point"]
        state["step"] += 1


def test_held_out_texts_are_not_trained_on(tmp_path):
    config = data_config(write_files(tmp_path / "data", TEXTS, 1, "txt"), 1)
    sample, fraction = bow_mae.sample_texts(config, bow_mae.list_files(config))
    held_out = [text for text in TEXTS if bow_mae.text_hash(text) < fraction]
    assert sample == TEXTS and fraction == 100 / 3000 and 70 < len(held_out) < 130
    (seen,) = read_epochs(config, held_out_fraction=fraction)
    assert sorted(seen) == sorted(set(TEXTS) - set(held_out))


def test_long_texts_are_cut_into_consecutive_sequences():
    """Joined, they give the text back. Texts without a word are left out."""
    text = " ".join(WORDS)
    sequences = bow_mae.cut_sequences(["", text, "unknown words"], TOKENIZER, 16)
    token_ids, word_ids = zip(*sequences, strict=True)
    assert [len(row) for row in token_ids] == [16] * 7 + [4]
    assert word_ids[1] == [0, *range(1, 15), 0]
    joined = itertools.chain.from_iterable(row[1:-1] for row in token_ids)
    assert list(joined) == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_text_columns_are_joined_and_null_counts_as_empty(tmp_path):
    """Half of a surrogate pair is no text; columns that are not read may hold anything."""
    pairs = [("ba", "ke di"), (None, "lo"), ("gal", None), (None, None), ("", ""), ("", "\ud83d")]
    rows = [{"title": title, "text": text, "n": [title]} for title, text in pairs]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    (found,) = read_epochs(data_config(data, 1, text_columns=["title", "text"]))
    assert sorted(found) == ["ba ke di", "gal", "lo"]


def test_what_is_no_training_data_is_left_out_and_counted(tmp_path, capfd):
    """Hidden and empty files, other formats, other splits; a BEIR folder stands for its corpus."""
    names = ["a.jsonl", "deep/b.jsonl", "deep/test-1.jsonl", "dev/c.jsonl", ".hidden.jsonl", "a.md"]
    paths = [str(write_jsonl(tmp_path / name, ["ba"])) for name in names]
    (tmp_path / "empty.jsonl").touch()
    assert bow_mae.list_files(Config(data=str(tmp_path))) == paths[:2]
    told = capfd.readouterr().out
    assert "2 files" in told and " 5 " in told
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["ba"])
    assert bow_mae.list_files(Config(data=str(tmp_path))) == [str(corpus)]


def test_a_hub_dataset_is_streamed(monkeypatch):
    """a/b:c:test is the split `test` of the configuration `c`."""
    stream = datasets.Dataset.from_dict({"text": TEXTS[:9]}).to_iterable_dataset()
    load_dataset = mock.Mock(return_value=stream)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert sorted(*read_epochs(data_config("a/b:c:test", 2))) == sorted(TEXTS[:9])
    load_dataset.assert_called_with("a/b", "c", split="test", streaming=True)


@pytest.mark.parametrize("words", ["में मैं म के को क", "น้ำ นำ ไม่ ไม", "ma má mà mạ mã"])
def test_words_that_differ_in_a_mark_differ_in_tokens(words):
    tokenizer = bow_mae.learn_tokenizer(Config(model="tiny", max_length=64), [words] * 50)
    found = [tuple(tokenizer.tokenize(word)) for word in words.split()]
    assert len(set(found)) == len(found) and tokenizer.unk_token not in sum(found, ())


def test_the_vocabulary_comes_from_all_files(tmp_path, monkeypatch):
    """Also where the first file alone has more texts than the sample: b.txt is in Cyrillic."""
    monkeypatch.setattr(bow_mae, "SAMPLE_TEXTS", 200)
    cyrillic = [text.replace("a", "я") for text in TEXTS[:300]]
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:300]), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join(cyrillic), encoding="utf-8")
    config = Config(data=str(tmp_path), model="tiny", max_length=64)
    sample, _ = bow_mae.sample_texts(config, bow_mae.list_files(config))
    tokenizer = bow_mae.learn_tokenizer(config, sample)
    assert len(sample) == 200
    assert not any(tokenizer.unk_token in tokenizer.tokenize(text) for text in cyrillic)


# ---- defaults, schedules, logs, precision and locale


def config_of(*flags):
    """The configuration of a command line, with the unset flags filled in."""
    parser = transformers.HfArgumentParser(Config)
    config = Config(**vars(parser.parse_args([*map(str, flags)])))
    bow_mae.complete_config(config)
    return config


PAPER = {"lr": 3e-4, "max_length": 144, "batch_size": 256, "adam_beta2": 0.999, "steps": 80_000}
PAPER |= {"warmup_steps": 4000, "lr_final_ratio": 0.1, "bow_weight": 1.0, "bow_weight_final": 0.1}
SHORT = {"lr": 2e-3, "max_length": 64, "batch_size": 64, "steps": 1800, "warmup_steps": 90}


def test_defaults_are_the_papers_or_those_of_a_short_run(capfd):
    for model, expected in (("some/folder", PAPER), ("tiny", SHORT), ("small", {"lr": 5e-4})):
        config = vars(config_of("--model", model))
        assert {name: config[name] for name in expected} == expected
        assert f"--lr {expected['lr']} " in capfd.readouterr().out


def test_learning_rate_and_bow_weight_follow_the_cosine(unbroken):
    """lr peaks at 2e-3 in step 4, ends at 2e-4; λ goes from 1 to 0.1; loss = mlm + λ·bow."""
    rows = {row["step"]: row for row in records(unbroken, "lr")}
    rates = {1: 5e-4, 4: 2e-3, 8: 2e-4 + 9e-4 * (1 + math.sqrt(0.5)), 12: 1.1e-3, 20: 2e-4}
    weights = {5: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 10: 0.55, 20: 0.1}
    assert {step: rows[step]["lr"] for step in rates} == pytest.approx(rates)
    assert {step: rows[step]["bow_weight"] for step in weights} == pytest.approx(weights)
    weighted = [row["mlm_loss"] + row["bow_weight"] * row["bow_loss"] for row in rows.values()]
    assert [row["loss"] for row in rows.values()] == pytest.approx(weighted, rel=1e-5)


def test_evaluation_equals_a_loop(unbroken):
    """Held-out losses and coverage of the saved model, from all of its logits."""
    config = config_of(*SMALL)
    texts, fraction = bow_mae.sample_texts(config, bow_mae.list_files(config))
    tokenizer = AutoTokenizer.from_pretrained(unbroken)
    lm = AutoModelForMaskedLM.from_pretrained(unbroken)
    special = special_ids(tokenizer, len(tokenizer))
    mlm, bow, coverage = [], [], []
    for batch in bow_mae.held_out_batches(config, tokenizer, texts, fraction):
        original_ids, positions = batch["original_ids"], batch["masked_positions"]
        attention_mask = (original_ids != tokenizer.pad_token_id).long()
        with torch.no_grad():
            logits = lm(batch["input_ids"], attention_mask).logits
            unmasked = lm(original_ids, attention_mask).logits[:, 0]
        targets = original_ids.flatten()[positions]
        masked = logits.flatten(0, 1)[positions]
        mlm += F.cross_entropy(masked, targets, reduction="none").tolist()
        for cls_logits, ids in zip(logits[:, 0], original_ids, strict=True):
            bow.append(bow_loss(cls_logits[None], ids[None], special).item())
        coverage += term_coverage(unmasked, original_ids, special).tolist()
    found = records(unbroken, "eval_mlm_loss")[-1].values()
    assert [*found] == pytest.approx([20, *map(np.mean, (mlm, bow, coverage))], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_losses_in_half_precision_are_near_those_in_float32(precision, unbroken, tmp_path):
    """Within 0.1 % at the first step; later fp16 skips steps while its scale is too high."""
    train("--output", tmp_path, "--precision", precision)
    assert losses(tmp_path)[1] == pytest.approx(losses(unbroken)[1], rel=1e-3)
    assert close(tmp_path, unbroken, 0.1)
    assert losses(tmp_path) != losses(unbroken)


def test_an_ascii_locale_breaks_neither_reading_nor_writing(tmp_path):
    texts = [text.replace("a", "á").replace("e", "я") for text in TEXTS[:200]]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ["--data", tmp_path / "a.txt", "--output", tmp_path / "out", "--steps", 5]
    ended = start(*flags, env=ascii_locale)
    assert ended.returncode == 0, ended.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not any(tokenizer.unk_token in tokenizer.tokenize(text) for text in texts)


# ---- stopping and resuming


def test_resume_after_kill_is_exact(unbroken, tmp_path):
    """SIGKILL at three moments, each after the point that the run killed before had reached."""
    flags = ["--output", tmp_path, "--workers", 1]
    for event, name, count in [
        ("open", "metrics.jsonl", 10),  # between steps 5 and 10
        ("open", ".checkpoint.tmp/modules.json", 1),  # while a checkpoint is written
        ("shutil.copyfile", "model.safetensors", 1),  # while the model is put in place
    ]:
        ended = start(*flags, before=signal_at(signal.SIGKILL, event, name, count))
        assert ended.returncode == -signal.SIGKILL, (event, name, ended.stderr)
        assert not (tmp_path / "model.safetensors").exists()
    train(*flags)
    assert same_run(tmp_path, unbroken) and len(losses(tmp_path)) == 20
    names = sorted(path.name for path in tmp_path.glob("*checkpoint*"))
    assert names == ["checkpoint-15", "checkpoint-20"]  # the newest are kept


def test_workers_do_not_outlive_a_killed_run(tmp_path):
    """`start` returns when the run's output is closed, which two living workers would hold open."""
    killed = signal_at(signal.SIGKILL, "open", "metrics.jsonl", 4)
    ended = start("--output", tmp_path, "--workers", 2, before=killed, timeout=60)
    assert ended.returncode == -signal.SIGKILL and "2 workers" in ended.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resume_after_a_signal_is_exact(number, unbroken, tmp_path, capfd):
    """It arrives while step 5 is saved. The next step ends the run, though none is logged."""
    flags = ["--output", tmp_path, "--workers", 1]
    before = signal_at(number, "os.rename", "checkpoint-5", 1)
    ended = start(*flags, "--log_every", 1000, before=before)
    assert ended.returncode == 128 + number and "step 6 is saved" in ended.stdout
    handler = signal.getsignal(number)
    train(*flags)
    assert "resuming from step 6" in capfd.readouterr().out
    assert same_run(tmp_path, unbroken) and signal.getsignal(number) == handler


def test_two_processes_stopped_twice_give_the_losses_of_one(tmp_path):
    """By a SIGTERM and by a SIGKILL of one of them, in a model with dropout and with workers."""
    flags = ["--model", MODEL, "--objective", "enhanced", "--micro_batch_size", 2]
    two = [*flags, "--workers", 2, "--output", tmp_path / "two"]
    for number, count in ((signal.SIGTERM, 9), (signal.SIGKILL, 10)):
        ended = start(*two, processes=2, before=signal_at(number, "open", "metrics.jsonl", count))
        assert ended.returncode == 1 and not (tmp_path / "two/model.safetensors").exists()
    ended = start(*two, processes=2)
    assert ended.returncode == 0 and "resuming from step" in ended.stdout
    train(*flags, "--output", tmp_path / "one")
    assert close(tmp_path / "two", tmp_path / "one")


def test_a_run_begun_on_one_process_continues_on_two(unbroken, unfinished):
    shutil.rmtree(unfinished / "checkpoint-20")
    ended = start("--output", unfinished, processes=2)
    assert ended.returncode == 0 and "resuming from step 15" in ended.stdout
    assert close(unfinished, unbroken)


def test_a_damaged_checkpoint_is_named(unbroken, unfinished, capfd):
    """Once it is removed, the run resumes from the one before."""
    os.truncate(unfinished / "checkpoint-20/model.safetensors", 1000)
    assert "checkpoint-20" in error_of(capfd, train, "--output", unfinished)
    shutil.rmtree(unfinished / "checkpoint-20")
    train("--output", unfinished)
    assert same_run(unfinished, unbroken)


def test_a_full_disk_leaves_the_last_checkpoint_whole(unbroken, unfinished, capfd):
    """No file may grow beyond 100 kB, less than the model; with room the same command resumes."""
    shutil.rmtree(unfinished / "checkpoint-20")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert "checkpoint-20" in error_of(capfd, train, "--output", unfinished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (unfinished / "checkpoint-20").exists()
    train("--output", unfinished)
    assert same_run(unfinished, unbroken)


def test_a_run_of_other_flags_or_files_is_refused_and_a_finished_one_says_so(tmp_path, capfd):
    """Of so few texts that none is held out."""
    data, output = write_jsonl(tmp_path / "a.jsonl", TEXTS[:99]), tmp_path / "out"
    flags = ["--data", data, "--output", output, "--steps", 5]
    train(*flags)
    shutil.copytree(output, tmp_path / "before")
    train(*flags)
    told = capfd.readouterr().out
    assert "nothing is held out" in told and "this run is finished: 5 steps" in told
    assert "--lr 0.002, not 0.1" in error_of(capfd, train, *flags, "--lr", 0.1)
    write_jsonl(data, TEXTS[:98])
    assert f"--data {data} has changed" in error_of(capfd, train, *flags)
    assert same_run(output, tmp_path / "before")


@pytest.mark.parametrize("steps, message", [(20, "loss is nan at"), (1, "eval_mlm_loss is")])
def test_a_loss_that_is_not_finite_stops_the_run(steps, message, tmp_path, capfd):
    """Nothing is saved, even where it was the last step that spoilt the weights."""
    flags = ["--output", tmp_path, "--lr", 1e30, "--steps", steps, "--warmup_steps", 0]
    assert message in error_of(capfd, train, *flags)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_saved_folder_tells_sentence_transformers_cls_and_dot_product(unbroken):
    names = ("modules", "1_Pooling/config", "config_sentence_transformers", "sentence_bert_config")
    modules, pooling, own, transformer = (read_json(unbroken, f"{name}.json") for name in names)
    found = [(module["type"].split(".")[-1], module["path"]) for module in modules]
    assert found == [("Transformer", ""), ("Pooling", "1_Pooling")]
    assert [name for name in pooling if pooling[name] is True] == ["pooling_mode_cls_token"]
    assert pooling["pooling_mode_mean_tokens"] is False  # some versions take a missing one for true
    assert own["similarity_fn_name"] == "dot" and transformer["max_seq_length"] == 32


# ---- bad input

HEADLESS = write_model(FOLDER / "headless", has_head=False)
BAD_FLAGS = {  # what the message must say
    "--steps 0": "--steps 0 must be at least 1",
    "--micro_batch_size 3": "--batch_size 8 is not a multiple of",
    "--warmup_steps 20": "--warmup_steps 20",
    "--data .": "--output out lies inside --data .",
    "--text_columns text boddy": "boddy",
    f"--model {MODEL} --max_length 161": "161 tokens (its max_position_embeddings is 160)",
    f"--model {HEADLESS}": "is missing or gets no gradient",
    f"--output {MODEL}": "has a model but no checkpoints",
    "--batch_size 800": "no text for shard",
}
GOOD = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(120))
BAD_FILES = [  # name, content, what the message must say
    ("malformed.jsonl", GOOD + '{"text": "ba ke"\n' + GOOD, '{"text": "ba ke"'),
    ("number.jsonl", GOOD + '{"text": 7}\n', "{'text': 7}"),
    ("truncated.jsonl.gz", gzip.compress(GOOD.encode())[:-200], "truncated.jsonl.gz"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_a_bad_flag_gives_one_line(flags, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(GOOD)
    flags = ["--data", "good.jsonl", "--output", "out", *flags.split()]
    assert message in error_of(capfd, train, *flags)


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_a_bad_file_gives_one_line(name, content, message, tmp_path, capfd):
    data = tmp_path / name
    data.write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in error_of(capfd, train, "--data", data, "--output", tmp_path / "out")


def test_two_processes_tell_an_error_once(tmp_path):
    """Their workers read malformed lines, beyond the sample that all processes read."""
    lines = GOOD.splitlines()
    lines[100:102] = ["{bad", "{bad"]  # of each shard
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = ["--data", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--workers", 1]
    ended = start(*flags, processes=2, before="bow_mae.SAMPLE_TEXTS = 100")
    (error,) = re.findall("^error: .*", ended.stderr, re.M)
    assert ended.returncode != 0 and "{bad" in error


def test_a_bug_of_ours_keeps_its_traceback_and_ends_the_run(tmp_path):
    ended = start("--output", tmp_path, "--workers", 1, before="bow_mae.learning_rate = None")
    assert ended.returncode == 1 and "TypeError: 'NoneType' object is not" in ended.stderr


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


# ==== eval_retrieval.py: helpers and fixtures

eval_retrieval.CHUNK_SIZE = 16  # vectors per file, so that 70 passages make several files
PASSAGES = [
    {"_id": f"d{i}", "title": [None, "", "ba"][i % 3], "text": text}
    for i, text in enumerate(make_texts(70, seed=3, longest=12))
]


def write_beir(folder, passages=PASSAGES, num_train=40):
    """A BEIR folder: query i is the first three words of passage i; train has the first queries."""
    queries = [" ".join(passage["text"].split()[:3]) for passage in passages]
    write_jsonl(folder / "corpus.jsonl", passages)
    rows = [{"_id": f"q{i}", "text": query} for i, query in enumerate(queries)]
    write_jsonl(folder / "queries.jsonl", rows)
    lines = [f"q{i}\td{i}\t1\n" for i in range(len(passages))]
    (folder / "qrels").mkdir()
    for split, own in (("train", lines[:num_train]), ("test", lines[num_train:])):
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(own))
    return folder


BEIR = write_beir(FOLDER / "beir")
EVALUATE = ["evaluate", "--model", MODEL, "--data", BEIR, "--precision", "fp32", "--output"]
BM25 = ["evaluate", "--model", "bm25", "--output"]


def retrieval(*flags):
    """A run of eval_retrieval.py in this process."""
    eval_retrieval.main([str(flag) for flag in flags])


def load(data, split="test"):
    """The task of a split."""
    return eval_retrieval.load_task(RetrievalConfig(data=str(data)), split)


@pytest.fixture(scope="session")
def evaluated():
    """The output of an evaluation."""
    retrieval(*EVALUATE, FOLDER / "evaluated")
    return FOLDER / "evaluated"


# ---- metrics, BM25 and tasks


def test_metrics_by_hand():
    """The ranking is b, a, c, d, and e is not found."""
    run = {"q": {"a": 2.0, "b": 3.0, "c": 1.0, "d": 0.5}}
    qrels = {"q": {"a": 2, "b": 0, "d": 1, "e": 1}}
    found = evaluate_run(run, qrels)["q"]
    assert (found["MRR@10"], found["Hit@1"], found["Hit@10"]) == (1 / 2, 0, 1)
    assert found["MAP@1000"] == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert found["Recall@50"] == pytest.approx(2 / 3)
    gain = 2 / math.log2(3) + 1 / math.log2(5)
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["nDCG@10"] == pytest.approx(gain / ideal)
    strict = evaluate_run(run, qrels, relevance_level=2)["q"]
    assert (strict["MAP@1000"], strict["nDCG@10"]) == (1 / 2, found["nDCG@10"])


def test_metrics_are_cut_at_their_depth():
    """Passages with the ranks 11, 51 and 1001 are relevant."""
    run = {"q": {f"{rank:04}": -float(rank) for rank in range(1, 1200)}}
    qrels = {"q": {"0011": 1, "0051": 1, "1001": 1}}
    found = evaluate_run(run, qrels)["q"]
    assert found["MRR@10"] == found["nDCG@10"] == found["Hit@10"] == 0
    assert found["MAP@1000"] == pytest.approx((1 / 11 + 2 / 51) / 3)
    recalls = [found[f"Recall@{depth}"] for depth in (50, 100, 1000)]
    assert recalls == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    shallow = evaluate_run(run, qrels, top_k=20)["q"]
    assert shallow.keys() == {"MRR@10", "nDCG@10", "Hit@1", "Hit@10"}


def test_ties_and_missing_queries_are_treated_as_by_trec_eval():
    """Scores that are equal as float32 are ranked by falling id; a query without hits has 0."""
    run = {"tie": {"10": 1 + 1e-8, "9": 1.0}, "irrelevant": {"a": 1.0}}
    qrels = {"tie": {"9": 1}, "missing": {"a": 1}, "irrelevant": {"a": 0}}
    found = evaluate_run(run, qrels)
    assert {name: values["MRR@10"] for name, values in found.items()} == {"tie": 1, "missing": 0}


def test_answers_match_whole_words():
    """As in DPR: case and Unicode form do not matter, the order of words does."""
    text = "In 1969, Neil\nARMSTRONG walked. O\u0301scar won $5."
    yes, no = ["neil armstrong", "\u00d3scar", "$5", "1969,"], ["arm", "5 $", " ", "Neil walked"]
    assert all(eval_retrieval.has_answer(text, [answer]) for answer in yes)
    assert not any(eval_retrieval.has_answer(text, [answer]) for answer in no)


def test_permutation_test_agrees_with_enumeration():
    differences = np.array([0.5, 0.1, -0.2, 0.4, 0.3, 0.25, -0.1, 0.6])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=8)]
    exact = np.mean([total >= abs(differences.sum()) - 1e-9 for total in sums])
    assert eval_retrieval.permutation_test(differences) == pytest.approx(exact, abs=0.01)


def test_bm25_follows_the_textbook():
    texts = ["x b b c", "b c d", "", "e x X x", "f"]
    passages = datasets.Dataset.from_dict({"text": texts})
    scores, rows = eval_retrieval.bm25(passages, ["B x unknown", "unknown"], 5)
    documents, expected = [text.lower().split() for text in texts], [0] * 5
    for i, term in itertools.product(range(5), "bx"):
        n, count = sum(term in other for other in documents), documents[i].count(term)
        idf = math.log(1 + (5 - n + 0.5) / (n + 0.5))
        length = len(documents[i]) / (12 / 5)  # as a share of the mean
        expected[i] += idf * count / (count + 0.9 * (1 - 0.4 + 0.4 * length))
    assert [list(own) for own in rows] == [[0, 3, 1], []]
    assert scores[0] == pytest.approx([expected[row] for row in rows[0]])


def test_bm25_terms():
    expected = {
        "The cat is in A.B.C. 1,000 don't": ["cat", "a.b.c", "1,000", "don't"],
        "BM25は検索 モデル": ["bm25", "は検", "検索", "モデ", "デル"],
        "मेरी किताब": ["मेरी", "किताब"],  # a vowel sign belongs to its word
    }
    for text, terms in expected.items():
        assert sorted(eval_retrieval.bm25_terms(text)) == sorted(terms)


def test_judgements_and_answers_are_both_reported(tmp_path):
    """Without judgements, the queries with answers are the split."""
    flags = [*BM25, tmp_path / "out", "--data", write_beir(tmp_path), "--split", "dev"]
    row = {"_id": "a", "text": PASSAGES[2]["text"], "answers": [PASSAGES[2]["text"]]}
    write_jsonl(tmp_path / "queries.dev.jsonl", [row])  # comes before queries.jsonl
    retrieval(*flags)
    hits = {"AnswerHit@5": 1, "AnswerHit@20": 1, "AnswerHit@100": 1}
    assert read_json(tmp_path, "out/metrics.json") == hits
    (tmp_path / "qrels/dev.tsv").write_text("a\td3\t1\n")
    retrieval(*flags)
    assert read_json(tmp_path, "out/metrics.json").items() > {**hits, "Hit@1": 0}.items()


@pytest.mark.parametrize("judged", ["a/x-qrels", "a/x default", "a/x qrels"])
def test_hub_layouts(judged, monkeypatch):
    """BEIR's pair, and the single repositories of MTEB and NanoBEIR; any single split is `test`."""
    tables = {
        "a/x corpus": {"_id": ["1"], "title": [None], "text": ["ke"]},
        "a/x queries": {"_id": ["2"], "text": ["di"]},
        judged: {"query-id": [2], "corpus-id": [1], "score": [1.0]},
    }
    hub = {name: {"train": datasets.Dataset.from_dict(table)} for name, table in tables.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: hub[" ".join(names)])
    configs = [name.removeprefix("a/x ") for name in tables]
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: configs)
    task = load("a/x")
    assert eval_retrieval.passage_texts(task.passages, [0]) == ["ke"]
    assert (task.queries, task.qrels) == ({"2": "di"}, {"2": {"1": 1}})


def test_missing_passages_and_queries_are_counted(tmp_path, capfd):
    """A missing passage stays judged, a missing query is left out. (Qrels as TREC writes them.)"""
    (write_beir(tmp_path) / "qrels/test.tsv").write_text("q1 0 d1 1\nq1 0 gone 1\nnobody 0 d2 1\n")
    retrieval(*BM25, tmp_path / "out", "--data", tmp_path)
    assert read_json(tmp_path, "out/metrics.json")["Recall@100"] == 1 / 2
    told = capfd.readouterr().out
    assert "1 judged passages are missing, the first is 'gone'" in told
    assert re.search("1 .*queries are missing, the first is 'nobody'", told)


def test_a_passage_with_the_id_of_its_query_is_dropped(tmp_path):
    """Unless it is judged relevant, or --keep_identical_ids is set."""
    data = write_beir(tmp_path)
    write_jsonl(data / "queries.jsonl", PASSAGES)  # queries with the ids of passages
    (data / "qrels/test.tsv").write_text("d1\td1\t1\nd2\td3\t1\n")
    for name, flags in {"out": [], "kept": ["--keep_identical_ids"]}.items():
        retrieval(*BM25, tmp_path / name, "--data", data, *flags)
        found = read_run(tmp_path / name / "run.trec")
        assert "d1" in found["d1"] and ("d2" in found["d2"]) == (name == "kept")


# ---- the encoder


def plain_vectors(folder, texts, pooling="cls", similarity="dot"):
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


def make_encoder(folder, **flags):
    """The encoder of a folder."""
    config = RetrievalConfig(model=str(folder), max_passage_length=32, precision="fp32", **flags)
    return eval_retrieval.Encoder(config, torch.device("cpu"))


def test_settings_come_from_sentence_transformers_files(tmp_path):
    write_model(tmp_path)
    settings = {"similarity_fn_name": "cosine", "prompts": {"query": "ba ", "passage": "ke "}}
    write_jsonl(tmp_path / "config_sentence_transformers.json", [settings])
    for pooling in ({"pooling_mode_mean_tokens": True}, {"pooling_mode": "mean"}):  # old and new
        write_jsonl(tmp_path / "1_Pooling/config.json", [pooling | {"include_prompt": True}])
        encoder = make_encoder(tmp_path, query_prefix="")  # given flags come first
        assert (encoder.pooling, encoder.similarity) == ("mean", "cos")
        assert encoder.prefixes == {"queries": "", "passages": "ke "}


def test_a_long_prefix_leaves_room_for_the_text():
    """It is not counted in --max_query_length and --max_passage_length, here both 32."""
    prefix, texts = "ke " * 40, ["baba keke", "didi lolo dididi"]
    encoder = make_encoder(MODEL, query_prefix=prefix, passage_prefix=prefix)
    expected = plain_vectors(MODEL, [prefix + text for text in texts])
    assert not np.allclose(*expected, atol=1e-3)
    for side in ("queries", "passages"):
        np.testing.assert_allclose(encoder.encode(texts, side), expected, atol=1e-5)


def test_finished_vectors_are_reused(tmp_path):
    """Only by the same weights; those of others are removed."""
    flags = [*EVALUATE, tmp_path / "out", "--model", write_model(tmp_path / "model")]
    retrieval(*flags)
    files = sorted(tmp_path.glob("out/vectors/passages/*/*.npy"))
    written = files[0].stat().st_mtime_ns
    files[1].unlink()  # as if the run had been interrupted
    retrieval(*flags)
    assert files[1].exists() and files[0].stat().st_mtime_ns == written
    write_model(tmp_path / "model", seed=1)
    retrieval(*flags)
    assert not files[0].exists()


# ---- evaluation and search


def test_evaluation_equals_a_plain_loop(evaluated):
    """All files that it writes agree."""
    task, found = load(BEIR), read_run(evaluated / "run.trec")
    texts = [f"{passage['title'] or ''} {passage['text']}".strip() for passage in PASSAGES]
    scores = plain_vectors(MODEL, task.queries.values()) @ plain_vectors(MODEL, texts).T
    for query_id, own in zip(task.queries, scores, strict=True):
        assert found[query_id] == pytest.approx(dict(zip(task.rows, own, strict=True)), abs=1e-4)
    rows = read_jsonl(evaluated, "per_query.jsonl")
    assert {row.pop("query_id"): row for row in rows} == evaluate_run(found, task.qrels)
    means = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    assert read_json(evaluated, "metrics.json") == pytest.approx(means)


def test_two_processes_write_the_run_file_of_one(evaluated, tmp_path):
    options = {"module": "eval_retrieval", "before": "eval_retrieval.CHUNK_SIZE = 16"}
    ended = start(*EVALUATE, tmp_path, processes=2, **options)
    assert ended.returncode == 0, ended.stderr
    assert same_file("run.trec", tmp_path, evaluated)


@pytest.mark.parametrize("index, level", [("IVF2,Flat nprobe=2", "note"), ("PCA2,Flat", "warning")])
def test_recall_of_other_indexes_is_printed(index, level, tmp_path, capfd):
    """At depth 10 and at the depth of the search, 17 beyond --top_k; a warning below .9."""
    retrieval(*EVALUATE, tmp_path, "--index", index, "--top_k", 20)
    line = rf"{level}: .* recall (\S+) at 10, (\S+) at 37"
    recalls = re.search(line, capfd.readouterr().out).groups()
    assert (min(map(float, recalls)) < 0.9) == (level == "warning")


def test_search_needs_only_output(evaluated, finetuned, tmp_path, capfd):
    """Its flags are those of an earlier evaluation or search, not those of fine-tuning."""

    def search(output, *flags):
        capfd.readouterr()
        retrieval("search", PASSAGES[50]["text"], "--output", tmp_path / output, *flags)
        found = re.findall(r"^ *(\d+\.\d{3})  (\S+)$", capfd.readouterr().out, re.MULTILINE)
        assert len(found) == 10 and found[0][1] == "d50"
        return float(found[0][0])

    shutil.copytree(evaluated, tmp_path / "evaluated")
    assert search("evaluated") > 2
    assert search("evaluated", "--similarity", "cos") <= 1.001  # given flags come first
    write_jsonl(tmp_path / "data/corpus.jsonl", PASSAGES)  # without queries
    score = search("new", "--model", MODEL, "--data", tmp_path / "data")
    assert search("new") == score
    argv = ["search", "ba", "--output", str(finetuned[1])]
    assert eval_retrieval.parse_command(argv)[2].model == RetrievalConfig().model


def test_compare_gives_differences_and_p_values(evaluated, tmp_path):
    retrieval(*BM25, tmp_path, "--data", BEIR, "--compare", evaluated / "run.trec")
    ours, theirs = (read_json(path, "metrics.json") for path in (tmp_path, evaluated))
    found = read_json(tmp_path, "compare.json")
    differences = {name: ours[name] - theirs[name] for name in ours}
    assert {name: found[name]["difference"] for name in found} == pytest.approx(differences)
    assert differences["MRR@10"] > 0.3 and found["MRR@10"]["p"] < 0.001


def test_explain_prints_the_terms_of_cls(capfd):
    retrieval("explain", "baba keke didi", "--model", MODEL)
    tokens = TOKENIZER("baba keke didi", return_tensors="pt")
    logits = AutoModelForMaskedLM.from_pretrained(MODEL)(**tokens).logits[0, 0]
    best = TOKENIZER.convert_ids_to_tokens(logits.topk(3).indices)
    coverage, told = len({"baba", "keke", "didi"} & {*best}) / 3, capfd.readouterr().out
    assert f"{coverage:.1%} of the 3 terms" in told and best[0] in told


# ---- fine-tuning, mining and commands

STEPS = ["--batch_size", 8, "--micro_batch_size", 2, "--epochs", 2, "--lr", 1e-3, "--log_every", 1]
STEPS += ["--warmup_steps", 0, "--save_every", 4, "--negatives", 2, "--max_passage_length", 32]
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
    output = FOLDER / "finetuned_on_two"
    ended = start(*finetuned[0], "--output", output, module="eval_retrieval", processes=2)
    assert ended.returncode == 0, ended.stderr
    return output


def test_loss_equals_a_loop_without_false_negatives():
    torch.manual_seed(0)
    queries, passages = torch.randn(3, 4), torch.randn(6, 4)
    false_negatives = torch.zeros(3, 6, dtype=torch.bool)
    false_negatives[0, 2] = false_negatives[2, 1] = True
    expected = 0
    for i, query in enumerate(queries):
        scores = torch.exp(passages @ query / 0.5)
        expected -= torch.log(scores[2 * i] / scores[~false_negatives[i]].sum()) / 3
    loss = eval_retrieval.contrastive_loss(queries, passages, false_negatives, 0.5)
    torch.testing.assert_close(loss, expected)


def make_step(config, encoder, step):
    """The micro-batches and false negatives of a step."""
    passages, examples, _ = eval_retrieval.load_examples(config)
    return eval_retrieval.make_step(config, encoder, passages, examples, step)


def test_cached_gradients_equal_those_of_one_big_batch(finetuned, tmp_path, monkeypatch):
    """With dropout, in a step of four micro-batches."""
    kept, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_and_keep(parameters, norm):
        kept.extend(parameter.grad.clone() for parameter in parameters)
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_keep)
    flags = [*map(str, finetuned[0]), "--steps", "1"]
    retrieval(*flags, "--output", tmp_path)
    config = eval_retrieval.parse_command(flags)[2]
    encoder = eval_retrieval.Encoder(config, torch.device("cpu")).train()
    micro_batches, false_negatives = make_step(config, encoder, 1)
    pairs = [eval_retrieval.encode_pair(encoder, batch) for batch in micro_batches]
    queries, passages = (torch.cat(vectors) for vectors in zip(*pairs, strict=True))
    loss = eval_retrieval.contrastive_loss(queries, passages, false_negatives, 1.0)
    loss.backward()
    assert len(pairs) == 4 and encoder.lm.config.hidden_dropout_prob > 0
    assert records(tmp_path, "loss")[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for cached, parameter in zip(kept, encoder.lm.base_model.parameters(), strict=True):
        assert (cached - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


def test_fine_tuning_on_two_processes_equals_one(finetuned, finetuned_on_two):
    one, two = (records(output, "grad_norm") for output in (finetuned[1], finetuned_on_two))
    for name in ("loss", "grad_norm"):
        ours, theirs = ([row[name] for row in rows] for rows in (one, two))
        assert theirs == pytest.approx(ours, rel=1e-4) and len(ours) == 10


@pytest.mark.parametrize("number, count, step", [(signal.SIGTERM, 3, 5), (signal.SIGKILL, 4, 4)])
def test_fine_tuning_resumes_exactly(number, count, step, finetuned, finetuned_on_two, tmp_path):
    """SIGTERM, here to one of two processes, is honoured at once, also between log lines."""
    flags = [*finetuned[0], "--log_every", 2, "--output", tmp_path]
    options = {"module": "eval_retrieval", "processes": 2 if number == signal.SIGTERM else 1}
    ended = start(*flags, **options, before=signal_at(number, "open", "metrics.jsonl", count))
    assert ended.returncode in (1, -number), ended.stderr
    ended = start(*flags, **options)
    assert ended.returncode == 0 and f"resuming from step {step}" in ended.stdout, ended.stderr
    unbroken = finetuned_on_two if number == signal.SIGTERM else finetuned[1]
    assert same_file("model.safetensors", tmp_path, unbroken)


def test_no_resume_with_another_model_or_data(tmp_path, capfd):
    """Names and sizes of the files are the same: only their content differs."""
    data, model = write_beir(tmp_path / "data"), write_model(tmp_path / "model")
    flags = ["finetune", *STEPS, "--steps", 1, "--model", model, "--data", data]
    flags += ["--output", tmp_path / "out"]
    retrieval(*flags)
    for name, old, new in [("qrels/train.tsv", "\td1\t", "\td2\t"), ("corpus.jsonl", "ke", "di")]:
        content = (data / name).read_text()
        (data / name).write_text(content.replace(old, new))
        assert "other content of --data" in error_of(capfd, retrieval, *flags)
        (data / name).write_text(content)
    write_model(tmp_path / "model", seed=1)
    assert "other content of --model" in error_of(capfd, retrieval, *flags)


TEXTS_ONLY = mock.Mock(tokenize=lambda texts, side, **_: texts)  # in place of an encoder


def test_known_positives_are_no_negatives(tmp_path):
    """Query i is relevant to passage i; the last two queries are equal and share their passages."""
    texts = ["lo lo lo 0", "mu mu mu 1", "ba ba ba 2", "ba ba ba 3"]
    passages = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    flags = {"data": str(write_beir(tmp_path, passages)), "negatives": 5}  # five of these four
    config = RetrievalConfig(batch_size=4, micro_batch_size=4, **flags)
    (batch,), false_negatives = make_step(config, TEXTS_ONLY, 1)
    for i, query in enumerate(batch["queries"]):
        for j, passage in enumerate(batch["passages"]):
            is_own = j == 6 * i  # the positive that the query brings
            assert false_negatives[i, j] == (query in passage and not is_own)


def test_an_epoch_has_each_query_once(finetuned):
    config = eval_retrieval.parse_command([*map(str, finetuned[0])])[2]
    epochs = [[], []]
    for step in range(1, 11):
        for batch in make_step(config, TEXTS_ONLY, step)[0]:
            epochs[step // 6].extend(batch["queries"])
    assert len(set(epochs[0])) == 40
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_each_epoch_draws_other_negatives():
    example = eval_retrieval.Example("ba", [0], np.arange(1, 100), [0])
    config = RetrievalConfig(negatives=9)
    draws = [eval_retrieval.draw_passages(config, [], example, epoch, 0) for epoch in (1, 2, 2)]
    assert set(draws[0]) != set(draws[1]) == set(draws[2])


def test_negatives_files_are_joined(tmp_path, capfd):
    """Positives in them are left out, and queries that no file names are left out and counted."""
    data = write_beir(tmp_path, num_train=3)
    one = [{"query_id": "q1", "negatives": ["d1", "d4"]}]
    two = [{"query_id": "q1", "negatives": ["d6"]}, {"query_id": "q2", "negatives": ["d2"]}]
    files = [write_jsonl(tmp_path / "1.jsonl", one), write_jsonl(tmp_path / "2.jsonl", two)]
    config = RetrievalConfig(data=str(data), negatives_file=files, negatives=1)
    _, examples, _ = eval_retrieval.load_examples(config)
    assert [list(example.positives) for example in examples] == [[1], [2]]
    assert [list(example.negatives) for example in examples] == [[4, 6], []]
    assert re.search("1 .*queries.* left out", capfd.readouterr().out)


@pytest.mark.parametrize("pooling, similarity", [("cls", "dot"), ("mean", "cos")])
def test_a_fine_tuned_folder_equals_a_plain_loop(pooling, similarity, tmp_path):
    """With a head, and without. The prefixes of fine-tuning are saved as its prompts, and used."""
    has_head, output = similarity == "dot", tmp_path / "out"
    source = write_model(tmp_path / "in", has_head, pooling, similarity)
    flags = ["--query_prefix", "ba ", "--passage_prefix", "ke ", "--model", source]
    retrieval("finetune", *STEPS, "--steps", 1, *flags, "--data", BEIR, "--output", output)
    encoder, texts = make_encoder(output), make_texts(99, longest=12)
    for side, prefix in (("queries", "ba "), ("passages", "ke ")):
        expected = plain_vectors(output, [prefix + text for text in texts], pooling, similarity)
        np.testing.assert_allclose(encoder.encode(texts, side), expected, atol=1e-5)
    saved = read_json(output, "config_sentence_transformers.json")
    assert saved["prompts"] == {"query": "ba ", "document": "ke "}


@pytest.mark.parametrize("similarity, temperature", [("dot", 1.0), ("cos", 0.05)])
def test_cosines_get_a_lower_temperature(similarity, temperature):
    config = eval_retrieval.complete_config(RetrievalConfig())
    assert eval_retrieval.plan_steps(config, similarity, 100).temperature == temperature


def test_fine_tuning_teaches_to_find(tmp_path):
    """It generalizes to other queries: each is the first words of its passage."""
    texts = make_texts(300, seed=9, longest=8)
    passages = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    data = write_beir(tmp_path / "data", passages, num_train=200)
    flags = ["--data", data, "--max_passage_length", 16]
    training = ["--batch_size", 32, "--micro_batch_size", 32, "--epochs", 15, "--lr", 2e-3]
    training += ["--negatives", 0, "--output", tmp_path / "tuned"]
    retrieval("finetune", "--model", MODEL, *flags, *training)
    found = []
    for name, model in {"before": MODEL, "after": tmp_path / "tuned"}.items():
        retrieval("evaluate", "--model", model, *flags, "--output", tmp_path / name)
        found.append(read_json(tmp_path, name, "metrics.json")["MRR@10"])
    assert found[1] > found[0] + 0.1


def test_mining_removes_positives_before_ranks_are_counted_and_answers_after(tmp_path):
    """All scores are equal, so the greatest id is first. Grade 0 is a negative."""
    passages = [{"_id": str(i), "text": f"ba {i}"} for i in range(9)]
    data = write_beir(tmp_path, passages)
    queries = [{"_id": "a", "text": "ba"}, {"_id": "b", "text": "ba", "answers": ["6", "1"]}]
    write_jsonl(data / "queries.jsonl", queries)
    (data / "qrels/train.tsv").write_text("a\t7\t2\nb\t8\t1\nb\t5\t1\nb\t4\t0\n")
    output = tmp_path / "out"
    retrieval("mine", "--model", "bm25", "--data", data, "--depth", 2, 4, "--output", output)
    found = [row["negatives"] for row in read_jsonl(output, "negatives.jsonl")]
    assert found == [["6", "5", "4"], ["4", "3"]]


PASSAGE, JUDGED = "data/corpus.jsonl", "data/qrels/test.tsv"
SETTINGS = "model/config_sentence_transformers.json"
BAD_INPUT = [  # flags, file, text added to it (of a model: its new text), what the error must say
    ("", PASSAGE, '{"_id": "d4", "text": ""}', "passage id 'd4' occurs twice"),
    ("", PASSAGE, '{"_id": "a", "text": ["b"]}', "line 71: .*text is no text"),
    ("", PASSAGE, '{"_id": "a b", "text": ""}', "the id 'a b' is empty or has white space"),
    ("", JUDGED, "q1\td1\t0.7", r"line 32.*0\.7"),
    ("", JUDGED, "q41\td41\t0", "q41 d41 has two grades"),
    ("", "model/modules.json", '[{"type": "models.Dense", "path": "2_Dense"}]', "Dense"),
    ("", "model/modules.json", '[{"type": "models.Pooling", "path": "gone"}]', "a Pooling without"),
    ("--query_prefix ba", "model/1_Pooling/config.json", '{"include_prompt": false}', "include"),
    ("", "model/sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case"),
    ("", SETTINGS, '{"similarity_fn_name": "euclidean"}', "euclidean"),
    ("", "out/run.json", '{"config": {"model": "bm25"}}', "has results of --model bm25"),
    ("--compare run.trec", "run.trec", "q1 Q0 d1 1 1 tag\n" * 2, "run.trec, line 2"),
]


@pytest.mark.parametrize("flags, name, text, message", BAD_INPUT)
def test_bad_input_gives_one_line(flags, name, text, message, tmp_path, monkeypatch, capfd):
    """Before anything is encoded. What a model's files ask for is never ignored."""
    monkeypatch.chdir(tmp_path)
    write_beir(Path("data"))
    write_model(Path("model"))
    Path(name).parent.mkdir(exist_ok=True)
    with Path(name).open("w" if name.startswith("model") else "a") as file:
        file.write(f"{text}\n")
    words = f"evaluate --data data --model model --output out {flags}".split()
    assert re.search(message, error_of(capfd, retrieval, *words))
    assert not Path("out/vectors").exists()


def test_the_recipe_starts_each_stage_from_the_same_model(tmp_path):
    """The negatives of stage 2 are those of the model of stage 1."""
    retrieval("--model", MODEL, "--data", BEIR, "--output", tmp_path, *STEPS, "--steps", 1)
    assert [*read_json(tmp_path, "table.json")] == ["bm25", "zero_shot", "stage1", "stage2"]
    names = ("zero_shot", "stage1/mined", "stage1/model", "stage2/mined", "stage2/model")
    used = [read_json(tmp_path, name, "run.json")["config"]["model"] for name in names]
    assert used == [MODEL, "bm25", MODEL, str(tmp_path / "stage1/model"), MODEL]


# ==== the README

README = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
SECTIONS = dict(section.split("\n", 1) for section in README.split("\n## ")[1:])
COMMANDS = re.findall(r"^    ((?:torchrun|python) \w+\.py.*?)(?:  #.*)?$", README, re.MULTILINE)
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def program(start):
    """The program of the README that begins like this."""
    (found,) = [text for text in PROGRAMS if text.startswith(start)]
    return found


def test_every_flag_of_the_readme_exists():
    flags = {field.name for kind in (Config, RetrievalConfig) for field in dataclasses.fields(kind)}
    others = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "help", "index"}
    assert set(re.findall(r"--([a-z]\w+)", README)) <= flags | others | {"url"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command):
    words = shlex.split(command)
    if "bow_mae.py" in words:
        config_of(*words[words.index("bow_mae.py") + 1 :])
    else:
        eval_retrieval.parse_command(words[words.index("eval_retrieval.py") + 1 :])


def test_the_commands_of_the_quick_start_run(tmp_path):
    """As they stand there, with 20 steps, and with the first 3,000 docstrings."""
    commands = re.findall(r"^    (python \w+\.py)$", SECTIONS["Quick start"], re.MULTILINE)
    assert commands == ["python bow_mae.py", "python eval_retrieval.py"]
    few = """
import bow_mae, itertools
docstrings = bow_mae.docstrings
bow_mae.docstrings = lambda versions: itertools.islice(docstrings(versions), 3000)
"""
    for module in ("bow_mae", "eval_retrieval"):
        flags = ["--steps", 20, "--warmup_steps", 1, "--precision", "fp32"]
        ended = start(*flags, module=module, before=few, small=[], cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
    assert [*read_json(tmp_path, "out/retrieval/table.json")][-1] == "stage2"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # and nothing elsewhere


def test_documents_become_passages_of_100_words(tmp_path):
    (tmp_path / "documents").mkdir()
    convert("make_corpus", tmp_path, {"documents/a.txt": "ba\n" * 150, "documents/c.txt": "ke"})
    rows = load(tmp_path / "mytexts", "").passages.to_list()  # their ids are unique
    assert [(row["title"], len(row["text"])) for row in rows] == [("a", 299), ("a", 149), ("c", 2)]


def test_the_sample_records_of_the_readme_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```\n(# \w.*?)```", SECTIONS["Your own data"], re.DOTALL):
        for name, content in re.findall(r"^# (\S+)\n((?:(?!# ).*\n)+)", block, re.MULTILINE):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(content)
    for name in ("texts.jsonl", "texts.txt"):
        config = Config(data=name)
        files = bow_mae.list_files(config)
        stream = bow_mae.open_stream(config, files)
        assert list(bow_mae.read_texts(config, files, stream)) == ["A table, by lines."]
    task = load("mydata")
    assert task.queries == {"q1": "what is csv"} and task.answers == {"q1": ["a table"]}
    with open("mydata/corpus.jsonl", "a") as corpus:
        corpus.write('{"_id": "d2", "text": "x"}\n{"_id": "d3", "text": "y"}\n')
    config = RetrievalConfig(data="mydata", train_split="test", negatives_file=["negatives.jsonl"])
    _, (example,), _ = eval_retrieval.load_examples(config)
    assert example.negatives.tolist() == [1, 2]


def test_the_training_loop_of_the_readme_teaches_the_bag_of_words():
    """The loop as it stands there, with a new model and a collator of transformers."""
    torch.manual_seed(0)
    model = bow_mae.fresh_lm(Config(model="tiny", max_length=64), TOKENIZER).train()
    rows = [TOKENIZER(text) for text in make_texts(2000, longest=6)]
    collator = transformers.DataCollatorForLanguageModeling(TOKENIZER, mlm_probability=0.3)
    loader = torch.utils.data.DataLoader(rows * 6, batch_size=64, collate_fn=collator)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    names = {"tokenizer": TOKENIZER, "model": model, "optimizer": optimizer, "loader": loader}
    exec(program("from bow_mae import"), names)
    unmasked = TOKENIZER.pad(rows[:64], return_tensors="pt")
    with torch.no_grad():
        cls = model.eval().base_model(**unmasked).last_hidden_state[:, 0]
    logits = bow_mae.mlm_head(model, cls)
    coverage = term_coverage(logits, unmasked["input_ids"], names["special"]).mean()
    assert coverage > 0.3  # by chance: 5 of 100 words


def test_the_trainer_of_the_readme_adds_the_bag_of_words_loss():
    """Its `compute_loss` alone, as a whole Trainer needs the package accelerate."""
    names = {}
    exec(program("from transformers import Trainer"), names)
    lm = random_model("mlm").lm
    batch = TOKENIZER(["baba keke lodi", "mumu"], padding=True, return_tensors="pt")
    labels = batch["input_ids"].clone()
    inputs = {**batch, "labels": labels, "input_ids": torch.full_like(labels, 4)}  # all masked
    accelerator = mock.Mock(unwrap_model=lambda model: model)
    trainer = mock.Mock(accelerator=accelerator, processing_class=TOKENIZER)
    trainer.state.global_step, trainer.state.max_steps = 1, 2  # λ is 0.55
    loss = names["BowTrainer"].compute_loss(trainer, lm, inputs)
    output = lm(**inputs)
    special = special_ids(TOKENIZER, lm.config.vocab_size)
    expected = output.loss + 0.55 * bow_loss(output.logits[:, 0], labels, special)
    torch.testing.assert_close(loss, expected)


def test_the_benchmark_of_the_readme_compares_the_objectives(tmp_path):
    (tmp_path / "bench.py").write_text(program("# bench.py"))
    command = [sys.executable, "bench.py", *SMALL, "--output", "out"]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    names = re.findall(r"^(\w+) .*x mlm \S+ \(\S+-\S+\)$", ended.stdout, re.MULTILINE)
    assert names == ["mlm", "bow", "enhanced"], ended.stderr


def convert(name, folder, files):
    """Write files into a folder and run a converter of the README there."""
    for path, content in files.items():
        (folder / path).write_text(content, encoding="utf-8", newline="")
    subprocess.run([sys.executable, "-c", program(f"# {name}.py")], cwd=folder, check=True)


def test_ms_marco_is_converted_with_titles_and_128_negatives_a_query(tmp_path):
    triples = [f"7\t0\t{i}\r\n" for i in range(1000)] + ["8\t1\t0\r\n", "8\t1\t22\r\n"]
    files = {
        "para.txt": '0\tA "quoted\u2028text\n1\tÖl\n22\tc\n',
        "para.title.txt": "22\tTitle of 22\n0\t-\n",
        "queries.train.tsv": "7\twhy, naïvely?\n8\t東京\n",
        "queries.dev.small.tsv": "9\tdev\n",
        "qrels.train.tsv": "7\t0\t0\t1\n8\t0\t1\t1\n",
        "qrels.dev.small.tsv": "9\t0\t22\t1\n",
        "qidpidtriples.train.full.2.tsv": "".join(triples),
    }
    convert("ms_marco", tmp_path, files)
    many, few = (row["negatives"] for row in read_jsonl(tmp_path, "negatives.jsonl"))
    assert len(set(many)) == 128 and max(many) > 900 and few == [0, 22]
    task = load(tmp_path, "train")
    assert task.passages["title"][:] == ["", "", "Title of 22"]
    assert task.queries == {"7": "why, naïvely?", "8": "東京"}
    assert task.qrels == {"7": {"0": 1}, "8": {"1": 1}}


def test_dpr_is_converted_with_answers_positives_and_negatives(tmp_path):
    """A question without a hard negative is dropped."""
    files = {"psgs_w100.tsv": 'id\ttext\ttitle\n1\t"Say ""ö"", now"\t"T"\n2\tb\tU V\n'}
    for split in ("dev", "test"):
        files[f"nq-{split}.qa.csv"] = 'who "x"?\t[\'O\\\'Neil\', "Zoë"]\n"a ""b"""\t[\'c\']\n'
    convert("dpr_corpus", tmp_path, files)
    record = {"question": "q [{,}] é", "answers": ["1"], "positive_ctxs": [{"passage_id": "1"}] * 2}
    hard = {"hard_negative_ctxs": [{"psg_id": "2", "text": '}, {"' * 300_000}]}  # over a piece
    records = [record | hard, record | {"hard_negative_ctxs": []}, record | hard]
    convert("dpr_train", tmp_path, {"biencoder-nq-train.json": json.dumps(records, indent=4)})
    rows = read_jsonl(tmp_path, "negatives.jsonl")
    assert rows[0] == {"query_id": "train:1", "negatives": ["2"]} and len(rows) == 2
    task = load(tmp_path, "test")
    assert task.queries == {"test:1": 'who "x"?', "test:2": 'a "b"'} and not task.qrels
    assert task.answers == {"test:1": ["O'Neil", "Zoë"], "test:2": ["c"]}
    assert eval_retrieval.passage_texts(task.passages, [0, 1]) == ['T Say "ö", now', "U V b"]
    assert load(tmp_path, "train").qrels == {"train:1": {"1": 1}, "train:3": {"1": 1}}


def test_tevatron_is_converted_with_passages_told_apart_by_their_text(tmp_path):
    one, two, three = ({"docid": "0", "title": t, "text": "ß\u2028"} for t in ("a", "b", None))
    rows = [
        {"query": "q", "positive_passages": [one], "negative_passages": [two, three]},
        {"query": "q", "positive_passages": [two], "negative_passages": []},
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    convert("tevatron", tmp_path, {"train.jsonl": "".join(lines)})
    assert load(tmp_path, "train").passages["title"][:] == ["a", "b", ""]
    config = RetrievalConfig(data=str(tmp_path), negatives_file=[f"{tmp_path}/negatives.jsonl"])
    _, examples, _ = eval_retrieval.load_examples(config)
    assert [example.negatives.tolist() for example in examples] == [[2], []]  # two is relevant to q
