"""What the tests share: small prepared folders, and scripts called inside this process."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of scripts started here, too: all that runs here is small
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch

import hardware
import runs
from configurator import run
from data import common
from data.toy import prepare as toy_prepare

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--attention", default="", help="the one mechanism that tests/test_contract.py holds to the laws")


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements of the largest tensor that anything makes within it: `elements`."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def tokens_of(texts):
    """(bytes of all texts, each after the mark 0, and their offsets)"""
    parts = [b"\0" + text.encode() for text in texts]
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0] + [len(part) for part in parts])


def write_bytes(folder, **texts):
    """A folder of running text, {split: str}, as bytes without a mark; like data/enwik8's."""
    arrays = {split: np.frombuffer(text.encode(), np.uint8) for split, text in texts.items()}
    meta = {"name": "text", "kind": "lm", "tokenizer": "bytes", "vocab_size": 256, "mark": None, "lossless": True,
            "partial": False, "options": {}, "source": {"file": "text"}, "split_rule": "as given"}
    common.write(folder, meta, {split: {"tokens": array, "bytes": len(array)} for split, array in arrays.items()})
    return folder


def write_reviews(folder, held_out=1, **splits):
    """A folder of reviews, {split: [(text, label), ...]}, as bytes; like data/imdb_bytes."""
    meta = {"name": "reviews", "kind": "classify", "tokenizer": "bytes", "vocab_size": 256, "mark": 0, "lossless": True,
            "classes": ["negative", "positive"], "partial": False, "options": {}, "source": {"file": "reviews"},
            "split_rule": "as given"}
    made = {}
    for split, rows in splits.items():
        tokens, offsets = tokens_of([text for text, _ in rows])
        made[split] = {"tokens": tokens, "offsets": offsets, "documents": len(rows), "bytes": len(tokens)}
        if split == "unsup":
            made[split]["held_out_documents"] = held_out
        else:
            made[split]["labels"] = [label for _, label in rows]
    common.write(folder, meta, made)
    return folder


def review(n):
    """Review number n of a made-up set: (text, label); longer ones and shorter ones of both labels."""
    return f"{n}: " + "so good " * (n % 2) + "a film " * (n * 7 % 11), n % 2


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """data/toy, prepared."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy_prepare.main(["--out_dir", str(folder)])
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Source text of the standard library as bytes, as in data/stdlib: train 50,000, val 500, test 500."""
    source = Path(argparse.__file__).read_text("utf-8").encode("ascii", "replace").decode()
    return write_bytes(tmp_path_factory.mktemp("data") / "text", train=source[:50000], val=source[50000:50500],
                       test=source[51000:51500])


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """Reviews: train 23, val 9, test 9, unsup 5 of which the last is held out."""
    return write_reviews(tmp_path_factory.mktemp("data") / "reviews", train=[review(n) for n in range(23)],
                         val=[review(n) for n in range(30, 39)], test=[review(n) for n in range(50, 59)],
                         unsup=[(f"unlabelled {n}", None) for n in range(5)])


def call(module, *arguments):
    """What module.main() returns for these arguments. Its settings, train.py's and the signals are put back afterwards."""
    modules = {module, *([sys.modules["train"]] if "train" in sys.modules else [])}  # compare.py sets those of train.py
    before, line = {each: dict(vars(each)) for each in modules}, sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    runs.asked.clear()
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    try:
        return module.main()
    finally:
        sys.argv = line
        for each, values in before.items():
            vars(each).update(values)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def quick(monkeypatch):
    """The machine's rate is not measured: float32 for all, and no second lost on it."""
    monkeypatch.setattr(hardware, "matmul_rate", lambda device, dtype: 1e9)


@pytest.fixture
def refused(capsys, monkeypatch):
    """A function of a module and its arguments: they must be refused with exit code 2; gives the one line of stderr."""

    def check(module, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py"])
        with pytest.raises(SystemExit) as left:
            run(lambda: call(module, *arguments))
        line = capsys.readouterr().err
        assert left.value.code == 2 and line.count("\n") == 1 and line.endswith("\n"), line
        return line.strip()

    return check


def pytest_terminal_summary(terminalreporter, exitstatus):
    """After `make test-faults`: what was tried and what was lost, as a table and in results/faults.json."""
    faulty = sys.modules.get("faulty")
    if exitstatus or not faulty or not faulty.MANY or not faulty.COUNTS:
        return
    runs.write_text(ROOT / "results" / "faults.json", json.dumps(faulty.COUNTS, indent=1) + "\n")
    lines = ["", "| fault | injected | runs resumed | refused, with one sentence | bytes lost |", "|---|---|---|---|---|"]
    lines += [f"| {row} | {n['injected']:,} | {n['resumed']:,} | {n['refused']:,} | {n['lost']:,} |"
              for row, n in faulty.COUNTS.items()]
    terminalreporter.write_line("\n".join(lines))
