"""Speed, memory and work, beside a peer in the same run: python bench.py attention|layer|step|sample|ranks|load
[--key=value]

attention  forward and backward of attention alone, against PyTorch's fused call, and how each grows with T
layer      a whole attention layer, training and forward pass, against the masked T x T form of adaptive span
step       whole training steps, against nanoGPT's where --peer=FOLDER holds a clone of it
sample     single tokens drawn at a full context, against nanoGPT's `generate` likewise
ranks      what a training step sends, under torchrun: torchrun --standalone --nproc_per_node=2 bench.py ranks
load       training and sampling on an idle machine and beside busy processes, with settings of its own: bench_load.py

What is measured is one row each: --mechanisms='["dense", "sparse window=128", "adaptive span"]', where
a text is a mechanism's name and its options, or one of this script's short names; `kernel=NAME` and
`n_kv_head=K` may stand among the options. --attention=NAME --key=value measures one alone. Every time is a median of
calls that alternate with all others, and every rate stands beside the machine's rate for one large
matrix product, measured in the same run.
"""

from core import startup  # first: torch reads its settings when it is loaded

import contextlib
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from core import dist, hardware, timing
from core.config import Text, UserError, check_choice, configure, run_main, convert
from core.inference import convert_for_inference
from core.kvcache import cache_bytes
from core.mechanisms import mechanism
from core.nanogpt import import_model
from core.optimizers import adamw
from core.report import add_ratios, print_table
from core.texts import NO_TEXTS, with_gates
from model import GPT, GPTConfig

mechanisms = []  # what is measured, see above; empty: the mode's own list (ROWS)
attention = ""  # one mechanism instead
kernel = "auto"
repeat = 11  # times each call is measured
budget = 30.0  # seconds for that: calls that take long are measured less often, at least 3 times
peer = ""  # the folder of a nanoGPT clone
results = ""  # a file for the figures as JSON
causal = True  # False: both directions; `step` then trains a classifier
shapes = []  # "BATCHxHEADSxTIME", for `attention` and `layer`; empty: the mode's own (SHAPES)
head_size = 64
n_layer = 6  # the model of `step` and `sample`
n_head = 6
n_kv_head = 0
n_embd = 384
dropout = 0.0  # in `step`
vocab_size = 256
batch_size = 16
block_size = 256
contexts = [256, 1024, 8192]  # for `sample`
tokens = 64  # drawn in one measured call of `sample`; the peer draws a sixteenth of them
compile = False
device = "auto"
dtype = "auto"

# Most heads near the ramp's 32 tokens and a few long, as Sukhbaatar et al. 2019 found them: of 8 heads the mean is 256.
# The long ones come first: a model of fewer heads has those.
SPANS = "adaptive_attention_span max_span=8192 span_init=[1304,512,64,40,32,32,32,32]"
WAVE = f"{SPANS} use_triangle_wave_masking=True"
FOUR = f"{WAVE} period_min_triangle_wave_masking=4 period_max_triangle_wave_masking=4"
NAMES = {  # short names, with a space in them: none can hide a mechanism's file
    "sparse local": "sparse sparse_pattern=local window=256",
    "sparse strided": "sparse sparse_pattern=strided",
    "sparse fixed": "sparse sparse_pattern=fixed",
    "sparse log": "sparse sparse_pattern=log window=256",
    "adaptive span": SPANS,
    "adaptive span, wave": WAVE,
    "dense, fused call": "dense kernel=sdpa",
    "adaptive span, wave, reference": f"{WAVE} kernel=reference",
    "adaptive span, period 4": FOUR,
    "adaptive span, period 4, snapped": f"{FOUR} snap_periods=True",
    "adaptive span, period 4, 1 key in 4": f"{FOUR} ratio_init_triangle_wave_masking=-0.15",
    "adaptive span, period 4, 1 key in 4, snapped": f"{FOUR} ratio_init_triangle_wave_masking=-0.15 snap_periods=True",
}
ALL = ["dense", "sparse local", "sparse strided", "sparse fixed", "sparse log", "adaptive span", "adaptive span, wave",
       "atrt", "alibi", "forgetting"]
LAYER = ["dense", "dense, fused call", "adaptive span, wave", "adaptive span, wave, reference",
         "adaptive span, period 4", "adaptive span, period 4, snapped", "adaptive span, period 4, 1 key in 4",
         "adaptive span, period 4, 1 key in 4, snapped"]
ROWS = {"attention": ALL, "layer": LAYER, "step": ["dense"], "sample": ALL, "ranks": ["dense"]}
SHAPES = {"attention": [f"1x8x{1024 << n}" for n in range(6)], "layer": ["2x8x2048"]}


class Row(NamedTuple):
    """A mechanism to be measured."""

    label: str
    attention: str
    kernel: str
    n_kv_head: int
    options: dict

    def model(self, default="auto", **config):
        """A model of it; `default` is the kernel where none was asked for."""
        kernel = default if self.kernel == "auto" else self.kernel
        torch.manual_seed(0)  # the same first periods at every size
        return GPT(GPTConfig(attention=self.attention, kernel=kernel, options=dict(self.options), **config)).to(device)


def parse(text):
    """The `Row` of a text like 'sparse window=128 kernel=engine' or one of NAMES."""
    text = str(text).strip()
    name, *settings = re.split(r"\s+(?=\w+=)", NAMES.get(text, text))
    if " " in name:
        check_choice("mechanism", name, NAMES)
    options = {"kernel": kernel, "n_kv_head": n_kv_head}
    defaults = {**mechanism(name)[1], **options}
    for setting in settings:
        key, value = setting.split("=", 1)
        check_choice(f"option of {name}", key, defaults)
        options[key] = convert(key, Text(value), defaults[key], f"mechanisms, {name}")
    return Row(text, name, options.pop("kernel"), options.pop("n_kv_head"), options)


def shape_of(text):
    """(B, H, T) of a text like 16x6x256."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", str(text)):
        raise UserError(f"shapes: expected BATCHxHEADSxTIME like 16x6x256, got {text!r}")
    return tuple(map(int, text.split("x")))


def side_by_side(calls):
    return timing.side_by_side(calls, device, repeat, budget)


def mebibytes(count):
    return None if math.isnan(count) else count / 2**20


def work(operations, seconds):
    """The columns for work done in some seconds."""
    rate = operations / seconds
    return {"GFLOP/s": rate / 1e9, "of matmul rate": rate / hardware.matmul_rate(device, dtype)}


# ---- attention alone -------------------------------------------------------------------------


def bench_attention(rows, B, H, T):
    """Forward + backward of attention, from queries, keys, values and, for gates, the layer's input."""
    q, k, v, g = torch.randn(4, B, H, T, head_size, device=device, dtype=hardware.DTYPES[dtype]).unbind(0)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    x = torch.randn(B, T, H * head_size, device=device, requires_grad=True)  # the layer's input, which only gates read
    shared = dict(n_layer=1, n_head=H, n_embd=H * head_size, block_size=T, n_class=0 if causal else 2)
    layers = [row.model("engine", **shared).layers[0].attention for row in rows]

    def ours(layer):
        y = layer.attend(*inputs, with_gates(layer, x, NO_TEXTS))
        torch.autograd.grad(y, inputs + layer.mask_parameters() + [x] * layer.gates, g)

    def fused():
        torch.autograd.grad(F.scaled_dot_product_attention(*inputs, is_causal=causal), inputs, g)

    *costs, peers = side_by_side([lambda layer=layer: ours(layer) for layer in layers] + [fused])
    return [{
        "attention": row.label, "batch x heads x time": f"{B}x{H}x{T}", "ms": 1e3 * cost.seconds,
        "fused call, ms": 1e3 * peers.seconds, "times as fast": peers.seconds / cost.seconds,
        "pairs kept": kept / T**2, "pairs multiplied": layer.multiplied_pairs(T) / T**2,
        # two products forward and four backward; what is computed again does not count as work
        **work(12 * head_size * kept * B * H, cost.seconds), "MiB more": mebibytes(cost.memory),
        "fused, MiB more": mebibytes(peers.memory), "repeats": cost.rounds,
    } for row, layer, cost, kept in zip(rows, layers, costs, [layer.kept_pairs(T) for layer in layers])]


# ---- a layer ---------------------------------------------------------------------------------


def masked(layer, x, rotation):
    """An adaptive span layer with periodic masking, written plainly: the softmax over the whole T x T, times
    the mask of every pair, over its new sum (Sukhbaatar et al. 2019, section 2), all of it under autograd.

    x: (B, T, C) -> (B, T, C). The same function of the same parameters as layer(x, rotation).
    """
    B, T, C = x.shape
    q, k, v = layer.project(x, rotation)  # (B, H, T, D)
    distance = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
    future, distance = distance < 0, distance.to(x.dtype)
    span, period, ratio = (x[:, None, None] for x in (layer.spans(), *layer.waves()))  # (H, 1, 1)
    softness = layer.options.softness_span_mask
    mask = ((softness + span - distance) / softness).clamp(0, 1)
    wave = sum(8 / (math.pi * n) ** 2 * torch.cos(2 * math.pi * n * distance / period) for n in (1, 3, 5))
    mask = mask * (period / 4 * wave + period * ratio + 0.5).clamp(0, 1)  # (H, T, T)
    p = torch.softmax((q @ k.mT / math.sqrt(q.size(3))).masked_fill(future, -math.inf), -1) * mask
    p = p / p.sum(-1, keepdim=True)
    return layer.proj((p @ v).transpose(1, 2).reshape(B, T, C))


def bench_layer(rows, B, H, T):
    """An attention layer with its projections: forward + backward, and forward alone as for a prompt."""
    x, g = torch.randn(2, B, T, H * head_size, device=device).unbind(0)
    x = x.clone().requires_grad_()
    models = [row.model("engine", n_layer=1, n_head=H, n_embd=H * head_size, block_size=T)
              for row in [*rows, parse(WAVE)]]
    layers, rotation = [model.layers[0].attention for model in models], models[0].position_table(T)
    calls = [(layer, layer, dtype) for layer in layers[:-1]]
    calls.append((lambda x, rotation: masked(layers[-1], x, rotation), layers[-1], "float32"))

    def forward(function, layer, precision):
        with hardware.autocast(device, precision):
            return function(x, rotation)

    def train(function, layer, precision):
        y = forward(function, layer, precision)
        torch.autograd.grad(y, [x, *layer.parameters()], g.to(y.dtype))

    costs = side_by_side([lambda call=call: train(*call) for call in calls]
                         + [lambda call=call: torch.no_grad()(forward)(*call) for call in calls])
    pairs = list(zip([row.label for row in rows] + ["masked T x T, float32"], costs, costs[len(calls) :]))
    *_, (_, slow, slow_forward) = pairs
    return [{
        "layer": label, "batch x heads x time": f"{B}x{H}x{T}", "ms": 1e3 * both.seconds,
        "times masked": slow.seconds / both.seconds, "MiB more": mebibytes(both.memory),
        "forward, ms": 1e3 * once.seconds, "forward, times masked": slow_forward.seconds / once.seconds,
        "repeats": both.rounds,
    } for label, both, once in pairs]


# ---- a step and a sampler --------------------------------------------------------------------


def nanogpt(context):
    """nanoGPT's model of the same shape, from the clone in `peer`."""
    module = import_model(peer)
    with contextlib.redirect_stdout(None):
        return module.GPT(module.GPTConfig(block_size=context, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                                           n_embd=n_embd, dropout=0.0, bias=False)).to(device)


def ours(row, context):
    return row.model(block_size=context, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                     n_kv_head=row.n_kv_head, dropout=dropout, n_class=0 if causal else 2)


def bench_step(rows, T):
    """Training steps, each of batch_size texts of T tokens; of a classifier where causal is False."""
    x = torch.randint(vocab_size, (batch_size, T), device=device)
    y = torch.randint(vocab_size, x.shape, device=device) if causal else torch.randint(2, (batch_size,), device=device)
    batch, runs = [(x, y, None, 1.0)], {}  # {name: (FLOP per token, model, what is called, optimizer, precision)}
    for row in rows:
        model = ours(row, T)
        cost, optimizer = model.estimate_flops(T), adamw(model.parameter_groups(0.1))
        runs[row.label] = cost, model, model, optimizer, dtype
        if compile:
            runs[f"{row.label}, compiled"] = cost, model, hardware.compiled(model), optimizer, dtype
    if peer:
        other, cost = nanogpt(T), ours(parse("dense"), T).estimate_flops(T)
        other.penalty = lambda: 0.0
        with contextlib.redirect_stdout(None):
            optimizer = other.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
        for precision in ["float32"] + [dtype] * (dtype != "float32"):  # on a CPU it trains in float32
            runs[f"nanoGPT, {precision}"] = cost, other, other, optimizer, precision
    costs = side_by_side([lambda model=model, net=net, optimizer=optimizer, precision=precision:
                          timing.training_step(model, net, optimizer, batch, device, precision)
                          for _, model, net, optimizer, precision in runs.values()])
    return add_ratios([{
        "step": name, "ms": 1e3 * cost.seconds, "tokens/s": x.numel() / cost.seconds,
        **work(operations * x.numel(), cost.seconds), "MiB more": mebibytes(cost.memory), "repeats": cost.rounds,
    } for (name, (operations, *_)), cost in zip(runs.items(), costs)], "dense", "nanoGPT, float32")


@torch.no_grad()
def keys_of_last(layer, T):
    """Keys that the last query of T sees, the mean over heads."""
    bias = layer.bias_at(torch.tensor([T - 1], device=device), torch.arange(T, device=device))
    return (bias > -math.inf).sum().item() / bias.size(0)


def bench_sample(rows, context):
    """Single-token decoding, batch 1, at a full context."""
    prompt, few = torch.randint(vocab_size, (1, context), device=device), max(1, tokens // 16)
    calls, known = [], []
    for row in rows:
        model = ours(row, context)
        read = sum(keys_of_last(layer.attention, context) for layer in model.layers) / n_layer
        convert_for_inference(model, hardware.DTYPES[dtype])
        caches = model.new_caches()
        model.new_caches = lambda caches=caches: caches  # so that they can be weighed
        stream = model.generate_stream(prompt, 10**9, temperature=0.8, top_k=200)
        next(stream)  # the prompt
        calls.append(lambda stream=stream: [next(stream) for _ in range(tokens)])
        known.append((row.label, tokens, caches, read))
    if peer:
        other = nanogpt(context).eval()
        calls.append(lambda: other.generate(prompt, few, temperature=0.8, top_k=200))
        known.append(("nanoGPT", few, [], None))
    return add_ratios([{
        "sample": name, "context": context, "tokens/s": count / cost.seconds,
        "cache, MiB": sum(map(cache_bytes, caches)) / 2**20 or None, "keys read": read, "repeats": cost.rounds,
    } for (name, count, caches, read), cost in zip(known, side_by_side(calls))], "dense", "nanoGPT")


def bench_ranks(rows, T):
    """Training steps of all ranks, each of batch_size texts in one or four forward passes: bytes that a rank sends.

    They stand beside what a ring of R sends for each float32 number: an all-gather and a reduce-scatter (R - 1) / R of
    its four bytes each. DDP does one of each with the gradients at the last backward pass; FSDP then scatters them, and
    gathers the weights before every forward and backward one.
    """
    if dist.world < 2:
        raise UserError("many ranks are to be measured: torchrun --standalone --nproc_per_node=2 bench.py ranks")
    x = torch.randint(vocab_size, (batch_size, T), device=device)
    found = []
    for row, sharded, passes in itertools.product(rows, (False, True), (1, 4)):
        model = ours(row, T)
        N = model.parameter_count()
        model = dist.shard(model, device) if sharded else model
        forward, optimizer = dist.wrap(model), adamw(model.parameter_groups(0.1))

        def step():
            for n in range(passes):
                with dist.gradient_sync(forward, n == passes - 1):
                    with hardware.autocast(device, dtype):
                        loss = forward(x, x)[1]
                    (loss + model.penalty()).backward()
            dist.clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds, sent = timing.traffic(step, device, repeat)
        found.append({"split": "FSDP" if sharded else "DDP", "ranks": dist.world, "forward passes": passes,
                      "million parameters": N / 1e6, "bytes a parameter and rank": sent / N,
                      "a ring's": 4 * (2 * passes + 1 if sharded else 2) * (dist.world - 1) / dist.world,
                      "ms": 1e3 * seconds})
    return found


# ---- the script ------------------------------------------------------------------------------


def main():
    global device
    modes = {"attention": bench_attention, "layer": bench_layer, "step": bench_step, "sample": bench_sample,
             "ranks": bench_ranks}
    arguments = sys.argv[1:]
    mode = arguments.pop(0) if arguments and arguments[0][0] != "-" else ("" if "--help" not in arguments else "step")
    check_choice("benchmark", mode, [*modes, "load"])
    if mode == "load":
        import bench_load  # which imports this file

        return bench_load.main(arguments)
    _, options = configure(globals(), arguments, more=lambda chosen: mechanism(chosen["attention"] or "dense")[1])
    for key in ("repeat", "tokens", "batch_size", "block_size", "vocab_size", "head_size"):
        if globals()[key] < 1:
            raise UserError(f"{key} must be at least 1, got {globals()[key]}")
    if attention and mechanisms:
        raise UserError(f"give --attention={attention} with its options, or --mechanisms, not both")
    texts = mechanisms or ROWS[mode]
    rows = [Row(attention, attention, kernel, n_kv_head, options)] if attention else [parse(text) for text in texts]
    if mode in ("attention", "layer") and any(row.n_kv_head for row in rows):
        raise UserError(f"n_kv_head expects the mode step, sample or ranks, got {mode}")
    if len({row.label for row in rows}) < len(rows):
        raise UserError(f"mechanisms: expected each once, got {mechanisms}")
    if not all(type(context) is int and context > 0 for context in contexts):
        raise UserError(f"contexts: expected numbers of tokens like [256, 1024], got {contexts}")
    lengths = {"step": [block_size], "ranks": [block_size], "sample": contexts}.get(mode, [])
    places = [(T,) for T in lengths] or [shape_of(shape) for shape in shapes or SHAPES[mode]]
    hardware.keep_freed_memory()
    torch.manual_seed(0)
    with dist.setup(hardware.pick_device(device)) as device:
        measure(modes[mode], mode, rows, places)


def measure(bench, mode, rows, places):
    """Run a benchmark at each of the places, and show and save what it found."""
    global dtype
    dtype = dist.all_gather(hardware.pick_dtype(dtype, device))[0]
    machine, rate = hardware.describe(), hardware.matmul_rate(device, dtype)
    print(f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; "
          f"matrix products in {dtype}: {rate / 1e9:,.0f} GFLOP/s")
    found = []
    for place in places:
        if sys.stderr.isatty():  # some take minutes
            print(mode, *place, end=" ...\r", file=sys.stderr, flush=True)
        found += bench(rows, *place)
    tables = {"rows": found, "growth": timing.growth(found) if mode == "attention" else []}
    for table in filter(None, tables.values()):
        print()
        print_table(table)
    if results and dist.rank == 0:
        measured = {row.label: {"attention": row.attention, "kernel": row.kernel, **row.options} for row in rows}
        saved = {"machine": machine, "dtype": dtype, "matmul_gflops": rate / 1e9, "mechanisms": measured, **tables}
        Path(results).write_text(json.dumps(saved, indent=1), "utf-8")


if __name__ == "__main__":
    run_main(main)
