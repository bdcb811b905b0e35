"""train.py of which a rank kills itself once: DIES='FILE RANK BATCH', where FILE, made by it, says that it has."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from core import dist, hardware

hardware.matmul_rate = lambda *machine: 1e9  # not measured
path, rank, number = os.environ.get("DIES", "/ -1 0").split()
make = train.batches


def batches(*arguments):
    source = make(*arguments)
    ask = source.batch

    def batch(n, *part):
        if dist.rank == int(rank) and n == int(number) and not os.path.exists(path):
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(n, *part)

    if arguments[1] == "train":
        source.batch = batch
    return source


train.batches = batches
train.run_main(train.main)
