"""ATRT beyond the laws of tests/test_contract.py: its zones, its statistics, its gradient.

`formula` is the equation of the design, term by term; what `core/ranking.py` computes in fewer operations is held to
it.
"""

import math

import pytest
import torch

from core import engine, ranking
from core.config import UserError
from core.mechanisms import mechanism
from core.ops import matrix_variation
from core.texts import Texts
from helpers import LargestTensor
from model import GPTConfig

TASKS = {"classification": ((0, 1.5), (1.10, 1.15, 1.25, 1.30)), "summarization": ((0, 1.0), (1.08, 1.12, 1.15, 1.20))}
PRECISIONS = [torch.float64, torch.float32, torch.bfloat16]
NEAR = 1e-9


def make(causal=False, **options):
    kind, defaults = mechanism("atrt")
    options = {**defaults, **{f"atrt_{name}": value for name, value in options.items()}}
    config = GPTConfig(n_head=3, n_embd=24, block_size=64, n_class=0 if causal else 2, kernel="engine",
                       attention="atrt",
                       options=options)
    return kind(config)


def formula(s, borders, factors, sharpness=1.0):
    """The factor of every s."""
    (low, high), (edge, middle, border, top) = borders, factors
    centre, width = (low + high) / 2, 0.3 * (high - low) / 1.5

    def g(s):
        return torch.exp(-((s - centre) ** 2) / (2 * width**2))

    low_g, centre_g = (g(torch.tensor(x, dtype=s.dtype)) for x in (low, centre))
    moderate = edge + (middle - edge) * (g(s) - low_g) / (centre_g - low_g)
    raised = border + (top - border) * (1 - torch.exp(-sharpness * (s - high) ** 2 / 2))
    return torch.where(s > high, raised, torch.where(s > low, moderate, torch.ones_like(s)))


def ranks(p, keys):
    """s of every weight of rows p (..., n, m) of which `keys` are not masked."""
    mu = 1 / keys.to(p.dtype)
    sigma = (p.square().sum(-1, keepdim=True) / keys - mu**2).clamp(min=0).sqrt()
    return torch.where(sigma > 0, (p - mu) / sigma, 0)


def plain(p, keys, renormalize=True, task="classification"):
    """What the design says, in p's own precision. p may need a gradient: the factors have none."""
    y = p * formula(ranks(p.detach(), keys), *TASKS[task])
    return y / y.sum(-1, keepdim=True) if renormalize else y


def rows(*shape, spread=1.5, dtype=torch.float64):
    """(softmax weights of random scores, the number of keys of each row)"""
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=torch.float64)
    return torch.softmax(spread * scores, -1).to(dtype), torch.full((*shape[:-1], 1), shape[-1])


def row_with(s, keys, relative):
    """A row (1, keys) of weights with sigma = relative * mu, the first of them `s` deviations above the mean."""
    others = torch.linspace(-1, 1, keys - 1, dtype=torch.float64)
    shift = -s / (keys - 1)
    spread = math.sqrt((keys - s**2 - (keys - 1) * shift**2) / others.square().sum())
    every = torch.cat([torch.tensor([s], dtype=torch.float64), others * spread + shift])
    return ((1 + relative * every) / keys)[None]


BELL = (math.exp(-0.5) - math.exp(-3.125)) / (1 - math.exp(-3.125))  # of the Gaussian, one deviation from its centre


@pytest.mark.parametrize("task, s, factor", [
    ("classification", -1.0, 1.0), ("classification", -NEAR, 1.0), ("classification", NEAR, 1.10),
    ("classification", 0.75, 1.15), ("classification", 0.45, 1.10 + 0.05 * BELL),
    ("classification", 1.05, 1.10 + 0.05 * BELL),
    ("classification", 1.5, 1.10), ("classification", 1.5 + NEAR, 1.25),
    ("classification", 2.5, 1.30 - 0.05 * math.exp(-0.5)),
    ("classification", 4.5, 1.30 - 0.05 * math.exp(-4.5)),
    ("summarization", -NEAR, 1.0), ("summarization", NEAR, 1.08), ("summarization", 0.5, 1.12),
    ("summarization", 0.3, 1.08 + 0.04 * BELL), ("summarization", 1.0, 1.08), ("summarization", 1.0 + NEAR, 1.15),
    ("summarization", 2.0, 1.20 - 0.05 * math.exp(-0.5)), ("summarization", 5.0, 1.20 - 0.05 * math.exp(-8)),
])
def test_zones(task, s, factor):
    """The factors in every zone and at its borders, in closed form."""
    layer = make(renormalize=False, task=task)
    for keys, relative in ((41, 0.2), (41, 0.02), (300, 0.1)):
        p = row_with(s, keys, relative)
        found = layer.reweigh(p, torch.tensor([[keys]])) / p
        assert found[0, 0].item() == pytest.approx(factor, abs=3 * NEAR), (keys, relative)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_mean_is_baseline(dtype):
    """s = 0, in numbers that no precision rounds: the mean of these is 1/4."""
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=dtype)
    f = make(renormalize=False).reweigh(p, torch.tensor([[4]])) / p
    assert f[0, 0] > 1.05 and (f[0, 1:] == 1).all()


@pytest.mark.parametrize("own", [
    {"borders": [0.25, 2], "factors": [0.9, 1, 1.5, 3.0], "sharpness": 2.5},
    {"borders": [0.25, 2.0], "sharpness": 0.0},
    {"factors": [1.2, 1.2, 1.2, 1.2]},
    {"factors": [1.0, 1.0, 1.25, 1.25]},
])
@pytest.mark.parametrize("task", TASKS)
def test_own_numbers(task, own):
    """Borders, factors and the sharpness as given; what is not given is the task's."""
    p, keys = rows(50, 30)
    borders, factors = own.get("borders", TASKS[task][0]), own.get("factors", TASKS[task][1])
    found = make(renormalize=False, task=task, **own).reweigh(p, keys) / p
    expected = formula(ranks(p, keys), borders, factors, own.get("sharpness", 1.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_constant_rows(dtype):
    """sigma = 0: the weights stay as they are, however 1 / n is rounded; a row beside them is raised."""
    layer = make(renormalize=False)
    for n in (1, 2, 3, 7, 10, 49, 255, 300, 1000, 2049, 5000):
        p = torch.full((3, n), 1 / n, dtype=torch.float64).to(dtype)
        p[1] = rows(n, dtype=dtype)[0]
        y = layer.reweigh(p, torch.full((3, 1), n))
        assert torch.equal(y[::2], p[::2]), n
        assert n == 1 or not torch.equal(y[1], p[1])
        beside = torch.cat([p[:1], torch.zeros(1, 30, dtype=dtype)], 1)
        assert torch.equal(layer.reweigh(beside, torch.tensor([[n]])), beside), n


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("m", [2, 40])
def test_two_keys(dtype, m):
    """Of two different weights s is 1 and -1 whatever they are: on summarization's border, never above it."""
    p = torch.zeros(500, m, dtype=dtype)
    p[:, :2] = torch.cat([rows(100, 2, spread=spread, dtype=dtype)[0] for spread in (0.1, 0.3, 1, 3, 9)])
    y = make(renormalize=False, task="summarization").reweigh(p, torch.full((500, 1), 2))
    large, small = p[:, :2].double().amax(1), p[:, :2].double().amin(1)
    # mu / sigma: s is known to some eps (1 + r^2), and below the border f rises by 0.11 s
    r = (large + small) / (large - small)
    clear, eps = r < 50, torch.finfo(dtype).eps
    assert clear.sum() > 400
    error = y.double().amax(1) / large - 1.08
    assert (error.abs() <= eps * (1 + r * r / 2))[clear].all()
    assert (error < 0.03).all() and (y[:, :2].double().amin(1) == small).all()


def test_one_key():
    """One key takes everything, wherever it stands and whatever is masked beside it."""
    p = torch.eye(5, dtype=torch.float64)[:, None]
    for renormalize in (True, False):
        assert torch.equal(make(renormalize=renormalize).reweigh(p, torch.ones(5, 1, 1, dtype=torch.long)), p)


def test_no_key():
    """A padded query may see nothing but padding: what it gets is of no use, but a number."""
    p = torch.full((2, 6), 1 / 6, dtype=torch.float64)
    for renormalize in (True, False):
        torch.testing.assert_close(make(renormalize=renormalize).reweigh(p, torch.tensor([[0], [6]])), p)


def test_causal_rows():
    """Masked keys do not count: every row is that of a text which ends there."""
    layer, T = make(causal=True), 40
    q, k = torch.randn(2, 2, 3, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(T, dtype=torch.float64).expand(2, 3, T, T)
    for found in (layer.weights(q, k), layer.attend(q, k, eye)):
        for t in range(T):
            p = torch.softmax(q[:, :, t : t + 1] @ k[:, :, : t + 1].mT / math.sqrt(8), -1)
            expected = plain(p, torch.full((2, 3, 1, 1), t + 1))
            torch.testing.assert_close(found[:, :, t : t + 1, : t + 1], expected, rtol=0, atol=1e-12)
            assert (found[:, :, t, t + 1 :] == 0).all()


def by_hand(scores, renormalize, task):
    """Matrix scope for one head of one example: scores (n, n), a list of lists, -> weights (n, n)."""
    p = [[math.exp(score) for score in row] for row in scores]
    p = [[x / sum(row) for x in row] for row in p]
    every = [x for row in p for x in row]
    mu = sum(every) / len(every)
    sigma = math.sqrt(sum((x - mu) ** 2 for x in every) / len(every))
    s = torch.tensor([[(x - mu) / sigma if sigma > 1e-12 else 0.0 for x in row] for row in p], dtype=torch.float64)
    y = torch.tensor(p, dtype=torch.float64) * formula(s, *TASKS[task])
    return y / y.sum(-1, keepdim=True) if renormalize else y


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_matrix_scope(task, renormalize):
    """Ranked among all weights of a head of an example, without padding: reference and engine, by hand."""
    layer, T = make(scope="matrix", task=task, renormalize=renormalize), 70
    q, k = 1.5 * torch.randn(2, 5, 3, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    eye = torch.eye(T, dtype=torch.float64).expand(5, 3, T, T)
    for lengths in (None, [70, 9, 2, 1, 33]):  # padding up to 69 of 70
        given = None if lengths is None else torch.tensor(lengths)
        found = layer.weights(q, k, texts=Texts(given)), layer.attend(q, k, eye, Texts(given))
        for b, n in enumerate(lengths or [T] * 5):
            for h in range(3):
                expected = by_hand((q[b, h, :n] @ k[b, h, :n].T / math.sqrt(8)).tolist(), renormalize, task)
                for weights in found:
                    torch.testing.assert_close(weights[b, h, :n, :n], expected, rtol=0, atol=1e-12)
                    assert (weights[b, h, :n, n:] == 0).all()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("T, n", [(67, 49), (49, 13), (100, 37)])
def test_constant_matrix(dtype, T, n):
    """Equal weights everywhere stay as they are, however they are rounded, also where padding's queries have others."""
    layer = make(scope="matrix", renormalize=False)
    q, k, v = torch.randn(3, 2, 3, T, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    q[0], q[1, :, :n], lengths = 0, 0, [T, n]
    given = torch.tensor(lengths)
    for found in (layer.weights(q, k, texts=Texts(given)) @ v, layer.attend(q, k, v, Texts(given))):
        for b, n in enumerate(lengths):
            expected = v[b, :, :n].double().mean(1, keepdim=True).expand(3, n, 8)
            error = (found[b, :, :n].double() - expected).abs().max()
            assert error <= 2 * torch.finfo(dtype).eps * v[b].abs().max()


def test_scopes_differ():
    """Two sharp queries and two nearly flat ones: among all weights, the flat rows' are below the mean or barely
    above."""
    p = torch.tensor([[0.9, 0.04, 0.03, 0.03], [0.26, 0.26, 0.24, 0.24], [0.3, 0.3, 0.2, 0.2],
                      [0.97, 0.01, 0.01, 0.01]])
    p, keys = p.double()[None, None], torch.full((1, 1, 4, 1), 4)
    row, matrix = (reweighed(make(scope=scope, renormalize=False), p, keys)[0, 0] / p[0, 0]
                   for scope in ("row", "matrix"))
    # in their rows the larger weights of the flat queries stand at s = 1, and among all at (0.26 - 1/4) / sigma
    sigma = p.std(correction=0).item()
    for found, s in ((row[1, 0], 1.0), (matrix[1, 0], 0.01 / sigma), (matrix[2, 0], 0.05 / sigma)):
        expected = formula(torch.tensor(s, dtype=torch.float64), *TASKS["classification"]).item()
        assert found.item() == pytest.approx(expected)
    assert matrix[0, 0] > 1.25 and matrix[3, 0] > 1.25


def reweighed(layer, p, keys):
    """`reweigh` of whole matrices p (B, H, T, T) as the reference calls it; as many queries as keys are not padding."""
    squares, lengths = p.detach().square().sum(-1, keepdim=True), keys[:, 0, 0, 0].long()
    return layer.reweigh(p, keys, matrix_variation(squares, Texts(lengths)) if layer.scope == "matrix" else None)


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient(renormalize, scope):
    """That of finite differences with the factors held fixed, masked keys included."""
    layer = make(renormalize=renormalize, scope=scope)
    p, keys = rows(1, 2, 6, 6)
    p[..., 4:] = 0
    p, keys = p / p.sum(-1, keepdim=True), keys - 2
    f = (reweighed(make(renormalize=False, scope=scope), p, keys) / p).nan_to_num(1)  # 1 where p is 0

    def fixed(p):
        return p * f / (p * f).sum(-1, keepdim=True) if renormalize else p * f

    p.requires_grad_()
    y = reweighed(layer, p, keys)
    torch.testing.assert_close(y.detach(), fixed(p.detach()), rtol=0, atol=1e-14)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(y, p, upstream)
    numeric = torch.zeros_like(grad)
    with torch.no_grad():
        for n in range(p.numel()):
            step = torch.zeros(p.numel(), dtype=torch.float64)
            step[n] = 1e-6
            difference = fixed(p + step.view_as(p)) - fixed(p - step.view_as(p))
            numeric.view(-1)[n] = (difference * upstream).sum() / 2e-6
    torch.testing.assert_close(grad, numeric, rtol=0, atol=1e-8)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_exact(task, renormalize, monkeypatch):
    """The few operations equal the formula in float64, in one piece and in many, strided or not."""
    layer = make(renormalize=renormalize, task=task)
    for piece in (2**19, 700, 1):
        monkeypatch.setattr(ranking, "PIECE", piece)
        for shape in ((1, 1), (3, 3), (1, 1, 1, 5), (2, 3, 17, 40), (7, 129), (2, 64, 300), (1, 2, 3, 1000)):
            for spread in (0.3, 1.5, 6):
                p, keys = rows(*shape, spread=spread)
                expected = plain(p, keys, renormalize, task)
                torch.testing.assert_close(layer.reweigh(p, keys), expected, rtol=1e-12, atol=0)
                strided, broadcast = p.mT.contiguous().mT, keys[..., :1, :]
                torch.testing.assert_close(layer.reweigh(strided, broadcast), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_in_low_precision(dtype, renormalize, task):
    """At most twice the error of the formula computed in the same precision, against float64, output and gradient.

    Rows that have a weight within rounding of a border are left out, for both: either side of it is right.
    With weights and sigma rounded by eps, s is uncertain by some eps (1 + r + r^2), r = mu / sigma.
    """
    layer, eps, compared = make(renormalize=renormalize, task=task), torch.finfo(dtype).eps, 0
    for n, spread in ((3, 2.0), (10, 0.5), (10, 3.0), (40, 1.5), (40, 6.0), (100, 0.1), (100, 4.0), (1000, 0.5)):
        p, keys = rows(4000, n, spread=spread, dtype=dtype)
        s, exact = ranks(p.double(), keys), p.double()
        r = 1 / (keys * exact.square().sum(-1, keepdim=True) - 1).clamp(min=1e-9).sqrt()
        clear = torch.stack([(s - border).abs() > 8 * eps * (1 + r + r * r)
                             for border in TASKS[task][0]]).all(0).all(-1)
        if clear.sum() < 20:
            continue
        compared += 1
        p, exact, keys = p[clear], exact[clear], keys[clear]
        upstream, results = torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).to(dtype), []
        for x, reweigh in ((p, layer.reweigh), (p, plain), (exact, plain)):
            x = x.clone().requires_grad_()
            y = reweigh(x, keys, *((renormalize, task) if reweigh is plain else ()))
            results.append((y.detach().double(), torch.autograd.grad(y, x, upstream.to(x.dtype))[0].double()))
            if reweigh is not plain:  # what the engine calls: without a graph
                assert (layer.reweigh(p, keys) - results[0][0]).abs().max() <= 2 * eps
        for ours, theirs, true in zip(*results):
            assert (ours - true).norm() <= 2 * (theirs - true).norm(), (n, spread)
        with torch.no_grad():
            error = (layer.reweigh(p, keys).double() - results[2][0]).norm()
            assert error <= 2 * (results[1][0] - results[2][0]).norm()
    assert compared >= 3, compared


@pytest.mark.parametrize("graph", [True, False])
def test_memory(graph):
    """No tensor has more elements than p."""
    p, keys = rows(4, 64, 100, dtype=torch.float32)
    p.requires_grad_(graph)
    with LargestTensor() as largest:
        y = make().reweigh(p, keys)
        if graph:
            torch.autograd.grad(y, p, torch.ones_like(y))
    assert largest.elements == p.numel()


def test_variation_of_a_matrix():
    """The engine's rows give the one number for each head of an example that matrix scope ranks by."""
    q, k = torch.randn(2, 2, 3, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    layer, texts = make(scope="matrix"), Texts(torch.tensor([30, 12]))
    found = matrix_variation(engine.row_squares(layer, q, k, texts), texts)
    assert found.shape == (2, 3, 1, 1)
    p = torch.softmax(q[1, 2, :12] @ k[1, 2, :12].T / math.sqrt(8), -1)
    assert found[1, 2].item() == pytest.approx((p.std(correction=0) / p.mean()).item() ** 2, rel=1e-12)


@pytest.mark.parametrize("options, said", [
    ({"causal": True, "scope": "matrix"}, "use atrt_scope=row, or train a classifier"),
    ({"scope": "rows"}, "unknown atrt_scope 'rows'; did you mean row"),
    ({"task": "translation"}, "unknown atrt_task 'translation'"),
    ({"borders": [1.5, 0.0]}, r"atrt_borders must be in order, like \[0.0, 1.5\]; got \[1.5, 0.0\]"),
    ({"borders": [1.0, 1.0]}, "atrt_borders must be in order"),
    *(({"borders": given}, "atrt_borders expects 2 numbers like")
      for given in ([1.0], [0, 1, 2], ["0", "1"], [0, math.inf], [0, math.nan], [True, 2])),
    ({"factors": [1.1, 1.2]}, "atrt_factors expects 4 numbers like"),
    ({"factors": [0, 1.1, 1.2, 1.3]}, "atrt_factors must be above 0"),
    *(({"sharpness": given}, "atrt_sharpness must be from 0") for given in (-1.0, math.inf, math.nan, 1e308)),
    ({"factors": [1e300] * 4}, "atrt_factors must be above 0"),
    ({"borders": [-1e308, 1e308]}, "atrt_borders must lie within 10,000 of 0"),
    ({"borders": [1.0, 1.0 + 1e-9]}, "atrt_borders must lie within 10,000 of 0 and apart"),
])
def test_refused(options, said):
    """What cannot be is refused with what to do."""
    with pytest.raises(UserError, match=said):
        make(**options)
