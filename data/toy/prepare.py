"""
Six sentences, word by word: the smallest thing that trains. No network, no time.

    python data/toy/prepare.py

writes data/toy: 13 tokens of vocabulary, 28 tokens of text, the same for train, val and test (so a score on it
says whether a model can memorise, nothing more). --source takes a text of your own, one sentence a line.
"""

import hashlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from core import prepare
from core.archive import decode_utf8, identity, single
from core.config import UserError
from core.tokenizer import Tokenizer, words

TEXT = """\
i love deep learning
i love artificial intelligence
deep learning is fun
artificial intelligence is cool
i love models
models learn patterns
"""


def main(argv):
    args = prepare.make_parser(__doc__, HERE).parse_args(argv)
    built_in = {"file": "prepare.py", "bytes": len(TEXT), "sha256": hashlib.sha256(TEXT.encode()).hexdigest()}
    if prepare.finished(args, {}, built_in if args.source is None else None):
        return
    text, source = TEXT, built_in
    if args.source is not None:
        text = decode_utf8(single(args.source, ("toy.txt",), 1 << 20), args.source.name)
        source = identity(args.source)
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise UserError(f"{args.source.name}: expected a sentence on each line, found none")
    vocab = list(dict.fromkeys(["<s>"] + [word for sentence in sentences for word in words(sentence)]))
    meta = {"name": "toy", "kind": "lm", "tokenizer": "words", "vocab_size": len(vocab), "mark": 0, "vocab": vocab}
    tokenizer = Tokenizer(meta)
    meta["lossless"] = all(tokenizer.decode(tokenizer.encode(sentence)) == sentence for sentence in sentences)
    meta.update(partial=False, options={}, source=source, split_rule="train, val and test are the same sentences")
    tokens = [token for sentence in sentences for token in [0] + tokenizer.encode(sentence)]
    size = sum(len(sentence.encode("utf-8")) + 1 for sentence in sentences)
    split = {"tokens": tokens, "bytes": size, "documents": len(sentences)}
    prepare.write(args.out_dir, meta, {name: split for name in ("train", "val", "test")})


if __name__ == "__main__":
    prepare.run_script(main)
