"""What a meta.json holds, and the one check of it: of a prepared folder's, and of the copy inside a checkpoint.

Everything that reads one relies on this check, so that a damaged or forged file ends in one line.
"""

import base64
import binascii
import hashlib
import json
import re

from core.config import UserError, short_repr
from core.readers import expect

FORMAT = 1
KINDS = ("bytes", "chars", "words", "bpe", "gpt2")  # of tokenizers
UNKNOWN = "<unk>"
DTYPES = ("uint8", "uint16", "uint32")  # of tokens
NEEDED = ("kind", "lossless", "source", "dtype", "splits")  # by a folder; a checkpoint may lack them
# Of each part of a split: the suffix of its file's name, and the key of its digest.
PARTS = {"tokens": ("", "sha256"), "offsets": (".offsets", "offsets_sha256"), "labels": (".labels", "labels_sha256"),
         "distances": (".distances", "distances_sha256")}

SPLIT_NAME = re.compile(r"\w[\w-]{0,39}", re.ASCII)  # part of a file's name: no dot, no slash
DIGEST = re.compile(r"[0-9a-f]{64}")


def is_count(value, limit=2**63):
    return type(value) is int and 0 <= value < limit  # True is no count


def check_meta(meta, source):
    """Raise UserError unless `meta` is as `check` expects. source: text that names the file in the message."""
    try:
        check(meta)
    except ValueError as error:
        raise UserError(f"{source} is damaged ({error})") from error


def read_meta(folder):
    """The checked meta.json of a prepared folder, a dict.

    Raises FileNotFoundError if there is none, UserError if it is damaged or lacks what a folder needs.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
        check(meta, NEEDED)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); run its prepare.py again") from error
    return meta


def check(meta, further=()):
    """Raise ValueError unless `meta` has the keys that a Tokenizer needs and the further ones, and every entry has the
    right type, range and size."""
    expect(type(meta) is dict, "an object with named entries", meta)
    if missing := [key for key in ("tokenizer", "vocab_size", "mark", *further) if key not in meta]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    expect(meta.get("format", FORMAT) == FORMAT, f"the format {FORMAT}", meta.get("format"))
    check_tokenizer(meta)
    kind, classes = meta.get("kind"), meta.get("classes", [])
    expect(kind in ("lm", "classify") or "kind" not in meta, "'lm' or 'classify' as kind", kind)
    names = type(classes) is list and all(type(name) is str for name in classes) and len(set(classes)) == len(classes)
    expect(names, "different texts as classes", classes)
    counts = {"classify": (2,), "lm": (0,)}.get(kind, (0, 2))
    expect(len(classes) in counts, "two classes for kind 'classify', none for 'lm'", classes)
    for key, type_ in (("lossless", bool), ("partial", bool), ("whole_documents", bool), ("source", dict),
                       ("options", dict), ("name", str)):
        expect(type(meta.get(key, type_())) is type_, f"{type_.__name__} as {key}", meta.get(key))
    expect(meta.get("dtype", DTYPES[0]) in DTYPES, f"{', '.join(DTYPES)} as dtype", meta.get("dtype"))
    whole = meta.get("whole_documents", False)
    expect(not whole or kind == "lm", "whole_documents for kind 'lm' alone", kind)
    check_splits(meta.get("splits", {}), kind, whole)


def check_tokenizer(meta):
    """Raise ValueError unless the vocabulary's size, its entries and the mark fit each other."""
    kind, size, mark = meta["tokenizer"], meta["vocab_size"], meta["mark"]
    if kind not in KINDS:
        raise ValueError(f"there is no tokenizer {short_repr(kind)}: choose one of {', '.join(KINDS)}")
    expect(is_count(size, 2**32 + 1) and size, "a vocab_size from 1 to 2**32", size)
    expect(mark is None or is_count(mark, size), f"a mark below {size:,}, or null", mark)
    key = {"chars": "vocab", "words": "vocab", "bpe": "ranks"}.get(kind)
    entries = meta.get(key, []) if key else []
    texts = type(entries) is list and all(type(entry) is str and entry for entry in entries)
    expect(texts, f"a list of texts as {key}", entries)
    # The vocabulary of gpt2 is not in the meta: the Tokenizer compares its size.
    entry_count = {"bytes": 256, "bpe": len(entries) + 1, "gpt2": size}.get(kind, len(entries))
    if size != entry_count:
        raise ValueError(f"the meta says {size} tokens and its {kind} vocabulary has {entry_count}: "
                         "prepare the data again")
    expect(len(set(entries)) == len(entries), f"every entry of {key} once", entries)
    if kind == "chars":
        expect(all(len(entry) == 1 or entry == UNKNOWN for entry in entries), "single characters as vocab", entries)
    if kind in ("chars", "words"):
        "".join(entries).encode("utf-8")  # ValueError for a lone surrogate
    if kind == "bpe":
        check_byte_pairs(meta.get("pattern"), entries, mark)


def check_byte_pairs(pattern, ranks, mark):
    """Raise ValueError for byte pairs that would make tiktoken abort the process or never return."""
    expect(type(pattern) is str and pattern, "a text as pattern", pattern)
    expect(mark == len(ranks), f"the mark {len(ranks)}, after all ranks", mark)
    try:
        tokens = {base64.b64decode(rank, validate=True) for rank in ranks}
    except binascii.Error as error:
        raise ValueError(f"expected base64 as ranks, got other text ({error})") from error
    complete = len(tokens) == len(ranks) and tokens.issuperset(bytes([b]) for b in range(256))
    expect(complete, "all 256 bytes among ranks, and each entry once", ranks)


def check_splits(splits, kind, whole=False):
    """Raise ValueError unless the splits have safe names, possible counts, and digests. whole: of whole documents."""
    objects = type(splits) is dict and all(type(split) is dict for split in splits.values())
    expect(objects, "named objects as splits", splits)
    digests = {key for _, key in PARTS.values()}
    for name, split in splits.items():
        expect(SPLIT_NAME.fullmatch(name), "letters and digits as the name of a split", name)
        counts = ["tokens", "bytes"] + ["documents"] * (whole or kind == "classify")
        counts += ["held_out_documents"] * (name == "unsup")
        expect(not whole or "offsets_sha256" in split, f"offsets_sha256 of {name}, whose documents are whole", split)
        for key, value in ({key: None for key in counts} | split).items():
            if key in digests:
                is_digest = type(value) is str and DIGEST.fullmatch(value)
                expect(is_digest, f"64 hexadecimal digits as {key} of {name}", value)
            else:
                expect(is_count(value), f"a number as {key} of {name}", value)
        held_out = split.get("held_out_documents", 0)
        expect(held_out <= split.get("documents", 2**63), f"at most all documents of {name} held out", held_out)


IDENTITY = ("source", "kind", "whole_documents", "tokenizer", "vocab_size", "mark", "classes", "vocab", "pattern",
            "ranks")  # of meta.json


def difference(before, now):
    """The first difference of the data that two meta.json describe, in words: expected `before`, found `now`; or ''.

    The meta of a model that convert.py imported has no source: its vocabulary is known, and the data is not.
    """
    imported = "source" not in before
    pairs = [(key, before.get(key), now.get(key)) for key in IDENTITY if not (imported and key in ("source", "mark"))]
    for split in () if imported else ("train", "val", "unsup"):
        old, new = (meta.get("splits", {}).get(split, {}) for meta in (before, now))
        # An old meta.json lacks the digests of offsets and labels.
        keys = ["tokens", "documents", "sha256", *(key for _, key in PARTS.values() if key in old)]
        pairs += [(f"{key} of {split}", old.get(key), new.get(key)) for key in keys]
    return next((f"{key}: expected {short_repr(a)}, found {short_repr(b)}" for key, a, b in pairs if a != b), "")


def files_of(meta):
    """{file name: (bytes, sha256)} of a checked folder's meta. The sha256 is None in folders that were prepared before
    meta.json held the digests of offsets and labels."""
    files = {}
    for name, split in meta["splits"].items():
        documents, bits = split.get("documents", 0), int(meta["dtype"].removeprefix("uint"))
        sizes = {"tokens": split["tokens"] * bits // 8, "offsets": 8 * (documents + 1), "labels": documents,
                 "distances": 2 * split["tokens"]}
        without_digests = meta["kind"] == "classify" and "offsets_sha256" not in split
        for part, (suffix, key) in PARTS.items():
            undigested = part == "offsets" or part == "labels" and name != "unsup"
            if part == "tokens" or key in split or without_digests and undigested:
                files[f"{name}{suffix}.bin"] = sizes[part], split.get(key)
    return files


def stamp(path):
    """(bytes, modification time, inode) of a file, which change when it is rewritten; None if it is missing."""
    try:
        info = path.stat()
        return info.st_size, info.st_mtime_ns, info.st_ino
    except OSError:
        return None


def digest_of(path, algorithm="sha256"):
    """The hexadecimal digest (str) of a file."""
    with open(path, "rb") as file:
        return digest_of_start(file, path.stat().st_size, algorithm)


def digest_of_start(file, size, algorithm="sha256"):
    """The hexadecimal digest (str) of the first `size` bytes of a file that is open for bytes."""
    hasher = hashlib.new(algorithm)
    file.seek(0)
    while size and (piece := file.read(min(size, 1 << 20))):
        hasher.update(piece)
        size -= len(piece)
    return hasher.hexdigest()


def mismatch(path, size, digest):
    """How a file differs from a size (bytes or None) and a digest ("algorithm:hex" or None), a text; or None."""
    if size is not None and (actual := path.stat().st_size) != size:
        return f"expected {size:,} bytes, got {actual:,}"
    if digest is not None:
        algorithm, expected = digest.split(":")
        if (actual := digest_of(path, algorithm)) != expected:
            return f"expected {algorithm} {expected}, got {actual}"
    return None
