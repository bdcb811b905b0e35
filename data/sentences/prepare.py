"""
Short opinions of films, made from lists of words: the smallest thing that a classifier learns. No network, a second.

    python data/sentences/prepare.py

writes data/sentences: 6,000 sentences like "the music was not bad, but i hated the ending.", half of them negative.
"not" inverts a word's meaning, and the clause after "but" decides. One title in five is a word outside the vocabulary,
so that a model sees unknown words and learns to ignore them. A model of this data knows these words and no others.
"""

import hashlib
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from core import prepare
from core.config import UserError
from core.tokenizer import UNKNOWN, Tokenizer, words

COUNT = 6000
NEGATIVE, POSITIVE = 0, 1
ADJECTIVES = (
    "bad terrible awful boring trash dull weak poor horrible stupid ugly lazy slow silly empty cheap flat tedious "
    "disappointing dreadful pointless clumsy annoying worthless shallow",
    "good great amazing wonderful brilliant excellent fine lovely funny moving superb clever charming perfect "
    "beautiful gripping fresh warm exciting fantastic delightful touching strong smart enjoyable",
)
VERBS = "hated disliked regretted despised", "loved liked enjoyed adored"
BARE = "hate dislike regret despise", "love like enjoy adore"  # after "did not"
NOUNS = {
    "was": "film movie story plot ending music script cast acting direction humour camera dialogue pace beginning "
           "picture idea",
    "were": "actors effects jokes songs characters scenes costumes pictures twists",
}
MUCH = "very really so quite simply just truly"
ASIDES = "honestly frankly overall sadly however for_me to_be_fair in_the_end this_time"
OUTSIDE = "zorro vertigo alien casablanca psycho gravity solaris stalker metropolis rashomon"  # stored as <unk>


def sentences():
    """[(text, label), ...], each text once, in an order that never changes."""
    chance = random.Random(1).random  # the one method whose numbers no Python version may change

    def pick(names):
        names = names.split()
        return names[int(chance() * len(names))].replace("_", " ")

    def clause(label):
        was = "was" if chance() < 0.7 else "were"
        title = chance() < 0.2
        noun = pick(OUTSIDE) if title else f"{'this' if was == 'was' and chance() < 0.2 else 'the'} {pick(NOUNS[was])}"
        was, kind = "was" if title else was, chance()
        if kind < 0.5:
            return f"{noun} {was} {pick(MUCH) + ' ' if chance() < 0.4 else ''}{pick(ADJECTIVES[label])}"
        if kind < 0.7:
            return f"{noun} {was} {'not' if chance() < 0.8 else 'never'} {pick(ADJECTIVES[1 - label])}"
        if kind < 0.85:
            return f"i {pick(VERBS[label])} {noun}"
        if kind < 0.95:
            return f"i did not {pick(BARE[1 - label])} {noun}"
        return f"what {'an' if (word := pick(ADJECTIVES[label]))[0] in 'aeiou' else 'a'} {word} {pick(NOUNS['was'])}"

    labels = {}  # of the texts
    while len(labels) < COUNT:
        label, kind = len(labels) % 2, chance()
        text = clause(label)
        if kind < 0.15:
            text += f" and {clause(label)}"
        elif kind < 0.5:
            text = f"{clause(1 - label)}{',' * (chance() < 0.5)} but {text}"
        if chance() < 0.2:
            text = f"{pick(ASIDES)}, {text}" if chance() < 0.5 else f"{text} {pick(ASIDES)}"
        labels.setdefault(text + pick(". . . !"), label)
    return list(labels.items())


def main(argv):
    args = prepare.make_parser(__doc__, HERE).parse_args(argv)
    if args.source is not None:
        raise UserError("data/sentences is made of this script's own words and takes no --source; for your own reviews "
                        "see data/imdb")
    rows = sentences()
    digest = hashlib.sha256("\n".join(f"{label} {text}" for text, label in rows).encode()).hexdigest()
    source = {"file": "prepare.py", "sha256": digest}
    if prepare.finished(args, {}, source):
        return
    known = dict.fromkeys(word for text, _ in rows for word in words(text))
    vocab = ["<s>", UNKNOWN, *(word for word in known if word not in OUTSIDE.split())]
    meta = {"name": "sentences", "kind": "classify", "tokenizer": "words", "vocab_size": len(vocab), "mark": 0,
            "vocab": vocab, "classes": ["negative", "positive"], "lossless": False, "partial": False, "options": {},
            "source": source,
            "split_rule": "the first 80 % in the order in which they were made, the next 10 %, the last 10 %"}
    tokenizer, splits = Tokenizer(meta), {}
    for name, first, last in (("train", 0, 0.8), ("val", 0.8, 0.9), ("test", 0.9, 1)):
        part = rows[round(first * COUNT) : round(last * COUNT)]
        offsets, tokens, labels = [0], [], [label for _, label in part]
        for text, _ in part:
            tokens += [0, *tokenizer.encode(text)]
            offsets.append(len(tokens))
        size = sum(len(text.encode()) + 1 for text, _ in part)
        splits[name] = {"tokens": tokens, "offsets": offsets, "labels": labels, "documents": len(part),
                        "positive": sum(labels), "bytes": size, "unknown": tokens.count(1)}
    prepare.write(args.out_dir, meta, splits)


if __name__ == "__main__":
    prepare.run_script(main)
