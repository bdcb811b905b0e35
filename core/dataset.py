"""A prepared folder of `data/` as batches, the same for training, evaluation and benchmarks.

What batch a step sees depends on the seed and the batch's number alone, so that a resumed run sees
what an unbroken one sees.

Letters: B batch, T time, N texts.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch

from core import ROOT
from core.config import UserError, nearest, shown
from core.meta import PARTS, files_of, read_meta
from core.runs import digest
from core.tokenizer import Tokenizer


class DataChanged(UserError):
    """A file of the data is no longer what it was when it was opened."""


def stamp(path):
    """What tells that a file was touched: (bytes, time, number on its disk); None where it is gone."""
    try:
        info = path.stat()
        return info.st_size, info.st_mtime_ns, info.st_ino
    except OSError:
        return None


class Dataset:
    """One folder with meta.json and a flat file of tokens for each split.

    folder: a path, or the NAME of data/NAME. task: 'lm' reads reviews as running text; '' is what
    the folder is for. Raises UserError where something is missing or not as meta.json says.
    """

    def __init__(self, folder, task=""):
        self.folder, self.opened = find(folder), {}  # {path: its stamp}
        self.meta = read_meta(self.folder)
        self.vocab_size, self.kind, self.lossless = (self.meta[key] for key in ("vocab_size", "kind", "lossless"))
        self.splits, self.source, self.classes = self.meta["splits"], self.meta["source"], self.meta.get("classes", [])
        self.dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self.digests = {name: digest for name, (_, digest) in files_of(self.meta).items()}
        try:
            self.tokenizer = Tokenizer(self.meta)
        except ValueError as error:  # byte pairs that tiktoken refuses
            raise UserError(f"{self.folder / 'meta.json'} is damaged ({error}); run its prepare.py again")
        if task not in ("", "lm", self.kind):
            raise UserError(f"{self.folder} holds {self.kind} data; task expects 'lm' or '{self.kind}', got {task!r}")
        self.kind = task or self.kind
        self.classes = self.classes if self.kind == "classify" else []

    def array(self, name, dtype, count):
        """A file of the folder as a read-only array, refused unless it holds `count` values."""
        path, size = self.folder / name, count * np.dtype(dtype).itemsize
        now = stamp(path)
        self.opened.setdefault(path, now)
        found = now[0] if now else 0
        if found != size:
            raise DataChanged(f"{path}: expected {size:,} bytes, found {found:,}; run its prepare.py again")
        return np.memmap(path, dtype, "r") if found else np.empty(0, dtype)

    def number(self, split, key):
        """A count that meta.json gives for a split."""
        if split not in self.splits:
            raise UserError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split][key]

    def check_digest(self, path):
        """Raise DataChanged where a file is not the one that meta.json gives the sha256 of."""
        expected = self.digests.get(path.name)
        if expected and path.exists():
            with open(path, "rb") as file:
                if (found := digest(file)) != expected:
                    raise DataChanged(f"{path}: expected sha256 {expected}, as its meta.json says, found {found}; it is damaged "
                                      "or of other data: run its prepare.py again")

    def check_files(self):
        """Raise UserError where a file that is in use is damaged: its digest, and every token of it."""
        for path, before in list(self.opened.items()):
            self.check_digest(path)
            name = path.name.removesuffix(".bin")
            if name in self.splits and before and np.iinfo(self.dtype).max >= self.vocab_size:
                for piece in cut(self.tokens(name), 1 << 24):
                    check_ids(piece, self)

    def check_unchanged(self):
        """Raise DataChanged where a file that is in use was cut, replaced or taken away; one rewritten as it was may stay."""
        for path, before in self.opened.items():
            if (now := stamp(path)) != before:
                if not (now and before) or now[0] != before[0] or not self.digests.get(path.name):
                    found = f"{now[0]:,} others" if now else "no file"
                    raise DataChanged(f"{path} was changed while in use: expected {(before or (0,))[0]:,} bytes as they were, "
                                      f"found {found}; put it back or run its prepare.py again")
                self.check_digest(path)
                self.opened[path] = now

    @contextlib.contextmanager
    def unchanged(self):
        """Within, the files that are in use are as they were when they were opened; else DataChanged is raised.

        (A file that is cut in the very moment of reading ends the process with SIGBUS, as mapped files do.)
        """
        self.check_unchanged()
        yield
        self.check_unchanged()

    def tokens(self, split):
        """The tokens of a split, in the file's type."""
        return self.array(f"{split}.bin", self.dtype, self.number(split, "tokens"))

    def offsets(self, split):
        """(documents + 1,): document n of a split is tokens[offsets[n]:offsets[n + 1]]."""
        tokens, documents = self.number(split, "tokens"), self.number(split, "documents")
        offsets = self.array(f"{split}.offsets.bin", "<i8", documents + 1)
        if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 1).any():
            raise UserError(f"{self.folder / split}.offsets.bin is damaged (expected to rise from 0 to {tokens:,}); "
                            "run its prepare.py again")
        return offsets

    def texts(self, split):
        """(tokens, offsets, labels) of a split of reviews."""
        labels = self.array(f"{split}.labels.bin", np.uint8, self.number(split, "documents"))
        if len(labels) and labels.max() >= len(self.classes):
            raise UserError(f"{self.folder / split}.labels.bin is damaged (expected labels below {len(self.classes)}, "
                            f"found {labels.max()}); run its prepare.py again")
        return self.tokens(split), self.offsets(split), labels

    def running(self, split):
        """The arrays of tokens that a language model reads as `split`. With reviews as running text,
        training takes the unlabelled ones too, but none about a film of the validation split."""
        arrays = [self.tokens(split)]
        if split == "train" and "unsup" in self.splits:  # the reviews held out stand at its end
            kept = self.number("unsup", "documents") - self.number("unsup", "held_out_documents")
            arrays.append(self.tokens("unsup")[: self.offsets("unsup")[kept]])
        return arrays

    def bytes_per_token(self, split):
        """How many bytes of text a token of the split stands for; None where decoding loses some."""
        return self.number(split, "bytes") / self.number(split, "tokens") if self.lossless else None


IDENTITY = ("source", "kind", "tokenizer", "vocab_size", "mark", "classes", "vocab", "pattern", "ranks")  # of meta.json


def difference(before, now):
    """The first thing in which two meta.json are of different data, in words, or '': what was and what is."""
    pairs = [(key, before.get(key), now.get(key)) for key in IDENTITY]
    for split in ("train", "val", "unsup"):
        was, is_now = (meta.get("splits", {}).get(split, {}) for meta in (before, now))
        keys = ["tokens", "documents", "sha256", *(key for _, key in PARTS.values() if key in was)]  # once they had one digest
        pairs += [(f"{key} of {split}", was.get(key), is_now.get(key)) for key in keys]
    return next((f"{key}: expected {shown(a)}, found {shown(b)}" for key, a, b in pairs if a != b), "")


def find(folder):
    """The path of a prepared folder: `folder` itself, data/NAME, or `folder` in the repository. Raises UserError."""
    data, name = ROOT / "data", Path(folder).name
    for path in (Path(folder), data / folder, ROOT / folder):
        if (path / "meta.json").exists():
            return path
    for script in (name, name.split("_")[0]):  # imdb_bytes is made by imdb's
        if (data / script / "prepare.py").exists():
            options = "" if script == name else " (with an option, see its --help)"
            raise UserError(f"{folder} is not prepared; make it: python data/{script}/prepare.py{options}")
    made = [path.parent.name for path in data.glob("*/prepare.py")]
    raise UserError(f"no dataset {str(folder)!r}, neither as a folder nor in data/{nearest(name, made)}")


def check_ids(ids, data):
    """Raise UserError for token ids, an array of integers, of which one is beyond the vocabulary of `data`, a Dataset."""
    if ids.size and (top := ids.max()) >= data.vocab_size:
        raise UserError(f"{data.folder} holds the token {top}, expected ids below {data.vocab_size}, its vocabulary; "
                        "it is damaged: run its prepare.py again")


class Batches:
    """What batches of running text and of reviews share. A kind says which `rows` training's batch `number` has, how a
    `stack` of rows becomes tensors, what `targets` rows hold, and the `groups` of rows of the whole split in order."""

    def read(self, rows):
        """(x, y, lengths) of some rows."""
        with self.data.unchanged():
            return self.stack(rows)

    def batch(self, number, part=0, parts=1):
        """Training batch `number` = 0, 1, ..., or of it the `part` of so many parts, which together are the whole."""
        rows = self.rows(number)
        mine = rows[part::parts]
        return self.read(mine if len(mine) else rows[:1])

    def share(self, number, part=0, parts=1):
        """The share of a batch's targets that lies in a part of it."""
        rows = self.rows(number)
        return self.targets(rows[part::parts]) / self.targets(rows) if parts > 1 else 1.0

    def in_order(self, count=0):
        """The batches of the whole split, everything once; with `count`, that many spread over it."""
        for group in self.groups(count):
            yield self.read(group)


class TextBatches(Batches):
    """Windows of running text: x, y (B, T) int64, y the tokens that follow x's."""

    def __init__(self, data, split, batch_size, block_size, seed=0):
        self.data = data
        self.arrays = [array for array in data.running(split) if len(array) > 1]
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.count = sum(len(array) - 1 for array in self.arrays)  # tokens to predict
        if self.count < 1:
            raise UserError(f"the {split} split of {data.folder} holds no two tokens")
        # windows that fit each array, numbered through; a text shorter than a window has one
        self.ends = np.cumsum([max(1, len(array) - block_size) for array in self.arrays])

    def window(self, array, start):
        """x, y (T,) from `start`; past the end of the text y is -1, which counts for nothing."""
        piece = np.full(self.block_size + 1, -1, np.int64)
        found = array[start : start + self.block_size + 1]
        piece[: len(found)] = found
        return np.maximum(piece[:-1], 0), piece[1:]

    def stack(self, rows):
        """(x, y, None): texts of one length, nothing is padding."""
        x, y = map(np.stack, zip(*(self.window(array, start) for array, start in rows)))
        check_ids(x, self.data)
        check_ids(y, self.data)
        return torch.from_numpy(x), torch.from_numpy(y), None

    def targets(self, rows):
        return sum(min(self.block_size, len(array) - 1 - start) for array, start in rows)

    def rows(self, number):
        """Windows from anywhere in the text."""
        starts = np.random.default_rng([self.seed, number]).integers(0, self.ends[-1], self.batch_size)
        which = np.searchsorted(self.ends, starts, side="right")
        firsts = np.concatenate([[0], self.ends[:-1]])
        return [(self.arrays[n], start - firsts[n]) for n, start in zip(which, starts)]

    def groups(self, count=0):
        """Windows side by side: every token predicted once."""
        starts = [(array, start) for array in self.arrays for start in range(0, len(array) - 1, self.block_size)]
        return spread(cut(starts, self.batch_size), count)


class ReviewBatches(Batches):
    """Labelled texts of like length: x (B, T) padded with 0, y (B,) labels, lengths (B,), all int64.

    A text is cut to its first `block_size` tokens.
    """

    def __init__(self, data, split, batch_size, block_size, seed=0):
        self.data = data
        self.tokens, self.offsets, self.labels = data.texts(split)
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.lengths = np.minimum(np.diff(self.offsets), block_size)
        self.by_length = np.argsort(self.lengths, kind="stable")  # shortest first
        self.count = len(self.labels)
        if self.count < 1:
            raise UserError(f"the {split} split of {data.folder} holds no text")
        self.epoch, self.order = None, []  # the epoch that `order` is of

    def stack(self, rows):
        """(x, y, lengths) of the texts numbered `rows`."""
        lengths = self.lengths[rows]
        width = min(self.block_size, -(-lengths.max() // 32) * 32)  # multiples of 32: few widths, few shapes
        x = np.zeros((len(rows), width), np.int64)
        for n, row in enumerate(rows):
            x[n, : lengths[n]] = self.tokens[self.offsets[row] : self.offsets[row] + lengths[n]]
        check_ids(x, self.data)
        return torch.from_numpy(x), torch.from_numpy(self.labels[rows].astype(np.int64)), torch.from_numpy(lengths)

    def targets(self, rows):
        return len(rows)

    def rows(self, number):
        """Texts of like length; each epoch sees every text once, in a new order.

        They are sorted within pools of 50 batches drawn at random: little padding, and yet other
        neighbours each epoch.
        """
        epoch, number = divmod(number, -(-self.count // self.batch_size))
        if self.epoch != epoch:
            random = np.random.default_rng([self.seed, epoch])
            pools = cut(random.permutation(self.count), 50 * self.batch_size)
            order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
            groups = cut(order, self.batch_size)
            self.epoch, self.order = epoch, [groups[n] for n in random.permutation(len(groups))]
        return self.order[number]

    def groups(self, count=0):
        """Shortest text first."""
        return spread(cut(self.by_length, self.batch_size), count)


def cut(items, size):
    """`items` in pieces of `size`, the last one shorter where it does not divide."""
    return [items[n : n + size] for n in range(0, len(items), size)]


def spread(items, count=0):
    """All of `items` (count 0), or `count` of them from the middles of as many equal parts."""
    if not 0 < count < len(items):
        return items
    return [items[(2 * n + 1) * len(items) // (2 * count)] for n in range(count)]


def batches(data, split, batch_size, block_size, seed=0):
    """The batches of a split, as running text or as labelled texts by what `data` is read for."""
    return (ReviewBatches if data.kind == "classify" else TextBatches)(data, split, batch_size, block_size, seed)
