"""Which tokens may be drawn, and how often: exactly, at the edges of top_k and top_p, and for each text of a batch."""

import math

import pytest
import torch

from core.inference import sample_next_token


@pytest.fixture
def shares(monkeypatch):
    """A function: what `draw` of these logits and rules draws from, each row's shares adding up to 1."""
    seen, multinomial = [], torch.multinomial

    def watched(p, *more, **named):
        seen.append(p)
        return multinomial(p, *more, **named)

    monkeypatch.setattr(torch, "multinomial", watched)

    def of(logits, **how):
        drawn = sample_next_token(torch.tensor(logits, dtype=torch.float64), **how)
        p = seen.pop()
        assert not seen and (p.gather(-1, drawn[:, None]) > 0).all()
        return p / p.sum(-1, keepdim=True)

    return of


def allowed(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Shares (V,) of one text's logits (no two alike), token by token: the temperature first, then the k likeliest,
    then of these the fewest that hold the share p."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda n: -weights[n])[: top_k or None]
    total, held, kept = sum(weights[n] for n in order), 0.0, []
    for n in order:
        if held / total >= top_p:
            break
        kept.append(n)
        held += weights[n]
    return [weights[n] / held if n in kept else 0.0 for n in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 5, 99])
@pytest.mark.parametrize("top_p", [0.05, 0.37, 0.71, 0.96, 1.0])
def test_rules_by_hand(shares, temperature, top_k, top_p):
    """In every combination, and each text of a batch by its own logits."""
    logits = [[0.1, 2.0, -1.3, 0.7, 1.9], [3.1, -0.4, 0.2, 0.3, -2.0], [0.01, 0.02, 0.04, 0.05, 0.03]]
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected = torch.tensor([allowed(row, **how) for row in logits], dtype=torch.float64)
    torch.testing.assert_close(shares(logits, **how), expected)


@pytest.mark.parametrize("top_p, tokens", [(0.125, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)])
def test_no_more_tokens_than_hold_the_share(shares, top_p, tokens):
    """Four tokens of a quarter each, which is exact: where two hold one half, top_p=0.5 draws from two."""
    assert (shares([[0.0] * 4], top_p=top_p) > 0).sum() == tokens


def test_the_temperature_decides_what_top_p_keeps(shares):
    logits = [[math.log(x) for x in (0.4, 0.3, 0.2, 0.1)]]
    assert [(shares(logits, top_p=0.69, temperature=t) > 0).sum().item() for t in (0.5, 1.0, 10.0)] == [2, 2, 3]
    assert [(shares(logits, top_p=0.5, temperature=t) > 0).sum().item() for t in (0.5, 1.0, 10.0)] == [1, 2, 2]
