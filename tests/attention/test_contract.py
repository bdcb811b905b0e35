"""The laws that every attention mechanism must pass, for each file beside model.py that holds one.

pytest tests/test_contract.py --attention=my_attention    holds one file to them, with its default options
"""

import dataclasses
import functools
import itertools
import math

import pytest
import torch

from core import contract, engine, sinks, tiles
from core.config import UserError
from core.contract import outputs_and_gradients
from core.kvcache import Cache, new_cache
from core.mechanisms import mechanism, mechanisms
from core.ops import expand_heads
from core.texts import Texts, document_starts
from model import GPTConfig
from strangers import STRANGERS

SPANS = {"span_init": [2.0, 9.5, 40.0], "softness_span_mask": 4, "max_span": 64}
PERIODIC = {**SPANS, "span_init": [2.0, 15.0, 60.0], "use_triangle_wave_masking": True}
VARIANTS = {  # options of files in this repository, besides each file's defaults
    "sparse": {
        "local": {"sparse_pattern": "local", "window": 9},
        "strided": {"sparse_pattern": "strided", "stride": 7},
        "fixed": {"sparse_pattern": "fixed", "stride": 7, "fixed_columns": 2},
        "log": {"sparse_pattern": "log", "window": 3},
        "local, global": {"sparse_pattern": "local", "window": 9, "global_tokens": 3},
        "strided, global": {"sparse_pattern": "strided", "stride": 5, "global_tokens": 2},
        "fixed, global": {"sparse_pattern": "fixed", "stride": 5, "global_tokens": 3},
        "log, global": {"sparse_pattern": "log", "window": 4, "global_tokens": 1},
        "dense": {"sparse_pattern": "dense"},
        "by head": {"sparse_pattern": "LSG", "pattern_by": "head", "window": 5, "stride": 7},
        "by head, global": {"sparse_pattern": "DFL", "pattern_by": "head", "window": 9, "stride": 5,
                            "global_tokens": 2},
        "by head, bands": {"sparse_pattern": "LLD", "pattern_by": "head", "window": 9},
    },
    "adaptive_attention_span": {
        "spans": SPANS,
        "periodic": PERIODIC,
        "periodic, exact": {**PERIODIC, "triangle_wave_harmonics": 0},
        "snapped": {**PERIODIC, "snap_periods": True},
        "snapped, exact": {**PERIODIC, "snap_periods": True, "triangle_wave_harmonics": 0},
    },
    "alibi": {"learned": {"alibi_learned": True}},
    "forgetting": {
        "short": {"forgetting_spans": [1.5, 4.0, 20.0], "forgetting_prune": False},
    },
    "atrt": {
        "raw": {"atrt_renormalize": False, "atrt_task": "summarization"},
        "matrix": {"atrt_scope": "matrix"},
    },
}
SHARED_TOO = ("adaptive_attention_span: periodic", "sparse: local, global", "atrt: matrix")  # and each file's defaults
SHARED = {"n_kv_head": 1, "qk_norm": True, "attention_sink": True}  # keys that three heads share, and a sink
LENGTHS = (1, 2, 5, 23, 64, 65, 130)  # odd sizes: one token, shorter than a block, no multiple of one
BOUND = 1e-10  # in float64


@dataclasses.dataclass
class Case:
    """A mechanism with its options, causal or not."""

    kind: type
    options: dict
    causal: bool
    changes: dict = dataclasses.field(default_factory=dict)  # of the GPTConfig

    def layer(self, block_size=64, dropout=0.0, kernel="engine", dtype=torch.float64, n_head=3):
        torch.manual_seed(0)
        config = GPTConfig(n_head=n_head, n_embd=8 * n_head, block_size=block_size, n_class=0 if self.causal else 2,
                           dropout=dropout, kernel=kernel, options=dict(self.options), **self.changes)
        layer = self.kind(config).to(dtype)
        if layer.sinks is not None:
            layer.sinks.data = torch.tensor([-1.0, 0.5, 2.0], dtype=dtype)
        if "ratio" in dict(layer.named_parameters()):  # as training may leave them: most keys dropped, and few
            layer.period.data = torch.tensor([-1.0, 0.1, 2.0], dtype=dtype)
            layer.ratio.data = torch.tensor([1.0, -4.0, -1.0], dtype=dtype)
        if "forget_bias" in dict(layer.named_parameters()):  # gates that differ from token to token
            torch.nn.init.normal_(layer.forget.weight, std=0.5)
        return layer


@functools.cache
def cases(only=""):
    """{"name, options, direction": Case} of every file with a mechanism, or of one, and of the strangers."""
    kinds = {}
    for name in [only] if only else mechanisms():
        kind, defaults = mechanism(name)
        for variant, options in {"": {}, **VARIANTS.get(name, {})}.items():
            kinds[f"{name}: {variant}" if variant else name] = kind, {**defaults, **options}
    if not only:
        kinds |= {name: (kind, {}) for name, kind in STRANGERS.items()}
    every = {}
    for name, (kind, options) in kinds.items():
        strange = not only and name in STRANGERS.keys() - {"AbsoluteKeys", "Prefix", "PerHead", "Learned"}
        for causal in (True,) if strange else (True, False):
            try:
                Case(kind, options, causal).layer()
            except UserError:  # matrix scope in a causal model
                continue
            direction = "causal" if causal else "both directions"
            every[f"{name}, {direction}"] = Case(kind, options, causal)
            if (causal or name == "dense") and (name in SHARED_TOO or name in {*mechanisms(), "Fading", only}):
                every[f"{name}, shared keys, {direction}"] = Case(kind, options, causal, SHARED)
    return every


def pytest_generate_tests(metafunc):
    every = cases(metafunc.config.getoption("--attention"))
    choices = {"case": lambda case: True, "causal_case": lambda case: case.causal,
               "both_ways": lambda case: not case.causal}
    for name in choices.keys() & {*metafunc.fixturenames}:
        chosen = {label: case for label, case in every.items() if choices[name](case)}
        metafunc.parametrize(name, chosen.values(), ids=list(chosen))


def random_qkv(T, B=2, H=3, D=8, dtype=torch.float64, K=3):
    torch.manual_seed(T)
    return [torch.randn(B, heads, T, D, dtype=torch.float64).to(dtype).requires_grad_() for heads in (H, K, K)]


def kernels_of(layer):
    """The kernels that compute a layer on a CPU, besides the reference."""
    return ["engine", "sdpa"] if layer.dense else ["engine"]


def test_exact(case):
    """The CPU's kernels equal the reference: outputs and all gradients, at odd sizes and with padding."""
    layer = case.layer()
    for T, kernel in itertools.product(LENGTHS, kernels_of(layer)):
        for lengths in (None, torch.tensor([T, max(1, T // 2)])):
            assert contract.error(layer, kernel, T, lengths) < BOUND, (T, lengths, kernel)


def test_flex_is_exact(case):
    """FlexAttention of the same formula equals the reference: outputs and all gradients, with padding."""
    assert contract.error(case.layer(), "flex", 130, torch.tensor([130, 65])) < BOUND


def test_flex_is_exact_for_one_token(causal_case):
    assert contract.error(causal_case.layer(), "flex", 1) < BOUND


def test_exact_with_documents(case):
    """The CPU's kernels equal the reference where tokens see their own document only, also with padding."""
    layer = case.layer()
    for T, lengths in ((1, None), (5, [5, 2]), (65, None), (130, [130, 65])):
        lengths = lengths and torch.tensor(lengths)
        for kernel in kernels_of(layer):
            assert contract.error(layer, kernel, T, lengths, documents=True) < BOUND, (T, lengths, kernel)


def test_flex_is_exact_with_documents(case):
    assert contract.error(case.layer(), "flex", 130, torch.tensor([130, 65]), documents=True) < BOUND


def test_exact_in_small_tiles(case, monkeypatch):
    """Tiles that hold some of a block's heads, examples and stacked blocks compute the same."""
    for size in (2**9, 2**12):
        monkeypatch.setattr(tiles, "TILE", size)
        for documents in (False, True):
            assert contract.error(case.layer(block_size=300), "engine", 150, documents=documents) < BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_in_low_precision(causal_case, dtype):
    """The CPU's kernels err at most twice as much as the reference in the same precision, by the norm of
    the error against float64 over several draws, for each output and gradient."""
    exact, low = (causal_case.layer(block_size=300, dtype=each) for each in (torch.float64, torch.float32))
    errors = {kernel: [] for kernel in [*kernels_of(exact), "reference"]}
    for draw in range(9):
        torch.manual_seed(draw)
        inputs = [torch.randn(2, heads, 300, 8).to(dtype) for heads in (3, exact.n_kv_head, exact.n_kv_head)]
        more = contract.random_inputs(exact, 300, torch.Generator().manual_seed(draw))[3:]  # of gates
        inputs += [x.float() for x in more]
        inputs = [x.requires_grad_() for x in inputs]
        same = [x.detach().double().requires_grad_() for x in inputs]
        true = outputs_and_gradients(exact, contract.kernels(exact)["reference"], same)
        for kernel in errors:
            found = outputs_and_gradients(low, contract.kernels(low)[kernel], inputs)
            errors[kernel].append(torch.stack([(a.double() - b).norm() for a, b in zip(found, true)]))
    # the middle one: where ATRT's factor jumps, a weight that rounding carries across is an error of its own size
    middle = {kernel: torch.stack(of_draws).median(0).values for kernel, of_draws in errors.items()}
    for kernel in kernels_of(exact):
        assert (middle[kernel] <= 2 * middle["reference"]).all(), (kernel, middle)


@pytest.mark.parametrize("kernel", ["engine", "reference"])
def test_causal(causal_case, kernel):
    """A changed token changes nothing before it."""
    layer = causal_case.layer(kernel=kernel)
    x = torch.randn(2, 70, 24, dtype=torch.float64)
    changed = x.clone()
    changed[:, 42] += 1
    before, after = layer(x), layer(changed)
    assert (before[:, :42] - after[:, :42]).abs().max() < 1e-12
    assert (before[:, 42:] - after[:, 42:]).abs().max() > 1e-3


def test_alone(both_ways):
    """An example's output does not depend on the others in its batch, nor on padding."""
    layer = both_ways.layer()
    x = torch.randn(3, 50, 24, dtype=torch.float64)
    lengths = torch.tensor([50, 31, 1])
    together = layer(x, texts=Texts(lengths))
    garbage = x.clone()
    garbage[1, 31:] = 1e3
    garbage[2, 1:] = -1e3
    other = layer(garbage, texts=Texts(lengths))
    for n, length in enumerate(lengths.tolist()):
        alone = layer(x[n : n + 1, :length])
        assert (together[n, :length] - alone[0]).abs().max() < 1e-12
        assert (together[n, :length] - other[n, :length]).abs().max() < 1e-12


def test_documents_are_alone(case):
    """Each document is computed from its own tokens alone, and every token has a row of its own: by the reference and
    the engine; `test_flex_is_exact_with_documents` holds FlexAttention to the reference."""
    layer, T = case.layer(), 100
    marks = torch.zeros(2, T, dtype=torch.long)
    marks[0, [0, 1, 30, 70]] = marks[1, 99] = 1
    texts = Texts(documents=document_starts(marks, 1))
    q, k, v = (x.detach() for x in random_qkv(T, K=layer.n_kv_head))
    with torch.no_grad():
        for name in ("reference", "engine"):
            y = contract.kernels(layer, texts)[name](q, k, v)
            for b, a, end in ((0, 0, 1), (0, 1, 30), (0, 30, 70), (0, 70, 100), (1, 0, 99), (1, 99, 100)):
                own, place = slice(a, end), torch.arange(a, end)
                weights = layer.weights(q[b : b + 1, :, own], k[b : b + 1, :, own], place, place)
                alone = weights @ expand_heads(v[b : b + 1, :, own], 3)
                assert (y[b, :, own] - alone[0]).abs().max() < 1e-12, (name, b, a)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("prompt, chunk", [(40, 1), (40, 7), (3, 1), (1, 5)])
def test_incremental(causal_case, prompt, chunk, documents):
    """Decoding through the cache equals the full pass, also far past the block size and from a prompt longer than
    it."""
    assert contract.decoding_error(causal_case.layer(block_size=32), 150, prompt, chunk, documents) < 1e-12


def test_complete(case):
    """The blocks cover each pair with a bias above -inf exactly once, and what is counted is what there is."""
    layer = case.layer()
    for T in LENGTHS:
        i = torch.arange(T)
        wanted = (layer.bias_at(i, i) > -math.inf).expand(3, T, T)
        covered, multiplied = torch.zeros(3, T, T, dtype=torch.long), 0
        for part in layer.blocks(T):
            rows = torch.zeros(3, T, dtype=torch.long)
            for block in part:
                heads, queries = torch.as_tensor(block.heads), torch.as_tensor(block.queries)
                keys = torch.cat([torch.as_tensor(keys) for keys in block.kv_ranges])
                distance = (queries[:, None] - keys).abs()
                answers = torch.ones_like(distance, dtype=torch.bool)
                if block.distances is not None:
                    answers = (distance >= block.distances.start) & (distance < block.distances.stop)
                covered[heads[:, None, None], queries[:, None], keys[None]] += answers
                rows[heads[:, None], queries] += 1
                multiplied += len(heads) * distance.numel()
            assert not part or rows.max() == 1, T  # a query of a head stands in one block of a part
        assert (covered[wanted] == 1).all(), T
        assert covered.max() <= 1, T
        assert layer.kept_pairs(T) == pytest.approx(wanted.sum().item() / 3, rel=1e-15)
        assert layer.multiplied_pairs(T) == multiplied / 3
        stacked = [stack for part in engine.stacks_of(layer, T) for stack in part]
        assert sum(stack.count * stack.block.pairs for stack in stacked) == multiplied


def test_block_mask_of_flex(case):
    """FlexAttention's blocks leave out no kept pair."""
    for T in (5, 130, 700):
        assert contract.cells_missed(case.layer(block_size=512), T) == 0


def test_declarations(case):
    """What is checked when a model is built holds, for a short and a longer block."""
    for block_size in (1, 2, 64, 513):
        contract.check(case.layer(block_size=block_size), "it")


def test_decoding_reads_what_is_kept(causal_case):
    """A cached key that the bias drops in every head is not read: NaN in its place changes nothing."""
    layer = causal_case.layer(block_size=32)
    x = torch.randn(2, 80, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        cache, dropped = new_cache(layer), 0
        layer(x[:, :10], cache=cache)
        for t in range(10, 80):
            read = Cache(cache.size, cache.first)
            read.__dict__.update(cache.__dict__)
            read.rings = [ring.clone() for ring in cache.rings]
            j = cache.positions()
            kept = (sinks.bias_at(layer, torch.tensor([t]), j) > -math.inf).expand(3, 1, len(j))[:, 0]
            if not layer.relative:  # the heads read the same slots
                kept = kept.any(0).expand(3, -1)
            kept = kept.view(layer.n_kv_head, -1, len(j)).any(1)  # a key is read for all heads that share it
            dropped += (~kept).sum().item()
            for h in range(layer.n_kv_head):
                for ring in read.rings[:2]:
                    ring[:, h, : len(j)][:, ~kept[h]] = math.nan
            if cache.length >= cache.size + cache.first:  # else the slot is free, and is about to be written
                slot = cache.slot(t)
                for ring, old in zip(read.rings, cache.rings):
                    ring[:, :, slot] = old[:, :, slot]
            assert (layer(x[:, t : t + 1], cache=read) - whole[:, t : t + 1]).abs().max() < 1e-12, t
            layer(x[:, t : t + 1], cache=cache)
    i = torch.arange(33)
    assert dropped > 0 or (layer.bias_at(i[-1:], i[1:]) > -math.inf).any(0).all() or not layer.relative


def test_rows_without_a_key(case):
    """A query that keeps no key gives 0, with gradient 0, in every kernel."""
    layer = case.layer()
    i = torch.arange(40)
    empty = ~(layer.bias_at(i, i) > -math.inf).expand(3, 40, 40).any(2)
    for name, attend in contract.kernels(layer).items():
        if name == "flex" and not empty.any():
            continue  # it takes a second, and equals the reference by `test_flex_is_exact`
        with contract.flex_on_cpu():
            y, *gradients = outputs_and_gradients(layer, attend, random_qkv(40, K=layer.n_kv_head))
        assert all(g.isfinite().all() for g in (y, *gradients))
        assert (y[:, empty] == 0).all() and (gradients[0][:, empty] == 0).all()


def test_dropout(causal_case):
    """Dropout drops weights at its rate, the same in both directions, and from the global stream."""
    layer = causal_case.layer(block_size=128, dropout=0.25)
    layer.train()
    inputs = random_qkv(100, K=layer.n_kv_head)
    q, k, v = inputs

    def attend(v):
        torch.manual_seed(7)
        return layer.attend(q, k, v)

    # v = identity shows the dropped weights themselves
    eye = torch.eye(100, dtype=torch.float64).expand(2, layer.n_kv_head, 100, 100).contiguous().requires_grad_()
    dropped, plain = attend(eye).detach(), layer.weights(q, k).detach()
    there = plain > 1e-12
    kept = dropped[there] > 0
    assert kept.double().mean() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(dropped[there][kept], plain[there][kept] / 0.75)
    # the same mask going back: with it fixed the layer is linear in v, so the gradient is that matrix
    upstream = torch.randn(2, 3, 100, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(attend(v), v, upstream)
    grouped = dropped.mT @ upstream  # summed over the heads that share a value
    torch.testing.assert_close(grad, grouped.unflatten(1, (layer.n_kv_head, -1)).sum(2))
    # and q's gradient against the reference with those weights dropped
    mask = torch.where(there, dropped / plain, 0)
    (expected,) = torch.autograd.grad(((layer.weights(q, k) * mask) @ expand_heads(v, 3) * upstream).sum(), q)
    (grad,) = torch.autograd.grad(attend(v), q, upstream)
    torch.testing.assert_close(grad, expected)
    torch.manual_seed(8)
    assert not torch.equal(layer.attend(q, k, eye), dropped)
    layer.eval()
    assert (layer.attend(q, k, v) - contract.kernels(layer)["reference"](q, k, v)).abs().max() < BOUND


def test_factor_is_what_reweigh_applies(case):
    """A `reweigh` written for speed equals the one that the base class derives from `factor`."""
    layer = case.layer()
    if not layer.reweighs:
        return
    p = torch.softmax(3 * torch.randn(2, 3, 40, 40, dtype=torch.float64), -1)
    keys = torch.full((2, 3, 40, 1), 40)
    for variation in (None, torch.full((2, 3, 40, 1), 2.5, dtype=torch.float64)):
        plain = super(case.kind, layer).reweigh(p, keys, variation)
        torch.testing.assert_close(layer.reweigh(p, keys, variation), plain, rtol=1e-9, atol=1e-12)


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
    ("sparse", {"sparse_pattern": "LLS", "pattern_by": "head", "window": 64}, 1.24),  # (2 n w + n sqrt(n)) / 3
    ("alibi", {}, 2),
    ("atrt", {}, 2),
    ("forgetting", {}, 2),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name, options, exponent", CLAIMS)
def test_cheap(name, options, exponent, causal):
    """Work counted from the blocks, and pairs kept, grow as the mechanism claims."""
    kind, defaults = mechanism(name)
    times, pairs, kept = [2**n for n in range(10, 16)], [], []
    for T in times:
        torch.manual_seed(0)  # the same first periods at each T
        layer = kind(GPTConfig(n_head=3, n_embd=24, block_size=T, n_class=0 if causal else 2,
                               options={**defaults, **options}))
        if layer.relative or T <= 8192:  # else every pair is looked at
            kept.append(layer.kept_pairs(T))
        if layer.relative or T <= 8192 or options["sparse_pattern"] == "fixed":  # whose blocks are written by hand
            pairs.append(layer.multiplied_pairs(T))

    def slope(counts):
        x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (times[: len(counts)], counts))
        return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()

    assert slope(kept) == pytest.approx(exponent, abs=0.1)
    assert exponent - 0.25 < slope(pairs) < exponent + 0.1  # less where a block is wider than a short window


def test_snapped_periods_multiply_less():
    """Whole periods with few kept residues skip most of the pairs of a long span."""
    kind, defaults = mechanism("adaptive_attention_span")
    options = {**defaults, "span_init": [2000.0], "use_triangle_wave_masking": True,
               "period_min_triangle_wave_masking": 4.0,
               "period_max_triangle_wave_masking": 4.0}
    pairs = []
    for snap in (False, True):
        layer = kind(GPTConfig(n_head=2, n_embd=16, block_size=4096, options={**options, "snap_periods": snap}))
        layer.ratio.data.fill_(-2.0)
        pairs.append(layer.multiplied_pairs(4096))
    assert pairs[1] < 0.35 * pairs[0]
