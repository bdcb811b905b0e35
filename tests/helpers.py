"""Functions that the tests share: small prepared folders, and scripts called inside this process."""

import signal
import sys
from pathlib import Path

import numpy as np
import torch

from core import prepare, runs

ROOT = Path(__file__).resolve().parents[1]


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements of the largest tensor that anything makes within it: `elements`."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def tokens_of(texts):
    """(bytes of all texts, each after the mark 0, and their offsets)"""
    parts = [b"\0" + text.encode() for text in texts]
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0] + [len(part) for part in parts])


def write_bytes(folder, **texts):
    """A folder of running text, {split: str}, as bytes without a mark; like data/enwik8's."""
    arrays = {split: np.frombuffer(text.encode(), np.uint8) for split, text in texts.items()}
    meta = {"name": "text", "kind": "lm", "tokenizer": "bytes", "vocab_size": 256, "mark": None, "lossless": True,
            "partial": False, "options": {}, "source": {"file": "text"}, "split_rule": "as given"}
    prepare.write(folder, meta, {split: {"tokens": array, "bytes": len(array)} for split, array in arrays.items()})
    return folder


def write_reviews(folder, held_out=1, **splits):
    """A folder of reviews, {split: [(text, label), ...]}, as bytes; like data/imdb_bytes."""
    meta = {"name": "reviews", "kind": "classify", "tokenizer": "bytes", "vocab_size": 256, "mark": 0, "lossless": True,
            "classes": ["negative", "positive"], "partial": False, "options": {}, "source": {"file": "reviews"},
            "split_rule": "as given"}
    made = {}
    for split, rows in splits.items():
        tokens, offsets = tokens_of([text for text, _ in rows])
        made[split] = {"tokens": tokens, "offsets": offsets, "documents": len(rows), "bytes": len(tokens)}
        if split == "unsup":
            made[split]["held_out_documents"] = held_out
        else:
            made[split]["labels"] = [label for _, label in rows]
    prepare.write(folder, meta, made)
    return folder


def review(n):
    """Review number n of a made-up set: (text, label); longer ones and shorter ones of both labels."""
    return f"{n}: " + "so good " * (n % 2) + "a film " * (n * 7 % 11), n % 2


def in_order(source, count=0):
    """The batches of a whole split, as an evaluation reads them, or `count` of them spread over it."""
    return map(source.read, source.groups(count))


def call(module, *arguments):
    """What module.main() returns for these arguments. Its settings, train.py's and the signals are put back
    afterwards."""
    modules = [module, *([sys.modules["train"]] if "train" in sys.modules else [])]  # compare.py sets those of train.py
    before, line = [dict(vars(each)) for each in modules], sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    runs.asked.clear()
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    try:
        return module.main()
    finally:
        sys.argv = line
        for each, values in zip(modules, before):
            vars(each).update(values)
        for number, handler in handlers.items():
            signal.signal(number, handler)
