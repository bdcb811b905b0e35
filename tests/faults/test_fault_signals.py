"""SIGKILL, signals that ask, and several runs in one folder: each a few times, and many times in `make test-faults`."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from fault_injection import count, end, several
from fault_runs import MAX, assert_nothing_lost, begin, fit, half_done, line, lost

from core.meta import digest_of
from helpers import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork, and their signals")


# ---- SIGKILL, and signals that ask -------------------------------------------------------------


def kill(process, out, draw, kind, duration):
    """SIGKILL at any moment, or within the writing of a checkpoint, of which the process makes twenty pieces."""
    if kind == "any":
        process.join(draw.uniform(0, duration))
    while kind == "writing" and process.is_alive():
        if list(out.glob("*.pt.part")):
            if draw.random() < 0.5:
                time.sleep(draw.uniform(0, 0.1))
                break
            while process.is_alive() and list(out.glob("*.pt.part")):
                time.sleep(0.002)
        time.sleep(0.001)
    process.kill()


def test_sigkill(whole, text, tmp_path):
    """Within the writing of a checkpoint, at any moment, around the system calls of writing, and at any moment again:
    in turn, so that a few kills have some of each. Runs are killed and resumed until they end, one after the other,
    until there were enough kills."""
    draw, wanted, killed, inside, ended = random.Random(1), several(6, 50), 0, 0, 0
    began = time.monotonic()
    assert fit(tmp_path / "timed", text)[0] == 0 and lost(whole, tmp_path / "timed") == 0
    duration = time.monotonic() - began
    while killed < wanted:
        out, code = tmp_path / f"run{ended}", None
        while code != 0:
            kind = ("writing", "any", "call", "any")[killed % 4] if killed < wanted else "none"
            call = draw.choice(["fsync", "link", "replace"]), draw.randint(1, 12), draw.random() < 0.5
            faults = {"writing": [("slow_writes", (0.2,))], "call": [("killed_at", call)]}.get(kind, [])
            had = (out / "ckpt.pt").exists()
            process = begin(out, text, faults=faults)
            if kind in ("any", "writing"):
                kill(process, out, draw, kind, duration)
            code, said = end(process)
            assert code in (0, -signal.SIGKILL), said
            count("SIGKILL at random moments", bool(code), had and "resume: from step" in said)
            killed += bool(code)
            inside += bool(code) and bool(list(out.glob("*.pt.part")))
        gone, ended = lost(whole, out), ended + 1
        count("SIGKILL at random moments", 0, lost=gone)
        assert gone == 0
    count("of these inside the writing of a checkpoint", inside)
    print(f"{killed} kills, {inside} inside the writing of a checkpoint; {ended} runs to their end, each as the "
          "unbroken one")
    assert inside >= wanted / 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_ask(whole, text, tmp_path, number):
    draw = random.Random(int(number))
    for n in range(several(1, 6)):
        out, steps = tmp_path / str(n), draw.randint(1, MAX - 1)
        process = begin(out, text, faults=[("slow_steps", (0.02,))])
        log, line = out / "log.jsonl", f'"step": {steps}, "split": "train"'
        while not log.exists() or line not in log.read_text():
            time.sleep(0.005)
        os.kill(process.pid, number)
        asked = time.monotonic()
        code, said = end(process)
        assert code == 128 + number and re.search(r"stopped at step \d+, saved", said) and time.monotonic() - asked < 20
        assert torch.load(out / "ckpt.pt")["state"]["step"] > steps
        count(signal.Signals(number).name)
        assert_nothing_lost(signal.Signals(number).name, whole, out, text)


def test_stopped_within_a_step(whole, text, tmp_path):
    """Between the forward passes of one step: what was done of it is done again."""
    code, said = fit(tmp_path / "out", text, faults=[("at_batch", (24, "terminate"))])
    assert code == 128 + signal.SIGTERM and "stopped at step 12, saved" in said
    count("SIGTERM")
    assert_nothing_lost("SIGTERM", whole, tmp_path / "out", text)


def test_signals_as_a_user_sends_them(text, tmp_path):
    """Without any help of these tests: python train.py, and Ctrl-C."""
    command = [sys.executable, ROOT / "train.py",
               *line(tmp_path / "out", text, "--max_iters=100000", "--eval_interval=1000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = [process.stdout.readline()]
    while "step 20/" not in said[-1]:
        said.append(process.stdout.readline())
        assert said[-1], said
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "saved; go on with --init_from=resume" in rest and "Traceback" not in rest


# ---- two runs, one folder ----------------------------------------------------------------------


def test_two_runs_into_one_folder(whole, text, tmp_path):
    row = "a second run into a folder in use"
    for n in range(several(1, 5)):
        out = half_done(whole, text, tmp_path / str(n))
        first = begin(out, text, faults=[("slow_steps", (0.5,))])
        while not (out / "lock").exists() or (out / "lock").read_text() != str(first.pid):
            time.sleep(0.01)
        for arguments in ((), ("--init_from=scratch",)):
            code, words = fit(out, text, *arguments)
            assert code == 2 and f"{out} is in use by another run (process {first.pid})" in words, words
            count(row, refused=1)
        assert first.is_alive()
        if n % 2:  # nothing stays locked
            first.kill()
            first.join()
            assert_nothing_lost(row, whole, out, text)
        else:
            assert end(first)[0] == 0 and lost(whole, out) == 0


def test_runs_begun_at_once(whole, text, tmp_path):
    """One of several goes on, whichever; the earlier run in the folder is moved aside once and whole."""
    for n in range(several(1, 5)):
        out = half_done(whole, text, tmp_path / str(n) / "out")
        kept = digest_of(out / "ckpt.pt")
        started = [begin(out, text, "--init_from=scratch", faults=[("slow_steps", (0.1,))]) for _ in range(3)]
        ends = [end(process) for process in started]
        done = [code for code, _ in ends].count(0)
        assert sorted({code for code, _ in ends}) in ([0,
                                                       2],
                                                      [0]) and done >= 1  # a slow one may begin when another is done
        assert all("is in use by another run" in words for code, words in ends if code)
        assert lost(whole, out) == 0 and digest_of(tmp_path / str(n) / "out.1" / "ckpt.pt") == kept
        assert len(list(out.parent.iterdir())) == 1 + done
        count("runs begun at once in one folder", len(ends), refused=len(ends) - done)


def test_killed_while_an_earlier_run_is_moved_aside(whole, text, tmp_path):
    for at in several((3,), range(1, 7)):
        out = half_done(whole, text, tmp_path / str(at) / "out")
        names = {path.name for path in out.iterdir()} - {"lock"}
        process = begin(out, text, "--init_from=scratch", faults=[("killed_at", ("rename", at, True))])
        assert end(process)[0] == -signal.SIGKILL
        assert fit(out, text, "--init_from=scratch")[0] == 0 and lost(whole, out) == 0
        assert names <= {path.name for path in (out.parent / "out.1").iterdir()} and not (out.parent / "out.2").exists()
        count("SIGKILL while an earlier run is moved aside")
