"""The mechanisms of the repository, and one that a user could drop beside them."""

from helpers import ROOT

MY_ATTENTION = '''"""Keys near by, each head at its own learned price of distance."""
import math

import torch

import attention

width = 3  # positions seen on each side
price = 0.0  # of a unit of slope, in the loss
start = [0.5]  # slopes, cycled over heads
name = "mine"
flat = False


class Attention(attention.Attention):
    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        start = self.options.start
        self.slope = torch.nn.Parameter(torch.tensor([start[h % len(start)] for h in range(self.n_head)]))

    def bias(self, h, i, j):
        slope = 0 * self.slope if self.options.flat else self.slope
        return torch.where((i - j).abs() <= self.options.width, -slope[h] * (i - j).abs(), -math.inf)

    def penalty(self):
        return self.options.price * self.slope.sum()

    def stats(self):
        return {**super().stats(), "slopes": self.slope.tolist(), "name": self.options.name}
'''
FILES = [file.stem for file in ROOT.glob("*.py") if file.stem != "attention"
         and "\nclass Attention(" in file.read_text("utf-8")]
