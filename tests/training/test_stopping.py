"""Every way in which a run stops: signals, a full disk, numbers that are not finite, patience."""

import math
import os
import re
import signal

import pytest
import torch
from training_runs import SMALL, assert_same_runs, evaluate_again, fit, log_of, scores_of

import train
from core import checkpoint as checkpoint_file
from core.config import run_main
from core.dataset import TextBatches
from core.run import Run
from model import load

pytestmark = pytest.mark.usefixtures("quick")


def test_ctrl_c_in_an_evaluation(text, tmp_path, monkeypatch):
    """Is seen at its next batch, not at its end, and the evaluation is done again."""
    seen, read = [], TextBatches.read

    def interrupted(self, rows):
        if self.seed == 0:  # not of training's batches
            seen.append(rows)
            if len(seen) == 9:  # the third evaluation
                os.kill(os.getpid(), signal.SIGINT)
        return read(self, rows)

    assert not fit(tmp_path / "whole", text, "--max_iters=12", "--eval_iters=4")
    monkeypatch.setattr(TextBatches, "read", interrupted)
    assert fit(tmp_path / "cut", text, "--max_iters=12", "--eval_iters=4") == 130
    assert len(seen) <= 10 and torch.load(tmp_path / "cut" / "ckpt.pt")["state"]["step"] == 10
    monkeypatch.setattr(TextBatches, "read", read)
    assert not fit(tmp_path / "cut", text, "--max_iters=12", "--eval_iters=4", "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_in_the_last_evaluation(text, tmp_path, monkeypatch):
    """After the training, while whole splits are scored: nothing is lost, and resume does only this again."""
    assert not fit(tmp_path / "whole", text, "--max_iters=3")
    finish = Run.finish
    monkeypatch.setattr(Run, "finish", lambda run: (os.kill(os.getpid(), signal.SIGINT), finish(run)))
    with pytest.raises(SystemExit) as left:
        run_main(lambda: fit(tmp_path / "cut", text, "--max_iters=3"))
    assert left.value.code == 130
    monkeypatch.setattr(Run, "finish", finish)
    assert not fit(tmp_path / "cut", text, "--max_iters=3", "--init_from=resume")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_in_the_last_save(text, tmp_path, monkeypatch):
    """Nothing looks at the signal before the training is over: it must not be lost, nor end in a traceback."""
    saved, save = [], checkpoint_file.save

    def interrupted(path, *what):
        saved.append(path.name)
        if len(saved) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        save(path, *what)

    monkeypatch.setattr(checkpoint_file, "save", interrupted)
    with pytest.raises(SystemExit) as left:
        run_main(lambda: fit(tmp_path, text, "--max_iters=3"))
    assert left.value.code == 130 and load(tmp_path / "ckpt.pt")[1]["state"]["step"] == 3


@pytest.mark.parametrize("break_at", ["half", "rename"])
def test_a_save_that_fails_leaves_what_was_there(text, tmp_path, monkeypatch, refused, break_at):
    write, rename, calls = torch.save, os.replace, []

    def full():
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")

    def half(checkpoint, file):
        write(checkpoint, file)
        if len(calls) >= 3:
            file.truncate(1000)
        full()

    def no_rename(a, b):
        if str(b).endswith(".pt"):
            full()
        rename(a, b)

    monkeypatch.setattr(*((torch, "save", half) if break_at == "half" else (os, "replace", no_rename)))
    line = refused(train, f"--out_dir={tmp_path}", f"--dataset={text}", *SMALL, "--max_iters=20")
    assert re.search(r"could not write .*(ckpt|best).pt: No space left on device; the previous file is intact", line)
    for name in ("ckpt.pt", "best.pt"):
        load(tmp_path / name)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("poison", ["learning rate", "weights", "gradient"])
def test_a_loss_that_is_not_finite(text, tmp_path, monkeypatch, at_batch, refused, poison):
    arguments = ["--max_iters=20"]
    if poison == "learning rate":
        arguments += ["--learning_rate=1e30", "--grad_clip=0", "--warmup_iters=0", "--norm=layernorm"]
    elif poison == "weights":
        made, new = [], train.new_model
        monkeypatch.setattr(train, "new_model", lambda config: made.append(new(config)) or made[-1])
        at_batch(7, lambda: made[0].embedding.weight.data.fill_(math.nan))
    else:
        made, new = [], train.new_model
        monkeypatch.setattr(train, "new_model", lambda config: made.append(new(config)) or made[-1])
        at_batch(7, lambda: made[0].embedding.weight.register_hook(lambda grad: grad * math.inf))
    line = refused(train, f"--out_dir={tmp_path}", f"--dataset={text}", *SMALL, *arguments)
    assert "the norm of the gradient is" in line if poison == "gradient" else "the training loss is" in line
    assert re.search(r" is (nan|inf) at step \d+: stopped; .* try a lower learning_rate", line)
    for name in ("ckpt.pt", "best.pt"):
        for tensor in load(tmp_path / name)[1]["model"].values():
            assert tensor.isfinite().all()
    log_of(tmp_path)  # holds no NaN, which is no JSON


def test_patience(text, tmp_path, monkeypatch, capsys):
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 1.0])  # better at steps 0, 5 and 15, then not at 20 and 25
    monkeypatch.setattr(train, "evaluate", lambda *arguments: ({"loss": next(losses)}, None))
    assert not fit(tmp_path, text, "--max_iters=99", "--patience=2")
    state = torch.load(tmp_path / "ckpt.pt")["state"]
    assert (state["step"], state["best_step"], state["best"]) == (25, 15, 3.0)
    assert torch.load(tmp_path / "best.pt")["state"]["step"] == 15
    assert "no better validation in 2 evaluations: stopped" in capsys.readouterr().out
    assert scores_of(log_of(tmp_path)[-1]) == {"step": 15, "split": "val", "whole": True,
                                               **evaluate_again(tmp_path, text, "val")}
