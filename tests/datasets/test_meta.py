"""The check of a meta.json: what is forged or damaged ends in a sentence that names the file."""

import base64
import json

import pytest

from core.config import UserError
from core.meta import check_meta, files_of, read_meta
from core.tokenizer import Tokenizer

BYTES = {"tokenizer": "bytes", "vocab_size": 256, "mark": 0}
WORDS = {"tokenizer": "words", "vocab_size": 3, "mark": 0, "vocab": ["<s>", "<unk>", "film"]}
CHARS = {"tokenizer": "chars", "vocab_size": 2, "mark": None, "vocab": ["a", "b"]}
RANKS = [base64.b64encode(bytes([b])).decode() for b in range(256)]
BPE = {"tokenizer": "bpe", "vocab_size": 257, "mark": 256, "pattern": r"\s|\S+", "ranks": RANKS}
SPLIT = {"tokens": 9, "bytes": 9, "documents": 2, "sha256": "0" * 64}
DATA = {**BYTES, "format": 1, "kind": "classify", "classes": ["no", "yes"], "lossless": True, "source": {"file": "x"},
        "dtype": "uint8", "options": {}, "partial": False, "name": "x", "splits": {"train": SPLIT}}


def test_what_is_right():
    for meta in (BYTES, WORDS, CHARS, BPE, DATA, {**DATA, "kind": "lm", "classes": []}, {**DATA, "splits": {}}):
        check_meta(meta, "x")
        Tokenizer(meta)


FORGED = [
    ([], "an object with named entries"), (None, "an object"), ({}, "it lacks tokenizer, vocab_size, mark"),
    ({**BYTES, "tokenizer": ["bytes"]}, "there is no tokenizer"),
    ({**BYTES, "tokenizer": "runes"}, "no tokenizer 'runes'"),
    ({**BYTES, "vocab_size": 10**12}, "a vocab_size from 1"), ({**BYTES, "vocab_size": True}, "a vocab_size from 1"),
    ({**BYTES, "vocab_size": 256.0}, "a vocab_size from 1"), ({**BYTES, "vocab_size": 0}, "a vocab_size from 1"),
    ({**BYTES, "vocab_size": 255}, "255 tokens and its bytes vocabulary has 256"),
    ({**BYTES, "mark": 256}, "a mark below 256"), ({**BYTES, "mark": -1}, "a mark below 256"),
    ({**BYTES, "mark": "0"}, "a mark"),
    ({**BYTES, "mark": False}, "a mark"), ({**BYTES, "classes": "ab"}, "different texts as classes"),
    ({**BYTES, "classes": ["a"]}, "two classes"), ({**BYTES, "classes": ["a", "a"]}, "different texts as classes"),
    ({**BYTES, "classes": [["a"], ["b"]]}, "different texts as classes"), ({**BYTES, "format": 2}, "the format 1"),
    ({**WORDS, "vocab": [1, 2, 3]}, "a list of texts as vocab"),
    ({**WORDS, "vocab": [["a"], "b", "c"]}, "a list of texts"),
    ({**WORDS, "vocab": "abc"}, "a list of texts as vocab"), ({**WORDS, "vocab": {"a": 1}}, "a list of texts as vocab"),
    ({**WORDS, "vocab": ["a", "a", "b"]}, "every entry of vocab once"),
    ({**WORDS, "vocab": ["", "a", "b"]}, "a list of texts"),
    ({**WORDS, "vocab": ["a"]}, "3 tokens and its words vocabulary has 1"),
    ({**WORDS, "vocab": ["a", "\ud800", "b"]}, "surrogates"),
    ({**CHARS, "vocab": ["a", "bc"]}, "single characters"),
    ({key: CHARS[key] for key in BYTES}, "its chars vocabulary has 0"),
    ({**BPE, "mark": 0}, "the mark 256"), ({**BPE, "ranks": RANKS[:-1] + ["?"]}, "base64 as ranks"),
    ({**BPE, "pattern": 1}, "a text"), ({**BPE, "pattern": ""}, "a text"),
    ({**BPE, "ranks": RANKS[:-1] + ["YWI="]}, "all 256 bytes among ranks"),
    ({**BPE, "ranks": RANKS[:-1] + [7]}, "a list of texts"),
    ({**DATA, "kind": "lm"}, "none for 'lm'"), ({**DATA, "kind": {}}, "'lm' or 'classify' as kind"),
    ({**DATA, "kind": None}, "as kind"),
    ({**DATA, "lossless": 1}, "bool as lossless"), ({**DATA, "source": "x"}, "dict as source"),
    ({**DATA, "splits": []}, "named objects as splits"), ({**DATA, "splits": {"train": 9}}, "named objects as splits"),
    ({**DATA, "splits": {"../train": SPLIT}}, "as the name of a split"),
    ({**DATA, "splits": {"": SPLIT}}, "the name of a split"),
    ({**DATA, "splits": {"unsup": SPLIT}}, "a number as held_out_documents of unsup"),
    ({**DATA, "splits": {"unsup": {**SPLIT, "held_out_documents": 3}}}, "at most all documents of unsup held out"),
    *(({**DATA, "dtype": dtype}, "uint8, uint16, uint32 as dtype") for dtype in (
        "object", "O", "bool", "float64", "S4", "U2", "complex128", "datetime64", "datetime64[s]", "int8", "uint64",
        ">u2", None, 1, [])),
    *(({**DATA, "splits": {"train": {**SPLIT, key: value}}}, "of train") for key, value in (
        ("tokens", -1), ("tokens", None), ("tokens", True), ("tokens", 2**63), ("tokens", 1.0), ("bytes", "9"),
        ("documents", -1), ("positive", [1]), ("sha256", "0"), ("sha256", None), ("sha256", "g" * 64),
        ("labels_sha256", 1), ("offsets_sha256", ""))),
]


@pytest.mark.parametrize("meta, message", FORGED, ids=range(len(FORGED)))
def test_what_is_forged(meta, message, tmp_path):
    with pytest.raises(UserError) as error:
        check_meta(meta, "out/ckpt.pt")
    line = str(error.value)
    assert line.startswith("out/ckpt.pt is damaged (") and message in line and "\n" not in line and len(line) < 300
    with pytest.raises(ValueError):
        Tokenizer(meta)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"meta.json is damaged \(.*\); run its prepare.py again"):
        read_meta(tmp_path)


@pytest.mark.parametrize("text", [
    "", "{", "[" * 100_000, "1" * 9999, '{"tokenizer": "bytes", "vocab_size": 256, "mark": null}', "\xff"])
def test_what_is_no_meta(text, tmp_path):
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"meta.json is damaged \(.*\); run its prepare.py again"):
        read_meta(tmp_path)


def test_the_files_of_a_folder():
    assert files_of({**DATA, "kind": "lm", "dtype": "uint16"}) == {"train.bin": (18, "0" * 64)}
    whole = {**SPLIT, "offsets_sha256": "1" * 64, "labels_sha256": "2" * 64}
    assert files_of({**DATA, "splits": {"val": whole}}) == \
        {"val.bin": (9, "0" * 64), "val.offsets.bin": (24, "1" * 64), "val.labels.bin": (2, "2" * 64)}
    assert files_of({**DATA, "splits": {"val": SPLIT, "unsup": SPLIT}}) == {
        "val.bin": (9, "0" * 64), "val.offsets.bin": (24, None), "val.labels.bin": (2, None),
        "unsup.bin": (9, "0" * 64), "unsup.offsets.bin": (24, None)}
