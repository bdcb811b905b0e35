"""What a model reaches on a split, shared among all ranks and the same for any number of them."""

import math

import numpy as np
import torch

from core import dist, hardware
from core.dataset import batches


@torch.no_grad()
def evaluate(model, data, split, batch_size, device, dtype, count=0):
    """(scores, p) of a split, by all ranks together: a dict of floats, the loss in nats and what else the task is judged
    by; and of a classifier and a whole split each text's probability of class 1, (N,), in the file's order, else None.

    count: batches to look at, spread over the split; 0: all of them, in order.
    """
    was_training, p = model.training, None
    model.eval()
    source = batches(data, split, batch_size, model.config.block_size)
    groups, found = source.groups(count), {}
    for n in dist.own(len(groups)):
        x, y, lengths = (t if t is None else t.to(device) for t in dist.together(source.read, groups[n]))
        with hardware.autocast(device, dtype):
            logits, loss = model(x, y, lengths)
        found[n] = loss.item(), (y != -1).sum().item(), *(
            (torch.softmax(logits.float(), -1)[:, -1].tolist(), y.tolist()) if data.kind == "classify" else ([], []))
    model.train(was_training)
    every = {n: part for one in dist.gather(found) for n, part in one.items()}
    losses, counts, said, truth = zip(*(every[n] for n in range(len(groups))))  # in order: the same sum for any number of ranks
    result = {"loss": sum(loss * n for loss, n in zip(losses, counts)) / sum(counts)}
    if data.kind == "classify":
        said = np.concatenate(said).astype(np.float32)
        result |= scores(said, np.concatenate(truth))
        if not count:
            p = np.empty_like(said)
            p[source.by_length] = said
    elif data.bytes_per_token(split):
        result["bits_per_byte"] = result["loss"] / math.log(2) / data.bytes_per_token(split)
    return result, p


def scores(p, labels):
    """Scores of a two-class classifier as a dict of floats.

    p: (N,) probability of class 1; labels: (N,) of 0 and 1. A text is said to be of class 1 where p
    is above 1/2. auc is the chance that a text of class 1 ranks above one of class 0, ties counted
    half (the Mann-Whitney form of the area under the ROC curve). Where a score's denominator is 0,
    as precision's when nothing was said to be of class 1, the score is 0; auc of one class is 1/2.
    """
    p, labels = np.asarray(p, np.float64), np.asarray(labels) == 1
    said = p > 0.5
    hits, positive, negative = (said & labels).sum(), labels.sum(), (~labels).sum()
    _, place, count = np.unique(p, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # mean rank among equals, from 1
    below = rank[labels].sum() - positive * (positive + 1) / 2  # pairs in the right order
    result = {
        "accuracy": (said == labels).mean(),
        "f1": 2 * hits / max(1, said.sum() + positive),
        "precision": hits / max(1, said.sum()),
        "recall": hits / max(1, positive),
        "auc": below / (positive * negative) if positive and negative else 0.5,
    }
    return {name: float(score) for name, score in result.items()}  # plain: a checkpoint holds no NumPy


def health(model):
    """What a record of an evaluation says of the mechanisms: each layer's stats, and FLOP to train on a token."""
    stats = [attention.stats() for attention in model.attentions()]
    return {"stats": stats, "work_per_token": model.estimate_flops(model.config.block_size)}
