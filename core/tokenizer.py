"""
Text to token ids and back, for every folder that data/NAME/prepare.py writes.

A Tokenizer is built from the folder's meta.json alone, so a checkpoint that carries the meta can read prompts and print
text without the data. Five kinds:

    bytes   the UTF-8 bytes themselves, 256 ids
    chars   one id per character of a list, `<unk>` for all others if the list has it
    words   lower-cased words and punctuation marks, `<unk>` for all others; spaces and line ends are not kept
    bpe     byte pairs learnt from the data (data/imdb), encoded by tiktoken
    gpt2    GPT-2's byte pairs, encoded by tiktoken, which downloads them once

The document mark (`meta["mark"]`, or None) begins every stored document. No text encodes to it: a prompt is only text.
It decodes to a newline. Bytes and characters have NUL for it, so prepare.py replaces NUL in a text by a space.
"""

import base64
import re

from core.meta import UNKNOWN, check

LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|\S")  # with apostrophes inside (don't); or one other visible character
NO_SPACE_BEFORE = set(".,!?;:)]}%")


def html_line_breaks(text):
    """`text` with its HTML line breaks as newlines, as texts to classify are stored and read."""
    return LINE_BREAK.sub("\n", text)


def words(text):
    """The lower-cased words and punctuation marks of `text`, a list of str. White space is dropped."""
    return WORD.findall(text.lower())


def printable(data):
    """Bytes as one line of text for labels in pictures: a space as ␣, control characters and broken UTF-8 escaped."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(b) if 33 <= b < 127 else f"\\x{b:02x}" for b in data)
    return "".join("␣" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def bpe_encoding(pattern, ranks, mark):
    """The tiktoken Encoding of `ranks`, a list of base64 token bytes in order of id; `mark` is the id after them."""
    import tiktoken

    ranks = {base64.b64decode(token): i for i, token in enumerate(ranks)}
    return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": mark})


def gpt2_encoding():
    """tiktoken's gpt2. Raises ConnectionError if it is neither stored nor can be downloaded."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # the network, a proxy, a damaged cache: the remedies are the same
        raise ConnectionError(
            f"tiktoken could not load its gpt2 vocabulary ({type(error).__name__}): run once with a network, "
            "or point TIKTOKEN_CACHE_DIR to a folder that holds it, or choose another tokenizer"
        ) from error


class Tokenizer:
    """
    The tokenizer that a meta.json describes.

    meta: dict with `tokenizer` (one of KINDS), `vocab_size`, `mark`, and `vocab` (chars, words) or `pattern` and
    `ranks` (bpe). Public attributes: kind, vocab_size (int), mark (int or None): the token that begins each document,
    at which generated text ends.
    Raises ValueError for a meta that meta.py's `check` refuses, ConnectionError if gpt2 cannot be loaded.
    """

    def __init__(self, meta):
        check(meta)
        self.kind, self.vocab_size, self.mark = meta["tokenizer"], meta["vocab_size"], meta["mark"]
        self._vocab, self._encoding = meta.get("vocab"), None
        if self.kind == "bytes":
            self._bytes = [bytes([b]) for b in range(256)]
        elif self.kind == "chars":
            self._bytes = [("\ufffd" if c == UNKNOWN else c).encode() for c in self._vocab]
        elif self.kind == "words":
            # The space belongs to the word that follows it, so that decoding token by token equals decoding at once.
            self._bytes = [(w if w in NO_SPACE_BEFORE else " " + w).encode() for w in self._vocab]
        else:
            is_bpe = self.kind == "bpe"
            self._encoding = bpe_encoding(meta["pattern"], meta["ranks"], self.mark) if is_bpe else gpt2_encoding()
            self._bytes = [self._encoding.decode_single_token_bytes(i) for i in range(self._encoding.n_vocab)]
        if len(self._bytes) != self.vocab_size:  # of gpt2, whose vocabulary is not in the meta
            raise ValueError(f"the meta says {self.vocab_size} tokens and {self.kind} has {len(self._bytes)}: "
                             "prepare the data again")
        if self.mark is not None:
            self._bytes[self.mark] = b"\n"
        if self.kind in ("chars", "words"):
            self._ids = {entry: i for i, entry in enumerate(self._vocab) if i != self.mark}

    def encode(self, text):
        """
        The ids of `text` (str), a list of int, without the document mark.
        Raises ValueError for a character or word that the vocabulary lacks, unless it has `<unk>`.
        """
        if self.kind == "bytes":
            return list((text if self.mark is None else text.replace("\0", " ")).encode("utf-8", "replace"))
        if self._encoding is not None:
            return self._encoding.encode_ordinary(text)  # ordinary: "<|endoftext|>" in a text is thirteen characters
        pieces = words(text) if self.kind == "words" else text
        unknown = self._ids.get(UNKNOWN)
        ids = [self._ids.get(piece, unknown) for piece in pieces]
        if None in ids:
            raise ValueError(
                f"the {'word' if self.kind == 'words' else 'character'} {pieces[ids.index(None)]!r} is not in the "
                f"vocabulary of {self.vocab_size} {self.kind}: leave it out, or use data prepared with {UNKNOWN}"
            )
        return ids

    def encode_batch(self, texts):
        """`encode` of many texts, a list of lists; byte pairs on all cores."""
        if self._encoding is not None:
            return self._encoding.encode_ordinary_batch(texts)
        return [self.encode(text) for text in texts]

    def token_keys(self):
        """A key for each id, a list: the token's bytes, or "mark" or "unknown" (str). Tokens of two tokenizers are the
        same if their keys are equal.
        """
        keys = list(self._bytes)
        if self.kind in ("chars", "words") and UNKNOWN in self._ids:
            keys[self._ids[UNKNOWN]] = "unknown"
        if self.mark is not None:
            keys[self.mark] = "mark"
        return keys

    def encode_stream(self, texts, size=1 << 18):
        """Yield `encode` of each of `texts` (an iterable of str), in batches of about `size` characters."""
        batch, length = [], 0
        for text in texts:
            batch.append(text)
            length += len(text)
            if length >= size:
                yield from self.encode_batch(batch)
                batch, length = [], 0
        yield from self.encode_batch(batch)

    def checked(self, i):
        """An id as an int. Raises ValueError if it is outside the vocabulary."""
        if not 0 <= (i := int(i)) < self.vocab_size:
            raise ValueError(f"token {i} is outside the vocabulary of {self.vocab_size} ({self.kind})")
        return i

    def decode_bytes(self, ids):
        """
        The bytes of `ids` (ints). Those of a sequence are those of its parts joined, so a stream may be printed token
        by token; a token may be part of a character. Raises ValueError for an id outside the vocabulary.
        """
        return b"".join([self._bytes[self.checked(i)] for i in ids])

    def decode(self, ids):
        """The text of `ids` (ints), a str; broken UTF-8 becomes U+FFFD. Raises ValueError like `decode_bytes`."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        if self.kind == "words":  # no space at a line's start or after an opening bracket
            text = re.sub(r"(^|[\n(\[{]) ", r"\1", text)
        return text

    def token(self, i):
        """One token in printable form (str), for labels in pictures. Raises ValueError like `decode_bytes`."""
        if (i := self.checked(i)) == self.mark:
            return "<|endoftext|>" if self._encoding is not None else "<s>"
        if self.kind == "words" or self.kind == "chars" and self._vocab[i] == UNKNOWN:
            return self._vocab[i]
        return printable(self._bytes[i])
