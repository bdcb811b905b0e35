"""
Multi-query associative recall: pairs of a key and a value, then keys whose values must be named (Arora et al. 2023,
"Zoology", section 4). No network, seconds.

    python data/recall/prepare.py

writes data/recall. With --pairs=2 --queries=3 --length=12 a sequence reads

    <s> k5v3 k1v7 . . k1 v7 . . k5 v3 k1 v7

Random places of two tokens behind the pairs ask for a random key; the other places are empty. Keys are drawn with
replacement: if each were asked for once, a model could answer the last queries by elimination.
By default, places near the pairs are the likelier ones: a window that sees few of the answers takes long to learn
anything.

A pair is one token. With --joined=0 it is two, as in the paper; a layer must then first tell each value which key
stands before it, which takes far longer to learn than to look a key up.
Only the values that answer count in loss and accuracy. The distance of an answer is that from the query, whose output
predicts it, back to the value in its pair: a window of w tokens sees distances below w.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from core import prepare
from core.config import UserError
from core.tokenizer import Tokenizer

MARK, EMPTY, FIRST_KEY = range(3)  # token ids; then come the values, and the pairs (k0 v0, k0 v1, ...)
CHUNK = 250  # sequences made at a time, for the memory
OPTIONS = {  # name: (default, least, most, help)
    "pairs": (4, 1, 2**14, "pairs of a sequence"),
    "queries": (8, 1, 2**15, "queries of a sequence"),
    "length": (64, 3, 2**16 - 2, "tokens of a sequence, without the mark"),
    "keys": (4, 1, 2**12, "different keys"),
    "values": (8, 2, 2**12, "different values"),
    "joined": (1, 0, 1, "1: a pair is one token, 0: two tokens"),
    "near": (0.1, 0.001, 10.0, "query places are drawn with the weights s ** (near - 1), s = 1, 2, ...: 1 is uniform, "
                               "0.01 is the paper's"),
    "train": (100_000, 1, 10**7, "sequences of the training split"),
    "val": (1_000, 1, 10**7, "sequences of the validation split"),
    "test": (1_000, 1, 10**7, "sequences of the test split"),
    "seed": (1, 0, 2**63 - 1, "of the random numbers"),
}


def sequences(random, count, options):
    """(tokens, distances), both (count, length + 1) int64: sequences after the mark; distances are 0 but at answers.

    random: a NumPy Generator. Only its method `random` is used, whose numbers no NumPy version may change.
    """
    n, size, first_value = options.pairs, 2 - options.joined, FIRST_KEY + options.keys
    rows, places = np.arange(count)[:, None], (options.length - size * n) // 2  # of two tokens, behind the pairs
    keys = random.random((count, options.keys)).argsort(1)[:, :n]
    values = (random.random((count, n)) * options.values).astype(np.int64)
    asked = (random.random((count, options.queries)) * n).astype(np.int64)  # which pair each query is about
    # a weighted draw without replacement: Efraimidis and Spirakis 2006
    weights = np.arange(1, places + 1) ** (options.near - 1)
    chosen = (-np.log1p(-random.random((count, places))) / weights).argsort(1)[:, : options.queries]
    tokens, distances = np.full((count, options.length + 1), EMPTY), np.zeros((count, options.length + 1), np.int64)
    tokens[:, 0] = MARK
    stored, query = size * (1 + np.arange(n)), 1 + size * n + 2 * chosen  # positions of the pairs' values, of queries
    tokens[:, stored] = first_value + values
    if options.joined:
        tokens[:, stored] = first_value + options.values * (1 + keys) + values
    else:
        tokens[:, stored - 1] = FIRST_KEY + keys
    tokens[rows, query], tokens[rows, query + 1] = FIRST_KEY + keys[rows, asked], first_value + values[rows, asked]
    distances[rows, query + 1] = query - stored[asked]
    return tokens, distances


def split_of(random, count, options):
    """A split of `count` sequences for `prepare.write`, without its bytes."""
    chunks = [sequences(random, min(CHUNK, count - start), options) for start in range(0, count, CHUNK)]
    tokens, distances = (np.concatenate(parts) for parts in zip(*chunks))
    return {"tokens": tokens.ravel(), "distances": distances.ravel(), "documents": count,
            "offsets": np.arange(count + 1) * (options.length + 1), "answers": int((distances > 0).sum())}


def check(options):
    """Raise UserError for options that no sequence can have."""
    for name, (_, least, most, _) in OPTIONS.items():
        if not least <= getattr(options, name) <= most:
            raise UserError(f"--{name} must be from {least:,} to {most:,}, got {getattr(options, name):,}")
    least = (2 - options.joined) * options.pairs + 2 * options.queries
    if options.length < least:
        raise UserError(f"--length must be at least {least} for --pairs={options.pairs} and two tokens for each of "
                        f"--queries={options.queries}; got {options.length}")
    if options.pairs > options.keys:
        raise UserError(f"--pairs must be at most --keys={options.keys}, for no key is in two pairs; "
                        f"got {options.pairs}")


def main(argv):
    parser = prepare.make_parser(__doc__, HERE)
    for name, (default, *_, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), metavar="N", default=default, help=f"{text} ({default})")
    args = parser.parse_args(argv)
    check(args)
    if args.source is not None:
        raise UserError("data/recall is made of random numbers and takes no --source")
    options = {name: getattr(args, name) for name in OPTIONS}
    splits, digest = {}, hashlib.sha256()
    for n, name in enumerate(("train", "val", "test")):
        splits[name] = split_of(np.random.default_rng([args.seed, n]), getattr(args, name), args)
        digest.update(splits[name]["tokens"].astype("<i8"))
    source = {"file": "prepare.py", "sha256": digest.hexdigest()}
    if prepare.finished(args, options, source):
        return
    vocab = ["<s>", ".", *(f"k{n}" for n in range(args.keys)), *(f"v{n}" for n in range(args.values))]
    vocab += [f"k{n}v{m}" for n in range(args.keys) for m in range(args.values)] * args.joined
    meta = {"name": "recall", "kind": "lm", "whole_documents": True, "tokenizer": "words", "vocab_size": len(vocab),
            "mark": MARK, "vocab": vocab, "lossless": False, "partial": False, "options": options, "source": source,
            "split_rule": "random sequences; one stream of random numbers for each split"}
    sizes = np.array([len(Tokenizer(meta).decode_bytes([token])) for token in range(len(vocab))])
    for split in splits.values():
        split["bytes"] = int(sizes[split["tokens"]].sum())
    prepare.write(args.out_dir, meta, splits)


if __name__ == "__main__":
    prepare.run_script(main)
