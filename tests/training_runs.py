"""Small training runs that the tests share, and what two of them must have in common."""

import json
import math
import os

import numpy as np
import pytest
import torch

import train
from core.dataset import Dataset, batches
from core.evaluation import scores
from helpers import call, in_order
from model import load

SMALL = ("--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=4", "--warmup_iters=2",
         "--eval_interval=5", "--eval_iters=2", "--log_interval=1", "--device=cpu", "--dtype=float32")
SHAPE = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
HARD = ("--dropout=0.2", "--gradient_accumulation_steps=2", "--max_iters=12", "--lr_decay_iters=12")  # to resume


def fit(out, data, *arguments):
    """train.py's exit code."""
    return call(train, f"--out_dir={out}", f"--dataset={data}", *SMALL, *arguments)


def log_of(out, *splits):
    """The records of log.jsonl, each line checked; without what depends on the clock."""
    records = [json.loads(line, parse_constant=pytest.fail) for line in (out / "log.jsonl").read_text().splitlines()]
    for record in records:
        assert type(record["step"]) is int and record["split"] in ("train", "val", "test")
        for key in ("seconds", "tokens_per_second", "matmul_share"):
            assert (key in record) == (record["split"] == "train" or key == "seconds" and "whole" in record)
            record.pop(key, None)
    return [record for record in records if not splits or record["split"] in splits]


def assert_same(a, b):
    """Nested tensors and plain values, equal to the bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_runs(a, b):
    """Two runs that ended alike: weights, optimizer, random stream, best weights, and every line of the log."""
    for name in ("ckpt.pt", "best.pt"):
        one, other = (torch.load(out / name, weights_only=True) for out in (a, b))
        assert one.keys() == other.keys()
        for checkpoint in (one, other):
            checkpoint.pop("settings")  # out_dir, init_from
            checkpoint["state"].pop("seconds")
        assert_same(one, other)
    assert log_of(a) == log_of(b)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def scores_of(record):
    """A record without what it says of the mechanism."""
    return {key: value for key, value in record.items() if key not in ("stats", "work_per_token", "work")}


def evaluate_again(out, data, split):
    """What a plain loop over a whole split gives for best.pt."""
    model, _ = load(out / "best.pt")
    data, total, seen, right, p, labels = Dataset(data), 0.0, 0, 0, [], []
    text_lengths = np.sort(np.diff(data.offsets(split))) if data.kind == "classify" else []
    with torch.no_grad():
        for x, y, lengths in in_order(batches(data, split, 4, 16)):
            logits, _ = model(x, y, lengths)
            flat = logits.flatten(0, -2), y.flatten()
            each = torch.nn.functional.cross_entropy(*flat, ignore_index=-1, reduction="sum")
            total, seen = total + each.item(), seen + (y != -1).sum().item()
            right += sum(p.argmax() == token for p, token in zip(*flat) if token != -1).item()
            if data.kind == "classify":
                p.append(logits.softmax(-1)[:, 1])
                labels.append(y)
    if data.kind == "classify":
        assert seen == data.meta["splits"][split]["documents"]
        p, labels = torch.cat(p), torch.cat(labels)
        groups = by_length((p > 0.5) == labels, text_lengths)
        return approximately({"loss": total / seen, **scores(p, labels)}) | {"accuracy_by_length": groups}
    assert seen == data.meta["splits"][split]["tokens"] - 1
    return approximately({"loss": total / seen, "accuracy": right / seen, "bits_per_byte": total / seen / math.log(2)})


def by_length(right, lengths):
    """`accuracy_by_length` of texts that are sorted by length: whether each is classified correctly, and its tokens."""
    rows, count, first = [], len(lengths), 0
    for part in (1, 2, 3, 4):  # a group ends with the text at its share of all, and all others of that length
        longest = lengths[math.ceil(part * count / 4) - 1]
        last = sum(length <= longest for length in lengths)
        if last > first:
            rows.append([lengths[first], longest, last - first, sum(right[first:last]).item() / (last - first)])
        first = last
    return rows


def approximately(scores):
    return {key: pytest.approx(value, rel=1e-6) for key, value in scores.items()}
