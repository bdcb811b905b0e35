"""The laws that every attention mechanism must pass: see "the contract" in README.md.

Beside the mechanisms of the repository stand four of the tests' own, which use what dense
attention does not: learned spans that differ by head, a plan of two parts, reweighing, and a
bias that depends on more than the distance.
"""

import math

import pytest
import torch
from conftest import LargestTensor

import attention
import engine
from attention import Attention, Block, Cache
from configurator import UserError
from model import GPTConfig, mechanism


class Span(Attention):
    """A soft window with a learned length for each head; every head has blocks of its own."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.span = torch.nn.Parameter(torch.linspace(3.0, 20.0, self.n_head))

    def bias(self, i, j):
        distance = i[:, None] - j[None]
        m = ((4 + self.span[:, None, None] - distance.abs()) / 4).clamp(0, 1)
        kept = (m > 0) & (distance >= 0 if self.causal else distance == distance)
        return torch.where(kept, m.where(m > 0, 1).log(), -math.inf)

    def plan(self, T):
        part = []
        for h in range(self.n_head):
            r = math.ceil(4 + self.span[h].item())
            for a in range(0, T, 16):
                b = min(a + 16, T)
                part.append(Block(range(h, h + 1), range(a, b), range(max(0, a - r), b if self.causal else min(T, b + r))))
        return [part]

    def reach(self):
        return math.ceil(4 + self.span.max().item())


class EvenOdd(Attention):
    """Every key, at a learned price of distance, in two parts: the even keys, and the odd ones in two
    ranges."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.price = torch.nn.Parameter(torch.tensor(0.3))

    def bias(self, i, j):
        distance = (i[:, None] - j[None]).to(self.price.dtype)
        kept = (distance >= 0) & (distance < self.block_size) if self.causal else distance == distance
        return torch.where(kept, -self.price * distance.abs().sqrt(), -math.inf)[None]

    def plan(self, T):
        parts = [[], []]
        for a in range(0, T, 24):
            b = min(a + 24, T)
            end = b if self.causal else T
            parts[0].append(Block(range(self.n_head), range(a, b), range(0, end, 2)))
            if end > 1:
                parts[1].append(Block(range(self.n_head), range(a, b), (range(1, end, 4), range(3, end, 4))))
        return parts if T > 1 else parts[:1]


class Reweigh(Attention):
    """Weights squared and scaled to sum to one."""

    def reweigh(self, p, keys, statistic=None):
        p = p.square() * keys.clamp(min=1)
        return p / p.sum(-1, keepdim=True)


class Anchored(Attention):
    """A learned bonus for keys at multiples of seven: not a function of the distance alone."""

    bias_period = 7

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.bonus = torch.nn.Parameter(torch.linspace(0.5, 1.5, self.n_head))

    def bias(self, i, j):
        bonus = self.bonus[:, None, None] * (j % 7 == 0)
        return super().bias(i, j) + bonus


SPANS = {"span_init": [2.0, 9.5, 40.0], "softness_span_mask": 4, "max_span": 64}
PERIODIC = {**SPANS, "span_init": [2.0, 15.0, 60.0], "use_triangle_wave_masking": True}
MECHANISMS = {
    "dense": ("dense", {}),
    "local": ("sparse", {"sparse_pattern": "local", "window": 9}),
    "strided": ("sparse", {"sparse_pattern": "strided", "stride": 7}),
    "fixed": ("sparse", {"sparse_pattern": "fixed", "stride": 7, "fixed_columns": 2}),
    "log": ("sparse", {"sparse_pattern": "log", "window": 3}),
    "local, global": ("sparse", {"sparse_pattern": "local", "window": 9, "global_tokens": 3}),
    "strided, global": ("sparse", {"sparse_pattern": "strided", "stride": 5, "global_tokens": 2}),
    "fixed, global": ("sparse", {"sparse_pattern": "fixed", "stride": 5, "global_tokens": 3}),
    "log, global": ("sparse", {"sparse_pattern": "log", "window": 4, "global_tokens": 1}),
    "sparse, dense": ("sparse", {"sparse_pattern": "dense"}),
    "adaptive": ("adaptive_attention_span", SPANS),
    "periodic": ("adaptive_attention_span", PERIODIC),
    "periodic, exact": ("adaptive_attention_span", {**PERIODIC, "triangle_wave_harmonics": 0}),
    "snapped": ("adaptive_attention_span", {**PERIODIC, "snap_periods": True}),
    "snapped, exact": ("adaptive_attention_span", {**PERIODIC, "snap_periods": True, "triangle_wave_harmonics": 0}),
    "atrt": ("atrt", {}),
    "atrt, raw": ("atrt", {"atrt_renormalize": False, "atrt_task": "summarization"}),
    "atrt, matrix": ("atrt", {"atrt_scope": "matrix"}),
    "span": (Span, {}), "even_odd": (EvenOdd, {}), "reweigh": (Reweigh, {}), "anchored": (Anchored, {}),
}
CAUSAL = [name for name in MECHANISMS if name != "atrt, matrix"]  # refused: it would see the future
BOTH = [(name, causal) for name in MECHANISMS for causal in (True, False) if name in CAUSAL or not causal]
LENGTHS = (1, 2, 5, 23, 64, 65, 130)  # odd sizes: one token, shorter than a block, no multiple of one


def make(name, causal=True, block_size=64, dropout=0.0, kernel="engine", dtype=torch.float64):
    torch.manual_seed(0)
    kind, options = MECHANISMS[name]
    if isinstance(kind, str):
        kind, defaults = mechanism(kind)
        options = {**defaults, **options}
    config = GPTConfig(n_head=3, n_embd=24, block_size=block_size, n_class=0 if causal else 2, dropout=dropout,
                       kernel=kernel, options=options)
    layer = kind(config).to(dtype)
    if "ratio" in dict(layer.named_parameters()):  # as training may leave them: most keys dropped, and few
        layer.period.data = torch.tensor([-1.0, 0.1, 2.0], dtype=dtype)
        layer.ratio.data = torch.tensor([1.0, -4.0, -1.0], dtype=dtype)
    return layer


def random_qkv(T, B=2, H=3, D=8, dtype=torch.float64):
    torch.manual_seed(T)
    return [torch.randn(B, H, T, D, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def outputs_and_gradients(layer, attend, inputs, lengths=None):
    """[output, gradients of q, k, v and of the mechanism's parameters], for one fixed upstream gradient."""
    y = attend(*inputs)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    if lengths is not None:  # nothing comes back from padding
        upstream = upstream * (torch.arange(y.size(2)) < lengths[:, None])[:, None, :, None]
        y = y * (torch.arange(y.size(2)) < lengths[:, None])[:, None, :, None]
    wanted = inputs + layer.mask_parameters()
    return [y] + list(torch.autograd.grad(y, wanted, upstream, allow_unused=True))


def reference(layer, lengths=None):
    return lambda q, k, v: layer.weights(q, k, lengths=lengths) @ v


def largest_error(found, expected):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(found, expected) if b is not None)


@pytest.mark.parametrize("name, causal", BOTH)
def test_exact(name, causal):
    """The engine equals the reference: outputs and all gradients, at odd sizes and with padding."""
    layer = make(name, causal)
    for T in LENGTHS:
        for lengths in (None, torch.tensor([T, max(1, T // 2)])):
            inputs = random_qkv(T)
            expected = outputs_and_gradients(layer, reference(layer, lengths), inputs, lengths)
            found = outputs_and_gradients(layer, lambda *x: layer.attend(*x, lengths), inputs, lengths)
            assert largest_error(found, expected) < 1e-10, (T, lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL)
def test_exact_in_low_precision(name, dtype):
    """The engine errs at most twice as much as the reference in the same precision, by the norm of
    the error against float64 over several draws, for each output and gradient."""
    exact, low = make(name, block_size=300), make(name, block_size=300, dtype=torch.float32)  # masks stay float32
    ours, theirs = [], []
    for draw in range(9):
        torch.manual_seed(draw)
        inputs = [torch.randn(2, 3, 300, 8).to(dtype).requires_grad_() for _ in range(3)]
        same = [x.detach().double().requires_grad_() for x in inputs]
        true = outputs_and_gradients(exact, reference(exact), same)
        for errors, attend in ((ours, low.attend), (theirs, reference(low))):
            found = outputs_and_gradients(low, attend, inputs)
            errors.append([(a.double() - b).norm() ** 2 for a, b in zip(found, true) if b is not None])
    for n, (error, bound) in enumerate(zip(zip(*ours), zip(*theirs))):
        # the middle one: where ATRT's factor jumps, a weight that rounding carries across is an error of its own size
        error, bound = (torch.stack(each).median().sqrt().item() for each in (error, bound))
        assert error <= 2 * bound, (n, error, bound)


@pytest.mark.parametrize("kernel", ["engine", "reference"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name, kernel):
    """A changed token changes nothing before it."""
    layer = make(name, kernel=kernel)
    x = torch.randn(2, 70, 24, dtype=torch.float64)
    changed = x.clone()
    changed[:, 41] += 1
    before, after = layer(x), layer(changed)
    assert (before[:, :41] - after[:, :41]).abs().max() < 1e-12
    assert (before[:, 41:] - after[:, 41:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MECHANISMS)
def test_alone(name):
    """An example's output does not depend on the others in its batch, nor on padding."""
    layer = make(name, causal=False)
    x = torch.randn(3, 50, 24, dtype=torch.float64)
    lengths = torch.tensor([50, 31, 1])
    together = layer(x, lengths=lengths)
    garbage = x.clone()
    garbage[1, 31:] = 1e3
    garbage[2, 1:] = -1e3
    other = layer(garbage, lengths=lengths)
    for n, length in enumerate(lengths.tolist()):
        alone = layer(x[n : n + 1, :length])
        assert (together[n, :length] - alone[0]).abs().max() < 1e-12
        assert (together[n, :length] - other[n, :length]).abs().max() < 1e-12


@pytest.mark.parametrize("prompt, chunk", [(40, 1), (40, 7), (3, 1), (1, 5)])
@pytest.mark.parametrize("name", CAUSAL)
def test_incremental(name, prompt, chunk):
    """Decoding through the cache equals the full pass, also far past the block size."""
    layer = make(name, block_size=32)
    rotation = attention.rotations(torch.arange(150), 8)
    x = torch.randn(2, 150, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x, rotation)
        cache = Cache(layer.reach() + 1)
        pieces = [layer(x[:, :prompt], rotation[:, :prompt], cache=cache)]  # also one longer than the cache
        for a in range(prompt, 150, chunk):
            pieces.append(layer(x[:, a : a + chunk], rotation[:, a : a + chunk], cache=cache))
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-12
    assert cache.k.size(2) == layer.reach() + 1


@pytest.mark.parametrize("name, causal", BOTH)
def test_complete(name, causal):
    """The plan covers each pair with a bias above -inf exactly once, and `kept` counts those pairs."""
    layer = make(name, causal)
    for T in LENGTHS:
        i = torch.arange(T)
        wanted = (layer.bias(i, i) > -math.inf).expand(3, T, T)
        covered, multiplied = torch.zeros(3, T, T, dtype=torch.long), 0
        for part in layer.plan(T):
            rows = torch.zeros(3, T, dtype=torch.long)
            for block in part:
                heads, queries = torch.as_tensor(block.heads), torch.as_tensor(block.queries)
                keys = torch.cat([torch.as_tensor(run) for run in block.runs])
                distance = (queries[:, None] - keys).abs()
                answers = torch.ones_like(distance, dtype=torch.bool)
                if block.distances is not None:
                    answers = (distance >= block.distances.start) & (distance < block.distances.stop)
                covered[heads[:, None, None], queries[:, None], keys[None]] += answers
                rows[heads[:, None], queries] += 1
                multiplied += len(heads) * distance.numel()
            assert rows.max() == 1, T  # a query of a head stands in one block of a part
        assert (covered[wanted] == 1).all(), T
        assert covered.max() == 1, T
        assert layer.kept(T) == pytest.approx(wanted.sum().item() / 3, rel=1e-15)
        assert layer.pairs(T) == multiplied / 3


@pytest.mark.parametrize("name", [name for name in CAUSAL if isinstance(MECHANISMS[name][0], str)])
def test_decoding_reads_what_is_kept(name):
    """A cached key that the bias drops is not read: NaN in its place changes nothing."""
    layer = make(name, block_size=32)
    x = torch.randn(2, 80, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        cache, dropped = Cache(layer.reach() + 1), 0
        layer(x[:, :10], cache=cache)
        for t in range(10, 80):
            read = Cache(cache.size)
            read.__dict__.update(cache.__dict__)
            read.k, read.v = cache.k.clone(), cache.v.clone()
            _, _, j = cache.held()
            kept = (layer.bias(torch.tensor([t]), j) > -math.inf).expand(3, 1, len(j))[:, 0]
            dropped += (~kept).sum().item()
            for h in range(3):
                read.k[:, h, : len(j)][:, ~kept[h]] = math.nan
                read.v[:, h, : len(j)][:, ~kept[h]] = math.nan
            if cache.length >= cache.size:  # else the slot is free, and is about to be written
                slot = t % cache.size
                read.k[:, :, slot], read.v[:, :, slot] = cache.k[:, :, slot], cache.v[:, :, slot]
            assert (layer(x[:, t : t + 1], cache=read) - whole[:, t : t + 1]).abs().max() < 1e-12, t
            layer(x[:, t : t + 1], cache=cache)
    assert dropped > 0 or name in ("dense", "sparse, dense", "atrt", "atrt, raw")


FAR = {**PERIODIC, "span_init": [20.0, 50.0, 300.0], "max_span": 0}
CLAIMS = [  # mechanism, options, exponent of the work over T = 1,024 to 32,768
    ("dense", {}, 2),
    ("sparse", {"sparse_pattern": "local", "window": 256}, 1),
    ("sparse", {"sparse_pattern": "strided"}, 1.5),
    ("sparse", {"sparse_pattern": "fixed"}, 1.5),
    ("sparse", {"sparse_pattern": "log", "window": 16}, 1 + 1 / math.log(8192)),  # the slope of n log(n)
    ("sparse", {"sparse_pattern": "local", "window": 256, "global_tokens": 4}, 1),
    ("adaptive_attention_span", {**SPANS, "max_span": 0}, 1),
    ("adaptive_attention_span", FAR, 1),
    ("adaptive_attention_span", {**FAR, "snap_periods": True}, 1),
    ("atrt", {}, 2),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name, options, exponent", CLAIMS)
def test_cheap(name, options, exponent, causal):
    """Work counted from the plan, and pairs kept, grow as the mechanism claims."""
    kind, defaults = mechanism(name)
    times, pairs, kept = [2**n for n in range(10, 16)], [], []
    for T in times:
        layer = kind(GPTConfig(n_head=3, n_embd=24, block_size=T, n_class=0 if causal else 2, options={**defaults, **options}))
        pairs.append(layer.pairs(T))
        if layer.relative or T <= 8192:  # else every pair is looked at
            kept.append(layer.kept(T))

    def slope(counts):
        x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (times[: len(counts)], counts))
        return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()

    assert slope(kept) == pytest.approx(exponent, abs=0.1)
    assert exponent - 0.25 < slope(pairs) < exponent + 0.1  # less where a block is wider than a short window


def test_snapped_periods_multiply_less():
    """Whole periods with few kept residues skip most of the pairs of a long span."""
    kind, defaults = mechanism("adaptive_attention_span")
    options = {**defaults, "span_init": [2000.0], "use_triangle_wave_masking": True, "period_min_triangle_wave_masking": 4.0,
               "period_max_triangle_wave_masking": 4.0}
    pairs = []
    for snap in (False, True):
        layer = kind(GPTConfig(n_head=2, n_embd=16, block_size=4096, options={**options, "snap_periods": snap}))
        layer.ratio.data.fill_(-2.0)
        pairs.append(layer.pairs(4096))
    assert pairs[1] < 0.35 * pairs[0]


@pytest.mark.parametrize("name", CAUSAL)
def test_dropout(name):
    """Dropout drops weights at its rate, the same in both directions, and from the global stream."""
    layer = make(name, block_size=128, dropout=0.25)
    layer.train()
    inputs = random_qkv(100)
    q, k, v = inputs

    def attend(v):
        torch.manual_seed(7)
        return layer.attend(q, k, v)

    # v = identity shows the dropped weights themselves
    eye = torch.eye(100, dtype=torch.float64).expand(2, 3, 100, 100).contiguous().requires_grad_()
    dropped, plain = attend(eye).detach(), layer.weights(q, k).detach()
    there = plain > 1e-12
    kept = dropped[there] > 0
    assert kept.double().mean() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(dropped[there][kept], plain[there][kept] / 0.75)
    # the same mask going back: with it fixed the layer is linear in v, so the gradient is that matrix
    upstream = torch.randn(2, 3, 100, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(attend(v), v, upstream)
    torch.testing.assert_close(grad, dropped.mT @ upstream)
    # and q's gradient against the reference with those weights dropped
    mask = torch.where(there, dropped / plain, 0)
    (expected,) = torch.autograd.grad(((layer.weights(q, k) * mask) @ v * upstream).sum(), q)
    (grad,) = torch.autograd.grad(attend(v), q, upstream)
    torch.testing.assert_close(grad, expected)
    torch.manual_seed(8)
    assert not torch.equal(layer.attend(q, k, eye), dropped)
    layer.eval()
    assert largest_error([layer.attend(q, k, v)], [reference(layer)(q, k, v)]) < 1e-10


def test_dropout_mask():
    """Zeros at the rate asked for in every place of the 64-bit draws, and a mean of one."""
    for p in (0.1, 0.5, 0.9):
        mask = engine.dropout_mask(torch.empty(4001, 7), p, torch.Generator().manual_seed(0))
        assert mask.mean().item() == pytest.approx(1, abs=0.05)
        assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-3)
        for lane in range(4):
            assert (mask.flatten()[lane::4] == 0).float().mean().item() == pytest.approx(p, abs=0.02)
    neighbours = mask.flatten()[:-1] * mask.flatten()[1:]
    assert neighbours.mean().item() == pytest.approx(1, abs=0.2)  # independent
    assert engine.drop(mask, 0.0) is mask
    assert (engine.drop(torch.ones(10000), 0.3) == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_reweigh_needs_complete_rows():
    class Both(EvenOdd):
        reweigh = Reweigh.reweigh

    layer = Both(GPTConfig(n_head=3, n_embd=24, block_size=64, kernel="engine"))
    with pytest.raises(ValueError, match="a plan of one part"):
        layer.attend(*random_qkv(64, dtype=torch.float32))


def test_kernels():
    """The fused call agrees with the reference, and is refused for anything but dense attention."""
    for causal, T in ((True, 50), (True, 100), (False, 50)):
        layer = make("dense", causal, kernel="sdpa")
        lengths = None if causal else torch.tensor([T, T // 2])
        inputs = random_qkv(T)
        found = outputs_and_gradients(layer, lambda *x: layer.attend(*x, lengths), inputs, lengths)
        assert largest_error(found, outputs_and_gradients(layer, reference(layer, lengths), inputs, lengths)) < 1e-10
    with pytest.raises(UserError, match="dense attention only"):
        make("span", kernel="sdpa").attend(*random_qkv(8))
    assert make("dense", kernel="auto").choose_kernel("cpu") == "engine"
    assert make("dense", kernel="auto").choose_kernel("cuda") == "sdpa"
    assert make("span", kernel="auto").choose_kernel("cuda") == "engine"


def test_sums_over_many_blocks():
    """In bfloat16 the first keys' gradient, a sum over all later blocks, errs as the reference's does."""
    layer = Attention(GPTConfig(n_head=1, n_embd=8, block_size=4096, kernel="engine"))
    layer.plan = lambda T: [[Block(range(1), *pair) for pair in layer.windows(range(T), 32, T)]]
    inputs = [x.bfloat16().requires_grad_() for x in torch.randn(3, 1, 1, 4096, 8)]
    same = [x.detach().float().requires_grad_() for x in inputs]

    def gradient(attend, inputs):  # what adds up is all of one sign, so that rounding shows
        return torch.autograd.grad(attend(*inputs).sum(), inputs[2])[0][0, 0, :256].float()

    true = gradient(reference(layer), same)
    ours, theirs = ((gradient(attend, inputs) - true).norm().item() for attend in (layer.attend, reference(layer)))
    assert ours < 1.3 * theirs, (ours, theirs)


def test_stacks():
    """Neighbours of one geometry stack while what they add to never meets; others do not."""
    def block(a, step=1, n=4):
        return Block(range(1), range(a, a + n * step, step), range(a, a + 2 * n * step, step))

    def sizes(*blocks, period=1):
        return [(stack.count, stack.shift) for stack in engine.stacks(blocks, period)]

    assert sizes(*map(block, range(0, 40, 4))) == [(10, 4)]
    assert sizes(block(0), block(4), block(9), block(14)) == [(2, 4), (2, 5)]
    assert sizes(*(block(a, step=3) for a in range(3))) == [(3, 1)]
    assert sizes(*(block(a, step=3) for a in range(5))) == [(3, 1), (2, 1)]  # residues 0 and 3 meet
    assert sizes(block(0), block(4, n=3), block(8, n=3)) == [(1, 0), (2, 4)]
    assert sizes(block(4), block(0)) == [(1, 0), (1, 0)]
    assert sizes(*map(block, range(0, 12, 4)), period=0) == 3 * [(1, 0)]
    assert sizes(*map(block, range(0, 12, 4)), period=8) == 3 * [(1, 0)]
    assert sizes(*map(block, range(0, 24, 8)), period=8) == [(3, 8)]


@pytest.mark.parametrize("name, causal", BOTH)
def test_nothing_is_added_to_one_place_twice_at_once(name, causal, monkeypatch):
    """What is added in place in one operation shares no element: else threads would lose sums, now and then."""
    at, add, added = engine.Tile.at, engine.Tile.add, []

    def watched(tile, x, runs, y):
        def places(tile, x, run):
            where = at(tile, torch.arange(x.numel()).view(x.shape), run)
            assert where.unique().numel() == where.numel()
            added.append(run)
            return at(tile, x, run)

        monkeypatch.setattr(engine.Tile, "at", places)
        add(tile, x, runs, y)
        monkeypatch.setattr(engine.Tile, "at", at)

    monkeypatch.setattr(engine.Tile, "add", watched)
    for T in (23, 300):
        make(name, causal, block_size=300).attend(*random_qkv(T, B=1)).sum().backward()
    assert added


@pytest.mark.parametrize("name", CAUSAL)
def test_engine_builds_no_square(name, monkeypatch):
    """No tensor of the engine has T x T elements: memory is linear in T."""
    T = 2048
    layer = make(name, block_size=T, dtype=torch.float32)
    monkeypatch.setattr(engine, "TILE", 2**16)
    inputs = random_qkv(T, B=1, dtype=torch.float32)
    with LargestTensor() as largest:
        torch.autograd.grad(layer.attend(*inputs).sum(), inputs + layer.mask_parameters(), allow_unused=True)
    assert 0 < largest.elements <= 1024 * T  # a strip of bias, or a tile of one head; T x T would be 2048 * T


def test_rotations():
    """Products of rotated vectors depend on the distance alone, also at far positions."""
    q, k = torch.randn(2, 8, dtype=torch.float64)

    def turned(x, position):
        cos, sin = attention.rotations(torch.tensor([position]), 8)[:, 0]
        return torch.cat([x[:4] * cos - x[4:] * sin, x[:4] * sin + x[4:] * cos])

    near, far = turned(q, 7) @ turned(k, 2), turned(q, 1_000_005) @ turned(k, 1_000_000)
    assert near.item() == pytest.approx(far.item(), abs=1e-9)
    assert near.item() != pytest.approx((turned(q, 7) @ turned(k, 3)).item(), abs=1e-3)
    # the layer's own turn is this one
    qkv = torch.stack([q, k, k])[:, None, None, None]
    found = attention.split_heads(qkv, attention.rotations(torch.tensor([7]), 8))
    torch.testing.assert_close(found[0].flatten(), turned(q, 7))
    torch.testing.assert_close(found[1].flatten(), turned(k, 7))
    torch.testing.assert_close(found[2].flatten(), k)
    several = torch.randn(3, 2, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    rotation = attention.rotations(torch.arange(5), 8)
    assert torch.autograd.gradcheck(lambda x: torch.stack(attention.split_heads(x, rotation)), several)
