"""Fixtures and options that all tests share."""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of scripts started here, too: all that runs here is small
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch

from core import hardware, runs
from core.config import run_main
from data.recall import prepare as recall_prepare
from data.toy import prepare as toy_prepare
from helpers import ROOT, call, review, write_bytes, write_reviews

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--attention", default="",
                     help="the one mechanism that tests/attention/test_contract.py holds to the laws")


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


@pytest.fixture(scope="session")
def recall(tmp_path_factory):
    """Associative recall as in data/recall, 16 tokens a sequence: train 60, val 10, test 10."""
    folder = tmp_path_factory.mktemp("data") / "recall"
    sizes = ("--pairs=4", "--queries=4", "--length=16", "--keys=6", "--values=3", "--train=60", "--val=10", "--test=10")
    recall_prepare.main(["--out_dir", str(folder), *sizes])
    return folder


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
            run_main(lambda: call(module, *arguments))
        line = capsys.readouterr().err
        assert left.value.code == 2 and line.count("\n") == 1 and line.endswith("\n"), line
        return line.strip()

    return check


def fault_counts():
    """The counts of `make test-faults` in this process, {} in other tests."""
    faults = sys.modules.get("fault_injection")
    return faults.COUNTS if faults and faults.MANY else {}


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["faults"] = fault_counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Add the counts of a process of pytest-xdist, which has ended, to those of this one."""
    if counts := getattr(node, "workeroutput", {}).get("faults"):
        import fault_injection

        for row, numbers in counts.items():
            fault_injection.count(row, **numbers)


def pytest_terminal_summary(terminalreporter, exitstatus):
    """After `make test-faults`: print what was tried and what was lost as a table, and write results/faults.json."""
    counts = {} if exitstatus else fault_counts()
    if not counts:
        return
    path = ROOT / "results" / "faults.json"
    order = list(json.loads(path.read_text("utf-8"))) if path.exists() else []  # the same rows in the same order
    counts = {row: counts[row]
              for row in [*(row for row in order if row in counts), *(row for row in counts if row not in order)]}
    runs.write_text(path, json.dumps(counts, indent=1) + "\n")
    lines = ["", "| fault | injected | runs resumed | refused, with one sentence | bytes lost |",
             "|---|---|---|---|---|"]
    lines += [f"| {row} | {n['injected']:,} | {n['resumed']:,} | {n['refused']:,} | {n['lost']:,} |"
              for row, n in counts.items()]
    terminalreporter.write_line("\n".join(lines))
