"""Dropout of attention weights is independent: of head, example, part of a plan, tile, and call."""

import pytest
import torch

from core import tiles
from core.mechanisms import mechanism
from model import GPTConfig

B, H, T, DRAWS = 2, 3, 40, 64
CASES = {
    "dense": ("dense", {}),
    "local": ("sparse", {"sparse_pattern": "local", "window": 9}),
    "strided": ("sparse", {"sparse_pattern": "strided", "stride": 4}),
    "fixed": ("sparse", {"sparse_pattern": "fixed", "stride": 4, "fixed_columns": 1}),
    "log, global": ("sparse", {"sparse_pattern": "log", "window": 4, "global_tokens": 2}),
    "adaptive": ("adaptive_attention_span", {"span_init": [3.0, 9.5, 30.0], "softness_span_mask": 4}),
}


def make(name, options, **changes):
    torch.manual_seed(0)
    kind, defaults = mechanism(name)
    config = GPTConfig(**{"n_head": H, "n_embd": 8 * H, "block_size": T, "options": {**defaults, **options}, **changes})
    return kind(config).double()


@pytest.mark.parametrize("kernel, tile", [("engine", 2**21), ("engine", 1000), ("reference", 2**21)])
@pytest.mark.parametrize("case", CASES)
def test_no_two_weights_are_dropped_together(case, kernel, tile, monkeypatch):
    """Over many calls every weight has a pattern of its own, of which the rate asked for is dropped. Two of 64
    fair coins each agree with a chance of 2^-64."""
    monkeypatch.setattr(tiles, "TILE", tile)
    layer = make(*CASES[case], dropout=0.5, kernel=kernel).train()
    scores = torch.zeros(B, H, T, 8, dtype=torch.float64)
    kept = (layer.weights(scores, scores) > 0).nonzero(as_tuple=True)
    eye = torch.eye(T, dtype=torch.float64).expand(B, H, T, T)  # as values: gives the weights themselves
    with torch.no_grad():
        patterns = torch.stack([layer.attend(scores, scores, eye)[kept] > 0 for _ in range(DRAWS)], 1)
    assert len(patterns) > 500 and patterns.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert len(patterns.unique(dim=0)) == len(patterns)


@pytest.mark.parametrize("causal", [True, False])
def test_tiles_that_hold_some_of_the_heads_of_a_block(causal, monkeypatch):
    """Heads of nearly equal spans are multiplied together, a tile at a time; each keeps its own bias and its own
    gradient."""
    options = {"span_init": [3.0, 8.0, 15.0], "softness_span_mask": 6, "max_span": 64}
    layer = make("adaptive_attention_span", options, block_size=64, n_class=0 if causal else 2, kernel="engine")
    q, k, v, upstream = torch.randn(4, B, H, 200, 8, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def results(y):
        return [y, *torch.autograd.grad((y * upstream).sum(), [*inputs, layer.span])]

    expected = results(layer.weights(q, k) @ v)
    for tile in (1, 1000, 7000, 13_000, 2**21):
        monkeypatch.setattr(tiles, "TILE", tile)
        for found, wanted in zip(results(layer.attend(q, k, v)), expected):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10, msg=f"tiles of {tile}")
