"""Runs of train.py in processes, with faults, and what such a run has lost against the unbroken one."""

import json
import shutil
import signal

import torch
from fault_injection import count, end, program

MAX, INTERVAL = 20, 5
SHAPE = ("--block_size=16", "--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=4", "--warmup_iters=2",
         "--dropout=0.2",
         "--gradient_accumulation_steps=2", f"--eval_interval={INTERVAL}", "--eval_iters=2", "--log_interval=1",
         "--device=cpu",
         "--dtype=float32", f"--max_iters={MAX}")


def line(out, data, *arguments):
    return [f"--out_dir={out}", f"--dataset={data}", *SHAPE, *arguments]


def begin(out, data, *arguments, faults=(), said=None):
    """A process of train.py that goes on from out/ckpt.pt, or begins where there is none."""
    resume = ["--init_from=resume"] * (out / "ckpt.pt").exists()
    return program("train", *line(out, data, *resume, *arguments), faults=faults, said=said)


def fit(out, data, *arguments, faults=()):
    """(exit code, the last line said) of a run."""
    code, text = end(begin(out, data, *arguments, faults=faults))
    return code, (text.strip().splitlines() or [""])[-1]


def unbroken_run(folder, data):
    """The folder of a run that nothing disturbs."""
    out = folder / "out"
    assert fit(out, data)[0] == 0
    return out


def content(value):
    """[(name, bytes)] of nested tensors and plain values; without what depends on the clock and on where it runs."""
    if isinstance(value, torch.Tensor):
        return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    if isinstance(value, dict):
        return {str(key): content(part) for key, part in value.items() if key not in ("settings", "seconds")}
    return [content(part) for part in value] if isinstance(value, (list, tuple)) else repr(value).encode()


def unlike(a, b):
    """Bytes in which b is not as a; what b lacks counts whole."""
    if isinstance(a, bytes):
        return sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b)) if a != b else 0
    if isinstance(a, dict):
        return sum(unlike(part, b.get(key, type(part)())) for key, part in a.items())
    return sum(unlike(part, b[n] if n < len(b) else type(part)()) for n, part in enumerate(a))


def log_of(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    for record in records:
        for key in ("seconds", "tokens_per_second", "matmul_share"):
            record.pop(key, None)
    return [json.dumps(record).encode() for record in records]


def lost(whole, out):
    """Bytes of weights, optimiser, random stream, best weights and log in which a run that ended is not as the unbroken
    one."""
    total = 0
    for name in ("ckpt.pt", "best.pt"):
        total += unlike(*(content(torch.load(folder / name, weights_only=True)) for folder in (whole, out)))
    assert not list(out.glob("*.part"))
    return total + unlike(log_of(whole), log_of(out)) + (len(log_of(whole)) != len(log_of(out)))


def assert_nothing_lost(row, whole, out, data, *arguments):
    """Resume a run to its end; it must be as the unbroken one."""
    code, said = fit(out, data, *arguments)
    assert code == 0, said
    gone = lost(whole, out)
    count(row, injected=0, resumed=1, lost=gone)
    assert gone == 0


def half_done(whole, data, to, steps=10):
    """A run that was stopped after so many steps, in the folder `to`; made once, then copied."""
    made = whole.with_name(f"stopped-at-{steps}")
    if not made.exists():
        code, said = fit(made, data, faults=[("at_batch", (2 * steps - 1, "terminate"))])
        assert code == 128 + signal.SIGTERM and f"stopped at step {steps}, saved" in said
    shutil.copytree(made, to)
    return to
