"""ALiBi, attention with linear biases (Press et al. 2022, section 3): each head lowers a score by its slope times the
distance.

    bias = -slope_h d        slope_h = 2^(-8 (h + 1) / H), h = 0 ... H - 1

d = i - j; in classifiers |i - j|. The bias stands for positions, so train with --pos=none. The published slopes for
numbers of heads that are no power of 2 are interpolated; here the formula holds for any H. `python attention.py alibi`
draws it.
"""

import torch
import torch.nn as nn

import attention

alibi_learned = False  # slopes are parameters that start at the formula's values


class Attention(attention.Attention):
    relative = True

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        if self.options.alibi_learned:  # logarithms, so that slopes stay positive
            h = torch.arange(self.n_head, dtype=torch.float32)
            self.log2_slope = nn.Parameter(-8 * (h + 1) / self.n_head)

    def slopes(self, h):
        """The slopes of heads h (an integer tensor) per position, in the shape of h."""
        return torch.exp2(self.log2_slope[h] if self.options.alibi_learned else -8 * (h + 1) / self.n_head)

    def bias(self, h, i, j):
        return -self.slopes(h) * (i - j).abs()

    def stats(self):
        return super().stats() | {"slopes": self.slopes(torch.arange(self.n_head)).tolist()}
