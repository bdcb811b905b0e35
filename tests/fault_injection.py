"""Processes in which something goes wrong, for the tests: real ones, forked from a server that has imported torch once.

A fault is a function of this file, which is called in the new process before the script's main.
"""

import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

import model
import train
from core import checkpoint, config, dist, hardware
from core import download as download_file
from core.run import Run

MANY = bool(os.environ.get("FAULTS"))  # `make test-faults`
COUNTS = {}  # {row of the table: {"injected", "resumed", "refused", "lost"}}


def several(few, many):
    return many if MANY else few


def count(row, injected=1, resumed=0, refused=0, lost=0):
    """Add to a row of the table."""
    numbers = COUNTS.setdefault(row, dict.fromkeys(("injected", "resumed", "refused", "lost"), 0))
    for key, value in (("injected", injected), ("resumed", resumed), ("refused", refused), ("lost", lost)):
        numbers[key] += value


torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # which imports a lot, once for all processes here
CONTEXT, NUMBERS = None, itertools.count()


def start(function, *arguments):
    """A running process that calls a function, or the one of this file that has this name."""
    global CONTEXT
    if CONTEXT is None:
        os.environ["OMP_NUM_THREADS"] = "1"
        CONTEXT = multiprocessing.get_context("forkserver")
        CONTEXT.set_forkserver_preload(["fault_injection"])
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    target = globals()[function] if isinstance(function, str) else function
    process = CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


@functools.cache
def said_folder():
    return tempfile.TemporaryDirectory()


def said_file():
    """A new file's path, for what a process says."""
    return Path(said_folder().name) / str(next(NUMBERS))


def program(name, *arguments, faults=(), said=None):
    """A process of a script; `said`: the file for its output."""
    said = said or said_file()
    process = start("script", name, arguments, str(said), faults)
    process.said = said
    return process


def end(process, seconds=600):
    """(exit code, what it said), never with a traceback."""
    process.join(seconds)
    assert process.exitcode is not None, "it goes on and on"
    text = process.said.read_text("utf-8") if process.said.exists() else ""
    assert "Traceback" not in text, text
    return process.exitcode, text


def script(name, arguments, said, faults=()):
    """A script as its user starts it, its output in the file `said`; faults: [(name of a function here, arguments)]."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    sys.argv = [f"{name}.py", *map(str, arguments)]
    torch.set_num_threads(1)
    hardware.matmul_rate = lambda *machine: 1e9  # not measured
    for fault, details in faults:
        globals()[fault](*details)
    config.run_main(importlib.import_module(name).main)


def download(url, path, size, digest, said):
    sys.stderr = open(said, "a")
    config.run_main(lambda: download_file.download(url, Path(path), size, digest) and None)


def as_rank(rank, world, port, kept=False):
    """What torchrun tells a process that it starts. kept: the store at the port is torchrun's own, which outlives
    ranks."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(kept)
    words = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in words.items()})
    dist.rank, dist.world, dist.local_rank, dist.local_world = rank, world, rank, world


# ---- faults ------------------------------------------------------------------------------------


def slow_writes(seconds):
    """A checkpoint is written in twenty pieces, so that a signal from outside meets it half done."""
    write = torch.save

    def slowly(checkpoint, file):
        buffer = io.BytesIO()
        write(checkpoint, buffer)
        content = buffer.getvalue()
        for n in range(20):
            file.write(content[n * len(content) // 20 : (n + 1) * len(content) // 20])
            file.flush()
            time.sleep(seconds / 20)

    torch.save = slowly


def killed_at(name, count, after):
    """SIGKILL before or after the `count`-th call of os.NAME."""
    call, calls = getattr(os, name), []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, dying)


def at_batch(number, action, *details):
    """Call a function of this file when training asks for its batch `number`."""
    make = train.batches

    def batches(*arguments):
        source = make(*arguments)
        if arguments[1] == "train":
            ask = source.batch
            source.batch = lambda n, *part: (n == number and globals()[action](*details), ask(n, *part))[1]
        return source

    train.batches = batches


def slow_steps(seconds):
    micro_batches = Run.micro_batches
    Run.micro_batches = lambda *arguments: (time.sleep(seconds), micro_batches(*arguments))[1]


def truncate(path, size):
    os.truncate(path, size)


def replace(path, content):
    """Another file takes the name."""
    Path(path + ".new").write_bytes(content)
    os.replace(path + ".new", path)


def overwrite(path, content):
    """The same file gets other content."""
    with open(path, "r+b") as file:
        file.write(content)


def remove(path):
    os.unlink(path)


def poison(where):
    """From now on a weight, or the gradient of one, is not a number."""
    tensor = MADE[-1].embedding.weight
    tensor.data.fill_(math.nan) if where == "loss" else tensor.register_hook(lambda grad: grad * math.inf)


MADE = []  # models


def remember_models():
    new = model.new_model  # which a resumed run calls
    model.new_model = lambda config: MADE.append(new(config)) or MADE[-1]


def full_for(folder, first, last):
    """The disk is full from the `first` to the `last` attempt to save a checkpoint."""
    save, calls, ballast = checkpoint.save, [], Path(folder) / "ballast"

    def saved(*arguments):
        calls.append(1)
        if len(calls) == first:
            fill(ballast, 0)
        if len(calls) == last + 1:
            ballast.unlink()
        save(*arguments)

    checkpoint.save = saved


def fill(path, left):
    """Write a file until so many bytes of its disk, in whole blocks, are free."""
    info = os.statvfs(path.parent)
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        for _ in range(info.f_bavail - left // info.f_frsize):
            file.write(bytes(info.f_frsize))


def file_limit(size):
    """No file may be longer."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def memory_limit(size):
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def count_bytes(path):
    """Into a file: {step: bytes that this machine had sent itself before it, ...}."""
    micro_batches, marks = Run.micro_batches, {}

    def counted(run, net, source, step):
        marks[step] = hardware.sent_bytes()
        Path(path).write_text(json.dumps(marks))
        return micro_batches(run, net, source, step)

    Run.micro_batches = counted


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
