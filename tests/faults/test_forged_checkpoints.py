"""Forged checkpoints, sealed like real ones: each is refused with one sentence, soon, by every script that reads it."""

import hashlib
import io
import json
import os
import zipfile

import pytest
import torch
from fault_injection import count
from fault_runs import INTERVAL, line
from test_forged_files import special, within
from test_sample import CHARS, MARKED, REVIEWS, write_checkpoint

import sample
import train
from core.checkpoint import SEAL, beside, check_whole, save
from core.config import UserError
from core.tokenizer import UNKNOWN
from helpers import call
from model import load

pytestmark = pytest.mark.usefixtures("quick")
ROW = "forged checkpoints: types, sizes, ranges, numbers that are not finite"


@pytest.fixture
def forge(tmp_path):
    """A function that saves a checkpoint with something replaced, {"a.b": value}, and loads it; gives the one
    sentence."""
    whole = torch.load(write_checkpoint(tmp_path / "whole", MARKED) / "best.pt", weights_only=True)

    def forged(changes):
        checkpoint = {**whole, "model": dict(whole["model"]), "model_config": dict(whole["model_config"])}
        for place, value in changes.items():
            *outer, last = place.split("/")
            inside = checkpoint
            for key in outer:
                inside = inside[key]
            inside[last] = value
        (tmp_path / "out").mkdir(exist_ok=True)
        save(tmp_path / "out" / "best.pt", checkpoint)
        with within(20), pytest.raises(UserError) as error:
            sample.read_run(tmp_path / "out" / "best.pt")
        said = str(error.value)
        assert str(tmp_path / "out" / "best.pt") in said and "\n" not in said and len(said) < 600, said
        count(ROW, refused=1)
        return said

    return forged


W = "model/layers.0.attention.proj.weight"


@pytest.mark.parametrize("changes, said", [
    ({"model_config/ngram": 16, "model_config/ngram_rows": 2**26}, "ngrams.tables.0.weight"),
    ({"model_config/ngram": 10**9}, "ngram must be 0 or from 2 to 16"),
    ({"model_config/n_layer": 10**6}, "n_layer"), ({"model_config/n_layer": 10**30}, "n_layer"),
    ({"model_config/n_embd": 2 * 10**6}, "embedding.weight"), ({"model_config/vocab_size": 10**9}, "embedding.weight"),
    ({"model_config/n_class": 10**9}, "head.weight"), ({"model_config/block_size": 10**12}, "block_size"),
    ({"model_config/n_layer": True}, "n_layer"), ({"model_config/n_layer": 2.0}, "n_layer"),
    ({"model_config/bias": 1}, "bias"),
    ({"model_config/dropout": float("nan")}, "dropout"), ({"model_config/dropout": "0"}, "dropout"),
    ({"model_config/attention": 3}, "attention"), ({"model_config/attention": ["dense"]}, "attention"),
    ({"model_config/options": [1]}, "options"), ({"model_config/options": {"window": "x"}}, "window"),
    ({"model_config/model": None}, "model"), ({"model_config": None}, "model_config"),
    ({"model_config": [1]}, "model_config"),
    ({"model": None}, "model"), ({"model": [1]}, "model"), ({W: 3}, "proj.weight"), ({W: [1.0]}, "proj.weight"),
    ({W: torch.zeros(16, 16, dtype=torch.int8)}, "int8"),
    ({W: torch.zeros(16, 16, dtype=torch.complex64)}, "complex64"),
    ({W: torch.zeros(16, 16).to_sparse()}, "sparse"), ({W: torch.zeros(3, 16)}, "the shape"),
    ({W: torch.full((16, 16), torch.nan)}, "not finite"), ({W: torch.full((16, 16), -torch.inf)}, "not finite"),
    ({W: torch.zeros(1).expand(16, 16)}, "proj.weight"), ({"model/more": torch.zeros(1)}, "more"),
    ({"settings": [1]}, "settings"), ({"settings": None}, "settings"),
])
def test_model(forge, changes, said):
    assert said in forge(changes)


def test_a_large_model_that_the_tensors_do_not_hold(forge):
    """Weights of 10^10 numbers that take no room in the file: the model is not built."""
    wide = torch.zeros(1).expand(256, 10**6)
    assert "embedding.weight" in forge({"model/embedding.weight": wide, "model/head.weight": wide,
                                        "model_config/n_embd": 10**6})
    narrow = torch.zeros(1, 200_000)
    changes = {"model/embedding.weight": narrow, "model/head.weight": narrow, "model_config/n_embd": 200_000}
    assert "n_embd" in forge({**changes, "model_config/vocab_size": 1})


@pytest.mark.parametrize("meta", [
    None, [1], 3, {}, {"tokenizer": "runes"}, {**MARKED, "vocab_size": "256"}, {**MARKED, "vocab_size": 10**9},
    {**MARKED, "vocab_size": 255}, {**MARKED, "mark": "0"}, {**MARKED, "mark": 256}, {**MARKED, "mark": -1},
    {**MARKED, "mark": 0.5},
    {**CHARS, "vocab_size": 256}, {**CHARS, "vocab_size": 256, "vocab": [3] * 256},
    {**CHARS, "vocab_size": 256, "vocab": "a" * 256},
    {**CHARS, "vocab_size": 256, "vocab": None}, {"tokenizer": ["bytes"], "vocab_size": 256, "mark": None},
    {**MARKED, "tokenizer": "bpe", "pattern": "(", "ranks": ["YQ=="] * 255},
    {**MARKED, "tokenizer": "bpe", "pattern": 3, "ranks": [3] * 255},
    {**MARKED, "tokenizer": "bpe", "pattern": "a", "ranks": None},
    {**MARKED, "tokenizer": "bpe", "pattern": "a", "ranks": ["%"] * 255},
])
def test_meta(forge, meta):
    forge({"meta": meta})


@pytest.mark.parametrize("classes", [[], ["a"], ["a", "b", "c"], [1, 2], "ab", None, {"a": 1}])
def test_classes(tmp_path, classes):
    out = write_checkpoint(tmp_path / "out", REVIEWS)
    checkpoint = torch.load(out / "best.pt", weights_only=True)
    save(out / "best.pt", {**checkpoint, "meta": {**REVIEWS, "classes": classes}})
    with pytest.raises(UserError, match="classes"):
        sample.read_run(out / "best.pt")
    count(ROW, refused=1)


def test_vocabularies_that_are_right_are_read(tmp_path):
    meta = {"tokenizer": "words", "vocab_size": 4, "mark": 0, "vocab": ["<s>", UNKNOWN, "a", "film"]}
    for n, each in enumerate((meta, MARKED, REVIEWS, CHARS)):
        assert sample.read_run(write_checkpoint(tmp_path / str(n),
                                                each) / "best.pt")[1].vocab_size == each["vocab_size"]


# ---- what is no regular file -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_no_regular_file(tmp_path, refused, kind):
    out = write_checkpoint(tmp_path / "out", MARKED, "ckpt.pt")
    special(out / "best.pt", kind)
    with within(20):
        assert "best.pt: expected a regular file" in refused(sample, f"--out_dir={out}")
        with pytest.raises(UserError, match="expected a regular file"):
            check_whole(out / "best.pt")
        assert "ckpt.pt" not in beside(out / "ckpt.pt")
    count(ROW, refused=1)


def test_larger_than_memory(tmp_path, refused):
    """A sparse file of 16 TiB is not read to its end."""
    out = write_checkpoint(tmp_path / "out", MARKED)
    try:
        os.truncate(out / "best.pt", 2**44 - 2**16)
    except OSError:
        pytest.skip("this disk has no files of that size")
    with within(20):
        assert "best.pt" in refused(sample, f"--out_dir={out}")


def test_packed(tmp_path, refused):
    """torch.save packs nothing; what is packed may unpack to more than any memory."""
    out = write_checkpoint(tmp_path / "out", MARKED)
    packed = io.BytesIO()
    with zipfile.ZipFile(out / "best.pt") as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part.filename))
    seal = SEAL + hashlib.sha256(packed.getvalue()).hexdigest().encode()
    (out / "best.pt").write_bytes(packed.getvalue() + seal)
    assert "packed" in refused(sample, f"--out_dir={out}")
    count(ROW, refused=1)


# ---- the state of a run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory, text):
    """The folder of a run that may go on from step 5."""
    out = tmp_path_factory.mktemp("half") / "out"
    call(train, *line(out, text, f"--max_iters={INTERVAL}"))
    return out


NAME = "layers.0.attention.proj.weight"


def moments(**changes):
    def change(checkpoint):
        mine = {**checkpoint["optimizer"][NAME], **changes}
        return {"optimizer": {**checkpoint["optimizer"], NAME: {k: v for k, v in mine.items() if v is not None}}}
    return change


def entry(part, key, value):
    return lambda checkpoint: {part: {**checkpoint[part], key: value}}


@pytest.mark.parametrize("change", [
    *(entry("state", "step", bad) for bad in (-5, 2.5, "x", None, True, 10**30, float("nan"))),
    *(entry("state", key, bad) for key in ("evaluated", "best_step", "worse") for bad in ("x", 2.5, -5, None)),
    *(entry("state", key, bad) for key in ("best", "seconds", "work") for bad in ("x", None, float("nan"), [1])),
    entry("state", "seconds", -1.0),
    entry("state", "work", float("inf")), lambda c: {"state": [1]}, lambda c: {"state": {}},
    moments(exp_avg=torch.zeros(16, 16, dtype=torch.int8)), moments(exp_avg=torch.zeros(16, 16, dtype=torch.float16)),
    moments(exp_avg_sq=torch.full((16, 16), -1.0)), moments(exp_avg_sq=torch.full((16, 16), torch.nan)),
    moments(exp_avg=torch.zeros(16)), moments(exp_avg=None), moments(exp_avg=3), moments(more=torch.zeros(16, 16)),
    moments(step=torch.tensor(-1.0)), moments(step=torch.tensor(torch.nan)), moments(step=torch.zeros(16, 16)),
    moments(step=torch.tensor(1, dtype=torch.int8)),
    moments(step=3), lambda c: {"optimizer": [1]}, lambda c: {"optimizer": None},
    lambda c: {"optimizer": {**c["optimizer"], NAME: None}}, lambda c: {"scaler": [1]}, lambda c: {"scaler": "x"},
    lambda c: {"random": []}, lambda c: {"random": [3]}, lambda c: {"random": None}, lambda c: {"random": [{}]},
    lambda c: {"random": [{"random": torch.zeros(3)}]}, lambda c: {"random": [{"random": "x"}]},
    lambda c: {"device": 3}, lambda c: {"dtype": ["float32"]},
])
def test_state(half, text, tmp_path, refused, change):
    """Resuming is refused, and nothing in the folder is changed."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("best.pt", "log.jsonl"):
        (out / name).write_bytes((half / name).read_bytes())
    checkpoint = torch.load(half / "ckpt.pt", weights_only=True)
    save(out / "ckpt.pt", {**checkpoint, **change(checkpoint)})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with within(60):
        said = refused(train, *line(out, text, "--init_from=resume"))
    assert "ckpt.pt" in said and len(said) < 600, said
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"} == before
    count(ROW, refused=1)


def test_the_state_that_is_right_goes_on(half, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("best.pt", "log.jsonl", "ckpt.pt"):
        (out / name).write_bytes((half / name).read_bytes())
    assert not call(train, *line(out, text, "--init_from=resume", f"--max_iters={INTERVAL + 1}"))
    assert load(out / "ckpt.pt")[1]["state"]["step"] == INTERVAL + 1
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["whole"]
