"""Vocabularies that a prepare.py learns from its texts."""

import base64
import sys
from collections import Counter
from itertools import chain

from core.tokenizer import UNKNOWN, gpt2_encoding, words

# What a byte pair may not cross: a word with its space and apostrophes, up to three digits, marks, line ends.
PATTERN = r" ?\p{L}+(?:['’]\p{L}+)*| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+|\s"


def vocabulary(kind, size, texts, further=()):
    """The entries of meta.json for a tokenizer, a dict. size: for words and bpe.

    texts: an iterable of str, read once; further: more of them, for bpe alone. Every vocabulary has a document mark,
    which no text holds: bytes and characters use NUL.
    """
    if kind == "words":
        counts = Counter(word for text in texts for word in words(text))
        vocab = ["<s>", UNKNOWN, *sorted(counts, key=lambda word: (-counts[word], word))[:size]]
        return {"vocab_size": len(vocab), "mark": 0, "vocab": vocab}
    if kind == "chars":
        seen = set(chain.from_iterable(map(set, texts)))
        vocab = ["\0", UNKNOWN, *sorted(seen - {"\0"})]
        return {"vocab_size": len(vocab), "mark": 0, "vocab": vocab}
    if kind == "bpe":
        return learn_bpe(chain(texts, further), size)
    return {"vocab_size": 256, "mark": 0} if kind == "bytes" else \
        {"vocab_size": gpt2_encoding().n_vocab, "mark": gpt2_encoding().eot_token}


def learn_bpe(texts, size):
    """`vocabulary` of byte pairs: `size` tokens, bytes and mark included."""
    import rustbpe

    learner = rustbpe.Tokenizer()
    print("learning byte pairs ...", file=sys.stderr, flush=True)
    learner.train_from_iterator(iter(texts), vocab_size=size - 1, pattern=PATTERN)
    ordered = sorted(learner.get_mergeable_ranks(), key=lambda pair: pair[1])
    ranks = [base64.b64encode(token).decode("ascii") for token, _ in ordered]
    if len(ranks) + 1 < size:
        print(f"the text has byte pairs for {len(ranks) + 1:,} tokens only", file=sys.stderr)
    return {"vocab_size": len(ranks) + 1, "mark": len(ranks), "pattern": PATTERN, "ranks": ranks}
