"""The engine, its tiles and stacks, and the choice of a kernel, beyond the laws of test_contract.py."""

import math

import pytest
import torch
from test_contract import cases, random_qkv

from attention import Attention
from core import blocks, contract, ops, tiles
from core.blocks import Block
from core.config import UserError
from helpers import LargestTensor
from model import GPTConfig
from strangers import STRANGERS, AbsoluteKeys, EvenOdd, Span, Squared

CASES = cases()
CAUSAL = [name for name in CASES if CASES[name].causal]


def make(kind=Attention, causal=True, block_size=64, kernel="engine", **config):
    torch.manual_seed(0)
    return kind(GPTConfig(n_head=3, n_embd=24, block_size=block_size, n_class=0 if causal else 2, kernel=kernel,
                          **config)).double()


def test_dropout_mask():
    """Zeros at the rate asked for in every place of the 64-bit draws, and a mean of one."""
    for p in (0.1, 0.5, 0.9):
        mask = ops.dropout_mask(torch.empty(4001, 7), p, torch.Generator().manual_seed(0))
        assert mask.mean().item() == pytest.approx(1, abs=0.05)
        assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-3)
        for lane in range(4):
            assert (mask.flatten()[lane::4] == 0).float().mean().item() == pytest.approx(p, abs=0.02)
    neighbours = mask.flatten()[:-1] * mask.flatten()[1:]
    assert neighbours.mean().item() == pytest.approx(1, abs=0.2)  # independent
    assert ops.drop(mask, 0.0) is mask
    assert (ops.drop(torch.ones(10000), 0.3) == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_factor_needs_complete_rows():
    class Both(EvenOdd):
        factor = Squared.factor

    with pytest.raises(ValueError, match="blocks of one part"):
        make(Both).attend(*random_qkv(64))
    with pytest.raises(UserError, match=r"both: factor needs complete rows, but blocks\(7\) has 2 parts; write one"):
        contract.check(make(Both), "both")


def test_kernels():
    """The fused call is refused for anything but dense attention; 'auto' takes the fastest kernel."""
    with pytest.raises(UserError, match="dense attention only"):
        make(Span, kernel="sdpa").attend(*random_qkv(8))
    with pytest.raises(UserError, match="kernel=flex needs CUDA"):
        make(Span, kernel="flex").attend(*random_qkv(8))
    dense, span = make(kernel="auto"), make(Span, kernel="auto")
    assert [dense.choose_kernel(device) for device in ("cpu", "cuda")] == ["sdpa", "sdpa"]
    assert [span.choose_kernel(device) for device in ("cpu", "cuda")] == ["engine", "flex"]
    assert dense.choose_kernel("cpu", torch.bfloat16) == "engine"
    assert dense.choose_kernel("cuda", torch.bfloat16) == "sdpa"
    assert dense.choose_kernel("cpu", T=dense.block_size) == "sdpa"
    assert dense.choose_kernel("cpu", T=dense.block_size + 1) == "engine"  # which a fused call would need a mask for
    dropped = make(kernel="auto", dropout=0.1)
    assert dropped.train().choose_kernel("cpu") == "engine" and dropped.eval().choose_kernel("cpu") == "sdpa"
    assert make(kernel="auto", document_mask=True).choose_kernel("cpu") == "engine"


@pytest.mark.parametrize("kind, dense", [(Attention, True), (AbsoluteKeys, False), (Span, False), (Squared, False)])
def test_what_is_dense(kind, dense):
    """Dense attention is recognised by its formula, whatever it is called."""

    class Zero(Attention):
        relative = True

        def bias(self, h, i, j):
            return 0.0 * (i - j)

    assert make(kind).dense is dense and make(Zero).dense
    assert not make(type("Undeclared", (Zero,), {"relative": False})).dense


def test_sums_over_many_blocks():
    """In bfloat16 the first keys' gradient, a sum over all later blocks, errs as the reference's does."""
    layer = Attention(GPTConfig(n_head=1, n_embd=8, block_size=4096, kernel="engine"))
    layer.blocks = lambda T: [[Block(range(1), *pair) for pair in blocks.windows(range(T), 32, T)]]
    inputs = [x.bfloat16().requires_grad_() for x in torch.randn(3, 1, 1, 4096, 8)]
    same = [x.detach().float().requires_grad_() for x in inputs]
    reference = contract.kernels(layer)["reference"]

    def gradient(attend, inputs):  # what adds up is all of one sign, so that rounding shows
        return torch.autograd.grad(attend(*inputs).sum(), inputs[2])[0][0, 0, :256].float()

    true = gradient(reference, same)
    ours, theirs = ((gradient(attend, inputs) - true).norm().item() for attend in (layer.attend, reference))
    assert ours < 1.3 * theirs, (ours, theirs)


def test_stacks():
    """Neighbours of one shape and bias stack while what they add to never meets; others do not."""

    class Every8(Attention):
        def bias(self, h, i, j):
            return torch.where((i + j) % 16 == 0, -math.inf, 0.0)  # the same for blocks 8 apart

    def block(a, step=1, n=4):
        return Block(range(1), range(a, a + n * step, step), range(a, a + 2 * n * step, step))

    def sizes(*part, kind=Attention):
        return [(stack.count, stack.shift) for stack in blocks.stack(make(kind, causal=False), part)]

    assert sizes(*map(block, range(0, 40, 4))) == [(10, 4)]
    assert sizes(block(0), block(4), block(9), block(14)) == [(2, 4), (2, 5)]
    assert sizes(*(block(a, step=3) for a in range(3))) == [(3, 1)]
    assert sizes(*(block(a, step=3) for a in range(5))) == [(3, 1), (2, 1)]  # residues 0 and 3 meet
    assert sizes(block(0), block(4, n=3), block(8, n=3)) == [(1, 0), (2, 4)]
    assert sizes(block(4), block(0)) == [(1, 0), (1, 0)]
    # a parameter may tell them apart
    assert sizes(*map(block, range(0, 12, 4)), kind=STRANGERS["Learned"]) == 3 * [(1, 0)]
    assert sizes(*map(block, range(0, 12, 4)), kind=Every8) == 3 * [(1, 0)]
    assert sizes(*map(block, range(0, 24, 8)), kind=Every8) == [(3, 8)]


def test_shared_keys_stack():
    """Blocks that see the same first keys, and a window that moves with them, are one stack: sinks cost no more."""

    class Sinks(Attention):
        def bias(self, h, i, j):
            return torch.where((j < 4) | (i - j < 64), 0.0, -math.inf)

    stacks = blocks.stack(make(Sinks, block_size=1024), make(Sinks, block_size=1024).blocks(1024)[0])
    assert max((stack.count, stack.kv_shifts) for stack in stacks) == (13, (0, 64))
    assert contract.error(make(Sinks, block_size=1024), "engine", 1024) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_added_to_one_place_twice_at_once(name, monkeypatch):
    """What is added in place in one operation shares no element: else threads would lose sums, now and then."""
    view_of, scatter_add, added = tiles.Tile.view_of, tiles.Tile.scatter_add, []

    def watched(tile, x, y):
        def places(tile, x, positions, shift):
            view = view_of(tile, torch.arange(x.numel()).view(x.shape), positions, shift)
            where = view if shift else view[:, :, 0]  # blocks with the same keys are summed first
            assert where.unique().numel() == where.numel()
            added.append(positions)
            return view_of(tile, x, positions, shift)

        monkeypatch.setattr(tiles.Tile, "view_of", places)
        scatter_add(tile, x, y)
        monkeypatch.setattr(tiles.Tile, "view_of", view_of)

    monkeypatch.setattr(tiles.Tile, "scatter_add", watched)
    for T in (23, 300):
        layer = CASES[name].layer(block_size=300)
        layer.attend(*random_qkv(T, B=1, K=layer.n_kv_head)).sum().backward()
    assert added


@pytest.mark.parametrize("name", CAUSAL)
def test_engine_builds_no_square(name, monkeypatch):
    """No tensor of the engine has T x T elements: memory is linear in T."""
    T = 2048
    layer = CASES[name].layer(block_size=T, dtype=torch.float32)
    monkeypatch.setattr(tiles, "TILE", 2**16)
    inputs = random_qkv(T, B=1, dtype=torch.float32, K=layer.n_kv_head)
    with LargestTensor() as largest:
        torch.autograd.grad(layer.attend(*inputs).sum(), inputs + layer.mask_parameters(), allow_unused=True)
    assert 0 < largest.elements <= 1024 * T  # a strip of bias, or a tile of one head; T x T would be 2048 * T


def test_rotations():
    """Products of rotated vectors depend on the distance alone, also at far positions."""
    q, k = torch.randn(2, 8, dtype=torch.float64)

    def turned(x, position):
        cos, sin = ops.rotations(torch.tensor([position]), 8)[:, 0]
        return torch.cat([x[:4] * cos - x[4:] * sin, x[:4] * sin + x[4:] * cos])

    near, far = turned(q, 7) @ turned(k, 2), turned(q, 1_000_005) @ turned(k, 1_000_000)
    assert near.item() == pytest.approx(far.item(), abs=1e-9)
    assert near.item() != pytest.approx((turned(q, 7) @ turned(k, 3)).item(), abs=1e-3)
    # the layer's own turn is this one
    qkv = torch.stack([q, k, k])[:, None, None, None]
    found = ops.rotated(qkv, ops.rotations(torch.tensor([7]), 8), 2)
    torch.testing.assert_close(found[0].flatten(), turned(q, 7))
    torch.testing.assert_close(found[1].flatten(), turned(k, 7))
    torch.testing.assert_close(found[2].flatten(), k)
    several = torch.randn(3, 2, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    rotation = ops.rotations(torch.arange(5), 8)
    assert torch.autograd.gradcheck(lambda x: ops.rotated(x, rotation, 2), several)
