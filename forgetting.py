"""Forgetting attention: a gate on each token decides how much of the text before it is kept.

From the input x_t of the layer each head computes a gate f_t = sigmoid(w . x_t + b). The score of a pair gets the sum
of log f_t over the tokens after the earlier one, up to the later one (Lin, Nikishin, He and Courville 2025, "Forgetting
Transformer", arXiv 2503.02130): a span that depends on the text. In classifiers the sum serves both directions.

Pairs whose sum is so low that their weights vanish are not multiplied (Lin, Obando-Ceron, He and Courville 2025,
"Adaptive Computation Pruning", arXiv 2504.06949). `python bench_pruning.py --out_dir=OUT_DIR` measures what that saves
in a trained run; `python attention.py forgetting` checks that all kernels agree.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import attention
from core.config import UserError
from core.ops import expand_heads

forgetting_spans = []  # initial spans in tokens, repeated over the heads; []: from 8 to block_size
forgetting_prune = True  # leave out pairs that change an output by less than 1e-4 of the largest value


class Attention(attention.Attention):
    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        first = self.options.forgetting_spans or spread(8, max(8, self.block_size), self.n_head)
        if not all(type(span) in (int, float) and 1 < span < 1e9 for span in first):
            raise UserError(f"forgetting_spans expects spans above 1 token, got {first}")
        spans = torch.tensor([first[h % len(first)] for h in range(self.n_head)])
        self.forget = nn.Linear(config.n_embd, self.n_head, bias=False)
        # f = 1 - 1 / span, so that the product of `span` gates is about 1 / e
        self.forget_bias = nn.Parameter(torch.log(spans - 1))

    def gate(self, x):
        logits = self.forget(x).transpose(1, 2) + self.forget_bias[:, None]
        return F.logsigmoid(logits if logits.dtype == torch.float64 else logits.float())

    def least_decay(self, q, k):
        """Per query: T keys with a smaller sum of gates have together less than exp(-10) of the weight of its own key,
        since no score q . k / sqrt(D) is above |q| max |k| / sqrt(D). The paper's bound, -2 max |q| max |k| / sqrt(D),
        stands for the difference of this maximum and the own key's score, which is known here."""
        if not self.options.forgetting_prune:
            return None
        q, k, scale = q.float(), expand_heads(k.float(), self.n_head), q.size(3) ** -0.5
        largest = scale * q.norm(dim=3) * k.norm(dim=3).amax(2, keepdim=True)
        return scale * (q * k).sum(3) - largest - 10 - math.log(q.size(2))

    def stats(self):
        return super().stats() | {"spans": (1 + self.forget_bias.exp()).tolist()}


def spread(low, high, n):
    """n numbers from low to high with equal ratios."""
    return [low * (high / low) ** (h / max(1, n - 1)) for h in range(n)]
