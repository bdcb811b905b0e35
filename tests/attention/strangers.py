"""Mechanisms as a stranger writes them, from the README alone: the laws of test_contract.py hold for them, too."""

import math

import torch

import attention
from core.blocks import Block


class AbsoluteKeys(attention.Attention):
    """Drops the key positions 3, 10, 17, ...: not a function of the distance."""

    def bias(self, h, i, j):
        return torch.where(j % 7 == 3, -math.inf, 0.0)


class Prefix(attention.Attention):
    """The first 20 positions are seen by all, beside a window; in classifiers the window looks in both directions."""

    def bias(self, h, i, j):
        return torch.where((j < 20) | ((i - j).abs() < 6), 0.0, -math.inf)


class PerHead(attention.Attention):
    """Each head has its own pattern: only far keys, only even keys and none at some queries, nothing at all."""

    def bias(self, h, i, j):
        far = (h == 0) & (i - j > 8)
        even = (h == 1) & (j % 2 == 0) & (i % 5 != 2)
        return torch.where(far | even, 0.0, -math.inf)


class Learned(attention.Attention):
    """A learned bonus for keys at multiples of seven, another for each head: not relative, no blocks."""

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.bonus = torch.nn.Parameter(torch.linspace(0.5, 1.5, self.n_head))

    def bias(self, h, i, j):
        return self.bonus[h] * (j % 7 == 0)


class Bands(attention.Attention):
    """Two bands of distances far apart, and a price of distance that is learned."""

    relative = True

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.price = torch.nn.Parameter(torch.tensor(0.3))

    def bias(self, h, i, j):
        d = (i - j).abs()
        return torch.where((d < 5) | ((d >= 40) & (d < 47)), -self.price * d.sqrt(), -math.inf)


class FarBands(attention.Attention):
    """Bands so far apart that the blocks leave out what lies between."""

    relative = True

    def bias(self, h, i, j):
        d = (i - j).abs()
        return torch.where((d < 5) | ((d > 400) & (d < 410)), 0.0, -math.inf)


class Span(attention.Attention):
    """A soft window with a learned length for each head, in blocks written by hand."""

    relative = True

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.span = torch.nn.Parameter(torch.linspace(3.0, 20.0, self.n_head))

    def bias(self, h, i, j):
        m = ((4 + self.span[h] - (i - j).abs()) / 4).clamp(0, 1)
        return torch.where(m > 0, m.where(m > 0, 1).log(), -math.inf)

    def blocks(self, T):
        part = []
        for h in range(self.n_head):
            r = math.ceil(4 + self.span[h].item())
            for a in range(0, T, 16):
                b = min(a + 16, T)
                part.append(Block(range(h, h + 1), range(a, b),
                                  range(max(0, a - r), b if self.causal else min(T, b + r))))
        return [part]


class EvenOdd(attention.Attention):
    """Every key, at a learned price of distance, in two parts: the even keys, and the odd ones in two ranges."""

    relative = True

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.price = torch.nn.Parameter(torch.tensor(0.3))

    def bias(self, h, i, j):
        return -self.price * (i - j).abs().sqrt()

    def blocks(self, T):
        parts = [[], []]
        for a in range(0, T, 24):
            b = min(a + 24, T)
            end = b if self.causal else T
            parts[0].append(Block(range(self.n_head), range(a, b), range(0, end, 2)))
            if end > 1:
                parts[1].append(Block(range(self.n_head), range(a, b), (range(1, end, 4), range(3, end, 4))))
        return parts if T > 1 else parts[:1]


class Squared(attention.Attention):
    """Weights squared, more so where a row has many keys, and scaled to sum to one."""

    def factor(self, p, keys, variation):
        return p * keys + 0.1


class Fading(EvenOdd):
    """What lies far fades, in two parts of keys, by what the tokens in between say; some tokens fade nothing at all.
    The first tokens stay visible beyond the block size, if they have not faded."""

    relative = False
    first_tokens = 3

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.price = torch.nn.Parameter(torch.linspace(0.1, 0.5, self.n_head))
        self.fade = torch.nn.Linear(config.n_embd, self.n_head)

    def bias(self, h, i, j):
        return -self.price[h] * (i - j).abs().sqrt()

    def gate(self, x):
        return self.fade(x).clamp(max=0).transpose(1, 2)


STRANGERS = {kind.__name__: kind
             for kind in (AbsoluteKeys, Prefix, PerHead, Learned, Bands, FarBands, Span, EvenOdd, Squared, Fading)}
