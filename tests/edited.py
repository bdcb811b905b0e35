"""Copies of train.py that a user has edited, run as scripts."""

import importlib
import os
import runpy
import shutil
import socket
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

from fault_injection import said_file, start

from helpers import ROOT

SMALL = ("--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=4", "--warmup_iters=2",
         "--eval_interval=3", "--eval_iters=2", "--log_interval=1", "--max_iters=6", "--lr_decay_iters=6",
         "--device=cpu",
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


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def is_ours(path):
    """Whether a file or a folder is the repository's own, and not of a package that is installed within it."""
    path = Path(path or ".").absolute()
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def run_script(folder, words, cwd, environment, outputs):
    """Run a script of the copy in `folder` in this process, which was forked with torch loaded. No module of the
    repository itself is left."""
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    for name, module in list(sys.modules.items()):
        if name != "__main__" and getattr(module, "__file__", None) and is_ours(module.__file__):
            del sys.modules[name]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    sys.argv = words
    sys.path[:] = [str(folder), *(path for path in sys.path if not is_ours(path))]
    importlib.import_module("core.hardware").matmul_rate = lambda *machine: 1e9  # not measured
    sys.path[0] = str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def begin(folder, words, cwd, **environment):
    """The process of a script of the copy in `folder`: `python WORDS` without the seconds of importing torch."""
    words = [str(Path(cwd, words[0])), *map(str, words[1:])]
    outputs = [said_file() for _ in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = start(run_script, folder, words, str(cwd), environment, [str(path) for path in outputs])
    process.outputs = outputs
    return process


def end(process):
    """A process of `begin` after its end: returncode, stdout, stderr."""
    process.join(600)
    assert process.exitcode is not None, "it goes on and on"
    stdout, stderr = (path.read_text("utf-8") if path.exists() else "" for path in process.outputs)
    return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)


def execute(folder, *words, cwd):
    """A script of the copy in `folder` after its end: see `end`."""
    return end(begin(folder, words, cwd))


def train(folder, out, data, *arguments, ranks=1):
    """What a run of the copy of train.py in `folder` prints, on all ranks; it must end well."""
    words, of_rank = ["train.py", f"--out_dir={out}", f"--dataset={data}", *SMALL, *arguments], [{}]
    if ranks > 1:  # what torchrun tells a process that it starts
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": free_port()}
        of_rank = [{**shared, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": False}
                   for rank in range(ranks)]
    processes = [begin(folder, words, folder, **{key: str(value) for key, value in each.items()}) for each in of_rank]
    ends = [end(process) for process in processes]
    assert not any(done.returncode for done in ends), [done.stdout + done.stderr for done in ends]
    return "".join(done.stdout for done in ends)
