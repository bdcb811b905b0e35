"""`bench.py load` measures each setting on an idle machine and beside busy processes, and leaves no process behind."""

import json
import os
import sys

import pytest

import bench
import bench_load
from helpers import call

SMALL = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2", "--seconds=0.05",
         "--rounds=2",
         "--processes=1", "--dtype=float32")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it measures libgomp, which PyTorch has on Linux")


@pytest.fixture
def settings(monkeypatch):
    """A function that sets the tool's settings; all are put back after the test."""
    for key, value in list(vars(bench_load).items()):
        if type(value) in (str, int, float, list):
            monkeypatch.setattr(bench_load, key, value)
    return lambda **values: vars(bench_load).update(values)


def children():
    """Process ids of this process's children."""
    found = set()
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/children") as file:
            found |= {int(number) for number in file.read().split()}
    return found


def test_load(tmp_path, settings, capsys):
    before, file = children(), tmp_path / "figures.json"
    assert call(bench, "load", *SMALL, '--spin_counts=["", "passive"]', f"--results={file}") is None
    assert children() == before
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "--" not in line]
    saved = json.loads(file.read_text("utf-8"))
    assert len(lines) == 1 + 4 * 2 == 1 + len(saved["rows"]) and saved["dtype"] == "float32"
    assert [row["spin count"] for row in saved["rows"]] == 4 * ["unset", "passive"]
    assert len(saved["rounds"]) == 4 * 2 * 3 and all(len(each["tokens/s"]) == 2 and min(each["tokens/s"]) > 0
                                                     for each in saved["rounds"])


def test_shares(settings):
    """Of the first setting's idle speed; for sampling, of that with all threads."""
    settings(spin_counts=["", "9"], busy=["python"])
    speeds = {"train": 1000, "1": 50, "all": 100, "faster": 98}
    measured = {(spin, load, what): [1.0, speed / (1 + (spin == "9")) / (1 if load == "idle" else 4), 10.0**9]
                for spin in ("", "9") for load in ("idle", "python") for what, speed in speeds.items()}
    rows = {(row["what"], row["spin count"]): row for row in bench_load.table(measured)}
    assert rows["training", "unset"]["of first, idle"] == 1
    assert rows["training", "9"]["of first, beside python"] == 0.125
    assert rows["sampling, 1 thread", "unset"]["of first, idle"] == 0.5
    assert rows["sampling, faster of both", "9"]["beside python, tokens/s"] == pytest.approx(98 / 8)
    assert rows["sampling, faster of both", "9"]["of first, idle"] == pytest.approx(0.49)


def test_environment(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    made = [bench_load.environment(spin) for spin in ("", "20", "passive")]
    assert [(one.get("GOMP_SPINCOUNT"), one.get("OMP_WAIT_POLICY")) for one in made] == [
        ("300000", None), ("20", None), (None, "passive")]


@pytest.mark.parametrize("argument, says", [
    ('--spin_counts=["fast"]', "spin_counts: expected numbers, '' or 'passive', got 'fast'"),
    ('--spin_counts=["1", "1"]', "spin_counts: expected each once"), ('--busy=["gcc"]', "unknown busy 'gcc'"),
    ("--rounds=0", "rounds must be at least 1"), ("--repeat=3", "unknown key 'repeat'")])
def test_refused(refused, settings, argument, says):
    assert says in refused(bench, "load", argument)


def test_a_worker_that_fails(refused, settings):
    before = children()
    assert "ended before its time" in refused(bench, "load", *SMALL, "--n_head=3", '--spin_counts=["5"]', "--busy=[]")
    assert children() == before
