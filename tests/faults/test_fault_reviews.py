"""Faults of a set of reviews, counted like the other faults: flipped labels and offsets, and a forged meta.json."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from fault_injection import count, several
from fault_runs import assert_nothing_lost, fit, half_done, unbroken_run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
FILES = [f"{split}{part}.bin" for split in ("train", "val") for part in ("", ".offsets", ".labels")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, reviews):
    """The unbroken run."""
    return unbroken_run(tmp_path_factory.mktemp("whole"), reviews)


@pytest.fixture
def data(reviews, tmp_path):
    """A copy of the data that may be spoiled."""
    return Path(shutil.copytree(reviews, tmp_path / "data"))


def test_a_flipped_byte_at_the_start(whole, tmp_path, data):
    """Of tokens, offsets or labels: a new run and a resumed one are refused."""
    out, row, draw = half_done(whole, data,
                               tmp_path / "out"), "a byte of tokens, offsets or labels flipped", random.Random(9)
    for n in range(several(6, 60)):
        name = FILES[n % len(FILES)]
        good = (data / name).read_bytes()
        place, mask = draw.randrange(len(good)), draw.choice([1, draw.randrange(1, 256)])
        (data / name).write_bytes(good[:place] + bytes([good[place] ^ mask]) + good[place + 1 :])
        code, words = fit(out if n % 2 else tmp_path / "new", data)
        assert code == 2 and re.search(f"{name}( is damaged|: expected sha256)",
                                       words) and not (tmp_path / "new").exists(), words
        (data / name).write_bytes(good)
        count(row, refused=1)
    assert_nothing_lost(row, whole, out, data)


@pytest.mark.parametrize("name", ["train.labels.bin", "train.offsets.bin"])
def test_a_flipped_byte_during_training(whole, tmp_path, data, name):
    """Seen before a batch is made of it: the run stops, saved, and once the file is back it goes on."""
    out, row = half_done(whole, data, tmp_path / "out"), "a byte of tokens, offsets or labels flipped"
    good = (data / name).read_bytes()
    bad = bytes([good[0] ^ 1]) + good[1:]
    code, words = fit(out, data, faults=[("at_batch", (27, "overwrite", str(data / name), bad))])
    assert code == 2 and re.search(f"{name}: expected sha256 .* found .*; stopped at step 13, saved: then go on with",
                                   words), words
    assert torch.load(out / "ckpt.pt")["state"]["step"] == 13
    (data / name).write_bytes(good)
    count(row, refused=1)
    assert_nothing_lost(row, whole, out, data)


def forged(meta):
    """[what is changed in a meta.json], each a lie that would crash a process or train on nonsense."""
    chars = {"tokenizer": "chars", "mark": None, "vocab_size": 60, "vocab": [chr(n) for n in range(60)]}
    changes = [{"dtype": dtype}
               for dtype in ("object", "bool", "float64", "S4", "U2", "complex128", "datetime64", None)]
    changes += [{"vocab_size": 10**12}, {"vocab_size": 255}, {"mark": 256}, {"mark": -1}, {"classes": ["a", "a"]},
                {"splits": []}]
    train, none = meta["splits"]["train"], "0" * 64
    for change in ({"tokens": -1}, {"documents": 10**6}, {"sha256": none}, {"labels_sha256": none},
                   {"offsets_sha256": None}):
        changes.append({"splits": {**meta["splits"], "train": {**train, **change}}})
    without = {key: value for key, value in train.items() if key != "labels_sha256"}
    return [*changes, chars, {"splits": {**meta["splits"], "train": without}}]


def test_a_forged_meta(whole, tmp_path, data):
    out, row = half_done(whole, data, tmp_path / "out"), "a forged meta.json"
    good = (data / "meta.json").read_bytes()
    for change in forged(json.loads(good))[:: several(3, 1)]:
        (data / "meta.json").write_text(json.dumps({**json.loads(good), **change}))
        code, words = fit(out, data)
        assert code == 2 and re.match("train.py: .*(is damaged|expected .* found|other data)", words), words
        count(row, refused=1)
    (data / "meta.json").write_bytes(good)
    assert_nothing_lost(row, whole, out, data)
