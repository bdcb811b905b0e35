"""Every kind of tokenizer: exact ids, round trips of any text, the mark, and what is refused."""

import base64
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from core import tokenizer
from core.tokenizer import Tokenizer, printable, words

PATTERN = r" ?\p{L}+| ?[^\s\p{L}]+|\s"
PIECES = [bytes([b]) for b in range(256)] + [b"ab", b" ab", b"abc", "é".encode(), b"<|endoftext|>"]
BYTES = {"tokenizer": "bytes", "vocab_size": 256, "mark": None}
MARKED = {**BYTES, "mark": 0}
CHARS = {"tokenizer": "chars", "vocab_size": 4, "mark": None, "vocab": ["\n", " ", "a", "é"]}
CHARS_UNK = {"tokenizer": "chars", "vocab_size": 3, "mark": None, "vocab": ["<unk>", "a", "\ufffd"]}
WORDS = {"tokenizer": "words", "vocab_size": 7, "mark": 0, "vocab": ["<s>", "<unk>", "it's", "fun", ".", "(", ")"]}
BPE = {
    "tokenizer": "bpe", "vocab_size": len(PIECES) + 1, "mark": len(PIECES), "pattern": PATTERN,
    "ranks": [base64.b64encode(piece).decode() for piece in PIECES],
}
EVERY = [BYTES, MARKED, CHARS, CHARS_UNK, WORDS, BPE]
# one object for all of a property's examples
BPE_TOKENIZER = Tokenizer(BPE)
encodable = st.text(st.characters(exclude_categories=["Cs"]))


def test_exact_ids():
    assert Tokenizer(BYTES).encode("aé\0") == [97, 0xC3, 0xA9, 0]
    assert Tokenizer(MARKED).encode("a\0") == [97, 32]  # byte 0 is the mark: a text's own becomes a space
    assert Tokenizer(CHARS).encode("éa\n") == [3, 2, 0]
    assert Tokenizer(CHARS_UNK).encode("ab\ufffd") == [1, 0, 2]
    assert Tokenizer(WORDS).encode("It's FUN. Not!") == [2, 3, 4, 1, 1]
    assert BPE_TOKENIZER.encode("ab abc") == [256, 257, 99]


def test_words():
    assert words("Don't stop\n\nbr-eak, a_b 3.5 'quoted' ÉTÉ’s") == [
        "don't", "stop", "br", "-", "eak", ",", "a", "_", "b", "3", ".", "5", "'", "quoted", "'", "été’s",
    ]
    assert words(" \n\t") == []


@given(encodable)
def test_round_trip_bytes(text):
    for meta in (BYTES, MARKED):
        t = Tokenizer(meta)
        want = text if meta["mark"] is None else text.replace("\0", " ")
        assert t.decode(t.encode(text)) == want
        assert t.decode_bytes(t.encode(text)) == want.encode()


@given(encodable)
def test_round_trip_bpe(text):
    ids = BPE_TOKENIZER.encode(text)
    assert BPE_TOKENIZER.decode(ids) == text
    assert BPE_TOKENIZER.mark not in ids


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_round_trip_chars(text):
    vocab = sorted(set(text))
    t = Tokenizer({**CHARS, "vocab": vocab, "vocab_size": len(vocab)})
    assert t.encode(text) == [vocab.index(c) for c in text]
    assert t.decode(t.encode(text)) == text


@given(encodable)
def test_words_again_are_the_same_words(text):
    vocab = ["<s>"] + list(dict.fromkeys(words(text)))
    t = Tokenizer({**WORDS, "vocab": vocab, "vocab_size": len(vocab)})
    assert [vocab[i] for i in t.encode(text)] == words(text)


@settings(max_examples=50)
@given(st.data())
def test_streaming_equals_at_once(data):
    for meta in EVERY:
        t = Tokenizer(meta)
        ids = data.draw(st.lists(st.integers(0, t.vocab_size - 1), max_size=20))
        assert b"".join(t.decode_bytes([i]) for i in ids) == t.decode_bytes(ids)


def test_words_decode_with_spaces_where_they_belong():
    t = Tokenizer(WORDS)
    assert t.decode(t.encode("it's (fun).")) == "it's (fun)."
    assert t.decode([0, 2, 3, 0, 3]) == "\nit's fun\nfun"
    assert t.decode([1]) == "<unk>"


@pytest.mark.parametrize("meta", EVERY, ids=lambda meta: meta["tokenizer"])
def test_marks(meta):
    t = Tokenizer(meta)
    assert t.vocab_size == meta["vocab_size"] and t.mark == meta["mark"]
    if t.mark is not None:
        assert t.decode([t.mark]) == "\n"
        assert t.token(t.mark) == ("<|endoftext|>" if t.kind == "bpe" else "<s>")
        if t.kind != "chars":
            assert t.mark not in t.encode("<s> <|endoftext|> <unk> \0")


def test_the_mark_of_characters():
    t = Tokenizer({"tokenizer": "chars", "vocab_size": 4, "mark": 0, "vocab": ["\0", "<unk>", "a", "\n"]})
    assert t.encode("\0a\n") == [1, 2, 3] and t.decode([0, 2, 3]) == "\na\n" and t.token(0) == "<s>"


@pytest.mark.parametrize("meta", [MARKED, WORDS, BPE], ids=lambda meta: meta["tokenizer"])
def test_a_stream_is_encoded_in_batches(meta):
    t, texts = Tokenizer(meta), ["fun", "", "it's (fun).", "it's" * 50, "fun"]
    for size in (1, 12, 10**6):
        assert list(t.encode_stream(iter(texts), size)) == [t.encode(text) for text in texts]
    assert list(t.encode_stream([])) == []


def test_special_text_in_a_prompt_is_text():
    ids = BPE_TOKENIZER.encode("<|endoftext|>")
    assert ids != [BPE_TOKENIZER.mark] and BPE_TOKENIZER.decode(ids) == "<|endoftext|>"


@pytest.mark.parametrize("meta", EVERY, ids=lambda meta: meta["tokenizer"])
@pytest.mark.parametrize("beyond", [-1, 10**6])
def test_ids_out_of_range(meta, beyond):
    t = Tokenizer(meta)
    for call in (t.token, lambda i: t.decode([0, i]), lambda i: t.decode_bytes([i])):
        with pytest.raises(ValueError, match=f"token {beyond} is outside the vocabulary of {t.vocab_size}"):
            call(beyond)


def test_unknown():
    with pytest.raises(ValueError, match="character 'b'.*vocabulary of 4 chars"):
        Tokenizer(CHARS).encode("aab")
    t = Tokenizer(CHARS_UNK)
    assert t.encode("ab") == [1, 0] and t.decode([1, 0]) == "a\ufffd" and t.token(0) == "<unk>"
    with pytest.raises(ValueError, match="word 'dull'"):
        Tokenizer({**WORDS, "vocab": ["<s>", "fun"], "vocab_size": 2}).encode("Dull fun")


def test_refused_metas():
    with pytest.raises(ValueError, match="'morse'.*bytes, chars, words, bpe, gpt2"):
        Tokenizer({**BYTES, "tokenizer": "morse"})
    with pytest.raises(ValueError, match="9 tokens.*has 4"):
        Tokenizer({**CHARS, "vocab_size": 9})


def test_printable():
    assert [Tokenizer(CHARS).token(i) for i in range(4)] == ["\\n", "␣", "a", "é"]
    assert printable(b"\xc3") == "\\xc3" and printable(b" a\t") == "␣a\\t" and printable(b"\x85 ") == "\\x85\\x20"
    assert Tokenizer(WORDS).token(2) == "it's"
    for meta in EVERY:
        t = Tokenizer(meta)
        labels = [t.token(i) for i in range(t.vocab_size)]
        assert all(len(s) and len(s.splitlines()) == 1 for s in labels)


def test_gpt2(monkeypatch):
    import tiktoken

    encoding = tokenizer.bpe_encoding(PATTERN, BPE["ranks"], BPE["mark"])
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding if name == "gpt2" else None)
    t = Tokenizer({**BPE, "tokenizer": "gpt2"})
    assert t.encode("ab abc<|endoftext|>")[:3] == [256, 257, 99]
    assert t.decode(t.encode("ab é\n")) == "ab é\n"
    assert t.encode_batch(["ab", "é"]) == [[256], [259]]

    def no_network(name):
        raise OSError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ConnectionError, match="gpt2 vocabulary.*TIKTOKEN_CACHE_DIR"):
        Tokenizer({**BPE, "tokenizer": "gpt2"})


def test_lone_surrogates_do_not_crash():
    for meta in (BYTES, BPE):
        t = Tokenizer(meta)
        t.decode(t.encode("a\ud800b"))
