"""Forgetting attention: a gate on each token decides how much of the text before it is kept.

From the input x_t of the layer each head computes a gate f_t = sigmoid(w . x_t + b). The score of a pair gets the sum
of log f_t over the tokens after the earlier one, up to the later one (Lin, Nikishin, He and Courville 2025, "Forgetting
Transformer", arXiv 2503.02130): a span that depends on the text. In classifiers the sum serves both directions.

Pairs whose sum is so low that their weights vanish are not multiplied (Lin, Obando-Ceron, He and Courville 2025,
"Adaptive Computation Pruning", arXiv 2504.06949). `python forgetting.py --out_dir=OUT_DIR` measures what that saves in
a trained run; `python attention.py forgetting` checks that all kernels agree.
"""

import math
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import attention
from core.config import UserError, configure, run_main
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


def measure_pruning(arguments=None):
    """Print what pruning saves in a forward and backward pass of a trained run, for T = 1,024, 2,048, ... tokens of its
    validation split: python forgetting.py --out_dir=OUT_DIR [--longest=8192]"""
    from core.dataset import Dataset
    from core.timing import side_by_side
    from core.tiles import Tile
    from model import load

    settings, _ = configure({"__doc__": measure_pruning.__doc__, "out_dir": "out", "longest": 8192}, arguments)
    scores, pairs, T = Tile.scores, [], 1024
    while T <= settings["longest"]:
        model, checkpoint = load(Path(settings["out_dir"]) / "best.pt", kernel="engine", block_size=T)
        if model.config.attention != "forgetting":
            raise UserError(f"expected a run with --attention=forgetting, got {model.config.attention}")
        data = Dataset(checkpoint["settings"]["dataset"], checkpoint["settings"]["task"])
        idx = torch.from_numpy(data.tokens("val")[: T + 1].astype("int64"))[None]
        if idx.size(1) <= T:
            raise UserError(f"expected more than {T:,} tokens in the validation split, {data.folder} has {idx.size(1):,}")

        def step(prune):
            for layer in model.attentions():
                layer.options.forgetting_prune = prune
            logits, loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            return logits.detach()

        def counted(tile, queries, keys):
            pairs.append(math.prod(tile.shape))
            return scores(tile, queries, keys)

        counts, logits = [], []
        for prune in (False, True):
            with mock.patch.object(Tile, "scores", counted):
                logits.append(step(prune))
            counts.append(sum(pairs))
            pairs.clear()
        costs = side_by_side([lambda: step(False), lambda: step(True)], times=3)
        print(f"T = {T:,}: {1 - counts[1] / counts[0]:.0%} of the multiplied pairs left out, {costs[0].seconds:.3f} s "
              f"without and {costs[1].seconds:.3f} s with pruning; logits differ by "
              f"{(logits[0] - logits[1]).abs().max():.1e}", flush=True)
        T *= 2


if __name__ == "__main__":
    run_main(measure_pruning)
