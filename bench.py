"""Speed, memory and work, beside a peer in the same run: python bench.py attention|step|sample [--key=value]

attention  forward and backward of attention alone, against PyTorch's fused call
step       whole training steps, against nanoGPT's where --peer=FOLDER holds a clone of it
sample     single tokens drawn at a full context, against nanoGPT's `generate` likewise

Every time is a median of calls that alternate with the peer's, and every rate stands beside the
machine's rate for one large matrix product, measured in the same run.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import hardware
from configurator import UserError, choose, configure, run
from model import GPT, GPTConfig, mechanism

repeat = 7  # times each call is measured
peer = ""  # the folder of a nanoGPT clone
results = ""  # a file for the figures as JSON
attention = "dense"
kernel = "auto"
causal = True
shapes = ["16x6x256", "4x6x1024", "1x8x4096"]  # batch x heads x time, for `attention`
head_size = 64
n_layer = 6  # the model of `step` and `sample`
n_head = 6
n_embd = 384
vocab_size = 256
batch_size = 16
block_size = 256
contexts = [256, 1024]  # for `sample`
tokens = 64  # drawn in one measured call of `sample`; the peer draws a sixteenth of them
compile = False
device = "auto"
dtype = "auto"


def bench_attention(options):
    """Rows of forward + backward for each shape: this repository's engine against the fused call."""
    rows = []
    for shape in shapes:
        try:
            B, H, T = map(int, shape.split("x"))
        except ValueError:
            raise UserError(f"shapes: expected BATCHxHEADSxTIME like 16x6x256, got {shape!r}")
        config = GPTConfig(n_layer=1, n_head=H, n_embd=H * head_size, block_size=T, n_class=0 if causal else 2,
                           attention=attention, kernel="engine" if kernel == "auto" else kernel, options=dict(options))
        layer = GPT(config).layers[0].attention.to(device)
        q, k, v, g = torch.randn(4, B, H, T, head_size, device=device, dtype=hardware.DTYPES[dtype]).unbind(0)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]

        def ours():
            torch.autograd.grad(layer.attend(*inputs), inputs, g)

        def fused():
            torch.autograd.grad(F.scaled_dot_product_attention(*inputs, is_causal=causal), inputs, g)

        memory = [mebibytes(call) for call in (ours, fused)]
        seconds, peer_seconds = hardware.side_by_side([ours, fused], device, repeat)
        kept = layer.kept(T)
        rows.append({
            "attention": attention, "batch x heads x time": shape, "ms": 1e3 * seconds, "fused call, ms": 1e3 * peer_seconds,
            "times as fast": peer_seconds / seconds, "pairs kept": kept / T**2, "pairs multiplied": layer.pairs(T) / T**2,
            # two products forward and four backward; what is computed again does not count as work
            **work(12 * head_size * kept * B * H, seconds), "MiB more": memory[0], "fused, MiB more": memory[1],
        })
    return rows


def mebibytes(call):
    """The most memory that a call takes beyond what was held before it."""
    hardware.reset_peak_memory(device)
    before = hardware.peak_memory(device)
    call()
    return (hardware.peak_memory(device) - before) / 2**20


def work(operations, seconds):
    """The columns for work done in some seconds."""
    rate = operations / seconds
    return {"GFLOP/s": rate / 1e9, "of matmul rate": rate / hardware.matmul_rate(device, dtype)}


def nanogpt(context):
    """nanoGPT's model of the same shape, from the clone in `peer`."""
    path = Path(peer) / "model.py"
    if not path.exists():
        raise UserError(f"peer expects the folder of a nanoGPT clone, with its model.py; got {peer!r}")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    sys.modules["nanogpt_model"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(None):
        return module.GPT(module.GPTConfig(block_size=context, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                                           n_embd=n_embd, dropout=0.0, bias=False)).to(device)


def ours(context, options):
    return GPT(GPTConfig(block_size=context, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                         attention=attention, kernel=kernel, options=dict(options))).to(device)


def bench_step(options):
    """Rows of training steps, each of batch_size texts of block_size tokens."""
    x, y = torch.randint(vocab_size, (2, batch_size, block_size), device=device).unbind(0)
    model = ours(block_size, options)
    costs = model.work_per_token(block_size) * x.numel()

    def step(model, optimizer, precision):
        with hardware.autocast(device, precision):
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    runs = [(f"here, {dtype}", model, model.optimizer(1e-3, 0.1, (0.9, 0.99)), dtype)]
    if compile:
        runs.append((f"here, {dtype}, compiled", model.compiled(), runs[0][2], dtype))
    if peer:
        other = nanogpt(block_size)
        with contextlib.redirect_stdout(None):
            optimizer = other.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
        precisions = ["float32"] + [dtype] * (dtype != "float32")  # on a CPU it trains in float32
        runs += [(f"nanoGPT, {precision}", other, optimizer, precision) for precision in precisions]
    calls = [lambda how=how: step(*how) for _, *how in runs]
    memory = [mebibytes(call) for call in calls]
    seconds = hardware.side_by_side(calls, device, repeat)
    slowest = seconds[[name for name, *_ in runs].index("nanoGPT, float32")] if peer else None
    return [{"step": name, "ms": 1e3 * s, "tokens/s": x.numel() / s, **work(costs, s), "MiB more": m,
             **({"times nanoGPT as it is": slowest / s} if peer else {})} for (name, *_), s, m in zip(runs, seconds, memory)]


def bench_sample(options):
    """Rows of single-token decoding, batch 1, at a full context."""
    rows = []
    for context in contexts:
        prompt = torch.randint(vocab_size, (1, context), device=device)
        model = ours(context, options)
        costs = model.work_per_token(context) / 3  # the forward pass alone
        model.for_sampling(hardware.DTYPES[dtype])
        stream = model.stream(prompt, 10**9, temperature=0.8, top_k=200)
        next(stream)  # the prompt
        calls = [lambda: [next(stream) for _ in range(tokens)]]
        names, counts = [f"here, {dtype}"], [tokens]
        if peer:
            other = nanogpt(context).eval()
            calls.append(lambda: other.generate(prompt, max(1, tokens // 16), temperature=0.8, top_k=200))
            names.append("nanoGPT")
            counts.append(max(1, tokens // 16))
        hardware.reset_peak_memory(device)
        speeds = [n / s for n, s in zip(counts, hardware.side_by_side(calls, device, repeat))]
        for name, speed in zip(names, speeds):
            rows.append({"sample": name, "context": context, "tokens/s": speed, **work(costs, 1 / speed),
                         "process, MiB": hardware.peak_memory(device) / 2**20, **({"times nanoGPT": speed / speeds[-1]} if peer else {})})
    return rows


def show(rows):
    """Print rows as a Markdown table."""
    def cell(name, value):
        if isinstance(value, float):
            return f"{value:.0%}" if name.startswith(("pairs", "of ")) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        return str(value)

    table = [list(rows[0])] + [[cell(*item) for item in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    for line in table:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")


def main():
    global device, dtype
    modes = {"attention": bench_attention, "step": bench_step, "sample": bench_sample}
    arguments = sys.argv[1:]
    mode = arguments.pop(0) if arguments and arguments[0][0] != "-" else ("" if "--help" not in arguments else "step")
    choose("benchmark", mode, modes)
    _, options = configure(globals(), arguments, more=lambda settings: mechanism(settings["attention"])[1])
    for key in ("repeat", "tokens", "batch_size", "block_size", "vocab_size", "head_size"):
        if globals()[key] < 1:
            raise UserError(f"{key} must be at least 1, got {globals()[key]}")
    hardware.keep_freed_memory()
    torch.manual_seed(0)
    device = hardware.pick_device(device)
    dtype = hardware.pick_dtype(dtype, device)
    machine = hardware.describe()
    rate = hardware.matmul_rate(device, dtype)
    print(f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; "
          f"matrix products in {dtype}: {rate / 1e9:,.0f} GFLOP/s; medians of {repeat}\n")
    rows = modes[mode](options)
    show(rows)
    if results:
        Path(results).write_text(json.dumps({"machine": machine, "dtype": dtype, "matmul_gflops": rate / 1e9, "rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    run(main)
