"""What batches of all kinds share, and the batches of documents that are read whole.

Letters: B batch, T time.
"""

import numpy as np
import torch

from core.config import UserError

MEND = "run its prepare.py again"


def check_ids(ids, data):
    """Raise UserError if an array of token ids has one beyond the vocabulary of `data`, a Dataset."""
    if ids.size and (top := ids.max()) >= data.vocab_size:
        raise UserError(f"{data.folder} holds the token {top}, expected ids below {data.vocab_size}, its vocabulary; "
                        f"it is damaged: {MEND}")


class Batches:
    """What batches of running text and of reviews share. Subclasses define the `rows` of a training batch, `all_rows`
    of the split in order, how `stack` makes tensors of rows, and the number of `targets` in rows."""

    distances = None  # of the split's tokens, if it has them: see `Dataset.distances`

    def __init__(self, data, batch_size, block_size, seed):
        self.data, self.batch_size, self.block_size, self.seed = data, batch_size, block_size, seed

    def read(self, rows):
        """(x, y, lengths) of rows. Raises DataChanged if a file in use was changed.

        (A file that is cut in the moment of reading ends the process with SIGBUS, as mapped files do.)
        """
        self.data.check_unchanged()
        batch = self.stack(rows)
        self.data.check_unchanged()
        return batch

    def batch(self, number, part=0, parts=1):
        """Training batch `number` = 0, 1, ..., or the `part` of it out of `parts`, which together are the whole."""
        rows = self.rows(number)
        own_rows = rows[part::parts]
        return self.read(own_rows if len(own_rows) else rows[:1])

    def share(self, number, part=0, parts=1):
        """The share of a batch's targets that is in a part of it."""
        rows = self.rows(number)
        return self.targets(rows[part::parts]) / self.targets(rows) if parts > 1 else 1.0

    def groups(self, count=0):
        """The rows of each batch of the whole split, all of them once; with `count`, of that many batches spread
        over it."""
        return spread(cut(self.all_rows(), self.batch_size), count)


class DocumentBatches(Batches):
    """Whole documents as running text: x, y (B, T) int64, y the tokens that follow x's. A row is a document's number.

    y is -1, which has no loss, past the end of a document and where the split's distances are 0. T is the length of the
    longest document without its last token. Raises UserError if block_size is shorter, or if a document has no loss.
    """

    def __init__(self, data, split, batch_size, block_size, seed=0):
        super().__init__(data, batch_size, block_size, seed)
        self.tokens, self.offsets, self.distances = data.tokens(split), data.offsets(split), data.distances(split)
        counted = np.ones(len(self.tokens), bool) if self.distances is None else np.array(self.distances) > 0
        counted[self.offsets[:-1]] = False  # nothing precedes the first token of a document
        if not len(counted):
            raise UserError(f"the {split} split of {data.folder} holds no document")
        self.counted, self.counts = counted, np.add.reduceat(counted, self.offsets[:-1], dtype=np.int64)
        if not self.counts.all():
            raise UserError(f"document {self.counts.argmin()} of the {split} split of {data.folder} has no token to "
                            f"predict; {MEND}")
        self.width = int(np.diff(self.offsets).max()) - 1
        if block_size < self.width:
            raise UserError(f"the documents of {data.folder} must not be cut: block_size must be at least "
                            f"{self.width}, got {block_size}")

    def windows(self, rows, values, padding):
        """(rows, T + 1) int64: `values` (one for each token of the split) of some documents, then `padding`."""
        windows = np.full((len(rows), self.width + 1), padding, np.int64)
        for window, row in zip(windows, rows):
            piece = values[self.offsets[row] : self.offsets[row + 1]]
            window[: len(piece)] = piece
        return windows

    def stack(self, rows):
        tokens = self.windows(rows, self.tokens, 0)
        check_ids(tokens, self.data)
        targets = np.where(self.windows(rows, self.counted, 0), tokens, -1)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy()), None

    def distances_of(self, rows):
        """(B, T) int64: for each target of the batch of `rows` its distance, 0 where there is no target."""
        return self.windows(rows, self.distances, 0)[:, 1:]

    def targets(self, rows):
        return int(self.counts[rows].sum())

    def rows(self, number):
        """Documents drawn at random."""
        return np.random.default_rng([self.seed, number]).integers(0, len(self.counts), self.batch_size)

    def all_rows(self):
        return np.arange(len(self.counts))


def cut(items, size):
    """`items` in pieces of `size`; the last one may be shorter."""
    return [items[n : n + size] for n in range(0, len(items), size)]


def spread(items, count=0):
    """All of `items` (count 0), or `count` of them from the middles of as many equal parts."""
    if not 0 < count < len(items):
        return items
    return [items[(2 * n + 1) * len(items) // (2 * count)] for n in range(count)]
