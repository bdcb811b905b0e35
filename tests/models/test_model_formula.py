"""The model against its formula written out once more, from the papers, in float64; and how its weights begin."""

import math

import pytest
import torch
from test_model import make

from core import ops
from model import GPT, GPTConfig


def turned(x, base=10000.0):
    """Rotary positions 0, 1, ... of x (H, T, D): dimensions d and d + D / 2 turn by position * base^(-2 d / D)."""
    half = x.size(-1) // 2
    turn = torch.tensor([[position * base ** (-d / half) for d in range(half)] for position in range(x.size(1))],
                        dtype=x.dtype)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([pairs.real, pairs.imag], -1)


def normalised(x, module):
    if isinstance(module, torch.nn.LayerNorm):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * module.weight + (0 if module.bias is None else module.bias)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def linear(x, module):
    return x @ module.weight.T + (0 if module.bias is None else module.bias)


def activated(x, activation):
    """The square of max(x, 0), or x times the normal distribution function, exact or as GPT-2 approximates it
    (Hendrycks and Gimpel 2016)."""
    if activation == "relu2":
        return x.clamp(min=0) ** 2
    if activation == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def signed(number):
    """An integer modulo 2^64 as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


def ngram_row(tokens, vocab_size, rows):
    """The row of an n-gram, its latest token first: Knuth's multiplicative hash of its digits."""
    number = 0
    for token in tokens:
        number = number * vocab_size + token
    return (signed(signed(number) * -0x61C8864680B583EB) >> 20) % rows


def ngrams(model, text):
    """The n-grams' part of the input of a text, a list of tokens: (T, C)."""
    config, rows = model.config, []
    for position in range(len(text)):
        latest = [*reversed(text[: position + 1]), *[0] * config.ngram]
        row = [table.weight[ngram_row(latest[:n], config.vocab_size, config.ngram_rows)]
               for n, table in enumerate(model.ngrams.tables, 2)]
        rows.append(model.ngrams.proj.weight @ torch.cat(row))
    return torch.stack(rows)


def by_hand(model, idx):
    """Logits of one text idx (T,): (T, V), or (n_class,) of a classifier with the mean over its tokens."""
    config, T, C = model.config, len(idx), model.config.n_embd
    x = model.embedding.weight[idx]
    if config.ngram:
        x = x + ngrams(model, idx.tolist())
    if config.pos == "learned":
        x = x + model.positions.weight[:T]
    elif config.pos == "sinusoidal":  # of the embedding's first size: 0.02 on average
        angles = [[position * 10000 ** (-2 * d / C) for d in range(C // 2)] for position in range(T)]
        waves = torch.tensor([[f(a) for f in (math.cos, math.sin) for a in row] for row in angles], dtype=x.dtype)
        x = x + 0.02 * waves / waves.square().mean().sqrt()
    for layer in model.layers:
        y = linear(normalised(x, layer.norm1), layer.attention.qkv)
        q, k, v = (part.view(T, config.n_head, -1).transpose(0, 1) for part in y.split(C, -1))  # (H, T, D)
        if config.pos == "rope":
            q, k = turned(q), turned(k)
        scores = q @ k.mT / math.sqrt(C / config.n_head)
        if config.causal:
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = scores.exp() / scores.exp().sum(-1, keepdim=True) @ v
        x = x + linear(y.transpose(0, 1).reshape(T, C), layer.attention.proj)
        y = linear(normalised(x, layer.norm2), layer.up)
        x = x + linear(activated(y, config.activation), layer.down)
    x = normalised(x, model.norm)
    return linear(x if config.causal else x.mean(0), model.head)


@pytest.mark.parametrize("n_class", [0, 2])
@pytest.mark.parametrize("changes", [{}, {"pos": "sinusoidal"}, {"pos": "none"}, {"activation": "gelu_tanh"},
                                     {"activation": "relu2"}, {"ngram": 5, "ngram_rows": 97, "ngram_dim": 3},
                                     {"bias": True, "norm": "layernorm", "pos": "learned", "tie": False}])
@torch.no_grad()
def test_forward_by_hand(changes, n_class):
    model = make(n_class=n_class, kernel="engine", **changes)
    if changes.get("pos") != "learned":
        model.embedding.weight *= 0.1  # where RMSNorm's epsilon and the size of the positions show
    idx = torch.randint(50, (3, 16))
    logits = model(idx, None if n_class else idx)[0]
    for text, found in zip(idx, logits):
        # the table of sines and cosines is float32: 6e-8 of each
        torch.testing.assert_close(found, by_hand(model, text), rtol=1e-6, atol=1e-6)


def test_weights_begin_as_said():
    """A standard deviation of 0.02; what adds to the residual stream, 2 n_layer times, less by the root of that."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=200, n_layer=8, n_head=2, n_embd=64, bias=True, pos="learned",
                          tie=False))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("proj.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.06) and p.mean().abs() < std / 10, name


def test_zero_init_begins_as_the_identity():
    """With output projections of 0, each block adds nothing, and the gradient reaches those projections alone."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, zero_init=True))
    idx = torch.randint(50, (2, 16))
    logits, loss = model(idx, idx)
    expected = linear(normalised(model.embedding.weight[idx], model.norm), model.head)
    torch.testing.assert_close(logits, expected)
    loss.backward()
    for name, p in model.named_parameters():
        if name.startswith("layers"):
            assert bool(p.grad.any()) == name.endswith(("proj.weight", "down.weight")), name


def test_ngrams_of_a_large_vocabulary_wrap_around():
    """Tokens to the 16th power exceed 64 bits; the hash is still that of exact arithmetic, and rows are used evenly."""
    model = make(vocab_size=50_257, ngram=16, ngram_rows=1000, ngram_dim=2)
    text = torch.randint(50_257, (1, 4000))
    rows = model.ngrams.rows(torch.cat([text.new_zeros(1, 15), text], 1))
    for n in (2, 7, 16):
        counts = torch.bincount(rows[n - 2][0], minlength=1000)
        assert counts.max() < 20  # 4 in the mean
        for at in (0, 3, 1999):
            latest = [*reversed(text[0, : at + 1].tolist()), *[0] * 16][:n]
            assert rows[n - 2][0, at] == ngram_row(latest, 50_257, 1000)


def test_rotations_far_away():
    """The angles of positions up to a million are those of exact arithmetic, within float64's rounding of the angle:
    exponents in float32 would be wrong in the third digit at position 1e5."""
    positions = [0, 1, 77, 99_991, 131_071, 1_000_003]
    cosines, sines = ops.rotations(torch.tensor(positions), 64)
    assert cosines.dtype == torch.float64 and cosines.shape == (6, 32)
    for position, cos, sin in zip(positions, cosines.tolist(), sines.tolist()):
        angles = [position * 10000 ** (-2 * d / 64) for d in range(32)]
        assert cos == pytest.approx([math.cos(angle) for angle in angles], abs=1e-9)
        assert sin == pytest.approx([math.sin(angle) for angle in angles], abs=1e-9)


def test_a_layer_far_away():
    """A layer's q and k at positions near 1e5, against the formula, by the scores that they give."""
    layer = make(n_embd=64).layers[0].attention
    x, positions = torch.randn(1, 4, 64, dtype=torch.float64), [99_991, 99_998, 100_003, 100_040]
    with torch.no_grad():
        plain = layer.project(x)
        q, k, v = layer.project(x, ops.rotations(torch.tensor(positions), 32))
    expected = []
    for part in plain[:2]:
        halves, turn = part[0].split(16, -1), [[p * 10000 ** (-d / 16) for d in range(16)] for p in positions]
        turn = torch.tensor(turn, dtype=torch.float64)
        expected.append(torch.complex(*halves) * torch.polar(torch.ones_like(turn), turn))
    scores = (expected[0] @ expected[1].mH).real
    torch.testing.assert_close(q[0] @ k[0].mT, scores, rtol=0, atol=1e-8)
    assert torch.equal(v, plain[2])
