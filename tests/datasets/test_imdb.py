"""data/imdb on a small aclImdb: texts, labels, splits by movie, vocabularies from train alone; what is refused."""

import base64
import importlib
import re

import pytest
import tiktoken
from sources import load, pack, prepare, untouched

from core.config import UserError
from core.tokenizer import Tokenizer, words

imdb = importlib.import_module("data.imdb.prepare")

N, UNSUP, PER_MOVIE = 40, 60, 4


def code(movie):
    """A word that only this movie's reviews hold."""
    return "movie" + "".join("abcdefghij"[int(c)] for c in str(movie)) * 2


def reviews(n=N, unsup=UNSUP):
    """{name: bytes} of a small aclImdb: 4 reviews a movie, unsup about train's movies, test about its own."""
    files = {"aclImdb/README": b"hello", "aclImdb/train/labeledBow.feat": b"0 9:1"}
    for group, count, base in (("train/pos", n, 100), ("train/neg", n, 105), ("train/unsup", unsup, 100),
                               ("test/pos", n, 500), ("test/neg", n, 600)):
        lines = b""
        for i in range(count):
            movie = base + i // PER_MOVIE
            lines += b"http://www.imdb.com/title/tt%07d/usercomments\n" % movie
            only = "testonly " * 9 if group.startswith("test") else "liked it " if group == "train/pos" else "hated it "
            text = f"Review {group} {i}.<br /><br />{(code(movie) + ' ') * 5}{only}caf\u00e9 <BR>end<br/>x\0y"
            files[f"aclImdb/{group}/{i}_{7 if 'pos' in group else 0}.txt"] = text.encode()
        folder, label = group.split("/")
        files[f"aclImdb/{folder}/urls_{label}.txt"] = lines
    return files


def clean(data):
    return re.sub(r"<(br|BR) ?/?>", "\n", data.decode()).replace("\0", " ")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The small aclImdb prepared with every tokenizer that needs no network, each from another kind of source."""
    top = tmp_path_factory.mktemp("imdb")
    folders = {}
    for kind, source in (("words", "a.tar.gz"), ("bytes", "a.zip"), ("bpe", "folder")):
        pack(reviews(), top / source)
        folders[kind] = top / kind
        size = {"words": ["--vocab_size=60"], "bpe": ["--vocab_size=900"]}.get(kind, [])
        options = ["--source", source, "--partial", f"--tokenizer={kind}", f"--out_dir={kind}", *size]
        prepare("imdb", *options, cwd=top)
    return top, folders


def documents(folder):
    """{split: [(ids without the mark, label or None), ...]} of a prepared folder, and its meta."""
    meta, arrays = load(folder)
    splits = {}
    for split in meta["splits"]:
        offsets, tokens = arrays[split + ".offsets"], arrays[split].tolist()
        labels = arrays.get(split + ".labels", [None] * (len(offsets) - 1))
        for a in offsets[:-1]:
            assert tokens[a] == meta["mark"]
        assert tokens.count(meta["mark"]) == len(offsets) - 1  # no text encodes to the mark
        splits[split] = [(tokens[a + 1 : b], label) for a, b, label in zip(offsets, offsets[1:], labels)]
    return splits, meta


def texts_of(folder):
    splits, meta = documents(folder)
    decode = Tokenizer(meta).decode
    return {split: [(decode(ids), label) for ids, label in rows] for split, rows in splits.items()}, meta


def where(text):
    """("train/pos", 12) of a small review."""
    group, number = re.match(r"Review ([a-z/]+) (\d+)\.", text).groups()
    return group, int(number)


def movie_of(text):
    return re.search(r"movie[a-j]+", text).group()


def test_imdb_texts_and_labels(made):
    _, folders = made
    split, meta = texts_of(folders["bytes"])
    files = {name: data for name, data in reviews().items() if re.search(r"/\d+_\d\.txt$", name)}
    want = sorted(clean(data) for data in files.values())
    assert sorted(text for rows in split.values() for text, _ in rows) == want
    assert [len(split[name]) for name in ("train", "val", "test", "unsup")] == [72, 8, 80, 60]
    for name in ("train", "val", "test"):
        for text, label in split[name]:
            group, _ = where(text)
            assert group.startswith("test" if name == "test" else "train") and label == ("pos" in group)
    assert all(where(text)[0] == "train/unsup" for text, _ in split["unsup"])
    assert meta["kind"] == "classify" and meta["classes"] == ["negative", "positive"]
    assert meta["mark"] == 0 and meta["partial"] is True
    for name in split:
        assert meta["splits"][name]["bytes"] == sum(len(text.encode()) + 1 for text, _ in split[name])
    labels = [label for _, label in split["test"]]
    assert labels != sorted(labels) and labels != sorted(labels, reverse=True)  # mixed, not folder by folder


def test_imdb_no_movie_on_both_sides(made):
    split, meta = texts_of(made[1]["bytes"])
    movies = {name: {movie_of(text) for text, _ in rows} for name, rows in split.items()}
    assert movies["train"] and movies["val"] and not movies["train"] & movies["val"]
    tail = meta["splits"]["unsup"]["held_out_documents"]
    held = [movie_of(text) in movies["val"] for text, _ in split["unsup"]]
    assert tail == sum(held) > 0
    assert held == [False] * (len(held) - tail) + [True] * tail
    assert {name: count["movies"] for name, count in meta["splits"].items()} == {n: len(m) for n, m in movies.items()}


def test_imdb_review_n_is_the_same_whatever_the_tokenizer(made):
    _, folders = made
    as_bytes, _ = texts_of(folders["bytes"])
    as_bpe, bpe_meta = texts_of(folders["bpe"])
    as_words, words_meta = documents(folders["words"])
    t = Tokenizer(words_meta)
    for split, rows in as_bytes.items():
        assert [label for _, label in rows] == [label for _, label in as_bpe[split]]
        assert [text for text, _ in rows] == [text for text, _ in as_bpe[split]]
        assert [ids for ids, _ in as_words[split]] == [t.encode(text) for text, _ in rows]
    assert bpe_meta["lossless"] is True and words_meta["lossless"] is False


def test_imdb_words_come_from_train_only(made):
    split, meta = documents(made[1]["words"])
    texts, _ = texts_of(made[1]["bytes"])
    count = {}
    for text, _ in texts["train"]:
        for word in words(text):
            count[word] = count.get(word, 0) + 1
    order = sorted(count, key=lambda word: (-count[word], word))
    assert meta["vocab"] == ["<s>", "<unk>"] + order[:60] and meta["vocab_size"] == 62
    assert "testonly" not in meta["vocab"]
    unknown = {name: sum(ids.count(1) for ids, _ in rows) for name, rows in split.items()}
    assert {name: s["unknown"] for name, s in meta["splits"].items()} == unknown


def test_imdb_bpe_is_learnt_without_val_and_test(made):
    texts, _ = texts_of(made[1]["bytes"])
    meta, _ = load(made[1]["bpe"])
    tokens = b"\n".join(base64.b64decode(rank) for rank in meta["ranks"])
    assert meta["vocab_size"] == len(meta["ranks"]) + 1 == meta["mark"] + 1
    # every movie's word stands five times in each of its reviews: one that was read became a token
    # (but for one, which may be the part of another)
    read, val = {movie_of(t) for t, _ in texts["train"]}, {movie_of(t) for t, _ in texts["val"]}
    assert all(movie.encode() in tokens for movie in read)
    assert not any(movie.encode() in tokens for movie in val)
    assert b"testonly" not in tokens and b"testo" not in tokens


def test_imdb_words_exactly():
    texts = {"train": ["B b a.", "a b"], "val": ["c a"], "test": [""], "unsup": ["c c c c"]}
    entries = imdb.vocabulary("words", 2, texts["train"], texts["unsup"])
    assert entries == {"vocab_size": 4, "mark": 0, "vocab": ["<s>", "<unk>", "b", "a"]}
    encoded = imdb.encode(Tokenizer({"tokenizer": "words", **entries}), texts)
    assert {name: (ids.tolist(), list(ends)) for name, (ids, ends) in encoded.items()} == {
        "train": ([0, 2, 2, 3, 1, 0, 3, 2], [0, 5, 8]), "val": ([0, 1, 3], [0, 3]), "test": ([0], [0, 1]),
        "unsup": ([0, 1, 1, 1, 1], [0, 5]),
    }
    assert imdb.vocabulary("words", 3, ["b a d c"], [])["vocab"][2:] == ["a", "b", "c"]  # ties: the alphabet


def test_imdb_again(made):
    top, folders = made
    options = ["--partial", "--vocab_size=60", "--out_dir", folders["words"]]
    for source in ([], ["--source", top / "a.tar.gz"]):
        done = prepare("imdb", *source, *options, cwd="/")
        assert "nothing to do" in done.stdout and "vocabulary 62" in done.stdout
    options = ["--partial", "--tokenizer=bpe", "--vocab_size=900", "--out_dir", folders["bpe"]]
    assert "nothing to do" in prepare("imdb", "--source", top / "folder", *options, cwd="/").stdout
    options[2] = "--vocab_size=800"
    done = prepare("imdb", "--source", top / "folder", *options, cwd="/")
    assert "nothing to do" not in done.stdout and load(folders["bpe"])[0]["options"]["vocab_size"] == 800
    assert "tokens only" in done.stderr  # so small a text runs out of pairs


def test_imdb_gpt2(made, tmp_path, monkeypatch, capsys):
    top, folders = made
    meta, _ = load(folders["bytes"])
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\s|\S+", mergeable_ranks={bytes([b]): b for b in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    imdb.main(["--source", str(top / "a.zip"), "--partial", "--tokenizer=gpt2", "--out_dir", str(tmp_path / "gpt2")])
    texts, meta = texts_of(tmp_path / "gpt2")
    assert meta["mark"] == 256 and meta["vocab_size"] == 257 and "ranks" not in meta and meta["tokenizer"] == "gpt2"
    assert [text for text, _ in texts["val"]] == [t for t, _ in texts_of(folders["bytes"])[0]["val"]]


def test_imdb_gpt2_without_network(made, tmp_path):
    # a proxy that is not there, an empty cache: as on a machine without a network
    nowhere = "http://127.0.0.1:9"
    env = {"HTTPS_PROXY": nowhere, "https_proxy": nowhere, "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    options = ["--source", made[0] / "a.zip", "--partial", "--tokenizer=gpt2", "--out_dir", tmp_path / "out"]
    done = prepare("imdb", *options, cwd=tmp_path, code=2, env=env)
    assert "gpt2 vocabulary" in done.stderr and len(done.stderr.splitlines()) == 1 and untouched(tmp_path / "out")


def change(files, **changes):
    """`files` with members replaced; None removes. Keys: the name after aclImdb/, with __ for /."""
    out = dict(files)
    for key, data in changes.items():
        name = "aclImdb/" + key.replace("__", "/") + ".txt"
        if data is None:
            del out[name]
        else:
            out[name] = data
    return out


@pytest.mark.parametrize("make, message", [
    (lambda f: {}, "reviews in train/pos, found 0"),
    (lambda f: {"aclImdb/train/pos": b"x"}, "reviews in train/pos, found 0"),
    (lambda f: {n: d for n, d in f.items() if "unsup/" not in n}, "expected 50,000 reviews in train/unsup, found 0"),
    (lambda f: change(f, train__urls_neg=None), "expected 40 lines in train/urls_neg.txt, one for each"),
    (lambda f: change(f, test__pos__3_7=None),
     "expected 39 lines in test/urls_pos.txt, one for each review in test/pos"),
    (lambda f: change(change(f, test__pos__3_7=None), test__pos__77_7=b"x"), "found no review 3"),
    (lambda f: f | {"copy/train/pos/3_8.txt": b"x"}, "train/pos holds review 3 twice"),
    (lambda f: f | {"aclImdb/train/neg/3_0.txt": b"\xff"}, "expected UTF-8"),
], ids="empty nothing no-unsup no-urls fewer-files wrong-number twice not-utf8".split())
def test_imdb_refused(tmp_path, make, message):
    files = make(reviews(40, 8))
    source = pack(files, tmp_path / "a.zip") if files else tmp_path / "a.zip"
    if not files:
        source.mkdir()
    done = prepare("imdb", "--source", source, "--partial", "--out_dir=out", cwd=tmp_path, code=2)
    assert message in done.stderr and untouched(tmp_path / "out")


def test_imdb_partial_has_to_be_asked_for(made, tmp_path):
    done = prepare("imdb", "--source", made[0] / "a.tar.gz", "--out_dir=out", cwd=tmp_path, code=2)
    assert "expected 12,500 reviews in train/pos, found 40" in done.stderr and "--partial" in done.stderr
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes((made[0] / "a.tar.gz").read_bytes()[:-3000])
    done = prepare("imdb", "--source", cut, "--partial", "--out_dir=out", cwd=tmp_path, code=2)
    assert "cut.tar.gz cannot be read to its end" in done.stderr and untouched(tmp_path / "out")


@pytest.mark.parametrize("options, message", [
    (["--tokenizer=bytes", "--vocab_size=300"], "bytes has a vocabulary of its own"),
    (["--tokenizer=bpe", "--vocab_size=100"], "expected at least 258 for bpe, got 100"),
    (["--vocab_size=0"], "expected at least 1 for words, got 0"),
])
def test_imdb_options(options, message):
    with pytest.raises(UserError, match=message):
        imdb.main(options)
