"""A sink beside the keys, and first tokens that stay visible, beyond the laws of test_contract.py."""

import pytest
import torch
from test_contract import random_qkv

from attention import Attention
from core import contract
from core.config import UserError
from core.mechanisms import mechanism
from model import GPT, GPTConfig


def make(name="dense", options=None, sinks=(-1.0, 0.5, 3.0), **changes):
    torch.manual_seed(0)
    kind, defaults = mechanism(name)
    config = {"n_head": 3, "n_embd": 24, "block_size": 32, "kernel": "engine", "attention_sink": True, **changes}
    layer = kind(GPTConfig(options={**defaults, **(options or {})}, **config)).double()
    if layer.sinks is not None:
        layer.sinks.data = torch.tensor(sinks, dtype=torch.float64)
    return layer


def with_a_key(layer, q, k):
    """The weights (B, H, T, T) by the definition: a softmax over the scores and the sink's logit, which is then left
    out."""
    T = q.size(2)
    scores = q @ k.mT / q.size(3) ** 0.5 + layer.bias_at(torch.arange(T), torch.arange(T))
    sink = layer.sinks[None, :, None, None].expand(len(q), -1, T, 1)
    return torch.softmax(torch.cat([sink, scores], -1), -1)[..., 1:]


@pytest.mark.parametrize("name, options",
                         [("dense", {}), ("sparse", {"sparse_pattern": "strided", "stride": 5}), ("alibi", {})])
def test_sink_by_hand(name, options):
    """Every kernel equals a softmax over one more key with value 0, with all gradients, the logit's too."""
    layer = make(name, options)
    q, k, v = random_qkv(50)
    upstream = torch.randn(2, 3, 50, 8, dtype=torch.float64)
    inputs = [q, k, v, layer.sinks]
    expected = with_a_key(layer, q, k) @ v
    wanted = [expected, *torch.autograd.grad((expected * upstream).sum(), inputs)]
    assert wanted[-1].abs().min() > 1e-3
    for attend in contract.kernels(layer).values():
        with contract.flex_on_cpu():
            y = attend(q, k, v)
            found = [y, *torch.autograd.grad((y * upstream).sum(), inputs)]
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_without_a_sink_nothing_changes():
    """A logit far below every score takes no weight; without one there is no parameter."""
    plain, far = make(attention_sink=False), make(sinks=(-1e4,) * 3)
    assert plain.sink() is None and "sinks" not in plain.state_dict()
    far.load_state_dict({**plain.state_dict(), "sinks": far.sinks})
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(far(x), plain(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("renormalize", [True, False])
def test_factor_ranks_among_the_keys(renormalize):
    """ATRT with a sink: the factors are those without it, and the row is then scaled by the share of the keys."""
    layer = make("atrt", {"atrt_renormalize": renormalize})
    plain = make("atrt", {"atrt_renormalize": renormalize}, attention_sink=False)
    q, k, _ = random_qkv(30)
    share = with_a_key(layer, q, k).sum(-1, keepdim=True)
    torch.testing.assert_close(layer.weights(q, k), plain.weights(q, k) * share)
    for kernel in ("engine", "flex"):
        assert contract.error(layer, kernel, 30) < 1e-10


def test_dropout_beside_a_sink():
    """What dropout keeps is scaled as without a sink: the mean over many draws is the output without dropout."""
    layer = make(dropout=0.5).train()
    q, k, v = random_qkv(20, B=1)
    with torch.no_grad():
        mean = torch.stack([layer.attend(q, k, v) for _ in range(4000)]).mean(0)
        layer.eval()
        assert (mean - layer.attend(q, k, v)).abs().max() < 0.15


def test_a_model_learns_its_sinks():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, attention_sink=True))
    idx = torch.randint(256, (2, 16))
    model(idx, idx)[1].backward()
    assert all(block.attention.sinks.grad.abs().min() > 0 for block in model.layers)
    assert not model.layers[0].attention.dense  # the fused call knows no sink
    with pytest.raises(UserError, match="kernel=sdpa computes dense attention only"):
        GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, attention_sink=True, kernel="sdpa"))(idx)


class Wrong(Attention):
    def sink(self):
        return self.logit


@pytest.mark.parametrize("logit", [torch.zeros(2), torch.full((3,), torch.inf), torch.zeros(3, dtype=torch.long)])
def test_refused(logit):
    layer = Wrong(GPTConfig(n_head=3, n_embd=24, block_size=32))
    layer.logit = logit
    said = r"wrong: sink\(\) must be None or a finite logit for each head, of shape \(3,\)"
    with pytest.raises(UserError, match=said):
        contract.check(layer, "wrong")
