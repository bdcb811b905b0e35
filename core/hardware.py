"""What this machine gives: device, precision, the rate of its matrix products, peak memory."""

import contextlib
import ctypes
import math
import os
import platform
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

from core.config import UserError, check_choice

THREADS = torch.get_num_threads()  # of this process at its start: OMP_NUM_THREADS, or one for each core
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name="auto"):
    """'cuda', 'mps' or 'cpu' for 'auto', in that order; a named device is refused where it is missing."""
    kind = name.split(":")[0]
    check_choice("device", kind, ("auto", "cpu", "cuda", "mps"))
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[kind]:
        raise UserError(f"device {name} is not there; this machine has {', '.join(d for d in there if there[d])}")
    if kind == "cuda" and name != kind and (not name[5:].isdigit() or int(name[5:]) >= torch.cuda.device_count()):
        raise UserError(f"device {name} is not there; there are {torch.cuda.device_count()}, counted from cuda:0")
    return name if kind == "cuda" else kind


def pick_dtype(name, device):
    """The name of the precision of products: for 'auto' bfloat16 only where the processor has it.

    A CPU without bfloat16 instructions emulates them, slower than float32 and without a warning:
    only a measurement tells.
    """
    check_choice("dtype", name, ("auto", *DTYPES))
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device == "cpu" and matmul_rate(device, "bfloat16") > 1.3 * matmul_rate(device, "float32"):
        return "bfloat16"
    return "float32"


BURST = 0.004  # seconds that a product of `burst_rate` takes at most: about a time slice of Linux


@lru_cache
def matmul_rate(device, dtype):
    """Floating-point operations per second of matrix products: on a CPU the sum over its threads, which compute side by
    side.

    Each thread has its own product. If they shared one, they would wait for each other at its end, and on a busy
    machine one of them is hardly ever running: the rate would be that of the other processes' time slices.
    """
    if device != "cpu":
        return burst_rate(device, dtype)
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return sum(pool.map(burst_rate, threads * [device], threads * [dtype]))
    finally:
        torch.set_num_threads(threads)


def burst_rate(device, dtype):
    """Floating-point operations per second in the best of many short bursts, each a product of two n x n matrices.

    n grows while a burst stays short: longer ones are interrupted on a busy machine, and take seconds on a CPU that
    emulates bfloat16.
    """
    rate = 0.0
    for n in (8192,) if device.startswith("cuda") else (128, 256, 512, 1024):
        if 2 * n**3 > BURST * rate > 0:
            break
        a, b = (torch.rand(n, n, device=device, generator=torch.Generator(device)).to(DTYPES[dtype]) for _ in range(2))
        rate = max(rate, 2 * n**3 / shortest(lambda: a @ b, device))
    return rate


def shortest(call, device="cpu", enough=0.05, budget=0.2, agree=5):
    """Seconds of the shortest of many calls, after one that is not timed.

    They go on for `enough` seconds, and then until `agree` of them took at most 1.05 times as long as the shortest, or
    the `budget` of seconds is spent.
    """
    call()
    synchronize(device)
    best, began, spent = [], time.perf_counter(), 0.0  # best: the `agree` shortest, in order
    while not best or spent < budget:
        if len(best) == agree and spent >= enough and best[-1] <= 1.05 * best[0]:
            break
        start = time.perf_counter()
        call()
        synchronize(device)
        end = time.perf_counter()
        best, spent = sorted([*best, end - start])[:agree], end - began
    return best[0]


def synchronize(device):
    """Wait for what the device still does, so that a clock tells the truth."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def adapt_threads(tokens, device):
    """Yield from an iterator that decodes tokens, each on a CPU with one thread or with all, whichever is faster at the
    moment.

    Decoding has a barrier after every small product. On an idle machine it gains from all threads; beside other
    processes one thread, which waits for none, is faster.
    """
    if device != "cpu" or THREADS == 1:
        yield from tokens
        return
    numbers = faster_number(1, THREADS)
    number = next(numbers)
    try:
        while True:
            torch.set_num_threads(number)  # at each token: the caller may draw from another model in between
            began = time.perf_counter()
            token = next(tokens, None)
            number = numbers.send(time.perf_counter() - began)
            torch.set_num_threads(THREADS)
            if token is None:
                return
            yield token
    finally:
        torch.set_num_threads(THREADS)


def faster_number(one, other, trial=4, share=0.03):
    """A generator of the number of threads for the next token, to which the seconds of that token are sent: the faster
    one.

    The first token, with the prompt, gets `other`. Then both numbers are tried for `trial` tokens each, the other one
    for less if it is slow, and the faster one follows. When the trial's loss has become that `share` of the time, or
    0.1 seconds at least have gone, the next trial begins: other processes come and go.
    """
    yield other
    while True:
        mean = {}
        for number in (one, other):
            spent, count = 0.0, 0
            while count < trial and spent < trial * mean.get(one, math.inf):
                spent += yield number
                count += 1
            mean[number] = spent / count
        faster = min(mean, key=mean.get)
        left = max(0.1, count * abs(mean[one] - mean[other]) / share)
        while left > 0:
            left -= yield faster


def compiled(model):
    """`model` through torch.compile. The engine's loops, which it would unroll, stay outside.

    Raises UserError on a CPU without a C++ compiler.
    """
    device = next(model.parameters()).device.type
    if device == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise UserError("compile=True needs a C++ compiler on a CPU and found none; install g++, or leave it False")
    for attention in model.attentions():
        if "engine" in (attention.choose_kernel(device, dtype) for dtype in (torch.float32, torch.bfloat16)):
            attention.attend = torch.compiler.disable(attention.attend)
    return torch.compile(model)


def activation_bytes(model, *batch):
    """Bytes that the forward pass of a batch (forward's arguments) keeps for the backward pass."""
    weights = {p.data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(x):
        if x.data_ptr() not in weights:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(*batch)
    return sum(sizes.values())


def autocast(device, dtype):
    """Products in `dtype` ('float32': nothing changes), the rest as PyTorch sees fit."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.split(":")[0], DTYPES[dtype])


def random_state(device):
    """The random streams that training on a device draws from, as tensors by name."""
    state = {"random": torch.get_rng_state()}
    return state | ({"cuda_random": torch.cuda.get_rng_state(device)} if device.startswith("cuda") else {})


def set_random_state(device, saved):
    """Put back what `random_state` gave, on this device or on another."""
    torch.set_rng_state(saved["random"].cpu())
    if device.startswith("cuda") and "cuda_random" in saved:
        torch.cuda.set_rng_state(saved["cuda_random"].cpu(), device)


def glibc():
    """The C library where it is glibc, whose allocator can be told what to do; else None."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):
        return None


def keep_freed_memory():
    """Let glibc keep what is freed instead of handing it back: a training step asks for the same
    pieces again, and fetching them as fresh pages costs 5 to 10 % of it on a CPU."""
    if malloc := glibc():
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        malloc.mallopt(trim_threshold, 2**31 - 1)
        malloc.mallopt(mmap_threshold, 2**30)


def memory_size(device="cpu"):
    """Bytes of memory that a CUDA device, or the machine, has; inf where unknown."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def reset_peak_memory(device="cpu"):
    """Let `peak_memory` count from now on. On a CPU that works on Linux alone."""
    if device.startswith("cuda"):
        return torch.cuda.reset_peak_memory_stats(device)
    if malloc := glibc():
        malloc.malloc_trim(0)  # what was freed and kept would be used again, uncounted
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device="cpu"):
    """Bytes: the most that tensors on a CUDA device, or the process (CPU), held; nan where unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def memory_of(call, device="cpu"):
    """Bytes: the most that a call holds beyond what was held before it; nan where unknown."""
    reset_peak_memory(device)
    before = peak_memory(device)
    call()
    synchronize(device)
    return peak_memory(device) - before


def sent_bytes():
    """Bytes that this machine has sent to itself, as ranks on it do; nan where unknown (Linux tells)."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/net/dev").read_text().splitlines()
        return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])
    return math.nan


def describe():
    """The machine and its software, in words, for a log: a dict of plain values."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor, "threads": torch.get_num_threads(), "gpu": gpu, "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__,
    }
