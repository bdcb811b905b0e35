"""A prepared folder of `data/` as batches, the same for training, evaluation and benchmarks.

A training batch depends on the seed and its number alone, so that a resumed run sees the same data as an unbroken one.

Letters: B batch, T time, N texts.
"""

from pathlib import Path

import numpy as np
import torch

from core import ROOT, foreign
from core.batches import MEND, Batches, DocumentBatches, check_ids, cut
from core.config import UserError, did_you_mean
from core.meta import digest_of, files_of, read_meta, stamp
from core.texts import window_starts
from core.tokenizer import Tokenizer


class DataChanged(UserError):
    """A file of the data was changed after meta.json was written, or while in use."""


class Dataset:
    """One folder with meta.json and a flat file of tokens for each split.

    folder: a path, or the NAME of data/NAME. task: 'lm' reads reviews as running text; '' is the kind in meta.json.
    Raises UserError if a file is missing or does not match meta.json.
    """

    def __init__(self, folder, task=""):
        self.folder, self.opened = find(folder), {}  # opened: {path: its stamp}
        self.meta = read_meta(self.folder)
        self.vocab_size, self.kind, self.lossless = (self.meta[key] for key in ("vocab_size", "kind", "lossless"))
        self.splits, self.source = self.meta["splits"], self.meta["source"]
        self.dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self.digests = {name: digest for name, (_, digest) in files_of(self.meta).items()}
        try:
            self.tokenizer = Tokenizer(self.meta)
        except ValueError as error:  # byte pairs that tiktoken refuses
            raise UserError(f"{self.folder / 'meta.json'} is damaged ({error}); {MEND}")
        if task not in ("", "lm", self.kind):
            raise UserError(f"{self.folder} holds {self.kind} data; task expects 'lm' or '{self.kind}', got {task!r}")
        self.kind = task or self.kind
        self.classes = self.meta.get("classes", []) if self.kind == "classify" else []

    def array(self, name, dtype, length):
        """A file of the folder as a read-only array. Raises DataChanged unless it holds `length` values."""
        path, expected = self.folder / name, length * np.dtype(dtype).itemsize
        current = stamp(path)
        self.opened.setdefault(path, current)
        size = current[0] if current else 0
        if size != expected:
            raise DataChanged(f"{path}: expected {expected:,} bytes, found {size:,}; {MEND}")
        return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)

    def count(self, split, key):
        """A count that meta.json gives for a split."""
        if split not in self.splits:
            raise UserError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split][key]

    def check_digest(self, path):
        """Raise DataChanged unless a file has the sha256 that meta.json gives, if it gives one."""
        expected = self.digests.get(path.name)
        if expected and path.exists() and (actual := digest_of(path)) != expected:
            raise DataChanged(f"{path}: expected sha256 {expected}, as its meta.json says, found {actual}; "
                              f"it is damaged or of other data: {MEND}")

    def check_files(self):
        """Raise UserError if a file in use is damaged: has another digest, or a token beyond the vocabulary."""
        for path in list(self.opened):
            self.check_digest(path)
            if (split := path.name.removesuffix(".bin")) in self.splits:
                for piece in cut(self.tokens(split), 1 << 24):
                    check_ids(piece, self)

    def check_unchanged(self):
        """Raise DataChanged if a file in use was cut, replaced or removed; rewriting the same bytes is accepted."""
        for path, before in self.opened.items():
            current = stamp(path)
            if current == before:
                continue
            if not (current and before) or current[0] != before[0] or not self.digests.get(path.name):
                size, found = before[0] if before else 0, f"{current[0]:,} others" if current else "no file"
                raise DataChanged(f"{path} was changed while in use: expected {size:,} bytes as they were, "
                                  f"found {found}; put it back or {MEND}")
            self.check_digest(path)
            self.opened[path] = current

    def tokens(self, split):
        """(tokens,): the tokens of a split, in the file's dtype."""
        return self.array(f"{split}.bin", self.dtype, self.count(split, "tokens"))

    def offsets(self, split):
        """(documents + 1,) int64: document n of a split is tokens[offsets[n]:offsets[n + 1]]."""
        tokens, documents = self.count(split, "tokens"), self.count(split, "documents")
        offsets = self.array(f"{split}.offsets.bin", "<i8", documents + 1)
        if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 1).any():
            raise UserError(f"{self.folder / split}.offsets.bin is damaged (expected to rise from 0 to {tokens:,}); "
                            f"{MEND}")
        return offsets

    def distances(self, split):
        """(tokens,) uint16: how many tokens before a token that determines it stands; 0: the token has no loss. None if
        the split has no such file: then each token has a loss."""
        has_file = "distances_sha256" in self.splits[split]
        return self.array(f"{split}.distances.bin", "<u2", self.count(split, "tokens")) if has_file else None

    def texts(self, split):
        """(tokens, offsets, labels (documents,) uint8) of a split of reviews."""
        labels = self.array(f"{split}.labels.bin", np.uint8, self.count(split, "documents"))
        if len(labels) and labels.max() >= len(self.classes):
            raise UserError(f"{self.folder / split}.labels.bin is damaged (expected labels below {len(self.classes)}, "
                            f"found {labels.max()}); {MEND}")
        return self.tokens(split), self.offsets(split), labels

    def token_arrays(self, split):
        """The arrays of tokens that a language model reads as `split`. With reviews as running text, train also has the
        unlabelled ones, except those of the validation split's movies."""
        arrays = [self.tokens(split)]
        if split == "train" and "unsup" in self.splits:  # the reviews held out are the last ones
            kept = self.count("unsup", "documents") - self.count("unsup", "held_out_documents")
            arrays.append(self.tokens("unsup")[: self.offsets("unsup")[kept]])
        return arrays

    def bytes_per_token(self, split):
        """Bytes of text per token of the split; None if decoding does not restore the text."""
        return self.count(split, "bytes") / self.count(split, "tokens") if self.lossless else None


def find(folder):
    """The path of a prepared folder: `folder` from the working directory, data/NAME, or `folder` from the repository's
    root. Raises UserError if none is prepared."""
    data, name = ROOT / "data", Path(folder).name
    for path in (Path(folder), data / folder, ROOT / folder):
        if (path / "meta.json").exists():
            return path
        if ((path / "meta.pkl").exists() or path.parent != data) and (explanation := foreign.explain_data(path)):
            raise UserError(explanation)
    for script in (name, name.split("_")[0]):  # data/imdb_bytes is made by data/imdb/prepare.py
        if (data / script / "prepare.py").exists():
            options = "" if script == name else " (with an option, see its --help)"
            raise UserError(f"{folder} is not prepared; make it: python data/{script}/prepare.py{options}")
    names = [path.parent.name for path in data.glob("*/prepare.py")]
    raise UserError(f"no dataset {str(folder)!r}, neither as a folder nor in data/{did_you_mean(name, names)}")


class TextBatches(Batches):
    """Windows of running text: x, y (B, T) int64, y the tokens that follow x's. A row is (array, start).

    align_documents: training windows start where documents do, see `texts.window_starts`; else anywhere.
    """

    def __init__(self, data, split, batch_size, block_size, seed=0, align_documents=False):
        super().__init__(data, batch_size, block_size, seed)
        self.arrays = [array for array in data.token_arrays(split) if len(array) > 1]
        self.count = sum(len(array) - 1 for array in self.arrays)  # tokens to predict
        if self.count < 1:
            raise UserError(f"the {split} split of {data.folder} holds no two tokens")
        mark = data.tokenizer.mark if align_documents else None
        if align_documents and mark is None:
            raise UserError(f"align_documents expects documents that begin with a mark; {data.folder} has no mark")
        # The starts of windows in each array; a text shorter than a window has one.
        self.starts = [window_starts(array, mark, block_size) if align_documents else
                       range(max(1, len(array) - block_size)) for array in self.arrays]
        self.ends = np.cumsum([len(starts) for starts in self.starts])

    def stack(self, rows):
        """(x, y, None): past the end of a text y is -1, which has no loss."""
        windows = np.full((len(rows), self.block_size + 1), -1, np.int64)
        for window, (array, start) in zip(windows, rows):
            tokens = array[start : start + self.block_size + 1]
            window[: len(tokens)] = tokens
        check_ids(windows, self.data)
        x, y = np.maximum(windows[:, :-1], 0), windows[:, 1:].copy()
        return torch.from_numpy(x), torch.from_numpy(y), None

    def targets(self, rows):
        return sum(min(self.block_size, len(array) - 1 - start) for array, start in rows)

    def rows(self, number):
        """Windows drawn at random."""
        starts = np.random.default_rng([self.seed, number]).integers(0, self.ends[-1], self.batch_size)
        indices = np.searchsorted(self.ends, starts, side="right")
        firsts = np.concatenate([[0], self.ends[:-1]])
        return [(self.arrays[n], int(self.starts[n][start - firsts[n]])) for n, start in zip(indices, starts)]

    def all_rows(self):
        """Adjacent windows: every token is predicted once."""
        return [(array, start) for array in self.arrays for start in range(0, len(array) - 1, self.block_size)]


class ReviewBatches(Batches):
    """Labelled texts of similar length: x (B, T) padded with 0, y (B,) labels, lengths (B,), all int64.

    A text is cut to its first `block_size` tokens. A row is the number of a text.
    """

    def __init__(self, data, split, batch_size, block_size, seed=0):
        super().__init__(data, batch_size, block_size, seed)
        self.tokens, self.offsets, self.labels = data.texts(split)
        self.lengths = np.minimum(np.diff(self.offsets), block_size)
        self.by_length = np.argsort(self.lengths, kind="stable")  # shortest first
        self.count = len(self.labels)
        if self.count < 1:
            raise UserError(f"the {split} split of {data.folder} holds no text")
        self.epoch, self.order = None, []  # the epoch that `order` is of

    def stack(self, rows):
        lengths = self.lengths[rows]
        width = min(self.block_size, -(-lengths.max() // 32) * 32)  # multiples of 32: few different shapes
        x = np.zeros((len(rows), width), np.int64)
        for n, row in enumerate(rows):
            x[n, : lengths[n]] = self.tokens[self.offsets[row] : self.offsets[row] + lengths[n]]
        check_ids(x, self.data)
        return torch.from_numpy(x), torch.from_numpy(self.labels[rows].astype(np.int64)), torch.from_numpy(lengths)

    def targets(self, rows):
        return len(rows)

    def rows(self, number):
        """Texts of similar length; each epoch reads every text once, in a new order.

        Texts are sorted by length within random pools of 50 batches: little padding, and other neighbours each epoch.
        """
        epoch, number = divmod(number, -(-self.count // self.batch_size))
        if self.epoch != epoch:
            random = np.random.default_rng([self.seed, epoch])
            pools = cut(random.permutation(self.count), 50 * self.batch_size)
            order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
            groups = cut(order, self.batch_size)
            self.epoch, self.order = epoch, [groups[n] for n in random.permutation(len(groups))]
        return self.order[number]

    def all_rows(self):
        """Texts by length, shortest first."""
        return self.by_length


def batches(data, split, batch_size, block_size, seed=0, align_documents=False):
    """The batches of a split: labelled texts, whole documents or running text, as its meta.json says.

    align_documents: of running text, see `TextBatches`.
    """
    if data.kind == "classify":
        return ReviewBatches(data, split, batch_size, block_size, seed)
    if data.meta.get("whole_documents"):
        return DocumentBatches(data, split, batch_size, block_size, seed)
    return TextBatches(data, split, batch_size, block_size, seed, align_documents)
