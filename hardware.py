"""What this machine gives: device, precision, the rate of its matrix products, peak memory."""

import contextlib
import platform
import time
from functools import lru_cache

import torch

from configurator import UserError, choose

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name="auto"):
    """'cuda', 'mps' or 'cpu' for 'auto', in that order; a named device is refused where it is missing."""
    kind = name.split(":")[0]
    choose("device", kind, ("auto", "cpu", "cuda", "mps"))
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[kind]:
        raise UserError(f"device {name} is not there; this machine has {', '.join(d for d in there if there[d])}")
    return name


def pick_dtype(name, device):
    """The name of the precision of products: for 'auto' bfloat16 only where the processor has it.

    A CPU without bfloat16 instructions emulates them, slower than float32 and without a warning:
    only a measurement tells.
    """
    choose("dtype", name, ("auto", *DTYPES))
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device == "cpu" and matmul_rate(device, "bfloat16") > 1.3 * matmul_rate(device, "float32"):
        return "bfloat16"
    return "float32"


@lru_cache
def matmul_rate(device, dtype):
    """Floating-point operations a second of one large matrix product, the median of several."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.empty(n, n, device=device).uniform_(generator=torch.Generator(device)).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, device, 5)


def synchronize(device):
    """Wait for what the device still does, so that a clock tells the truth."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def median_seconds(call, device="cpu", times=5):
    """The median time of a call after one that is not counted."""
    taken = []
    for n in range(times + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[times // 2]


def autocast(device, dtype):
    """Products in `dtype` ('float32': nothing changes), the rest as PyTorch sees fit."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.split(":")[0], DTYPES[dtype])


def peak_memory(device="cpu"):
    """Bytes: the most the process has held (CPU), or its tensors on a CUDA device; None where unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


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
