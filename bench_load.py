"""Training and sampling of train.py's default model on an idle machine and beside one busy process a core, by OpenMP's
settings:

python bench.py load [--spin_counts='["", "2000", "20000", "passive"]'] [--results=FILE] [--key=value]

Each setting has a worker process. The workers take turns of `seconds`, first on the idle machine, then beside each kind
of busy process, so that what else the machine does falls on all settings. The table shows the medians of all rounds.
The shares are of the idle speed of the first setting, which should be "": libgomp's own spin count. Needs a CPU that
nothing else uses.
"""

from core import startup  # first: torch reads its settings when it is loaded

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from core import hardware, timing
from core.config import UserError, check_choice, configure, run_main
from core.inference import convert_for_inference
from core.optimizers import adamw
from core.report import print_table
from model import GPT, GPTConfig
from train import batch_size, block_size, n_embd, n_head, n_layer

# GOMP_SPINCOUNT; "": libgomp's own; 'passive': OMP_WAIT_POLICY
spin_counts = ["", "2000", "20000", "200000", "passive"]
busy = ["python", "matmul"]  # kinds of busy processes, see BUSY
processes = 0  # busy ones; 0: one a core
rounds = 3
seconds = 1.5  # of one measurement
vocab_size = 256
dtype = "auto"
results = ""  # a file for the figures as JSON

SAMPLING = {"1": "sampling, 1 thread", "all": "sampling, all threads", "faster": "sampling, faster of both"}
WORK = {"train": "training", **SAMPLING}  # {what a worker is asked for: its name in the table}
BUSY = {  # a busy process says so in a line, and ends when its parent has
    "python": "print(flush=True)\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass",
    "matmul": "import torch\ntorch.set_num_threads(1)\na = torch.rand(512, 512)\na @ a\nprint(flush=True)\n"
              "while os.getppid() == parent: a @ a",
}


def environment(spin_count):
    """The variables of a worker's environment. Raises UserError unless spin_count is '', a number or 'passive'."""
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if spin_count == "passive":
        return {**kept, "OMP_WAIT_POLICY": "passive"}
    if spin_count and not spin_count.isdigit():
        raise UserError(f"spin_counts: expected numbers, '' or 'passive', got {spin_count!r}")
    return {**kept, "GOMP_SPINCOUNT": spin_count or "300000"}  # what libgomp takes where nothing is set


# ---- a worker ------------------------------------------------------------------------------------


def worker():
    """Measure what each line of standard input asks for, 'WORK SECONDS', and print tokens per second."""
    configure(globals())
    hardware.keep_freed_memory()
    torch.manual_seed(0)
    trained, sampled = (GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size,
                                      vocab_size=vocab_size)) for _ in range(2))
    x, y = torch.randint(vocab_size, (2, batch_size, block_size))
    optimizer = adamw(trained.parameter_groups(0.1))
    sampled = convert_for_inference(sampled, hardware.DTYPES[dtype])
    stream = sampled.generate_stream(x[:1], 10**9, temperature=0.8, top_k=200)
    sampling = map(lambda token: 1, stream)

    def training():
        while True:
            timing.training_step(trained, trained, optimizer, [(x, y, None, 1.0)], "cpu", dtype)
            yield x.numel()

    def measured(what, seconds):
        torch.set_num_threads(1 if what == "1" else hardware.THREADS)
        tokens = training() if what == "train" else sampling
        if what == "faster":
            tokens = hardware.adapt_threads(sampling, "cpu")
        next(tokens)
        count, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < seconds:
            count += next(tokens)
        return count / spent

    print(flush=True)  # ready
    for line in sys.stdin:
        what, length = line.split()
        print(measured(what, float(length)), flush=True)


@contextlib.contextmanager
def started(*arguments, **how):
    """A Python process that runs within the context, from the first line that it prints on."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, **how) as process:
        try:
            answer(process)
            yield process
        finally:
            process.kill()


def answer(process):
    """The next line of a process's output. Raises UserError where it has ended."""
    line = process.stdout.readline()
    if not line:
        raise UserError("a process of the benchmark ended before its time; what it said stands above")
    return line


# ---- all of them ---------------------------------------------------------------------------------


@contextlib.contextmanager
def loaded(others):
    """These stopped processes run within the context."""
    try:
        for process in others:
            process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        yield
    finally:
        for process in others:
            process.send_signal(signal.SIGSTOP)


def measure_all(arguments):
    """{(spin count, load, work): [tokens/s of each round]}; load: 'idle' or a kind of busy process."""
    measured, here = {}, str(Path(__file__).resolve())
    with contextlib.ExitStack() as stack:
        others = {"idle": []}
        for kind in busy:
            code = f"import os\nparent = {os.getpid()}\n{BUSY[kind]}"
            others[kind] = [stack.enter_context(started("-c", code))
                            for _ in range(processes or len(os.sched_getaffinity(0)))]
            with loaded(others[kind]):
                pass  # stopped from here on
        workers = {spin_count: stack.enter_context(started(here, *arguments, env=environment(spin_count),
                                                           stdin=subprocess.PIPE))
                   for spin_count in spin_counts}
        for number, load in itertools.product(range(rounds), others):
            with loaded(others[load]):
                for what, (spin_count, process) in itertools.product(WORK, workers.items()):
                    if sys.stderr.isatty():
                        print(f"round {number + 1} of {rounds}, {load}, {WORK[what]} ...".ljust(70), end="\r",
                              file=sys.stderr)
                    print(what, seconds, file=process.stdin, flush=True)
                    measured.setdefault((spin_count, load, what), []).append(float(answer(process)))
    return measured


def table(measured):
    """Rows of the medians, and their shares of the idle speed of the first setting: for sampling, with all threads."""
    speed = {key: statistics.median(values) for key, values in measured.items()}
    rows = []
    for what, spin_count in itertools.product(WORK, spin_counts):
        best = speed[spin_counts[0], "idle", what if what == "train" else "all"]
        row = {"what": WORK[what], "spin count": spin_count or "unset"}
        for load in ("idle", *busy):
            name = load if load == "idle" else f"beside {load}"
            row |= {f"{name}, tokens/s": speed[spin_count, load, what],
                    f"of first, {name}": speed[spin_count, load, what] / best}
        rows.append(row)
    return rows


def main(arguments):
    global dtype, spin_counts
    configure(globals(), arguments)
    spin_counts = [str(spin_count) for spin_count in spin_counts]
    for spin_count in spin_counts:
        environment(spin_count)
    for kind in busy:
        check_choice("busy", kind, BUSY)
    for key, least in (("rounds", 1), ("seconds", 0), ("processes", 0)):
        if globals()[key] < least:
            raise UserError(f"{key} must be at least {least}, got {globals()[key]}")
    if not spin_counts or len({*spin_counts}) < len(spin_counts):
        raise UserError(f"spin_counts: expected each once, got {spin_counts}")
    if sys.platform != "linux":
        raise UserError("bench.py load measures libgomp, which PyTorch has on Linux")
    dtype = hardware.pick_dtype(dtype, "cpu")
    machine = hardware.describe()
    print(f"{machine['processor']}, {hardware.THREADS} threads, torch {machine['torch']}, {dtype}; the scripts' spin "
          f"count is {startup.SPIN_COUNT:,}\n")
    measured = measure_all([*arguments, f"--dtype={dtype}"])
    rows = table(measured)
    print_table(rows)
    if results:
        saved = {"machine": machine, "dtype": dtype, "seconds": seconds, "rows": rows,
                 "rounds": [{"spin count": spin_count, "load": load, "what": WORK[what], "tokens/s": values}
                            for (spin_count, load, what), values in measured.items()]}
        Path(results).write_text(json.dumps(saved, indent=1), "utf-8")


if __name__ == "__main__":  # a worker of `python bench.py load`
    run_main(worker)
