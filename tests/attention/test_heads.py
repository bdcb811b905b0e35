"""Heads that share keys and values, and normalised queries and keys, beyond the laws of test_contract.py."""

import math

import pytest
import torch

from core.config import UserError
from core.kvcache import new_cache
from core.mechanisms import mechanism
from core.ops import rotations
from model import GPT, GPTConfig

SPANS = {"span_init": [2.0, 9.5, 20.0, 30.0, 5.0, 8.0], "softness_span_mask": 4}


def make(name="dense", options=None, **changes):
    torch.manual_seed(0)
    kind, defaults = mechanism(name)
    config = {"n_head": 6, "n_embd": 48, "block_size": 32, "kernel": "engine", **changes}
    return kind(GPTConfig(options={**defaults, **(options or {})}, **config)).double()


def widened(layer, **changes):
    """The layer with a copy of the keys and values for each head: the same function, and what sharing saves."""
    wide = make(**changes)
    q, k, v = layer.qkv.weight.split([48, 8 * layer.n_kv_head, 8 * layer.n_kv_head])
    k, v = (x.view(layer.n_kv_head, 1, 8, 48).expand(-1, 6 // layer.n_kv_head, -1, -1).reshape(48, 48) for x in (k, v))
    wide.load_state_dict({**layer.state_dict(), "qkv.weight": torch.cat([q, k, v]).detach()})
    return wide


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("name, options",
                         [("dense", {}), ("adaptive_attention_span", SPANS),
                          ("sparse", {"window": 9, "global_tokens": 2})])
@pytest.mark.parametrize("kernel", ["engine", "reference"])
def test_heads_of_a_group_share_their_keys(kernel, name, options, K):
    """Neighbouring heads: it equals a layer with a copy of the keys for each head, in whole texts and in decoding."""
    layer = make(name, options, n_kv_head=K, kernel=kernel)
    wide = widened(layer, name=name, options=options)
    x, rotation = torch.randn(2, 70, 48, dtype=torch.float64), rotations(torch.arange(70), 8)
    with torch.no_grad():
        expected = wide(x, rotation)
        assert (layer(x, rotation) - expected).abs().max() < 1e-12
        cache = new_cache(layer)
        decoded = [layer(x[:, :50], rotation[:, :50], cache=cache)]
        decoded += [layer(x[:, t : t + 1], rotation[:, t : t + 1], cache=cache) for t in range(50, 70)]
        assert (torch.cat(decoded, 1) - expected).abs().max() < 1e-12
    size = cache.first + layer.max_distance() + 1
    assert [ring.shape for ring in cache.rings] == 2 * [(2, K, size, 8)]  # K heads are cached, none is copied


def test_the_fused_call():
    for causal, T in ((True, 30), (True, 50), (False, 30)):
        n_class = 0 if causal else 2
        fused, engine = (make(n_kv_head=2, kernel=kernel, n_class=n_class) for kernel in ("sdpa", "engine"))
        x = torch.randn(2, T, 48, dtype=torch.float64)
        torch.testing.assert_close(fused(x), engine(x), rtol=0, atol=1e-12)


def test_as_many_key_heads_as_heads_change_nothing():
    """n_kv_head = n_head draws the same weights and gives the same bits as 0, which old checkpoints mean."""
    x, rotation = torch.randn(2, 30, 48, dtype=torch.float64), rotations(torch.arange(30), 8)
    a, b = make(), make(n_kv_head=6)
    assert a.qkv.weight.shape == (3 * 48, 48) and torch.equal(a(x, rotation), b(x, rotation))


def test_gradients_are_summed_over_a_group():
    layer = make(n_kv_head=2)
    wide = widened(layer)
    x = torch.randn(2, 30, 48, dtype=torch.float64)
    for each in (layer, wide):
        each(x).square().sum().backward()
    copies = wide.qkv.weight.grad[48:].view(2, 2, 3, 8, 48)  # keys and values, groups, heads of a group
    torch.testing.assert_close(layer.qkv.weight.grad[48:].view(2, 2, 8, 48), copies.sum(2))


def test_qk_norm_by_hand():
    """q and k of unit root mean square, times their gains, then the rotation; v is as it was."""
    layer, plain = make(n_kv_head=2, qk_norm=True), make(n_kv_head=2)
    layer.q_gain.data, layer.k_gain.data = torch.rand(2, 8, dtype=torch.float64)
    x, rotation = torch.randn(2, 30, 48, dtype=torch.float64), rotations(torch.arange(30), 8)
    with torch.no_grad():
        q, k, v = plain.project(x)
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
                for y, gain in ((q, layer.q_gain), (k, layer.k_gain)))
        found = layer.project(x, rotation)
    for y, expected in zip(found[:2], (q, k)):
        turned = torch.complex(*expected.chunk(2, -1)) * torch.complex(*rotation)
        torch.testing.assert_close(y, torch.cat([turned.real, turned.imag], -1))
    assert torch.equal(found[2], v)


def test_qk_norm_bounds_the_scores():
    """Scores are at most sqrt(D) times the gains, however large the weights."""
    layer = make(qk_norm=True)
    layer.qkv.weight.data *= 1e4
    q, k, _ = layer.project(torch.randn(1, 30, 48, dtype=torch.float64))
    assert (q @ k.mT / math.sqrt(8)).abs().max() <= math.sqrt(8) + 1e-9
    for gain in (layer.q_gain, layer.k_gain):
        gain.data *= 2
    assert layer(torch.randn(1, 30, 48, dtype=torch.float64)).sum().backward() is None
    assert layer.q_gain.grad.abs().min() > 0 and layer.k_gain.grad.abs().min() > 0


@pytest.mark.parametrize("wrong", [4, -1, 12])
def test_refused(wrong):
    with pytest.raises(UserError, match=rf"n_kv_head must divide n_head = 6 \(0: n_head\), got {wrong}"):
        GPT(GPTConfig(n_head=6, n_embd=48, n_layer=1, n_kv_head=wrong))
