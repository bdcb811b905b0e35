"""
Tiny Shakespeare, character by character: 65 characters, the first 90 % for training, the rest for validation.

    python data/shakespeare_char/prepare.py                    # downloads 1 MB
    python data/shakespeare_char/prepare.py --source input.txt

writes data/shakespeare_char: train 1,003,854 and val 111,540 tokens, no test.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from core import prepare  # first: it handles a missing package

import numpy as np

from core.archive import check_size, decode_utf8, identity, single
from core.download import download

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394
DIGEST = "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main(argv):
    args = prepare.make_parser(__doc__, HERE, f"{SIZE:,} bytes").parse_args(argv)
    if prepare.finished(args, {}):
        return
    source = args.source or download(URL, HERE / "input.txt", SIZE, DIGEST)
    data = single(source, ("input.txt", "tinyshakespeare.txt"), SIZE)
    partial = check_size(source, len(data), SIZE, args.partial)
    text = decode_utf8(data, source.name)
    vocab = sorted(set(text))
    ids = {c: i for i, c in enumerate(vocab)}
    tokens = np.array([ids[c] for c in text])
    cut = int(len(text) * 0.9)
    meta = {
        "name": "shakespeare_char", "kind": "lm", "tokenizer": "chars", "vocab_size": len(vocab), "mark": None,
        "vocab": vocab, "lossless": True, "partial": partial, "options": {},
        "source": {**identity(source), "content_bytes": len(data)},
        "split_rule": "train is the first 90 % of the characters, val the rest",
    }
    prepare.write(args.out_dir, meta, {
        "train": {"tokens": tokens[:cut], "bytes": len(text[:cut].encode("utf-8"))},
        "val": {"tokens": tokens[cut:], "bytes": len(text[cut:].encode("utf-8"))},
    })


if __name__ == "__main__":
    prepare.run_script(main)
