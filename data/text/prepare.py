"""
Your own text: a folder (with its subfolders), a file or an archive of UTF-8 text, or JSONL.

    python data/text/prepare.py --source=~/notes --name=notes            # into data/notes
    python data/text/prepare.py --source=book.txt --name=book --tokenizer=chars
    python data/text/prepare.py --source=reviews.jsonl --name=opinions   # {"text": "...", "label": "good"} on each line
    python train.py --dataset=notes

A document is a file, or a line of a file named .jsonl or .ndjson. Documents are put in an order that depends on --seed;
val and test take whole documents, about --val_share and --test_share of the bytes. If there are fewer documents than
splits, each is cut by its place instead: train is its beginning, test its end. Exact duplicates of a document of val or
test are dropped, those of train stay in train. Vocabularies are learnt from train.

Lines with a label make a classifier's set of two classes, sorted by name. Their shares are of the documents, the same
for each class, and HTML line breaks become newlines, as in what sample.py classifies. `train.py --task=lm` reads the
set as running text.

Each document begins with the document mark. Bytes and chars use NUL for it, so a NUL in the text of JSONL becomes a
space. A single document of bytes or chars has no mark, since nothing would train it. Line ends are stored as newlines.
A file that is not UTF-8, or holds NUL, is named and skipped. Hidden files and white space alone are no documents.
"""

import hashlib
import mmap
import re
import sys
from array import array
from itertools import tee
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from core import prepare  # first: it handles a missing package

import numpy as np

from core.archive import identity, next_character
from core.config import UserError, short_repr
from core.documents import read
from core.download import Progress
from core.tokenizer import UNKNOWN, Tokenizer, gpt2_encoding
from core.vocabulary import vocabulary

NAME = re.compile(r"[a-z0-9][\w-]{0,39}", re.ASCII | re.IGNORECASE)
STEP = 1 << 16  # bytes of a document that are encoded at a time
IN_ORDER = "whole documents in the order of a hash of the seed and the text; val, then test, take those that fit " \
           "their share of the {}; their duplicates are dropped"
RULES = {"lm": IN_ORDER.format("bytes"), "classify": IN_ORDER.format("documents of each class"),
         "cut": "each document is cut: its beginning is train, then comes val, then test, by their shares of its bytes"}


def parse(argv):
    parser = prepare.make_parser(__doc__, None)
    parser.add_argument("--name", default="", help="the set goes to data/NAME, where train.py --dataset=NAME finds it")
    prepare.add_tokenizer(parser, ("bytes", "chars", "words", "bpe", "gpt2"))
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the split (default 1)")
    parser.add_argument("--val_share", type=float, default=0.1, metavar="X", help="(default 0.1)")
    parser.add_argument("--test_share", type=float, default=0.1, metavar="X", help="0: no test split (default 0.1)")
    args = parser.parse_args(argv)
    if args.source is None or not args.name:
        raise UserError("expected --source=FILE_OR_FOLDER, the text, and --name=NAME, the set that is made of it")
    if not NAME.fullmatch(args.name):
        raise UserError(f"--name expects at most 40 letters, digits, - and _, got {short_repr(args.name)}")
    for script in (args.name, args.name.split("_")[0]):  # data/imdb_bytes is made by data/imdb/prepare.py
        if (HERE.parent / script / "prepare.py").exists() and (script != HERE.name or script == args.name):
            raise UserError(f"--name {args.name} is for a set of data/{script}/prepare.py: choose another name")
    if not (args.val_share > 0 and args.test_share >= 0 and args.val_share + args.test_share < 1):
        raise UserError("expected --val_share above 0, --test_share of 0 or more, and less than 1 together, "
                        f"got {args.val_share} and {args.test_share}")
    if not args.source.exists():
        raise UserError(f"--source {args.source}: there is no such file or folder")
    args.out_dir = args.out_dir or HERE.parent / args.name
    return args


def name_filter(source, out_dir):
    """The function that tells whether a file of `source` may belong to the text: no hidden one, nor what this script
    writes to out_dir."""
    source, out_dir = source.resolve(), out_dir.resolve()
    inside = out_dir.relative_to(source).as_posix() if out_dir.is_relative_to(source) else None

    def wanted(name):
        if any(part.startswith(".") for part in name.split("/")) and name != source.name:
            return False
        if inside is None:
            return True
        folder, _, file = name.rpartition("/")
        written = folder == inside.removeprefix(".") and prepare.is_ours(file)
        return not written and not name.startswith(f"{inside}.part-")

    return wanted


# ---- splits ------------------------------------------------------------------------------------


def shuffled(documents, seed):
    """(order, text, copy), each (N,) int64: the numbers of the documents in an order that depends on the seed and their
    texts alone; the number of each one's text, equal for duplicates; and 0 for the first document of a text, 1 for the
    second, ...

    Documents keep their order when others are added, so that most of val stays in val.
    """
    digests = np.frombuffer(bytes(documents.digests), "S16")
    _, text = np.unique(digests, return_inverse=True)
    by_text = np.argsort(text, kind="stable")
    copy = np.empty_like(text)
    copy[by_text] = np.arange(len(text)) - np.searchsorted(text[by_text], text[by_text])
    keys = bytearray()
    for n in range(len(documents)):
        key = b"%d %d " % (seed, copy[n]) + documents.digests[16 * n : 16 * n + 16]
        keys += hashlib.blake2b(key, digest_size=16).digest()
    return np.argsort(np.frombuffer(bytes(keys), "S16"), kind="stable"), text, copy


def split_documents(documents, data, seed, shares):
    """(rule, {split: {spans (N, 2) in `data`, labels (N,) of a classifier, counts}}, number of dropped duplicates).

    rule: a key of RULES; data: the file of text. Raises UserError if a class has too few documents.
    """
    order, text, copy = shuffled(documents, seed)
    firsts, ends, classes = order[copy[order] == 0], np.array(documents.ends), sorted(documents.classes)
    if not classes and len(firsts) <= len(shares):
        return "cut", cut_by_place(ends, firsts, data, shares), len(order) - len(firsts)
    sizes, parts = np.diff(ends), [firsts]
    if classes:
        sorted_number = np.array([classes.index(name) for name in documents.classes], np.uint8)
        labels = sorted_number[np.frombuffer(bytes(documents.labels), np.uint8)]
        sizes, parts = np.ones_like(sizes), [firsts[labels[firsts] == n] for n in range(len(classes))]
    owner = np.empty(len(firsts), np.int64)  # the split of each text: 0 train, 1 val, 2 test
    for n, part in enumerate(parts):
        if len(part) <= len(shares):
            raise UserError(f"too small to split: expected {len(shares) + 1} texts or more of each label, one for each "
                            f"split, found {len(part)} of {short_repr(classes[n])}")
        for place, numbers in enumerate(divide(part, sizes, shares)):
            owner[text[numbers]] = place
    splits = {}
    for place, name in enumerate(("train", *shares)):
        kept = order[(owner[text[order]] == place) & ((copy[order] == 0) | (place == 0))]
        splits[name] = {"spans": np.stack([ends[kept], ends[kept + 1]], 1)}
        if classes:
            splits[name] |= {"labels": labels[kept], "positive": labels[kept].sum()}
    dropped = len(order) - sum(len(split["spans"]) for split in splits.values())
    return "classify" if classes else "lm", splits, dropped


def divide(order, sizes, shares):
    """The documents of `order` of each split, train first.

    Each split of `shares` takes the documents that fit its share of the sum of sizes, at least the smallest one, and
    leaves one to each split after it; train gets the others.
    """
    parts, left, total = [], order, sizes[order].sum()
    for later, share in zip(range(len(shares), 0, -1), shares.values()):
        room, spare, taken = round(share * total), len(left) - later, np.zeros(len(left), bool)
        for n, size in enumerate(sizes[left]):
            if size <= room and spare:
                room, spare, taken[n] = room - size, spare - 1, True
        if not taken.any():
            taken[np.argmin(sizes[left])] = True
        parts.append(left[taken])
        left = left[~taken]
    return [left, *parts]


def cut_by_place(ends, order, data, shares):
    """{split: {spans (N, 2)}} of documents that are each cut, at whole characters, into train, val and test."""
    spans = {name: [] for name in ("train", *shares)}
    for n in order:
        start, end = ends[n], ends[n + 1]
        cuts, share = [start], 1 - sum(shares.values())
        for later in shares.values():
            cuts.append(next_character(data, start + int((end - start) * share)))
            share += later
        for name, first, last in zip(spans, cuts, [*cuts[1:], end]):
            if first < last:
                spans[name].append((first, last))
    return {name: {"spans": np.reshape(of_split, (-1, 2)).astype(np.int64)} for name, of_split in spans.items()}


# ---- tokens ------------------------------------------------------------------------------------


def pieces_of(data, spans):
    """Yield (whether a document begins, text) of the spans of `data` (UTF-8), in pieces of at most about STEP bytes. A
    long document is cut before white space, where no word or byte pair is cut."""
    for start, end in spans:
        first = True
        while start < end:
            stop = end
            if end - start > STEP:
                piece = data[start : start + STEP]
                length = len(piece[: max(0, piece.rfind(b" "), piece.rfind(b"\n"))].rstrip())
                stop = start + length if length else next_character(data, start + STEP)
            yield first, data[start:stop].decode()
            start, first = stop, False


def learn(kind, size, texts, single):
    """`vocabulary`; without a mark for a single document of bytes or chars."""
    entries = vocabulary(kind, size, texts)
    if single and kind in ("bytes", "chars"):
        entries["mark"] = None
        if kind == "chars":
            entries |= {"vocab_size": entries["vocab_size"] - 1, "vocab": entries["vocab"][1:]}
    return entries


def encode(tokenizer, unknown, data, spans, path):
    """Write the tokens of the documents at `spans` to the file `path`, each document after the mark.

    unknown: the id to count, or None. Returns a split for `prepare.write`: tokens (memory-mapped), offsets, counts.
    """
    dtype, offsets, size, count = prepare.token_dtype(tokenizer.vocab_size), array("q"), 0, 0
    mark = [] if tokenizer.mark is None else [tokenizer.mark]
    flags, pieces = tee(pieces_of(data, spans))
    with open(path, "wb") as file, Progress(f"encoding {path.stem}", unit="tokens") as progress:
        for (first, _), ids in zip(flags, tokenizer.encode_stream(text for _, text in pieces)):
            if first:
                offsets.append(size)
            tokens = np.array(array(dtype.char, mark * first + ids), dtype)  # NumPy is slow on a list
            file.write(tokens)
            size += len(tokens)
            count += np.count_nonzero(tokens == unknown) if unknown is not None else 0
            progress.add(len(tokens))
    if size < 2:
        raise UserError(f"too small to split: {path.stem} would have {size} tokens; give more text")
    split = {"tokens": np.memmap(path, dtype, "r"), "documents": len(spans), "offsets": np.array([*offsets, size]),
             "bytes": (spans[:, 1] - spans[:, 0] + len(mark)).sum()}
    return split if unknown is None else {**split, "unknown": count}


# ---- the script --------------------------------------------------------------------------------


def main(argv):
    args = parse(argv)
    shares = {"val": args.val_share} | ({"test": args.test_share} if args.test_share else {})
    options = {**prepare.tokenizer_options(args), "seed": args.seed, "shares": shares}
    wanted = name_filter(args.source, args.out_dir)
    source = identity(args.source, wanted)
    if prepare.finished(args, options, source):
        return
    if args.tokenizer == "gpt2":
        gpt2_encoding()  # it may fail, so before the long work
    with prepare.workspace(args.out_dir) as folder:
        documents = read(args.source, wanted, folder / "text.bin")
        with documents.file, mmap.mmap(documents.file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            rule, splits, dropped = split_documents(documents, data, args.seed, shares)
            spans = splits["train"]["spans"]
            texts = (text for _, text in pieces_of(data, spans))
            entries = learn(args.tokenizer, options.get("vocab_size"), texts, rule == "cut" and len(spans) == 1)
            tokenizer = Tokenizer({"tokenizer": args.tokenizer, **entries})
            unknown = entries["vocab"].index(UNKNOWN) if "vocab" in entries else None
            for name, split in splits.items():
                split |= encode(tokenizer, unknown, data, split.pop("spans"), folder / f"{name}.bin")
                if not documents.classes:
                    del split["offsets"]
        if dropped:
            print(f"dropped {dropped:,} duplicates of documents of val and test", file=sys.stderr)
        classes = {"classes": sorted(documents.classes), "class_order": "sorted by name"} if documents.classes else {}
        prepare.write(args.out_dir, {
            "name": args.name, "kind": "classify" if classes else "lm", "tokenizer": args.tokenizer, **entries,
            **classes,
            "lossless": args.tokenizer != "words" and not any(split.get("unknown") for split in splits.values()),
            "partial": False, "options": options,
            "source": {**source, "content_bytes": documents.ends[-1], "documents": len(documents),
                       "dropped_duplicates": dropped, "blank_documents": documents.blank,
                       "skipped_files": len(documents.skipped)},
            "split_rule": RULES[rule],
        }, splits)


if __name__ == "__main__":
    prepare.run_script(main)
