"""The times that a run prints: training's speed, the time left, and the time in all."""

import re

import pytest

import core.run
import train
from core import stopwatch
from core.run import Run
from core.runs import clock as clock_text
from helpers import call


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, [100.0], that time.perf_counter gives to the scripts; a test moves it."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def pass_laps(watch, clock, steps, *seconds):
    for each in seconds:
        clock[0] += each
        watch.lap(steps)


def test_left_is_of_recent_laps(clock):
    """The first step, which takes long, and what was slow long ago do not count."""
    watch = stopwatch.Stopwatch()
    pass_laps(watch, clock, 1, 90.0)
    assert watch.left(99, 0) is None
    pass_laps(watch, clock, 10, 30.0)
    assert watch.left(99, 0) == pytest.approx(99 * 3)
    pass_laps(watch, clock, 10, 5.0)
    assert watch.left(40, 0) == pytest.approx(40 * 35 / 20)
    pass_laps(watch, clock, 10, *[5.0] * stopwatch.RECENT)
    assert watch.left(40, 0) == pytest.approx(40 * 0.5)


def test_evaluations_are_no_part_of_a_lap(clock):
    watch = stopwatch.Stopwatch(before=1000.0)
    pass_laps(watch, clock, 1, 1.0)
    with watch.evaluating(batches=20):
        clock[0] += 8.0
    clock[0] += 5.0
    assert watch.lap(10) == pytest.approx(5)
    assert watch.left(30, 0) == pytest.approx(15) and watch.left(30, 50) == pytest.approx(15 + 50 * 0.4)
    assert watch.seconds() == pytest.approx(1000 + 1 + 8 + 5)


SMALL = ("--block_size=8", "--n_layer=1", "--n_head=1", "--n_embd=8", "--batch_size=4", "--device=cpu",
         "--dtype=float32",
         "--log_interval=2", "--eval_interval=10", "--eval_iters=2", "--max_iters=20")


def test_a_run_says_its_times(text, tmp_path, quick, clock, monkeypatch, capsys):
    """A step takes 2 s, the first one 500 s; a batch of an evaluation 3 s, with 16 of them at the end."""
    micro_batches, evaluate = Run.micro_batches, core.run.evaluate

    def slow_micro_batches(run, net, source, step):
        clock[0] += 500 if step == 0 else 2
        return micro_batches(run, net, source, step)

    def slow_evaluate(*arguments):
        clock[0] += 3 * (arguments[6] if len(arguments) == 7 else 16)
        return evaluate(*arguments)

    monkeypatch.setattr(Run, "micro_batches", slow_micro_batches)
    monkeypatch.setattr(core.run, "evaluate", slow_evaluate)
    monkeypatch.setattr(train, "evaluate", slow_evaluate)
    assert call(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL) is None
    out = capsys.readouterr().out
    left = dict(re.findall(r"^step (\d+)/20: .*?(?:, ([\d:]+) left)?$", out, re.M))
    # of step 2: 17 steps, the evaluations at 10 and 20, and the 16 batches of the last one
    assert left == {"0": "", **{str(n): clock_text(2 * (19 - n) + 6 * (1 + (n < 10)) + 48) for n in range(2, 20, 2)}}
    assert re.search(r"^10:04 in all; sample with", out,
                     re.M)  # 500 + 19 * 2, three evaluations of 6 s and one of 48: 604 s


def test_a_resumed_run_counts_what_was_before(text, tmp_path, quick, clock, monkeypatch, capsys):
    micro_batches = Run.micro_batches
    monkeypatch.setattr(Run, "micro_batches",
                        lambda *arguments: (clock.__setitem__(0, clock[0] + 60), micro_batches(*arguments))[1])
    common = (f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL, "--log_interval=1")
    assert call(train, *common) is None
    assert "\n20:00 in all" in capsys.readouterr().out
    clock[0] += 1e6
    assert call(train, *common, "--init_from=resume", "--max_iters=22") is None
    assert "\n22:00 in all" in capsys.readouterr().out


def test_the_log_is_explained_once(text, tmp_path, quick, capsys):
    call(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={text}", *SMALL)
    out = capsys.readouterr().out
    for words in ("nats per token", "tokens per second", "share of the rate of matrix products", "time left",
                  "the scores of 2 batches", "* marks"):
        assert out.count(words) == 1 and out.index(words) < out.index("step 0")
