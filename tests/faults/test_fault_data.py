"""Data that is not what it was, at the start of a run or during it."""

import json
import os
import re

import pytest
import torch
from fault_injection import count, several
from fault_runs import assert_nothing_lost, fit, half_done, lost

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork, and their signals")


def test_data_that_is_not_what_it_was_at_the_start(whole, text, tmp_path, data):
    out, row = half_done(whole, text,
                         tmp_path / "out"), "data cut, empty, replaced or of another vocabulary, at the start"
    good = {name: (data / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}
    tokens, meta = good["train.bin"], json.loads(good["meta.json"])
    del meta["splits"]["train"]["sha256"]
    cases = [("train.bin", tokens[:-1], "expected 50,000 bytes, found 49,999"),
             ("train.bin", b"", "expected 50,000 bytes, found 0"),
             ("val.bin", b"", "expected 500 bytes, found 0"), ("train.bin", None, "expected 50,000 bytes, found 0"),
             ("train.bin", tokens[::-1], "expected sha256 [0-9a-f]{64}, as its meta.json says, found [0-9a-f]{64}"),
             ("train.bin", tokens[:-1] + b"!", "expected sha256"),
             ("val.bin", good["val.bin"][:-1] + b"!", "expected sha256"),
             ("meta.json", good["meta.json"][:-100], "meta.json is damaged"),
             ("meta.json", b"", "meta.json is damaged"),
             ("meta.json", json.dumps({**meta, "vocab_size": 300}).encode(), "meta.json is damaged"),
             ("meta.json", json.dumps({**meta, "source": {"file": "other"}}).encode(),
              "other data .*source: expected .*, found"),
             ("meta.json", json.dumps({**meta, "tokenizer": "chars", "vocab": ["a", "b"], "vocab_size": 2}).encode(),
              "other data .*tokenizer: expected 'bytes', found 'chars'"),
             ("meta.json", json.dumps(meta).encode(),
              "other data .*sha256 of train: expected '[0-9a-f]{64}', found None")]
    for name, content, said in cases:
        (data / name).unlink() if content is None else (data / name).write_bytes(content)
        code, words = fit(out, data)
        assert code == 2 and re.search(said, words), words
        (data / name).write_bytes(good[name])
        count(row, refused=1)
    assert_nothing_lost(row, whole, out, data)


CHANGES = [("truncate", (1000,)), ("truncate", (0,)), ("replace", (bytes(50000),)), ("replace", (b"short",)),
           ("overwrite", (b"other",)), ("remove", ())]


@pytest.mark.parametrize("change, details", CHANGES[:: several(2, 1)])
def test_data_changed_during_training(whole, text, tmp_path, data, change, details):
    """Seen before anything of it is used: what was learnt from the right data is saved, and once it is back the run
    goes on."""
    out, row = half_done(whole, text, tmp_path / "out"), "data replaced, cut or removed during training"
    name, at = "val.bin" if change == "overwrite" else "train.bin", 13
    good = (data / name).read_bytes()
    code, words = fit(out, data, faults=[("at_batch", (27, change, str(data / name), *details))])
    assert code == 2 and re.search(f"{name}.*expected .* found .*; stopped at step {at}, saved: then go on with",
                                   words), words
    assert torch.load(out / "ckpt.pt")["state"]["step"] == at
    (data / name).write_bytes(good)
    count(row, refused=1)
    assert_nothing_lost(row, whole, out, data)


def test_data_rewritten_as_it_was(whole, text, tmp_path, data):
    faults = [("at_batch", (26, "replace", str(data / "train.bin"), (data / "train.bin").read_bytes()))]
    code, words = fit(half_done(whole, text, tmp_path / "out"), data, faults=faults)
    assert code == 0 and lost(whole, tmp_path / "out") == 0, words
