"""
Text to token ids and back, for every folder that data/NAME/prepare.py writes.

A Tokenizer is built from the folder's meta.json and nothing else, so a checkpoint that carries the
meta can read prompts and print text without the data. Five kinds:

    bytes   the UTF-8 bytes themselves, 256 ids
    chars   one id per character of a list, `<unk>` for the rest if the list has it
    words   lower-cased words and punctuation marks, `<unk>` for the rest; spaces and lines are not kept
    bpe     byte pairs learnt from the data (data/imdb), run by tiktoken
    gpt2    GPT-2's byte pairs, run by tiktoken, which downloads them once

The document mark (`meta["mark"]`, or None) begins every stored document. No text encodes to it,
whatever the text says: a prompt is only text. It decodes to a newline.
"""

import base64
import re

from core.meta import UNKNOWN, check

# A word may hold apostrophes inside (don't); any other visible character stands alone.
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|\S")
_CLOSING = set(".,!?;:)]}%")


def words(text):
    """The lower-cased words and punctuation marks of `text`, as a list of str. White space is dropped."""
    return _WORD.findall(text.lower())


def printable(data):
    """Bytes in a form that fits on one line of a picture: a space as ␣, control and broken bytes escaped."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(b) if 33 <= b < 127 else f"\\x{b:02x}" for b in data)
    return "".join(
        "␣" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def bpe_encoding(pattern, ranks, mark):
    """The tiktoken Encoding of `ranks`, a list of base64 token bytes in order of id, `mark` the id after them."""
    import tiktoken

    return tiktoken.Encoding(
        name="own",
        pat_str=pattern,
        mergeable_ranks={base64.b64decode(token): i for i, token in enumerate(ranks)},
        special_tokens={"<|endoftext|>": mark},
    )


def gpt2_encoding():
    """tiktoken's gpt2. ConnectionError, with what to do, if it is neither stored nor to be had from the network."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # the network, a proxy, a spoilt cache: the way out is the same
        raise ConnectionError(
            f"tiktoken could not load its gpt2 vocabulary ({type(error).__name__}): run once with a network, "
            "or point TIKTOKEN_CACHE_DIR to a folder that holds it, or choose another tokenizer"
        ) from error


class Tokenizer:
    """
    The tokenizer that a meta.json describes.

    meta: dict with `tokenizer` (one of KINDS), `vocab_size`, `mark`, and `vocab` (chars, words) or
    `pattern` and `ranks` (bpe).
    Public attributes: kind, vocab_size (int), mark (int or None).
    Raises ValueError for a meta that is not as meta.py's `check` expects, ConnectionError where gpt2 cannot be loaded.
    """

    def __init__(self, meta):
        check(meta)
        self.kind = meta["tokenizer"]
        self.mark = meta["mark"]
        self._encoding = None
        if self.kind == "bytes":
            self._bytes = [bytes([b]) for b in range(256)]
        elif self.kind == "chars":
            self._bytes = [("\ufffd" if c == UNKNOWN else c).encode("utf-8") for c in meta["vocab"]]
        elif self.kind == "words":
            # A word brings its own space, so that what is decoded token by token is what is decoded at once.
            self._bytes = [(w if w in _CLOSING else " " + w).encode("utf-8") for w in meta["vocab"]]
        else:
            own = self.kind == "bpe"
            self._encoding = bpe_encoding(meta["pattern"], meta["ranks"], self.mark) if own else gpt2_encoding()
            self._bytes = [self._encoding.decode_single_token_bytes(i) for i in range(self._encoding.n_vocab)]
        self.vocab_size = len(self._bytes)
        if self.vocab_size != meta["vocab_size"]:  # of gpt2, whose vocabulary is not in the meta
            raise ValueError(f"the meta says {meta['vocab_size']} tokens and {self.kind} has {self.vocab_size}: prepare the data "
                             "again")
        if self.mark is not None:
            self._bytes[self.mark] = b"\n"
        self._vocab = meta["vocab"] if self.kind in ("chars", "words") else None
        if self._vocab is not None:
            self._ids = {entry: i for i, entry in enumerate(self._vocab)}
            self._unknown = self._ids.get(UNKNOWN)

    def encode(self, text):
        """
        The ids of `text` (str), as a list of int, without the document mark.
        Raises ValueError for a character or word that the vocabulary lacks, unless it has `<unk>`.
        """
        if self.kind == "bytes":
            # Byte 0, where it is the mark, must stay the mark's own: prepare.py stores NUL as a space, too.
            return list((text if self.mark is None else text.replace("\0", " ")).encode("utf-8", "replace"))
        if self._encoding is not None:
            return self._encoding.encode_ordinary(text)  # ordinary: "<|endoftext|>" in a text is thirteen characters
        pieces = words(text) if self.kind == "words" else text
        ids = [self._ids.get(piece, self._unknown) for piece in pieces]
        if None in ids:
            kind = "word" if self.kind == "words" else "character"
            raise ValueError(
                f"the {kind} {pieces[ids.index(None)]!r} is not in the vocabulary of {self.vocab_size} {self.kind}: "
                f"leave it out, or use data prepared with {UNKNOWN}"
            )
        return ids

    def encode_batch(self, texts):
        """`encode` of many texts, as a list of lists; byte pairs on all cores."""
        if self._encoding is not None:
            return self._encoding.encode_ordinary_batch(texts)
        return [self.encode(text) for text in texts]

    def _check(self, i):
        i = int(i)
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"token {i} is outside the vocabulary of {self.vocab_size} ({self.kind})")
        return i

    def decode_bytes(self, ids):
        """
        The bytes that `ids` (ints) stand for. Those of a sequence are those of its parts joined, so a stream
        may be printed token by token; a token may be part of a character. Raises ValueError for an unknown id.
        """
        return b"".join([self._bytes[self._check(i)] for i in ids])

    def decode(self, ids):
        """The text that `ids` (ints) stand for, as str; broken UTF-8 becomes U+FFFD. ValueError for an unknown id."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        if self.kind == "words":  # no space begins a line or follows an opening bracket
            text = re.sub(r"(^|[\n(\[{]) ", r"\1", text)
        return text

    def token(self, i):
        """One token in printable form (str), for labels in pictures. Raises ValueError for an unknown id."""
        i = self._check(i)
        if i == self.mark:
            return "<|endoftext|>" if self._encoding is not None else "<s>"
        if self._vocab is not None and (self.kind == "words" or self._vocab[i] == UNKNOWN):
            return self._vocab[i]
        return printable(self._bytes[i])
