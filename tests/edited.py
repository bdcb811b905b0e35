"""Copies of train.py that a user has edited, run as scripts."""

import os
import shutil
import subprocess
import sys

from helpers import ROOT

SMALL = ("--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=4", "--warmup_iters=2",
         "--eval_interval=3", "--eval_iters=2", "--log_interval=1", "--max_iters=6", "--lr_decay_iters=6", "--device=cpu",
         "--dtype=float32", "--learning_rate=1e-2")


def edited_copy(folder, *changes, name="train.py"):
    """A copy of the scripts in `folder` with (old text, new text) replaced in one of them; returns the folder."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for part in ("core", "config"):
        shutil.copytree(ROOT / part, folder / part, dirs_exist_ok=True)
    for file in ROOT.glob("data/*/prepare.py"):
        (folder / "data" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "data" / file.parent.name)
    source = (folder / name).read_text("utf-8")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / name).write_text(source, "utf-8")
    return folder


def execute(*words, cwd):
    """The finished process of a Python script."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, env=environment)


def train(folder, out, data, *arguments, ranks=1):
    """What a run of the copy of train.py in `folder` prints; it must end well. ranks: above 1 under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = execute(*launcher, folder / "train.py", f"--out_dir={out}", f"--dataset={data}", *SMALL, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
