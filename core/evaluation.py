"""Scores of a model on a split, computed by all ranks together. They do not depend on the number of ranks."""

import math

import numpy as np
import torch

from core import dist, hardware
from core.dataset import batches


@torch.no_grad()
def evaluate(model, data, split, batch_size, device, dtype, count=0):
    """(scores, p) of a split. scores: a dict of floats, the loss in nats and the task's other scores; the accuracy of a
    language model is the share of targets that are the most likely next token. Targets of -1 do not count. With
    distances in the data, scores also holds the list `accuracy_by_distance`.

    For a classifier on the whole split, scores also holds the list `accuracy_by_length`, and p is the probability of
    class 1 of each text, (N,) in the file's order; else p is None.
    count: number of batches, spread evenly over the split; 0: all of them. Raises Stop or DataChanged on all ranks.
    """
    was_training, p = model.training, None
    model.eval()
    source = batches(data, split, batch_size, model.config.block_size)
    groups, results = source.groups(count), {}
    for n in dist.rank_indices(len(groups)):
        x, y, lengths = (t if t is None else t.to(device) for t in dist.on_all_ranks(source.read, groups[n]))
        with hardware.autocast(device, dtype):
            logits, loss = model(x, y, lengths)
        results[n] = loss.item(), (y != -1).sum().item(), *outcomes(logits, y, source, groups[n])
    model.train(was_training)
    results = {n: result for of_rank in dist.all_gather(results) for n, result in of_rank.items()}
    # in the split's order, so that sums do not depend on the number of ranks
    losses, counts, *details = zip(*(results[n] for n in range(len(groups))))
    result = {"loss": sum(loss * n for loss, n in zip(losses, counts)) / sum(counts)}
    if data.kind == "classify":
        predicted, labels = map(np.concatenate, details)
        predicted = predicted.astype(np.float32)
        result |= scores(predicted, labels)
        if not count:
            p = np.empty_like(predicted)
            p[source.by_length] = predicted
            result["accuracy_by_length"] = accuracy_by_length(p, source.labels, np.diff(source.offsets))
        return result, p
    if source.distances is not None:
        result["accuracy_by_distance"] = accuracy_by_distance(*map(np.concatenate, details[1:]))
    elif data.bytes_per_token(split):
        result["bits_per_byte"] = result["loss"] / math.log(2) / data.bytes_per_token(split)
    result["accuracy"] = sum(details[0]) / sum(counts)
    return result, p


def outcomes(logits, y, source, group):
    """What the scores of a batch need besides its loss. Of a classifier: the texts' probabilities of class 1, and their
    labels. Of a language model: how many targets are the most likely token, and for data with distances, which answers
    are, and the distance of each."""
    if source.data.kind == "classify":
        return torch.softmax(logits.float(), -1)[:, -1].tolist(), y.tolist()
    right = logits.max(-1).indices == y  # argmax takes four times as long in bfloat16 on a CPU
    if source.distances is None:
        return (right.sum().item(),)
    counted = (y != -1).cpu()
    return right.sum().item(), right.cpu()[counted].numpy(), source.distances_of(group)[counted.numpy()]


def accuracy_by_distance(right, distances):
    """The accuracy of answers (N,) by their distance: [[distance, accuracy], ...], from near to far."""
    values, index, counts = np.unique(distances, return_inverse=True, return_counts=True)
    return [list(pair) for pair in zip(values.tolist(), (np.bincount(index, right) / counts).tolist())]


def scores(p, labels):
    """Scores of a two-class classifier as a dict of floats.

    p: (N,) probability of class 1; labels: (N,) of 0 and 1. A text is predicted to be of class 1 if p is above 1/2.
    auc is the probability that a text of class 1 ranks above one of class 0, ties counted half (the Mann-Whitney form
    of the area under the ROC curve). A score whose denominator is 0 is 0 (precision without predictions of class 1, for
    example); auc of a single class is 1/2.
    """
    p, labels = np.asarray(p, np.float64), np.asarray(labels) == 1
    predicted = p > 0.5
    hits, positive, negative = (predicted & labels).sum(), labels.sum(), (~labels).sum()
    _, place, count = np.unique(p, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # mean rank among equals, from 1
    ordered_pairs = rank[labels].sum() - positive * (positive + 1) / 2
    result = {
        "accuracy": (predicted == labels).mean(),
        "f1": 2 * hits / max(1, predicted.sum() + positive),
        "precision": hits / max(1, predicted.sum()),
        "recall": hits / max(1, positive),
        "auc": ordered_pairs / (positive * negative) if positive and negative else 0.5,
    }
    return {name: float(score) for name, score in result.items()}  # no NumPy scalars: checkpoints hold plain values


def accuracy_by_length(p, labels, lengths, parts=4):
    """The accuracy of a classifier on groups of texts, shortest first: [[shortest, longest, texts, accuracy], ...].

    p, labels: see `scores`; lengths: (N,) tokens of each text. The groups are `parts` quantiles; texts of one length
    are in one group, so the groups can differ in size, and there can be fewer.
    """
    right = (np.asarray(p) > 0.5) == (np.asarray(labels) == 1)
    longest = np.quantile(lengths, np.arange(1, parts) / parts, method="inverted_cdf")  # of each group but the last
    group = np.searchsorted(longest, lengths)
    chosen = [group == n for n in np.unique(group)]
    return [[int(lengths[c].min()), int(lengths[c].max()), int(c.sum()), float(right[c].mean())] for c in chosen]


def health(model):
    """The log's entries about the mechanisms: each layer's statistics, and FLOP to train on a token."""
    stats = [attention.stats() for attention in model.attentions()]
    return {"stats": stats, "work_per_token": model.estimate_flops(model.config.block_size)}
