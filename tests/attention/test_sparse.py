"""Sparse patterns against masks written out by hand, their choice per layer, and what is refused."""

import math

import pytest
import torch

from core import contract
from core.config import UserError
from core.kvcache import new_cache
from core.mechanisms import mechanism
from core.ops import rotations
from model import GPT, GPTConfig

# 16 queries downwards, keys to the right, stride 4: x a key that is kept.
STRIDED = """
x...............
xx..............
xxx.............
xxxx............
xxxxx...........
.xxxxx..........
..xxxxx.........
...xxxxx........
x...xxxxx.......
.x...xxxxx......
..x...xxxxx.....
...x...xxxxx....
x...x...xxxxx...
.x...x...xxxxx..
..x...x...xxxxx.
...x...x...xxxxx
"""
FIXED = """
x...............
xx..............
xxx.............
xxxx............
...xx...........
...xxx..........
...xxxx.........
...xxxxx........
...x...xx.......
...x...xxx......
...x...xxxx.....
...x...xxxxx....
...x...x...xx...
...x...x...xxx..
...x...x...xxxx.
...x...x...xxxxx
"""
LOG = """
x...............
xx..............
xxx.............
xxxx............
xxxxx...........
.xxxxx..........
..xxxxx.........
...xxxxx........
x...xxxxx.......
.x...xxxxx......
..x...xxxxx.....
...x...xxxxx....
....x...xxxxx...
.....x...xxxxx..
......x...xxxxx.
.......x...xxxxx
"""
FIXED_BOTH = """
xxxx...x...x...x
xxxx...x...x...x
xxxx...x...x...x
xxxx...x...x...x
...xxxxx...x...x
...xxxxx...x...x
...xxxxx...x...x
...xxxxx...x...x
...x...xxxxx...x
...x...xxxxx...x
...x...xxxxx...x
...x...xxxxx...x
...x...x...xxxxx
...x...x...xxxxx
...x...x...xxxxx
...x...x...xxxxx
"""
GLOBAL = """
xxxxxx
xxxxxx
xxxx..
xxxxx.
xx.xxx
xx..xx
"""


def layer(n=16, causal=True, pos="rope", **options):
    kind, defaults = mechanism("sparse")
    return kind(GPTConfig(n_head=2, n_embd=8, block_size=n, pos=pos, n_class=0 if causal else 2,
                          options={**defaults, **options}))


@pytest.mark.parametrize("pattern, window, causal, drawn", [
    ("strided", 1, True, STRIDED), ("fixed", 1, True, FIXED), ("log", 4, True, LOG), ("log", 1, True, None),
    ("fixed", 1, False, FIXED_BOTH),
])
def test_patterns_by_hand(pattern, window, causal, drawn):
    kept = layer(causal=causal, sparse_pattern=pattern, window=window,
                 fixed_columns=1).bias_at(*2 * [torch.arange(16)])[0] == 0
    if drawn is None:  # log with the smallest window: 0, 1, 2, 4, 8
        distances = [[d for d in range(16) if i >= d and kept[i, i - d]] for i in (0, 3, 15)]
        assert distances == [[0], [0, 1, 2], [0, 1, 2, 4, 8]]
        return
    assert ["".join(".x"[there] for there in row) for row in kept.int().tolist()] == drawn.split()


def test_both_directions_and_globals():
    """Without causality a pattern is its own mirror; global tokens see and are seen by all."""
    i = torch.arange(16)
    for pattern in ("local", "strided", "fixed", "log"):
        options = {"sparse_pattern": pattern, "window": 3}
        both, causal = (layer(causal=c, **options).bias_at(i, i)[0] == 0 for c in (False, True))
        assert (both == both.T).all() or pattern == "fixed"
        assert torch.equal(both.tril(), causal)
    kept = layer(6, causal=False, window=2, global_tokens=2).bias_at(torch.arange(6), torch.arange(6))[0] == 0
    assert ["".join(".x"[there] for there in row) for row in kept.int().tolist()] == GLOBAL.split()


@pytest.mark.parametrize("said, patterns", [
    ("strided", ["strided"] * 5),
    ("local,local,dense", ["local", "local", "dense", "local", "local"]),
    ("local, dense", ["local", "dense", "local", "dense", "local"]),
    ("LLLD", ["local", "local", "local", "dense", "local"]),
    ("SFG", ["strided", "fixed", "log", "strided", "fixed"]),
])
def test_a_pattern_for_each_layer(said, patterns):
    model = GPT(GPTConfig(n_layer=5, n_head=2, n_embd=8, block_size=16, attention="sparse",
                          options={"sparse_pattern": said}))
    assert [layer.attention.pattern for layer in model.layers] == patterns


def test_dense_layers_may_use_the_fused_call():
    dense, local = (layer(sparse_pattern=pattern, window=4) for pattern in ("dense", "local"))
    assert dense.choose_kernel("cuda") == "sdpa" and local.choose_kernel("cuda") == "flex"
    local.kernel = "sdpa"
    with pytest.raises(UserError, match="dense attention only"):
        local.choose_kernel("cpu")


def test_stride_follows_the_block_size():
    assert [layer(n).stride for n in (1, 16, 256, 512, 16384)] == [1, 4, 16, 23, 128]
    assert layer(256, stride=10).stride == 10


@pytest.mark.parametrize("options, said", [
    ({"sparse_pattern": "strided,lokal"}, "did you mean local"),
    ({"sparse_pattern": "LXD"}, "there are dense, fixed, local, log, strided"),
    ({"sparse_pattern": ""}, "unknown sparse_pattern"),
    ({"window": 0}, "window must be from 1 to 16,777,216, got 0"),
    ({"window": 10**20}, "window must be from 1 to 16,777,216, got 100000000000000000000"),
    ({"stride": -1}, "stride must be from 0 to 16,777,216, got -1"),
    ({"fixed_columns": 0}, "fixed_columns must be from 1"),
    ({"global_tokens": -2}, "global_tokens must be from 0"),
])
def test_refused(options, said):
    with pytest.raises(UserError, match=said):
        layer(**options)


def test_kept_pairs():
    """Counts in closed form: local n w - w (w - 1) / 2."""
    assert layer(100, window=7).kept_pairs(100) == 100 * 7 - 21
    assert layer(100, causal=False, window=7).kept_pairs(100) == 100 * 13 - 42
    assert layer(16, sparse_pattern="log", window=1).kept_pairs(16) == 16 + 15 + 14 + 12 + 8
    assert math.isclose(layer(16, sparse_pattern="log", window=1).stats()["kept_share"], 65 / 136)


def test_a_pattern_for_each_head():
    """`LLS` by head: heads 0 and 1 see a window, head 2 the stride, and so on from the first letter, in every layer."""
    options = {"sparse_pattern": "LLS", "pattern_by": "head", "window": 3, "stride": 4}
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=16, attention="sparse", options=options))
    i, names = torch.arange(16), ("local", "local", "strided", "local")
    for block in model.layers:
        assert block.attention.patterns == list(names)
        for head, name in zip(block.attention.bias_at(i, i), names):
            alone = layer(sparse_pattern=name, window=3, stride=4)
            assert torch.equal(head, alone.bias_at(i, i)[0])


def test_letters_are_explained():
    """In the run's start lines: what each letter was read as. A name needs no explanation."""
    described = [layer(sparse_pattern=text, pattern_by=by).description
                 for text, by in (("LLD", "layer"), ("SFG", "head"), ("local", "layer"), ("local,dense", "layer"))]
    assert described == ["sparse_pattern LLD: L local, D dense; a letter for each layer, repeated",
                         "sparse_pattern SFG: S strided, F fixed, G log; a letter for each head, repeated", "", ""]


@pytest.mark.parametrize("pattern", ["local", "dense", "strided", "fixed", "LS"])
def test_first_tokens_stay_visible(pattern):
    """In a causal model the global tokens are seen at any distance, by the formula, in whole texts, and in decoding,
    whose cache holds them beside the positions that slide."""
    attn = layer(16, sparse_pattern=pattern, pattern_by="head", window=5, stride=4, global_tokens=3).double()
    kept = attn.weights(*torch.randn(2, 1, 2, 100, 4, dtype=torch.float64)) > 0
    assert kept[..., 3:, :3].all() and not kept[..., 40:, 3:20].any()
    for kernel in ("engine", "flex"):
        assert contract.error(attn, kernel, 100, torch.tensor([100, 2])) < 1e-10
    for prompt, chunk in ((1, 1), (2, 1), (40, 1), (10, 7)):
        assert contract.decoding_error(attn, 100, prompt, chunk) < 1e-12
    cache = new_cache(attn)
    attn(torch.randn(1, 60, 8, dtype=torch.float64), cache=cache)
    size = {"local": 5}.get(pattern, 16)
    assert cache.rings[0].size(2) == 3 + size and sorted(cache.positions().tolist()) == [0, 1, 2, *range(60 - size, 60)]


@pytest.mark.parametrize("rotary", [True, False])
def test_distances_of_first_tokens_are_capped(rotary):
    """A rotation counts the distance of a first token up to block_size - 1: scores by complex numbers, of each
    distance."""
    attn = layer(16, window=5, global_tokens=3, pos="rope" if rotary else "none").double()
    x, i = torch.randn(1, 50, 8, dtype=torch.float64), torch.arange(50)
    q, k, _ = attn.project(x)
    distance = i[:, None] - i
    capped = torch.where(i < 3, distance.clamp(max=15), distance) if rotary else 0 * distance
    turn = torch.polar(torch.ones(1, dtype=torch.float64),
                       capped[..., None] * torch.tensor([1.0, 0.01], dtype=torch.float64))
    q, k = (torch.complex(*y.chunk(2, -1)) for y in (q, k))
    scores = (q[..., :, None, :] * turn * k.conj()[..., None, :, :]).sum(-1).real / 2
    scores = scores.masked_fill((distance < 0) | (i >= 3) & (distance >= 5), -math.inf)
    found = attn.map(x, rotations(i, 4) if rotary else None)
    torch.testing.assert_close(found, torch.softmax(scores, -1))


def test_a_window_that_drops_its_first_tokens_differs():
    """Without global tokens the same text is another one far past the block; with them the first tokens still
    matter."""
    x = torch.randn(1, 100, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, :2] += 1
    for count, matters in ((0, False), (2, True)):
        attn = layer(16, window=5, global_tokens=count).double()
        assert ((attn(x) - attn(changed))[:, -1].abs().max() > 1e-6) == matters
