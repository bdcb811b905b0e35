"""A prepared folder of `data/` as batches, the same for training, evaluation and benchmarks.

What batch a step sees depends on the seed and the step's number alone, so that a resumed run, or
a run cut into ranks, sees what an unbroken one sees.

Letters: B batch, T time.
"""

import json
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from tokenizer import Tokenizer


class Dataset:
    """One folder with meta.json and a flat file of tokens for each split.

    folder: a path, or the NAME of data/NAME. task: 'lm' reads reviews as running text; '' is what
    the folder is for. Raises UserError where something is missing or not as meta.json says.
    """

    def __init__(self, folder, task=""):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").exists():
            self.folder = Path(__file__).parent / "data" / folder
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text("utf-8"))
            self.vocab_size, self.kind, self.splits = (self.meta[key] for key in ("vocab_size", "kind", "splits"))
            self.dtype = np.dtype(self.meta["dtype"])
        except FileNotFoundError:
            script = self.folder / "prepare.py"
            hint = f"python {script}" if script.exists() else "python data/NAME/prepare.py"
            raise UserError(f"no prepared data in {self.folder}; make it: {hint}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder / 'meta.json'} is damaged ({error!r}); run its prepare.py again")
        if task not in ("", "lm", self.kind):
            raise UserError(f"{self.folder} holds {self.kind} data; task expects 'lm' or '{self.kind}', got {task!r}")
        self.kind = task or self.kind
        self.classes = self.meta["classes"] if self.kind == "classify" else []
        self.tokenizer = Tokenizer(self.meta)

    def array(self, name, dtype, count):
        """A file of the folder as a read-only array, refused unless it holds `count` values."""
        path = self.folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != count * np.dtype(dtype).itemsize:
            raise UserError(f"{path}: expected {count * np.dtype(dtype).itemsize:,} bytes, found {found:,}; run its prepare.py again")
        return np.memmap(path, dtype, "r") if found else np.empty(0, dtype)

    def tokens(self, split):
        """The tokens of a split, in the file's type."""
        if split not in self.splits:
            raise UserError(f"{self.folder} has no split {split}; it has {', '.join(self.splits)}")
        return self.array(f"{split}.bin", self.dtype, self.splits[split]["tokens"])

    def texts(self, split):
        """(tokens, offsets, labels) of a split of reviews; review n is tokens[offsets[n]:offsets[n + 1]]."""
        documents = self.splits[split]["documents"]
        offsets = self.array(f"{split}.offsets.bin", np.int64, documents + 1)
        return self.tokens(split), offsets, self.array(f"{split}.labels.bin", np.uint8, documents)

    def running(self, split):
        """The arrays of tokens that a language model reads as `split`. With reviews as running text,
        training takes the unlabeled ones too, but none about a film of the validation split."""
        arrays = [self.tokens(split)]
        if split == "train" and "unsup" in self.splits:
            held_out = self.splits["unsup"].get("held_out_documents", 0)
            documents = self.splits["unsup"]["documents"]
            offsets = self.array("unsup.offsets.bin", np.int64, documents + 1)
            arrays.append(self.tokens("unsup")[: offsets[documents - held_out]])
        return arrays

    def bytes_per_token(self, split):
        """How many bytes of text a token of the split stands for; None where decoding loses some."""
        return self.splits[split]["bytes"] / self.splits[split]["tokens"] if self.meta["lossless"] else None


class TextBatches:
    """Windows of running text: x, y (B, T) int64, y the tokens that follow x's."""

    def __init__(self, data, split, batch_size, block_size, seed=0):
        self.arrays, self.batch_size, self.block_size, self.seed = data.running(split), batch_size, block_size, seed
        self.room = np.array([max(0, len(a) - block_size) for a in self.arrays])  # windows that fit
        self.count = sum(len(a) - 1 for a in self.arrays if len(a))  # tokens to predict
        if self.count < 1:
            raise UserError(f"the {split} split of {data.folder} holds no two tokens")

    def window(self, array, start):
        """x, y from `start`; past the end of the text y is -1, which counts for nothing."""
        piece = np.full(self.block_size + 1, -1, np.int64)
        found = array[start : start + self.block_size + 1]
        piece[: len(found)] = found
        return np.maximum(piece[:-1], 0), piece[1:]

    def stack(self, windows):
        x, y = zip(*windows)
        return torch.from_numpy(np.stack(x)), torch.from_numpy(np.stack(y)), None

    def batch(self, number):
        """Training batch `number` = 0, 1, ...: windows from anywhere in the text."""
        random = np.random.default_rng([self.seed, number])
        starts = random.integers(0, max(1, self.room.sum()), self.batch_size)
        ends = self.room.cumsum()
        which = np.minimum(np.searchsorted(ends, starts, side="right"), len(ends) - 1)
        return self.stack([self.window(self.arrays[a], s - (ends[a] - self.room[a])) for a, s in zip(which, starts)])

    def in_order(self, count=0):
        """The whole split, every token predicted once; with `count`, that many batches spread over it."""
        starts = [(a, s) for a in self.arrays for s in range(0, len(a) - 1, self.block_size)]
        batches = [starts[n : n + self.batch_size] for n in range(0, len(starts), self.batch_size)]
        for group in spread(batches, count):
            yield self.stack([self.window(a, s) for a, s in group])


class ReviewBatches:
    """Labelled texts of like length: x (B, T) padded with 0, y (B,) labels, lengths (B,), all int64.

    A text is cut to its first `block_size` tokens.
    """

    def __init__(self, data, split, batch_size, block_size, seed=0):
        self.tokens, self.offsets, self.labels = data.texts(split)
        self.batch_size, self.seed = batch_size, seed
        self.lengths = np.minimum(np.diff(self.offsets), block_size)
        self.count = len(self.labels)
        if self.count < 1:
            raise UserError(f"the {split} split of {data.folder} holds no text")

    def stack(self, rows):
        lengths = self.lengths[rows]
        x = np.zeros((len(rows), -(-lengths.max() // 32) * 32), np.int64)  # few widths: few shapes
        for n, row in enumerate(rows):
            x[n, : lengths[n]] = self.tokens[self.offsets[row] : self.offsets[row] + lengths[n]]
        return torch.from_numpy(x), torch.from_numpy(self.labels[rows].astype(np.int64)), torch.from_numpy(lengths)

    def batch(self, number):
        """Training batch `number`: each epoch sees every text once, in a new order."""
        per_epoch = -(-self.count // self.batch_size)
        epoch, number = divmod(number, per_epoch)
        if getattr(self, "epoch", None) != epoch:
            random = np.random.default_rng([self.seed, epoch])
            order = random.permutation(self.count)
            pools = [order[n : n + 50 * self.batch_size] for n in range(0, self.count, 50 * self.batch_size)]
            order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
            groups = [order[n : n + self.batch_size] for n in range(0, self.count, self.batch_size)]
            self.epoch, self.groups = epoch, [groups[n] for n in random.permutation(per_epoch)]
        return self.stack(self.groups[number])

    def in_order(self, count=0):
        """The whole split by length, shortest first, or `count` batches spread over it."""
        order = np.argsort(self.lengths, kind="stable")
        groups = [order[n : n + self.batch_size] for n in range(0, self.count, self.batch_size)]
        for group in spread(groups, count):
            yield self.stack(group)


def spread(items, count=0):
    """All of `items`, or `count` of them, evenly spaced."""
    if not 0 < count < len(items):
        return items
    return [items[n * len(items) // count] for n in range(count)]


def batches(data, split, batch_size, block_size, seed=0):
    """The batches of a split, as running text or as labelled texts by what `data` is read for."""
    return (ReviewBatches if data.kind == "classify" else TextBatches)(data, split, batch_size, block_size, seed)


def scores(p, labels):
    """Scores of a two-class classifier as a dict of floats.

    p: (N,) probability of class 1; labels: (N,) of 0 and 1. auc is the chance that a text of class
    1 ranks above one of class 0, ties counted half (the Mann-Whitney form of the ROC area).
    """
    p, labels = np.asarray(p, np.float64), np.asarray(labels) == 1
    said = p > 0.5
    hits, positive, negative = (said & labels).sum(), labels.sum(), (~labels).sum()
    precision, recall = hits / max(1, said.sum()), hits / max(1, positive)
    values, place, count = np.unique(p, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # mean rank among equals
    auc = (rank[labels].sum() - positive * (positive + 1) / 2) / max(1, positive * negative)
    f1 = 2 * hits / max(1, said.sum() + positive)
    return {"accuracy": (said == labels).mean(), "f1": f1, "precision": precision, "recall": recall, "auc": auc}
