"""ALiBi beyond the laws of test_contract.py: its bias by hand, and slopes that are learned."""

import pytest
import torch

from core.mechanisms import mechanism
from model import GPT, GPTConfig


def layer(n_head=4, causal=True, **options):
    kind, defaults = mechanism("alibi")
    return kind(GPTConfig(n_head=n_head, n_embd=8 * n_head, block_size=8, n_class=0 if causal else 2,
                          options={**defaults, **options}))


@pytest.mark.parametrize("learned", [False, True])
def test_bias_by_hand(learned):
    """Slopes 1/4, 1/16, 1/64, 1/256 of four heads (Press et al. 2022, figure 3), times the distance."""
    i = torch.arange(3)
    bias = layer(alibi_learned=learned).bias_at(i, i)
    far = -float("inf")
    expected = [[0, far, far], [-1, 0, far], [-2, -1, 0]]
    for head, slope in zip(bias, (1 / 4, 1 / 16, 1 / 64, 1 / 256)):
        torch.testing.assert_close(head, torch.tensor([[slope * x if x else 0.0 for x in row] for row in expected]))
    both = layer(causal=False, alibi_learned=learned).bias_at(i, i)
    torch.testing.assert_close(both[1], torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]]) * (-1 / 16))
    assert layer(8).stats()["slopes"] == [2.0**-n for n in range(1, 9)]  # as section 3 gives them for eight heads


def test_learned_slopes_stay_positive():
    """Even a large step in either direction leaves every slope above 0."""
    attn = layer(alibi_learned=True)
    for step in (-20.0, 20.0):
        attn.log2_slope.data += step
        assert min(attn.stats()["slopes"]) > 0
    assert [p is attn.log2_slope for p in attn.mask_parameters()] == [True]
    assert layer().mask_parameters() == []


def test_slopes_are_learned():
    """The gradient of the loss reaches them."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, pos="none", attention="alibi",
                          options={"alibi_learned": True}))
    idx = torch.randint(256, (2, 16))
    model(idx, idx)[1].backward()
    assert model.layers[0].attention.log2_slope.grad.abs().min() > 0
