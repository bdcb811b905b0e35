"""A resumed run equals an unbroken one; what resuming reports and refuses."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from training_runs import HARD, SMALL, assert_same, assert_same_runs, fit, log_of, send

import train
from core import checkpoint as checkpoint_file
from core import hardware
from helpers import ROOT

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_stopped_and_resumed_equals_unbroken(folder, tmp_path, at_batch, monkeypatch, capsys, number):
    assert not fit(tmp_path / "whole", folder, *HARD)
    at_batch(15, send(number))  # in the second half of step 7, between two evaluations
    assert fit(tmp_path / "cut", folder, *HARD) == 128 + number
    assert "stopped at step 8, saved; go on with --init_from=resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "cut" / "ckpt.pt")["state"]["step"] == 8
    monkeypatch.undo()
    monkeypatch.setattr(hardware, "matmul_rate", lambda *machine: 1e9)
    assert not fit(tmp_path / "cut", folder, *HARD, "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_killed_and_resumed_equals_unbroken(text, tmp_path):
    """SIGKILL in the middle of step 8: a step that the log has and the checkpoint (of step 5) has not."""
    program = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import train, torch
from core import hardware
torch.set_num_threads(1)
hardware.matmul_rate = lambda *machine: 1e9
make = train.batches
def killing(*arguments):
    source = make(*arguments)
    ask = source.batch
    source.batch = lambda n, *part: os.kill(os.getpid(), 9) if n == 17 else ask(n, *part)
    return source
train.batches = killing
train.run_main(train.main)
"""
    line = [f"--out_dir={tmp_path / 'cut'}", f"--dataset={text}", *SMALL, *HARD]
    done = subprocess.run([sys.executable, "-c", program, *line], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert log_of(tmp_path / "cut", "train")[-1]["step"] == 7
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 8, "spl')  # as a crash of the machine leaves it
    assert not fit(tmp_path / "cut", text, *HARD, "--init_from=resume")
    assert not fit(tmp_path / "whole", text, *HARD)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_resume_with_more_steps(folder, tmp_path):
    """N steps, then N more, equal 2N: only the evaluation at the shorter run's end is extra."""
    assert not fit(tmp_path / "whole", folder, *HARD)
    assert not fit(tmp_path / "cut", folder, *HARD, "--max_iters=5")
    assert sum(record.get("whole", False) for record in log_of(tmp_path / "cut")) == 1
    assert not fit(tmp_path / "cut", folder, *HARD, "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_resume_keeps_the_precision(text, tmp_path, monkeypatch):
    """Rates are measured, and another moment may give others: what `auto` chose stays."""
    assert not fit(tmp_path / "out", text, "--max_iters=2", "--dtype=auto")
    monkeypatch.setattr(hardware, "matmul_rate", lambda device, dtype: 1e9 if dtype == "float32" else 9e9)
    assert not fit(tmp_path / "new", text, "--max_iters=2", "--dtype=auto")
    assert not fit(tmp_path / "out", text, "--max_iters=4", "--dtype=auto", "--init_from=resume")
    assert [torch.load(tmp_path / name / "ckpt.pt")["dtype"] for name in ("new", "out")] == ["bfloat16", "float32"]


def test_resume_at_the_end_changes_nothing(text, tmp_path):
    assert not fit(tmp_path, text, "--max_iters=5")
    before, log = torch.load(tmp_path / "ckpt.pt"), log_of(tmp_path)
    assert not fit(tmp_path, text, "--max_iters=5", "--init_from=resume")
    assert_same(torch.load(tmp_path / "ckpt.pt")["model"], before["model"])
    assert log_of(tmp_path) == log


def test_resume_says_what_is_not_as_it_was(text, reviews, tmp_path, capsys):
    assert not fit(tmp_path / "out", text, "--max_iters=2")
    shutil.copytree(tmp_path / "out", tmp_path / "lighter")
    assert not fit(tmp_path / "lighter", text, "--max_iters=4", "--init_from=resume")
    capsys.readouterr()
    assert not fit(tmp_path / "out", text, "--max_iters=4", "--init_from=resume", "--block_size=8",
                   "--weight_decay=0.5")
    said = capsys.readouterr().out
    assert "block_size stays 16, not 8" in said
    assert "max_iters was 2, is now 4" in said and "resume: from step 2 of 4" in said
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt")
    assert checkpoint["settings"]["block_size"] == 16 and checkpoint["settings"]["weight_decay"] == 0.5
    lighter = torch.load(tmp_path / "lighter" / "ckpt.pt")["model"]["embedding.weight"]
    assert checkpoint["model"]["embedding.weight"].norm() < lighter.norm()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["settings"]["block_size"] == 16


def test_resume_is_refused(text, toy, reviews, tmp_path, refused):
    def refusal(data, *arguments):
        return refused(train, f"--out_dir={tmp_path / 'out'}", f"--dataset={data}", *SMALL, "--init_from=resume",
                       *arguments)

    assert "no checkpoint at" in refusal(text) and not (tmp_path / "out").exists()
    assert not fit(tmp_path / "out", reviews, "--max_iters=1")
    assert "was trained on other data" in refusal(text) and "was trained on other data" in refusal(toy)
    assert "was trained on other data" in refusal(reviews, "--task=lm")
    (tmp_path / "out" / "ckpt.pt").write_bytes((tmp_path / "out" / "ckpt.pt").read_bytes()[:5000])
    assert "ckpt.pt is damaged or not a checkpoint" in refusal(reviews)


def test_checkpoints_with_a_gradient_scaler(text, tmp_path, capsys):
    """Of float16 training, which earlier versions had: they resume in another precision, and none of the new ones has a
    scaler."""
    assert not fit(tmp_path, text, "--max_iters=2")
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    assert "scaler" not in checkpoint
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
              "_growth_tracker": 2}
    checkpoint_file.save(tmp_path / "ckpt.pt", {**checkpoint, "scaler": scaler, "dtype": "float16"})
    assert not fit(tmp_path, text, "--max_iters=4", "--dtype=auto", "--init_from=resume")
    assert "checkpoint: dtype was 'float16', is now 'float32'" in capsys.readouterr().out
    assert torch.load(tmp_path / "ckpt.pt")["state"]["step"] == 4
