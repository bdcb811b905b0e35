"""
The Large Movie Review Dataset: 25,000 reviews to learn from, 25,000 to test on, 50,000 without a label.

    python data/imdb/prepare.py                                # downloads 80 MB
    python data/imdb/prepare.py --source aclImdb_v1.tar.gz     # or any archive, or the folder aclImdb
    python data/imdb/prepare.py --tokenizer=bytes              # into data/imdb_bytes
    python data/imdb/prepare.py --tokenizer=bpe                # into data/imdb_bpe: rustbpe learns, tiktoken encodes
    python data/imdb/prepare.py --tokenizer=gpt2               # into data/imdb_gpt2, tiktoken's own

writes, in about half a minute, train 22,496, val 2,504, test 25,000 and unsup 50,000 reviews. test is the official one.
val is a tenth of the official train, held out by movie, so that no movie is on both sides. In unsup the reviews of
val's movies come last, and meta.json says how many (in the official data none): a language model that is to be judged
on val must not read them. Review n is the same review whatever the tokenizer. Vocabularies are learnt from train
(bpe: and from unsup without val's movies), never from val or test.
"""

import base64
import hashlib
import re
import sys
from array import array
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from core import prepare  # first: it handles a missing package

import numpy as np

from core.archive import check_size, decode_utf8, identity, members
from core.config import UserError
from core.download import Progress, download
from core.tokenizer import UNKNOWN, bpe_encoding, gpt2_encoding, words

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
DIGEST = "md5:7c2ac02c03563afcf9b574c7e56c153a"
OFFICIAL = {"train/pos": 12_500, "train/neg": 12_500, "train/unsup": 50_000, "test/pos": 12_500, "test/neg": 12_500}
SEED = "1"  # of every shuffle below
REVIEW = re.compile(r"(?:^|/)((?:train|test)/(?:pos|neg|unsup))/(\d+)_\d+\.txt$")
MOVIES = re.compile(r"(?:^|/)(train|test)/urls_(pos|neg|unsup)\.txt$")
MOVIE = re.compile(r"tt\d+")
LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
# What a byte pair may not cross: a word with its space and apostrophes, up to three digits, marks, line ends.
PATTERN = r" ?\p{L}+(?:['’]\p{L}+)*| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+|\s"
CHUNK = 2000  # reviews handed to tiktoken at once


def shuffled(keys):
    """`keys` (str) in an order that looks random and never changes, with the Python or with what else is listed."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{SEED} {key}".encode()).digest())


def read(source, partial):
    """
    All reviews of `source`: {"train/pos": {n: (text, movie)}, ...}, and whether they are fewer than the official ones.
    Raises UserError unless every folder is there, numbered from 0, with as many lines in its urls file.
    """
    texts, movies = {group: {} for group in OFFICIAL}, {}
    with Progress(f"reading {source.name}", sum(OFFICIAL.values()), "reviews") as progress:
        for name, data in members(source, lambda name: REVIEW.search(name) or MOVIES.search(name), 1 << 24):
            if found := MOVIES.search(name):
                # a movie is its number; a line without one still tells its movie from others
                lines = decode_utf8(data, name).removesuffix("\n").split("\n") if data else []
                movies["/".join(found.groups())] = [(MOVIE.search(line) or [line.strip()])[0] for line in lines]
                continue
            group, number = REVIEW.search(name).groups()
            if group in texts:
                if int(number) in texts[group]:
                    raise UserError(f"{source.name}: {group} holds review {number} twice: give one copy only")
                # NUL is the mark of the bytes; it goes for every tokenizer, so that all have the same text
                texts[group][int(number)] = LINE_BREAK.sub("\n", decode_utf8(data, name).replace("\0", " "))
                progress.add(1)
    smaller = False
    for group, official in OFFICIAL.items():
        smaller |= check_size(source, len(texts[group]), official, partial, f"reviews in {group}")
        lines = len(movies.get(group, ()))
        urls = group.replace("/", "/urls_") + ".txt"
        if lines != len(texts[group]):
            raise UserError(f"{source.name}: expected {len(texts[group]):,} lines in {urls}, one for each "
                                   f"review in {group}, found {lines:,}: it is not whole; copy or download it again")
        if gone := set(range(lines)) - set(texts[group]):
            raise UserError(f"{source.name}: expected {group} numbered from 0 to {lines - 1:,} like the lines "
                                   f"of {urls}, found no review {min(gone):,}: copy or download it again")
    return {group: {n: (text, movies[group][n]) for n, text in texts[group].items()} for group in OFFICIAL}, smaller


def held_out(groups):
    """The movies (set of str) of validation: in a fixed random order, until they have a tenth of the train reviews."""
    count = defaultdict(int)
    for label in ("pos", "neg"):
        for _, movie in groups[f"train/{label}"].values():
            count[movie] += 1
    chosen, reviews = set(), 0
    for movie in shuffled(count):
        if reviews * 10 >= sum(count.values()):
            break
        chosen.add(movie)
        reviews += count[movie]
    if len(chosen) == len(count):
        raise UserError(f"expected reviews of two movies or more in train, found {len(count)}: check --source")
    return chosen


def arrange(groups, chosen):
    """
    The splits in their final order: {name: [(text, label or None, movie), ...]}. Labels are mixed, 1 is positive;
    in unsup the movies of `chosen` come last.
    """
    splits = {}
    for name, folder, labels in (("train", "train", ("neg", "pos")), ("test", "test", ("neg", "pos")),
                                 ("unsup", "train", ("unsup",))):
        keys = shuffled(f"{folder}/{label}/{n}" for label in labels for n in groups[f"{folder}/{label}"])
        rows = []
        for key in keys:
            group, n = key.rsplit("/", 1)
            text, movie = groups[group][int(n)]
            rows.append((text, None if name == "unsup" else labels.index(group.split("/")[1]), movie))
        splits[name] = rows
    val = [row for row in splits["train"] if row[2] in chosen]
    train = [row for row in splits["train"] if row[2] not in chosen]
    unsup = sorted(splits["unsup"], key=lambda row: row[2] in chosen)  # stable: the shuffle stays within each part
    return {"train": train, "val": val, "test": splits["test"], "unsup": unsup}


def as_words(texts, size):
    """
    {split: texts} as word ids: (meta entries, {split: (tokens, offsets)}).

    One pass over the text: words are numbered as they appear, and renumbered once the `size` most frequent words of
    train are known. 0 is the mark, 1 is `<unk>`, then by falling frequency, ties in the order of the alphabet.
    """
    seen = defaultdict()
    seen.default_factory = seen.__len__
    seen["<s>"]  # number 0; no text holds it, words() splits it
    flat, offsets = {}, {}
    with Progress("splitting into words", sum(map(len, texts.values())), "reviews") as progress:
        for name, reviews in texts.items():
            ids, ends = array("I"), [0]
            for text in reviews:
                ids.append(0)
                ids.extend(map(seen.__getitem__, words(text)))
                ends.append(len(ids))
                progress.add(1)
            flat[name], offsets[name] = np.frombuffer(ids, dtype=np.uintc), ends
    counts = np.bincount(flat["train"], minlength=len(seen))
    known = list(seen)
    frequent = sorted(np.flatnonzero(counts[1:]) + 1, key=lambda i: (-counts[i], known[i]))[:size]
    table = np.ones(len(seen), prepare.token_dtype(len(frequent) + 2))
    table[0] = 0
    table[frequent] = np.arange(2, len(frequent) + 2)
    vocab = ["<s>", UNKNOWN] + [known[i] for i in frequent]
    return {"vocab_size": len(vocab), "mark": 0, "vocab": vocab}, {n: (table[flat[n]], offsets[n]) for n in texts}


def as_bytes(texts):
    """{split: texts} as bytes, byte 0 being the mark: like `as_words`."""
    encoded = {}
    for name, reviews in texts.items():
        parts = [b"\0" + text.encode("utf-8") for text in reviews]
        encoded[name] = (np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0] + [len(part) for part in parts]))
    return {"vocab_size": 256, "mark": 0}, encoded


def learn_bpe(texts, size):
    """The meta entries of byte pairs learnt from `texts` (iterable of str): `size` tokens, bytes and mark included."""
    import rustbpe

    learner = rustbpe.Tokenizer()
    print("learning byte pairs ...", file=sys.stderr, flush=True)
    learner.train_from_iterator(iter(texts), vocab_size=size - 1, pattern=PATTERN)
    ordered = sorted(learner.get_mergeable_ranks(), key=lambda pair: pair[1])
    ranks = [base64.b64encode(token).decode("ascii") for token, _ in ordered]
    if len(ranks) + 1 < size:
        print(f"the text has byte pairs for {len(ranks) + 1:,} tokens only", file=sys.stderr)
    return {"vocab_size": len(ranks) + 1, "mark": len(ranks), "pattern": PATTERN, "ranks": ranks}


def as_pairs(meta, encoding, texts):
    """{split: texts} through a tiktoken Encoding, each text after the mark: like `as_words`."""
    encoded, dtype = {}, prepare.token_dtype(meta["vocab_size"])
    with Progress("encoding byte pairs", sum(map(len, texts.values())), "reviews") as progress:
        for name, reviews in texts.items():
            parts, lengths = [], [0]
            for start in range(0, len(reviews), CHUNK):
                chunk = encoding.encode_ordinary_batch(reviews[start : start + CHUNK])
                parts += [np.array([meta["mark"]] + ids, dtype) for ids in chunk]
                lengths += [len(ids) + 1 for ids in chunk]
                progress.add(len(chunk))
            encoded[name] = (np.concatenate(parts), np.cumsum(lengths))
    return meta, encoded


def options_of(args):
    """What makes one folder differ from another, checked: a dict for meta.json."""
    default, least = {"words": (10_000, 1), "bpe": (8192, 258)}.get(args.tokenizer, (None, None))
    if default is None:
        if args.vocab_size is not None:
            raise UserError(f"--vocab_size: {args.tokenizer} has a vocabulary of its own; leave the option out")
        return {"tokenizer": args.tokenizer}
    size = default if args.vocab_size is None else args.vocab_size
    if size < least:
        raise UserError(f"--vocab_size: expected at least {least} for {args.tokenizer}, got {size}")
    return {"tokenizer": args.tokenizer, "vocab_size": size}


def main(argv):
    def more(parser):
        parser.add_argument("--tokenizer", choices=("words", "bytes", "bpe", "gpt2"), default="words")
        parser.add_argument("--vocab_size", type=int, metavar="N",
                            help="words: the N most frequent, besides <s> and <unk> (default 10000); "
                                 "bpe: N tokens in all (default 8192)")

    def folder(args):
        return "imdb" if args.tokenizer == "words" else f"imdb_{args.tokenizer}"

    args = prepare.arguments(__doc__, argv, HERE, "12,500 (unsup: 50,000) reviews a folder", more, folder)
    options = options_of(args)
    if prepare.finished(args, options):
        return
    gpt2 = gpt2_encoding() if args.tokenizer == "gpt2" else None  # before the long work, since it may fail
    source = args.source or download(URL, HERE / "aclImdb_v1.tar.gz", None, DIGEST)
    groups, partial = read(source, args.partial)
    chosen = held_out(groups)
    rows = arrange(groups, chosen)
    texts = {split: [text for text, _, _ in reviews] for split, reviews in rows.items()}
    tail = sum(movie in chosen for _, _, movie in rows["unsup"])
    if args.tokenizer == "words":
        entries, encoded = as_words(texts, options["vocab_size"])
    elif args.tokenizer == "bytes":
        entries, encoded = as_bytes(texts)
    elif args.tokenizer == "bpe":
        entries = learn_bpe(texts["train"] + texts["unsup"][: len(texts["unsup"]) - tail], options["vocab_size"])
        entries, encoded = as_pairs(entries, bpe_encoding(PATTERN, entries["ranks"], entries["mark"]), texts)
    else:
        entries, encoded = as_pairs({"vocab_size": gpt2.n_vocab, "mark": gpt2.eot_token}, gpt2, texts)
    splits = {}
    for split, reviews in rows.items():
        tokens, offsets = encoded[split]
        splits[split] = {"tokens": tokens, "offsets": offsets, "documents": len(reviews),
                         "movies": len({movie for _, _, movie in reviews}),
                         "bytes": sum(len(text.encode("utf-8")) + 1 for text in texts[split])}
        if args.tokenizer == "words":
            splits[split]["unknown"] = np.count_nonzero(tokens == 1)
        if split != "unsup":
            splits[split]["labels"] = [label for _, label, _ in reviews]
            splits[split]["positive"] = sum(splits[split]["labels"])
    splits["unsup"]["held_out_documents"] = tail
    prepare.write(args.out_dir, {
        "name": folder(args), "kind": "classify", "tokenizer": args.tokenizer, **entries,
        "classes": ["negative", "positive"], "lossless": args.tokenizer != "words", "partial": partial,
        "options": options, "source": identity(source),
        "split_rule": "test is the official one; val is a tenth of the official train, held out by movie; in unsup the "
                      "reviews of val's movies come last (held_out_documents)",
    }, splits)


if __name__ == "__main__":
    prepare.run_script(main)
