"""
enwik8: the first 10^8 bytes of an English Wikipedia dump, a benchmark of byte-level language models.

    python data/enwik8/prepare.py                              # downloads 35 MB
    python data/enwik8/prepare.py --source enwik8.zip          # the zip, or enwik8 itself, plain or compressed
    python data/enwik8/prepare.py --chars                      # decoded characters, into data/enwik8_chars

writes data/enwik8: train 90,000,000, val 5,000,000, test 5,000,000 bytes, the split of the published figures.
A shorter file (--partial) is cut in the same proportions, and no figure on it compares with a published one.

--chars keeps the characters of the training bytes and has `<unk>` for all others. It cuts at the same places, moved to
the next whole character. Its losses are per character: the counts of bytes in meta.json turn them into bits per byte.
If `<unk>` replaces a character, meta.json says that the tokens are not lossless.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from core import prepare  # first: it handles a missing package

import numpy as np

from core.archive import check_size, decode_utf8, identity, next_character, single
from core.download import Progress, download
from core.tokenizer import UNKNOWN

URL = "http://mattmahoney.net/dc/enwik8.zip"
SIZE, DIGEST = 36_445_475, "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
BYTES = 100_000_000
STEP = 1 << 22  # bytes decoded at a time


def cuts(data, chars):
    """Where the splits of `data` (bytes) begin and end: 4 positions, at whole characters if `chars`."""
    at = [0, len(data) * 90 // 100, len(data) * 95 // 100, len(data)]
    if chars:
        for n in (1, 2):
            at[n] = next_character(data, at[n])
        # A file that was cut may end inside a character: its first bytes are left out.
        last = next_character(data, max(0, len(data) - 8))
        at[3] = last + len(data[last:].decode("utf-8", "ignore").encode())
    return at


def code_points(data, start, end, progress):
    """Yields the code points (uint32 arrays) of data[start:end], a few megabytes at a time."""
    while start < end:
        stop = min(next_character(data, start + STEP), end)
        yield np.frombuffer(decode_utf8(data[start:stop], "enwik8").encode("utf-32-le"), "<u4")
        progress.add(stop - start)
        start = stop


def characters(data, at):
    """(vocab, splits) of the decoded text: a list with `<unk>` first, then the characters of train, and its ids."""
    with Progress("counting characters", at[1]) as progress:
        seen = np.zeros(0x110000, bool)
        for points in code_points(data, 0, at[1], progress):
            seen[points] = True
    known = np.flatnonzero(seen)
    table = np.zeros(0x110000, np.uint32)
    table[known] = np.arange(1, len(known) + 1)
    table = table.astype(prepare.token_dtype(len(known) + 1))
    splits = {}
    with Progress("encoding characters", at[3]) as progress:
        for name, start, end in zip(("train", "val", "test"), at, at[1:]):
            parts = [table[points] for points in code_points(data, start, end, progress)]
            tokens = np.concatenate(parts) if parts else np.zeros(0, table.dtype)
            splits[name] = {"tokens": tokens, "bytes": end - start, "unknown": int(np.count_nonzero(tokens == 0))}
    return [UNKNOWN] + [chr(point) for point in known], splits


def parse(argv):
    parser = prepare.make_parser(__doc__, None, f"{BYTES:,} bytes")
    parser.add_argument("--chars", action="store_true", help="decoded characters, into data/enwik8_chars")
    args = parser.parse_args(argv)
    args.name = "enwik8_chars" if args.chars else "enwik8"
    args.out_dir = args.out_dir or HERE.parent / args.name
    return args


def main(argv):
    args = parse(argv)
    options = {"chars": args.chars}
    if prepare.finished(args, options):
        return
    source = args.source or download(URL, HERE / "enwik8.zip", SIZE, DIGEST)
    data = single(source, ("enwik8",), BYTES)
    partial = check_size(source, len(data), BYTES, args.partial)
    at = cuts(data, args.chars)
    meta = {"name": args.name, "kind": "lm", "tokenizer": "bytes", "vocab_size": 256, "mark": None, "lossless": True}
    if args.chars:
        vocab, splits = characters(data, at)
        lossless = not any(split["unknown"] for split in splits.values())
        meta.update(tokenizer="chars", vocab_size=len(vocab), vocab=vocab, lossless=lossless)
    else:
        tokens = np.frombuffer(data, np.uint8)
        splits = {n: {"tokens": tokens[a:b], "bytes": b - a} for n, a, b in zip(("train", "val", "test"), at, at[1:])}
    meta.update(
        partial=partial, options=options, source={**identity(source), "content_bytes": len(data)},
        split_rule="train is the first 90 % of the bytes, val the next 5 %, test the last 5 %"
                   + (", each cut moved to the next whole character" if args.chars else ""),
    )
    prepare.write(args.out_dir, meta, splits)
    if args.chars:
        print(f"  a character that train does not hold is {UNKNOWN}; a loss here is per character, not per byte")


if __name__ == "__main__":
    prepare.run_script(main)
