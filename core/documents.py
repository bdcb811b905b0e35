"""The documents of a source of text: files of UTF-8, and the lines of files of JSONL.

Their text goes to one file on the disk, so that a source may be larger than the memory.
"""

import codecs
import hashlib
import io
import json
import sys
from array import array

from core.archive import check_limit, streams
from core.config import UserError, short_repr
from core.download import Progress
from core.tokenizer import html_line_breaks

JSONL = (".jsonl", ".ndjson")  # suffixes of files with a document on each line
LINE = 1 << 26  # the most bytes of a line
NAMED = 10  # skipped files whose names are printed
EXAMPLE = '{"text": "...", "label": "..."}'


class Documents:
    """The documents of a source: their text in one file on the disk, a few bytes of each in memory.

    ends: document n is bytes ends[n] to ends[n + 1] of the file; digests: 16 bytes of each; labels: the number of each
    in `classes`, names in the order in which they came; empty without labels. blank: the number of documents of white
    space alone; skipped: names of files that are not UTF-8 text.
    """

    def __init__(self, path):
        self.file, self.ends, self.digests = open(path, "w+b"), array("q", [0]), bytearray()
        self.labels, self.classes, self.skipped, self.blank = bytearray(), [], [], 0

    def __len__(self):
        return len(self.ends) - 1

    def add(self, pieces, where, label=None):
        """Append a document, an iterable of str; one of white space alone is counted only. where: its file and line.

        Raises UserError for a label that does not fit the others. A ValueError of `pieces` leaves nothing appended.
        """
        digest, end, blank = hashlib.blake2b(digest_size=16), self.ends[-1], True
        try:
            for text in pieces:
                data = text.encode("utf-8", "replace")
                self.file.write(data)
                digest.update(data)
                end, blank = end + len(data), blank and not text.strip()
        except ValueError:
            self.rewind()
            raise
        if blank:
            self.rewind()
            self.blank += 1
            return
        self.add_label(label, where)
        self.ends.append(end)
        self.digests += digest.digest()

    def rewind(self):
        """Remove what was written of the document that is not appended."""
        self.file.seek(self.ends[-1])
        self.file.truncate()

    def add_label(self, label, where):
        """Append the label (str) of the next document; None: it has none."""
        if len(self) and (label is None) != (not self.classes):
            has = "a label, those before it have none" if label is not None else "no label, those before it have one"
            raise UserError(f"{where} has {has}: give every document a label, or none")
        if label is None:
            return
        if label not in self.classes:
            self.classes.append(label)
        if len(self.classes) > 2:
            raise UserError(f"{where} has a third label: expected two classes, found {short_repr(self.classes)[1:-1]}")
        self.labels.append(self.classes.index(label))


def decoded(pieces):
    """Yield the text of `pieces` (bytes) without a byte order mark, line ends as newlines. Raises ValueError for a file
    that is not UTF-8 or holds NUL, which text does not."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    for data in pieces:
        if b"\0" in data:
            raise ValueError("binary data")
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def lines(pieces, name):
    """Yield (number from 1, bytes) of each line of `pieces` that is not blank."""
    number, rest = 1, b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for number, line in enumerate(whole, number):
            if line.strip():
                yield number, line
        number += bool(whole)
        check_limit(len(rest), f"{name}, line {number}", LINE, "holds at least")
    if rest.strip():
        yield number, rest


def parse_line(line, where):
    """(text, label or None) of a line of JSONL. Raises UserError for one that is not as expected."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    text, label = (row.get("text"), row.get("label")) if type(row) is dict else (None, None)
    if type(text) is not str:
        shown = short_repr(line.decode("utf-8", "replace").strip())
        raise UserError(f"{where}: expected an object with a text, like {EXAMPLE}, got {shown}")
    if label is not None and type(label) not in (str, int) or label == "":
        raise UserError(f"{where}: expected a text or a whole number as label, got {short_repr(label)}")
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", " ")
    return (text, None) if label is None else (html_line_breaks(text), str(label).encode("utf-8", "replace").decode())


def read(source, wanted, path):
    """The Documents of a source, their text in the file `path`. Raises UserError if there are none."""
    documents, files = Documents(path), 0
    with Progress(f"reading {source.name}") as progress:
        def counted(pieces):
            for piece in pieces:
                progress.add(len(piece))
                yield piece

        for files, (name, pieces) in enumerate(streams(source, wanted), 1):
            if name.lower().endswith(JSONL):
                for number, line in lines(counted(pieces), name):
                    where = f"{name}, line {number}"
                    text, label = parse_line(line, where)
                    documents.add([text], where, label)
                continue
            try:
                documents.add(decoded(counted(pieces)), name)
            except ValueError:
                documents.skipped.append(name)
    for name in documents.skipped[:NAMED]:
        print(f"skipped, not UTF-8 text: {short_repr(name)}", file=sys.stderr)
    if len(documents.skipped) > NAMED:
        print(f"... and {len(documents.skipped) - NAMED:,} other files", file=sys.stderr)
    if not len(documents):
        raise UserError(f"{source.name}: expected UTF-8 text, found none ({files:,} files, "
                        f"{len(documents.skipped):,} of them not UTF-8 text, {documents.blank:,} blank documents): "
                        "check --source")
    if len(documents.classes) == 1:
        raise UserError(f"{source.name}: expected labels of two classes, found {short_repr(documents.classes[0])} "
                        "alone; leave the labels out for a language model")
    documents.file.flush()
    return documents
