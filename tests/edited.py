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
    shutil.copytree(ROOT / "core", folder / "core", dirs_exist_ok=True)
    source = (folder / name).read_text("utf-8")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / name).write_text(source, "utf-8")
    return folder


def added_lines(*changes):
    return sum(len(new.splitlines()) for _, new in changes)


def train(folder, out, data, *arguments, ranks=1, script="train.py", cwd=None):
    """What the process of a script prints; it must end well. ranks: above 1 under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    line = [sys.executable, *launcher, folder / script, f"--out_dir={out}", f"--dataset={data}", *SMALL, *arguments]
    done = subprocess.run(list(map(str, line)), cwd=cwd or folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
