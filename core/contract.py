"""Checks of a mechanism: its declarations when a model is built, and the agreement of all kernels with the reference.

`check` takes milliseconds and refuses a mechanism whose declarations would make a result silently wrong. `error`,
`decoding_error` and `cells_missed` serve tests/attention/test_contract.py and `python attention.py NAME`.

Letters: B batch, T time, H heads, D head size; n sampled queries.
"""

import contextlib
import math
import warnings
from unittest import mock

import torch

from core import engine, flex, kvcache
from core.config import UserError
from core.kernels import sdpa
from core.ops import expand_heads, rotations
from core.texts import NO_TEXTS, Texts, document_starts, with_gates

ROWS = 24  # queries that `check` evaluates: the first, the middle, the last two and random ones


def check(layer, name):
    """Raise UserError, which names a pair, if `bias`, `relative`, `blocks` or `max_distance` of a layer is wrong.

    name: of the mechanism, for the message. The random state is not touched.
    """
    T = layer.block_size
    inner = torch.randperm(T, generator=torch.Generator().manual_seed(0))[: ROWS - 4]
    i = torch.cat([inner, torch.tensor([0, T // 2, T - 2, T - 1]).clamp(min=0)]).unique().to(layer.proj.weight.device)
    with torch.no_grad():
        bias = check_elementwise(layer, name, i)
        if layer.relative:
            check_relative(layer, name, i, bias)
        if layer.causal:
            check_distance(layer, name, i, bias)
        if not layer.derives_blocks:
            for size in sorted({1, min(7, T), T}):
                check_blocks(layer, name, size, i[i < size], bias[:, i < size, :size])
    check_gradient(layer, name)
    check_sink(layer, name)
    if layer.gates:
        check_gate(layer, name)
    if layer.reweighs and layer.first_tokens:
        raise UserError(f"{name}: factor needs complete rows, which first_tokens are joined to; leave one of them out")


def pair(h, i, j):
    return f"head {int(h)}, query {int(i)}, key {int(j)}"


def first_of(mask):
    """The first index at which a mask, such as (H, n, T), is true, as a list; or None."""
    indices = mask.nonzero()
    return indices[0].tolist() if len(indices) else None


def close(a, b):
    """Whether two biases are equal up to rounding, elementwise."""
    return torch.isclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)


def check_elementwise(layer, name, i):
    """The bias at queries i (n,) of a text of block_size, (H, n, T). Raises UserError if single pairs give another."""
    T, H = layer.block_size, layer.n_head
    j = torch.arange(T, device=i.device)
    try:
        bias = layer.bias_at(i, j).expand(H, len(i), T)
        generator = torch.Generator().manual_seed(1)
        h, row, key = (torch.randint(size, (200,), generator=generator).to(i.device) for size in (H, len(i), T))
        key = torch.where(key % 2 == 0, key, (i[row] - key % 8).clamp(min=0))  # half of them near: most are kept there
        alone = layer.total_bias(h, i[row], key).expand(200)
        single = [layer.total_bias(h[n], i[row[n]], key[n]).reshape(()) for n in range(4)]
        formula = layer.bias(h, i[row], key)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{name}: bias(h, i, j) must be elementwise over integer tensors that broadcast, for rows and "
                        f"single pairs; it raised {type(error).__name__}: {str(error).splitlines()[0]}")
    if isinstance(formula, torch.Tensor) and not formula.is_floating_point():
        raise UserError(f"{name}: bias must be of floats, 0.0 to keep a pair and -math.inf to drop it; got "
                        f"{formula.dtype}: write torch.where(kept, 0.0, -math.inf)")
    if index := first_of(bias.isnan() | (bias == math.inf)):
        raise UserError(f"{name}: bias must be a number below infinity; at {pair(index[0], i[index[1]], index[2])} "
                        f"it is {bias[tuple(index)].item()}")
    together = bias[h, row, key]
    for value, n in ((alone, slice(None)), (torch.stack(single), slice(4))):
        if index := first_of(~close(value, together[n])):
            (n,) = index
            raise UserError(f"{name}: bias is not elementwise: at {pair(h[n], i[row[n]], key[n])} it is "
                            f"{value[n].item():g} alone and {together[n].item():g} among other pairs; write it with h, "
                            "i and j of that pair only")
    return bias


def check_relative(layer, name, i, bias):
    """Raise UserError unless the bias (H, n, T) at queries i depends on the offset only."""
    T = layer.block_size
    if layer.first_tokens:
        raise UserError(f"{name}: relative = True, but first_tokens stay visible at any distance; leave relative out")
    row = layer.bias_by_offset(T).expand(layer.n_head, -1)
    expected = row[:, torch.arange(T, device=i.device) - i[:, None] + T - 1]
    if index := first_of(~close(bias, expected)):
        h, n, j = index
        raise UserError(f"{name}: relative = True, but bias depends on more than i - j: at {pair(h, i[n], j)} it is "
                        f"{bias[h, n, j].item():g}, and {expected[h, n, j].item():g} at the same distance from query "
                        f"{T - 1}; leave relative out")


def check_distance(layer, name, i, bias):
    """Raise UserError if the bias (H, n, T) at queries i keeps a pair beyond `max_distance`."""
    distance = i[:, None] - torch.arange(layer.block_size, device=i.device)
    most = layer.max_distance()
    if index := first_of((bias > -math.inf) & (distance > most) & (distance < i[:, None] + 1 - layer.first_tokens)):
        h, n, j = index
        raise UserError(f"{name}: max_distance() is {most}, but {pair(h, i[n], j)} is kept; "
                        "return the largest kept distance")


def check_blocks(layer, name, T, i, bias):
    """Raise UserError if `blocks` miss a kept pair of queries i, hold one twice, or lie outside a text of T tokens."""
    parts, row_of = layer.blocks(T), {int(query): n for n, query in enumerate(i)}
    if layer.reweighs and len(parts) > 1:
        raise UserError(f"{name}: factor needs complete rows, but blocks({T}) has {len(parts)} parts; write one")
    covered = torch.zeros_like(bias, dtype=torch.uint8)
    for part in parts:
        seen = torch.zeros(layer.n_head, len(i), dtype=torch.uint8, device=i.device)
        for block in part:
            for positions in (block.queries, *block.kv_ranges):
                if positions and not 0 <= min(positions) <= max(positions) < T:
                    raise UserError(f"{name}: blocks({T}) names positions {positions}; expected them from 0 to {T - 1}")
            rows = [row_of[n] for n in block.queries if n in row_of]
            if not rows:
                continue
            rows, heads = torch.tensor(rows, device=i.device), torch.as_tensor(block.heads, device=i.device)
            keys = torch.cat([torch.as_tensor(keys, device=i.device) for keys in block.kv_ranges])
            count = torch.ones(len(rows), len(keys), dtype=torch.uint8, device=i.device)
            if block.distances is not None:
                distance = (i[rows, None] - keys).abs()
                count = ((distance >= block.distances.start) & (distance < block.distances.stop)).byte()
            covered[heads[:, None, None], rows[:, None], keys] += count
            seen[heads[:, None], rows] += 1
        if index := first_of(seen[..., None] > 1):
            raise UserError(f"{name}: blocks({T}) names query {int(i[index[1]])} of head {index[0]} twice in one part; "
                            "a query of a head may be in one block of a part only")
    missed = (covered == 0) & (bias > -math.inf)
    for wrong, what in ((missed, "misses the kept pair"), (covered > 1, "holds twice the pair")):
        if index := first_of(wrong):
            raise UserError(f"{name}: blocks({T}) {what} {pair(index[0], i[index[1]], index[2])}; "
                            "leave blocks out, or mend them")


def check_gradient(layer, name):
    """Raise UserError unless the gradients of the bias's parameters are finite."""
    parameters = [p for p in layer.mask_parameters() if p.requires_grad]
    T = min(layer.block_size, 48)
    i = torch.arange(T, device=layer.proj.weight.device)
    bias = layer.bias_at(i, i)
    if not (parameters and bias.requires_grad):
        return
    kept = torch.where(bias > -math.inf, bias, 0)
    gradients = torch.autograd.grad(kept.sum(), parameters, allow_unused=True)
    if not all(g is None or g.isfinite().all() for g in gradients):
        raise UserError(f"{name}: the gradient of bias is not finite, as that of a logarithm or a root at 0 where the "
                        "pair is dropped; guard its argument: x.where(kept, 1).log()")


def check_sink(layer, name):
    """Raise UserError unless the sink is None or a finite number for each head."""
    sink = layer.sink()
    if sink is not None and not (sink.shape == (layer.n_head,) and sink.is_floating_point() and sink.isfinite().all()):
        raise UserError(f"{name}: sink() must be None or a finite logit for each head, of shape ({layer.n_head},); got "
                        f"{tuple(sink.shape)} {sink.dtype}")


@torch.no_grad()
def check_gate(layer, name):
    """Raise UserError unless `gate` gives numbers at most 0, (B, H, T), each from its own token alone."""
    weight, T = layer.proj.weight, 8
    x = torch.randn(2, T, weight.size(1), generator=torch.Generator().manual_seed(0)).to(weight)
    gate, expected = layer.gate(x), (2, layer.n_head, T)
    if gate.shape != expected:
        raise UserError(f"{name}: gate(x) expects one number for each head and token, {expected} for x of "
                        f"{tuple(x.shape)}; got {tuple(gate.shape)}")
    if index := first_of(~(gate <= 0)):
        raise UserError(f"{name}: gate(x) expects logarithms of gates, at most 0; got {gate[tuple(index)].item():g}")
    if not close(gate, torch.cat([layer.gate(x[:, t : t + 1]) for t in range(T)], 2)).all():
        raise UserError(f"{name}: gate(x) of a token depends on other tokens; decoding gives it one token at a time")


# ---- agreement of the kernels --------------------------------------------------------------


@contextlib.contextmanager
def in_float64():
    """Within this context, formulas convert integers to float64, so that rounding hides no error."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@contextlib.contextmanager
def flex_on_cpu():
    """Within this context, FlexAttention computes gradients on a CPU, uncompiled and with T x T scores."""
    torch._dynamo.reset()  # uncompiled calls count as compiled variants
    accept = mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *inputs: None)
    with accept, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


def kernels(layer, texts=NO_TEXTS):
    """{name of a kernel: function of q (B, H, T, D), k, v (B, K, T, D) and sums of gates (B, H, T) or None that returns
    the outputs (B, H, T, D)}, without dropout."""
    def reference(layer, q, k, v, texts):
        return layer.weights(q, k, texts=texts) @ expand_heads(v, q.size(1))

    def with_decay(attend):
        return lambda q, k, v, decay=None: attend(layer, q, k, v, texts._replace(decay=decay))

    functions = {"reference": reference, "engine": engine.attend, "flex": flex.attend}
    functions |= {"sdpa": sdpa} if layer.dense else {}
    return {name: with_decay(attend) for name, attend in functions.items()}


def outputs_and_gradients(layer, attend, inputs, lengths=None):
    """[outputs, gradients of the inputs, gradients of the parameters] for a fixed random upstream gradient.

    Outputs at padding are 0 and get no gradient.
    """
    y = attend(*inputs)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    if lengths is not None:
        real = (torch.arange(y.size(2)) < lengths[:, None])[:, None, :, None]
        y, upstream = y * real, upstream * real
    gradients = torch.autograd.grad(y, [*inputs, *layer.parameters()], upstream, allow_unused=True)
    return [y, *(torch.zeros(()) if g is None else g for g in gradients)]


def random_inputs(layer, T, generator, B=2, D=8):
    """q (B, H, T, D) and k, v (B, K, T, D) in float64, and with gates their sums (B, H, T) for a random input."""
    inputs = [torch.randn(B, heads, T, D, generator=generator, dtype=torch.float64)
              for heads in (layer.n_head, layer.n_kv_head, layer.n_kv_head)]
    if layer.gates:
        weight = layer.proj.weight
        x = torch.randn(B, T, weight.size(1), generator=generator, dtype=torch.float64).to(weight)
        inputs.append(with_gates(layer, x, NO_TEXTS).decay.detach().double())
    return inputs


def random_documents(B, T, generator):
    """The starts of random documents, (B, T): in one text many short ones, in the others one or two."""
    starts = torch.rand(B, T, generator=generator) < torch.where(torch.arange(B) == 0, 0.2, 1 / T)[:, None]
    return document_starts(starts.long(), 1)


def error(layer, kernel, T, lengths=None, documents=False, D=8):
    """The largest difference of outputs and gradients between a kernel and the reference, for random float64 inputs.

    lengths: (B,) of two examples with padding, or None. documents: whether they hold several documents each.
    """
    generator = torch.Generator().manual_seed(T)
    inputs = [x.requires_grad_() for x in random_inputs(layer, T, generator, D=D)]
    attend = kernels(layer, Texts(lengths, random_documents(2, T, generator) if documents else None))
    with in_float64(), flex_on_cpu():
        actual, expected = (outputs_and_gradients(layer, attend[name], inputs, lengths)
                            for name in (kernel, "reference"))
    return max((a - b).abs().max().item() for a, b in zip(actual, expected))


@in_float64()
@torch.no_grad()
def decoding_error(layer, T, prompt, chunk, documents=False):
    """The largest difference between outputs computed through the cache and those of the full forward pass.

    layer: float64 and causal. prompt: tokens of the first call; chunk: tokens of each later call. documents: whether
    the texts hold several documents each.
    """
    rotation, generator = rotations(torch.arange(T), layer.head_size), torch.Generator().manual_seed(T)
    x = torch.randn(2, T, layer.proj.in_features, generator=generator, dtype=torch.float64)
    starts = random_documents(2, T, generator) if documents else None
    cache, pieces, edges = kvcache.new_cache(layer), [], [0, *range(prompt, T, chunk), T]
    for a, b in zip(edges, edges[1:]):
        texts = Texts(documents=starts[:, a:b] if documents else None)
        pieces.append(layer(x[:, a:b], rotation[:, a:b], texts, cache))
    return (torch.cat(pieces, 1) - layer(x, rotation, Texts(documents=starts))).abs().max().item()


@torch.no_grad()
def cells_missed(layer, T):
    """The number of kept pairs that the block mask of kernel=flex leaves out."""
    i = torch.arange(T)
    kept = (layer.bias_at(i, i) > -math.inf).expand(layer.n_head, T, T)
    cells = flex.cells_of(layer, T, "cpu").expand(layer.n_head, -1, -1)
    return int((kept & ~cells[:, i[:, None] // flex.BLOCK, i // flex.BLOCK]).sum())
