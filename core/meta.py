"""What a meta.json holds, and the one check of it: of a prepared folder's, and of the copy inside a checkpoint.

Everything that reads one relies on this check, so that a damaged or forged file ends in a sentence.
"""

import base64
import binascii
import json
import re

from core.config import UserError, short_repr

FORMAT = 1
KINDS = ("bytes", "chars", "words", "bpe", "gpt2")  # of tokenizers
UNKNOWN = "<unk>"
DTYPES = ("uint8", "uint16", "uint32")  # of tokens
NEEDED = ("kind", "lossless", "source", "dtype", "splits")  # by a folder; a checkpoint may lack them
PARTS = {"tokens": ("", "sha256"), "offsets": (".offsets", "offsets_sha256"), "labels": (".labels", "labels_sha256")}  # of a split

_SPLIT = re.compile(r"\w[\w-]{0,39}", re.ASCII)  # part of a file's name: no dot, no slash
_DIGEST = re.compile(r"[0-9a-f]{64}")


def expect(condition, what, found):
    """Raise ValueError, which says what was expected and what was found, unless `condition` holds."""
    if not condition:
        raise ValueError(f"expected {what}, found {short_repr(found)}")


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

    Raises FileNotFoundError where there is none, and UserError where it is damaged or lacks what a folder needs.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
        check(meta)
        if missing := [key for key in NEEDED if key not in meta]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); run its prepare.py again") from error
    return meta


def check(meta):
    """Raise ValueError unless `meta` has what a Tokenizer needs, and every entry in it has the right type, range and size."""
    expect(type(meta) is dict, "an object with named entries", meta)
    if missing := [key for key in ("tokenizer", "vocab_size", "mark") if key not in meta]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    expect(meta.get("format", FORMAT) == FORMAT, f"the format {FORMAT}", meta.get("format"))
    check_tokenizer(meta)
    kind, classes = meta.get("kind"), meta.get("classes", [])
    expect(kind in ("lm", "classify") or "kind" not in meta, "'lm' or 'classify' as kind", kind)
    expect(type(classes) is list and all(type(name) is str for name in classes) and len(set(classes)) == len(classes),
           "different texts as classes", classes)
    two = {"classify": (2,), "lm": (0,)}.get(kind, (0, 2))
    expect(len(classes) in two, "two classes for kind 'classify', none for 'lm'", classes)
    for key, expected in (("lossless", bool), ("partial", bool), ("source", dict), ("options", dict), ("name", str)):
        expect(type(meta.get(key, expected())) is expected, f"{expected.__name__} as {key}", meta.get(key))
    expect(meta.get("dtype", DTYPES[0]) in DTYPES, f"{', '.join(DTYPES)} as dtype", meta.get("dtype"))
    check_splits(meta.get("splits", {}), kind)


def check_tokenizer(meta):
    """Raise ValueError unless the vocabulary is whole: its size, its entries and the mark fit each other."""
    kind, size, mark = meta["tokenizer"], meta["vocab_size"], meta["mark"]
    if kind not in KINDS:
        raise ValueError(f"there is no tokenizer {short_repr(kind)}: choose one of {', '.join(KINDS)}")
    expect(is_count(size, 2**32 + 1) and size, "a vocab_size from 1 to 2**32", size)
    expect(mark is None or is_count(mark, size), f"a mark below {size:,}, or null", mark)
    vocabulary = {"chars": "vocab", "words": "vocab", "bpe": "ranks"}.get(kind)
    entries = meta.get(vocabulary, []) if vocabulary else []
    expect(type(entries) is list and all(type(entry) is str and entry for entry in entries), f"a list of texts as {vocabulary}",
           entries)
    has = {"bytes": 256, "bpe": len(entries) + 1, "gpt2": size}.get(kind, len(entries))  # gpt2: its encoding tells
    if size != has:
        raise ValueError(f"the meta says {size} tokens and its {kind} vocabulary has {has}: prepare the data again")
    expect(len(set(entries)) == len(entries), f"every entry of {vocabulary} once", entries)
    if kind == "chars":
        expect(all(len(entry) == 1 or entry == UNKNOWN for entry in entries), "single characters as vocab", entries)
    if kind in ("chars", "words"):
        "".join(entries).encode("utf-8")  # ValueError for half a character
    if kind == "bpe":
        check_pairs(meta.get("pattern"), entries, mark)


def check_pairs(pattern, ranks, mark):
    """Raise ValueError unless tiktoken can be given these byte pairs; it would end the process, or never end."""
    expect(type(pattern) is str and pattern, "a text as pattern", pattern)
    expect(mark == len(ranks), f"the mark {len(ranks)}, after all ranks", mark)
    try:
        tokens = {base64.b64decode(rank, validate=True) for rank in ranks}
    except binascii.Error as error:
        raise ValueError(f"expected base64 as ranks, found other text ({error})") from error
    expect(len(tokens) == len(ranks) and tokens.issuperset(bytes([b]) for b in range(256)),
           "all 256 bytes among ranks, and each entry once", ranks)


def check_splits(splits, kind):
    """Raise ValueError unless the splits have safe names, counts that can be, and digests."""
    expect(type(splits) is dict and all(type(split) is dict for split in splits.values()), "named objects as splits", splits)
    for name, split in splits.items():
        expect(_SPLIT.fullmatch(name), "letters and digits as the name of a split", name)
        needed = ["tokens", "bytes"] + ["documents"] * (kind == "classify") + ["held_out_documents"] * (name == "unsup")
        digests = [key for _, key in PARTS.values() if key in split]
        for key in dict.fromkeys([*needed, *split]):
            if key in digests:
                expect(type(split[key]) is str and _DIGEST.fullmatch(split[key]), f"64 hexadecimal digits as {key} of {name}",
                       split[key])
            else:
                expect(is_count(split.get(key)), f"a number as {key} of {name}", split.get(key))
        expect(split.get("held_out_documents", 0) <= split.get("documents", 2**63), f"at most all documents of {name} held out",
               split.get("held_out_documents"))


def files_of(meta):
    """{file name: (bytes, sha256)} of a checked folder's meta; the sha256 is None where the folder was prepared before
    meta.json told that of offsets and labels."""
    files = {}
    for name, split in meta["splits"].items():
        documents = split.get("documents", 0)
        sizes = {"tokens": split["tokens"] * int(meta["dtype"][4:]) // 8, "offsets": 8 * (documents + 1), "labels": documents}
        for part, (suffix, key) in PARTS.items():
            before = "offsets_sha256" not in split and meta["kind"] == "classify" and (part == "offsets" or name != "unsup")
            if part == "tokens" or key in split or before:
                files[f"{name}{suffix}.bin"] = sizes[part], split.get(key)
    return files
