"""What pruning saves of a trained run with --attention=forgetting, in a forward and backward pass over the first T =
1,024, 2,048, ... tokens of its validation split: python bench_pruning.py [--out_dir=OUT_DIR] [--longest=8192]
"""

from core import startup  # first: torch reads its settings when it is loaded

import math
from pathlib import Path
from unittest import mock

import torch

from core.config import UserError, configure, run_main
from core.dataset import Dataset
from core.tiles import Tile
from core.timing import side_by_side
from model import load

out_dir = "out"  # the run's folder
longest = 8192  # the largest T


def train_on(model, idx, prune):
    """The logits of tokens idx (1, T + 1), after a forward and backward pass with or without pruning."""
    for layer in model.attentions():
        layer.options.forgetting_prune = prune
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    return logits.detach()


def counted(model, idx, prune):
    """(query-key pairs that the engine multiplies, logits) of `train_on`."""
    scores, pairs = Tile.scores, []

    def count(tile, queries, keys):
        pairs.append(math.prod(tile.shape))
        return scores(tile, queries, keys)

    with mock.patch.object(Tile, "scores", count):
        logits = train_on(model, idx, prune)
    return sum(pairs), logits


def measure(T):
    """Print the line of one T. Raises UserError for a run without gates, and for a validation split that is too
    short."""
    model, checkpoint = load(Path(out_dir) / "best.pt", kernel="engine", block_size=T)
    if model.config.attention != "forgetting":
        raise UserError(f"expected a run with --attention=forgetting, got {model.config.attention}")
    data = Dataset(checkpoint["settings"]["dataset"], checkpoint["settings"]["task"])
    idx = torch.from_numpy(data.tokens("val")[: T + 1].astype("int64"))[None]
    if idx.size(1) <= T:
        raise UserError(f"expected more than {T:,} tokens in the validation split, {data.folder} has {idx.size(1):,}")
    (all_pairs, logits), (pairs, pruned) = (counted(model, idx, prune) for prune in (False, True))
    plain, saving = side_by_side([lambda: train_on(model, idx, False), lambda: train_on(model, idx, True)], times=3)
    print(f"T = {T:,}: {1 - pairs / all_pairs:.0%} of the multiplied pairs left out, {plain.seconds:.3f} s without and "
          f"{saving.seconds:.3f} s with pruning; logits differ by {(logits - pruned).abs().max():.1e}", flush=True)


def main(arguments=None):
    configure(globals(), arguments)
    T = 1024
    while T <= longest:
        measure(T)
        T *= 2


if __name__ == "__main__":
    run_main(main)
