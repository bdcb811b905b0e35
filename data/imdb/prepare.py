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

import hashlib
import re
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from core import prepare  # first: it handles a missing package

import numpy as np

from core.archive import check_size, decode_utf8, identity, members
from core.config import UserError
from core.download import Progress, download
from core.tokenizer import Tokenizer, gpt2_encoding, html_line_breaks
from core.vocabulary import vocabulary

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
DIGEST = "md5:7c2ac02c03563afcf9b574c7e56c153a"
OFFICIAL = {"train/pos": 12_500, "train/neg": 12_500, "train/unsup": 50_000, "test/pos": 12_500, "test/neg": 12_500}
SEED = "1"  # of every shuffle below
REVIEW = re.compile(r"(?:^|/)((?:train|test)/(?:pos|neg|unsup))/(\d+)_\d+\.txt$")
MOVIES = re.compile(r"(?:^|/)(train|test)/urls_(pos|neg|unsup)\.txt$")
MOVIE = re.compile(r"tt\d+")
LABELS = {"neg": 0, "pos": 1}


def shuffled(keys):
    """`keys` (str) in an order that looks random, and that depends neither on Python's version nor on other keys."""
    return sorted(keys, key=lambda key: hashlib.sha256(f"{SEED} {key}".encode()).digest())


def read(source, partial):
    """
    All reviews of `source`: {"train/pos": {n: (text, movie)}, ...}, and whether they are fewer than the official ones.
    Raises UserError unless every folder is there, numbered from 0, with as many lines in its urls file.
    """
    texts, movies = {group: {} for group in OFFICIAL}, dict.fromkeys(OFFICIAL, [])
    with Progress(f"reading {source.name}", sum(OFFICIAL.values()), "reviews") as progress:
        for name, data in members(source, lambda name: REVIEW.search(name) or MOVIES.search(name), 1 << 24):
            if match := MOVIES.search(name):
                # A movie is its number; a line without one still tells its movie from others.
                lines = decode_utf8(data, name).removesuffix("\n").split("\n") if data else []
                movies["/".join(match.groups())] = [(MOVIE.search(line) or [line.strip()])[0] for line in lines]
                continue
            group, number = REVIEW.search(name).groups()
            if group in texts:
                if int(number) in texts[group]:
                    raise UserError(f"{source.name}: {group} holds review {number} twice: give one copy only")
                # NUL is the mark of the bytes. It is replaced for every tokenizer, so that all have the same text.
                texts[group][int(number)] = html_line_breaks(decode_utf8(data, name).replace("\0", " "))
                progress.add(1)
    smaller = False
    for group, official in OFFICIAL.items():
        count, lines, urls = len(texts[group]), len(movies[group]), group.replace("/", "/urls_") + ".txt"
        smaller |= check_size(source, count, official, partial, f"reviews in {group}")
        if lines != count:
            raise UserError(f"{source.name}: expected {count:,} lines in {urls}, one for each review in {group}, "
                            f"found {lines:,}: it is not complete; copy or download it again")
        if missing := set(range(lines)) - set(texts[group]):
            raise UserError(f"{source.name}: expected {group} numbered from 0 to {lines - 1:,} like the lines of "
                            f"{urls}, found no review {min(missing):,}: copy or download it again")
    return {group: {n: (text, movies[group][n]) for n, text in texts[group].items()} for group in OFFICIAL}, smaller


def held_out_movies(groups):
    """The movies (set of str) of validation: in a fixed random order, until they have a tenth of the train reviews."""
    counts = Counter(movie for label in ("pos", "neg") for _, movie in groups[f"train/{label}"].values())
    movies, reviews = set(), 0
    for movie in shuffled(counts):
        if reviews * 10 >= counts.total():
            break
        movies.add(movie)
        reviews += counts[movie]
    if len(movies) == len(counts):
        raise UserError(f"expected reviews of two movies or more in train, found {len(counts)}: check --source")
    return movies


def arrange(groups, movies):
    """
    The splits in their final order: {name: [(text, label or None, movie), ...]}, labels mixed, 1 is positive. `movies`
    go to val, and to the end of unsup.
    """
    def rows(*names):
        keys = shuffled(f"{group}/{n}" for group in names for n in groups[group])
        for group, n in (key.rsplit("/", 1) for key in keys):
            text, movie = groups[group][int(n)]
            yield text, LABELS.get(group.split("/")[1]), movie

    splits = {"train": [], "val": [], "test": list(rows("test/neg", "test/pos"))}
    for row in rows("train/neg", "train/pos"):
        splits["val" if row[2] in movies else "train"].append(row)
    splits["unsup"] = sorted(rows("train/unsup"), key=lambda row: row[2] in movies)  # stable: each part stays shuffled
    return splits


def encode(tokenizer, texts):
    """{split: list of str} as {split: (tokens (tokens,), offsets (documents + 1,))}, each text after the mark."""
    encoded, dtype = {}, prepare.token_dtype(tokenizer.vocab_size)
    with Progress("encoding", sum(map(len, texts.values())), "reviews") as progress:
        for split, reviews in texts.items():
            parts = []
            for ids in tokenizer.encode_stream(reviews):
                parts.append(np.array([tokenizer.mark, *ids], dtype))
                progress.add(1)
            encoded[split] = np.concatenate(parts), np.cumsum([0, *map(len, parts)])
    return encoded


def parse(argv):
    parser = prepare.make_parser(__doc__, None, "12,500 (unsup: 50,000) reviews a folder")
    prepare.add_tokenizer(parser, ("words", "bytes", "bpe", "gpt2"))
    args = parser.parse_args(argv)
    args.name = "imdb" if args.tokenizer == "words" else f"imdb_{args.tokenizer}"
    args.out_dir = args.out_dir or HERE.parent / args.name
    return args


def main(argv):
    args = parse(argv)
    options = prepare.tokenizer_options(args)
    if prepare.finished(args, options):
        return
    if args.tokenizer == "gpt2":
        gpt2_encoding()  # it may fail, so before the long work
    source = args.source or download(URL, HERE / "aclImdb_v1.tar.gz", None, DIGEST)
    groups, partial = read(source, args.partial)
    movies = held_out_movies(groups)
    rows = arrange(groups, movies)
    texts = {split: [text for text, _, _ in reviews] for split, reviews in rows.items()}
    held_out = sum(movie in movies for _, _, movie in rows["unsup"])
    unsup = texts["unsup"][: len(texts["unsup"]) - held_out]
    entries = vocabulary(args.tokenizer, options.get("vocab_size"), texts["train"], unsup)
    splits = {}
    for split, (tokens, offsets) in encode(Tokenizer({"tokenizer": args.tokenizer, **entries}), texts).items():
        splits[split] = {"tokens": tokens, "offsets": offsets, "documents": len(rows[split]),
                         "movies": len({movie for _, _, movie in rows[split]}),
                         "bytes": sum(len(text.encode("utf-8")) + 1 for text in texts[split])}
        if args.tokenizer == "words":
            splits[split]["unknown"] = np.count_nonzero(tokens == 1)
        if split != "unsup":
            splits[split]["labels"] = [label for _, label, _ in rows[split]]
            splits[split]["positive"] = sum(splits[split]["labels"])
    splits["unsup"]["held_out_documents"] = held_out
    prepare.write(args.out_dir, {
        "name": args.name, "kind": "classify", "tokenizer": args.tokenizer, **entries,
        "classes": ["negative", "positive"], "lossless": args.tokenizer != "words", "partial": partial,
        "options": options, "source": identity(source),
        "split_rule": "test is the official one; val is a tenth of the official train, held out by movie; in unsup the "
                      "reviews of val's movies come last (held_out_documents)",
    }, splits)


if __name__ == "__main__":
    prepare.run_script(main)
