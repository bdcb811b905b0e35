"""Every prepare.py as its user runs it, on archives made here; and downloads, from a server made here."""

import bz2
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from core import prepare as shared
from core.config import UserError
from core.tokenizer import Tokenizer, words

imdb = importlib.import_module("data.imdb.prepare")
enwik8 = importlib.import_module("data.enwik8.prepare")
stdlib = importlib.import_module("data.stdlib.prepare")


def prepare(name, *options, cwd, code=0, env=None):
    """Runs data/NAME/prepare.py from the folder `cwd`; what it printed, its exit code and its manners checked."""
    command = [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, options)]
    env = {**os.environ, **(env or {})}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert len([line for line in done.stderr.splitlines() if line.startswith("prepare.py: ")]) == 1, done.stderr
    return done


def load(folder):
    """(meta, {name of a .bin without the suffix: array}) of a finished folder, every count and digest checked."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {}
    for name, split in meta["splits"].items():
        file = folder / f"{name}.bin"
        tokens = arrays[name] = np.fromfile(file, np.dtype(meta["dtype"]).newbyteorder("<"))
        assert len(tokens) == split["tokens"] and split["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert len(tokens) == 0 or tokens.max() < meta["vocab_size"]
        if meta["kind"] == "classify":
            offsets = arrays[name + ".offsets"] = np.fromfile(folder / f"{name}.offsets.bin", "<i8")
            assert offsets[0] == 0 and offsets[-1] == len(tokens) and len(offsets) == split["documents"] + 1
            assert (np.diff(offsets) > 0).all()
        if meta["kind"] == "classify" and name != "unsup":
            arrays[name + ".labels"] = np.fromfile(folder / f"{name}.labels.bin", np.uint8)
            assert len(arrays[name + ".labels"]) == split["documents"]
    expected = {f"{name}.bin" for name in arrays} | {"meta.json"}
    assert {file.name for file in folder.iterdir()} == expected
    return meta, arrays


def untouched(folder):
    """Nothing at `folder`, and nothing temporary beside it."""
    return not folder.exists() and not list(folder.parent.glob(f"{folder.name}*"))


def add(tar, name, data, **more):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def pack(files, path):
    """{name: bytes} as what the path's suffix says: a zip, a tar, or a folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif ".tar" in path.name:
        how = path.suffix[1:] if path.suffix != ".tar" else ""
        with tarfile.open(path, f"w:{how}") as archive:
            for name, data in files.items():
                add(archive, name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


# ---------------------------------------------------------------------------------------------------
# toy


def test_toy(tmp_path):
    out = tmp_path / "toy"
    done = prepare("toy", "--out_dir", out, cwd=tmp_path)
    meta, arrays = load(out)
    assert meta["vocab"] == "<s> i love deep learning artificial intelligence is fun cool models learn patterns".split()
    want = [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 0, 3, 4, 7, 8, 0, 5, 6, 7, 9, 0, 1, 2, 10, 0, 10, 11, 12]
    for split in ("train", "val", "test"):
        assert arrays[split].tolist() == want
        assert meta["splits"][split]["documents"] == 6 and f"{split:5s}" in done.stdout
    text = Tokenizer(meta).decode(want)
    assert text.splitlines()[1:] == ["i love deep learning", "i love artificial intelligence", "deep learning is fun",
                                     "artificial intelligence is cool", "i love models", "models learn patterns"]
    assert meta["splits"]["train"]["bytes"] == len(text.encode()) and meta["lossless"] is True
    assert (meta["format"], meta["kind"], meta["mark"], meta["dtype"], meta["partial"]) == (1, "lm", 0, "uint8", False)


def test_toy_again_is_free_and_other_text_is_not(tmp_path):
    out = tmp_path / "deep" / "toy"
    prepare("toy", "--out_dir", out, cwd=tmp_path)
    before = (out / "train.bin").stat()
    assert "nothing to do" in prepare("toy", "--out_dir", out, cwd=tmp_path).stdout
    assert (out / "train.bin").stat().st_mtime_ns == before.st_mtime_ns
    own = tmp_path / "own.txt"
    own.write_text("Hello there\n\n  hello you  \n")
    assert "nothing to do" not in prepare("toy", "--out_dir", out, "--source", own, cwd=tmp_path).stdout
    meta, arrays = load(out)
    assert arrays["val"].tolist() == [0, 1, 2, 0, 1, 3] and meta["lossless"] is False  # "Hello" lost its capital
    assert "nothing to do" not in prepare("toy", "--out_dir", out, cwd=tmp_path).stdout


# ---------------------------------------------------------------------------------------------------
# tiny Shakespeare: one plain file, in every wrapping

PLAY = ("First Citizen:\nBefore we proceed, hear me speak.\n" * 3).encode()


def wrap(data, path, inner="input.txt"):
    if path.name.endswith((".tar", ".tar.gz", ".zip")) or not path.suffix:
        return pack({inner: data}, path)
    opener = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix, open)
    with opener(path, "wb") as f:
        f.write(data)
    return path


@pytest.mark.parametrize("name", "a.txt a.txt.gz a.txt.xz a.bz2 a.zip a.tar a.tar.gz folder a.wrong".split())
def test_shakespeare_sources(tmp_path, name):
    source = wrap(PLAY, tmp_path / name)
    out = tmp_path / "out"
    prepare("shakespeare_char", "--source", source, "--partial", "--out_dir", out, cwd=tmp_path)
    meta, arrays = load(out)
    text = PLAY.decode()
    assert meta["vocab"] == sorted(set(text)) and meta["vocab_size"] == len(set(text)) and meta["mark"] is None
    cut = int(len(text) * 0.9)
    assert arrays["train"].tolist() == [meta["vocab"].index(c) for c in text[:cut]]
    assert Tokenizer(meta).decode(arrays["train"]) + Tokenizer(meta).decode(arrays["val"]) == text
    assert meta["partial"] is True and meta["source"]["content_bytes"] == len(PLAY) and "test" not in meta["splits"]
    assert meta["source"]["file"] == name and str(tmp_path) not in (out / "meta.json").read_text()


def test_shakespeare_sources_relative_and_among_others(tmp_path):
    pack({"readme": b"no", "deep/input.txt": PLAY}, tmp_path / "a.zip")
    prepare("shakespeare_char", "--source=a.zip", "--partial", "--out_dir=out", cwd=tmp_path)
    assert load(tmp_path / "out")[0]["source"]["content_bytes"] == len(PLAY)
    pack({"one": b"no", "two": PLAY}, tmp_path / "b.zip")
    done = prepare("shakespeare_char", "--source=b.zip", "--partial", "--out_dir=other", cwd=tmp_path, code=2)
    assert "b.zip holds 2 files" in done.stderr and "input.txt" in done.stderr


@pytest.mark.parametrize("make, said", [
    (lambda p: p.write_bytes(PLAY), "expected 1,115,394 bytes, found 147: give the whole file, or --partial"),
    (lambda p: p.write_bytes(b""), "is empty"),
    (lambda p: p.write_bytes(b"x" * 1_115_395), "more than the 1,115,394 bytes"),
    (lambda p: None, "there is no such file or folder"),
    (lambda p: p.write_bytes(gzip.compress(PLAY * 1000)[:-20]), "cannot be read to its end"),
    (lambda p: p.write_bytes(lzma.compress(PLAY * 1000)[:-20]), "cannot be read to its end"),
    (lambda p: p.write_bytes(bz2.compress(PLAY * 1000)[:-20]), "cannot be read to its end"),
    (lambda p: p.write_bytes(b"PK\3\4 and then nothing"), "cannot be read to its end"),
    (lambda p: p.write_bytes(gzip.compress(PLAY)[:-8] + b"\0" * 8), "cannot be read to its end"),
    (lambda p: p.mkdir(), "holds 0 files"),
], ids="short empty long missing cut-gz cut-xz cut-bz2 cut-zip bad-checksum empty-folder".split())
def test_refused_files(tmp_path, make, said):
    source, out = tmp_path / "input", tmp_path / "out"
    make(source)
    done = prepare("shakespeare_char", "--source", source, "--out_dir", out, cwd=tmp_path, code=2)
    assert said in done.stderr
    assert untouched(out)


def test_not_utf8(tmp_path):
    (tmp_path / "a").write_bytes(PLAY + b"\xff" + PLAY)
    done = prepare("shakespeare_char", "--source=a", "--partial", "--out_dir=out", cwd=tmp_path, code=2)
    assert "expected UTF-8 text, found b'\\xff' at byte 147" in done.stderr


def test_again(tmp_path):
    source, out = wrap(PLAY, tmp_path / "a.gz"), tmp_path / "out"
    options = ("--partial", "--out_dir", out)
    prepare("shakespeare_char", "--source", source, *options, cwd=tmp_path)
    assert "nothing to do" in prepare("shakespeare_char", "--source", source, *options, cwd="/").stdout
    source.rename(tmp_path / "b.gz")
    for again in (("--source=b.gz",), ()):  # a name says nothing
        assert "nothing to do" in prepare("shakespeare_char", *again, *options, cwd=tmp_path).stdout
    # without --partial a partial folder will not do
    prepare("shakespeare_char", "--source=b.gz", "--out_dir", out, cwd=tmp_path, code=2)
    load(out)  # and what was there is still there
    (out / "val.bin").write_bytes(b"cut")
    assert "nothing to do" not in prepare("shakespeare_char", "--source=b.gz", *options, cwd=tmp_path).stdout
    load(out)
    (out / "meta.json").write_text("{")
    assert "nothing to do" not in prepare("shakespeare_char", "--source=b.gz", *options, cwd=tmp_path).stdout
    wrap(PLAY + b"more", tmp_path / "b.gz")
    assert "nothing to do" not in prepare("shakespeare_char", "--source=b.gz", *options, cwd=tmp_path).stdout
    assert load(out)[0]["source"]["content_bytes"] == len(PLAY) + 4


# a script whose renames or writes are interrupted: {how} is what happens instead of the rename of {name}
DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from core import prepare as shared
from data.shakespeare_char import prepare
rename = os.replace
def replace(a, b):
    if str(b).endswith({name!r}):
        {how}
    rename(a, b)
shared.os.replace = replace
sys.argv[1:] = ["--source", {source!r}, "--partial", "--out_dir", {out!r}]
shared.run_script(prepare.main)
"""


@pytest.mark.parametrize("how, code", [
    ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143),
    ("os.kill(os.getpid(), signal.SIGINT)", 130),
    ("raise OSError(28, 'No space left on device')", 2),
], ids="kill term ctrl-c disk-full".split())
@pytest.mark.parametrize("name", ["train.bin", "meta.json"])
def test_interrupted(tmp_path, how, code, name):
    source, out = wrap(PLAY, tmp_path / "a.txt"), tmp_path / "out"
    # over an older finished folder, the harder case
    old = wrap(PLAY + PLAY, tmp_path / "old.txt")
    prepare("shakespeare_char", "--source", old, "--partial", "--out_dir", out, cwd=tmp_path)
    script = DRIVER.format(root=str(ROOT), name=name, how=how, source=str(source), out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert not (out / "meta.json").exists()
    if code != -signal.SIGKILL:
        assert not list(tmp_path.glob("out.part*"))
    for left in tmp_path.glob("out.part*"):  # a kill leaves it; the next run an hour later removes it
        os.utime(left, (0, 0))
    again = prepare("shakespeare_char", "--source", source, "--partial", "--out_dir", out, cwd=tmp_path)
    assert "nothing to do" not in again.stdout
    assert load(out)[0]["source"]["content_bytes"] == len(PLAY)
    assert not list(tmp_path.glob("out.part*"))


def test_out_dir_is_a_file(tmp_path):
    source, out = wrap(PLAY, tmp_path / "a.txt"), tmp_path / "out"
    out.write_text("mine")
    done = prepare("shakespeare_char", "--source", source, "--partial", "--out_dir", out, cwd=tmp_path, code=2)
    assert "is a file" in done.stderr and out.read_text() == "mine"


# ---------------------------------------------------------------------------------------------------
# archives are read safely


def hostile(path):
    """An archive with one good file and members that must not count."""
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "../../input.txt", b"outside")
        add(tar, "/tmp/input.txt", b"absolute")
        add(tar, "link/input.txt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard/input.txt", b"", type=tarfile.LNKTYPE, linkname="good/input.txt")
        add(tar, "pipe/input.txt", b"", type=tarfile.FIFOTYPE)
        add(tar, "good", b"", type=tarfile.DIRTYPE)
        add(tar, "./good/input.txt", PLAY)
    return path


def hostile_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../input.txt", b"outside")
        archive.writestr("C:\\input.txt", b"absolute")
        archive.writestr("a\\..\\..\\input.txt", b"outside")
        link = zipfile.ZipInfo("link/input.txt")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("good/input.txt", PLAY)
    return path


@pytest.mark.parametrize("make, name", [(hostile, "a.tgz"), (hostile_zip, "a.zip")])
def test_links_and_paths_outside_are_ignored(tmp_path, make, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    source = make(inside / name)
    before = sorted(tmp_path.rglob("*"))
    assert list(shared.members(source)) == [("good/input.txt", PLAY)]
    assert sorted(tmp_path.rglob("*")) == before
    prepare("shakespeare_char", "--source", source, "--partial", "--out_dir", inside / "out", cwd=inside)
    assert load(inside / "out")[0]["source"]["content_bytes"] == len(PLAY)


@pytest.mark.parametrize("name", ["bomb.zip", "bomb.tar.xz", "bomb.gz", "folder"])
def test_size_bound(tmp_path, name):
    source = wrap(b"\0" * 2_000_000, tmp_path / name)
    with pytest.raises(UserError, match="more than the 1,000 bytes"):
        list(shared.members(source, limit=1000))


def test_cut_tars_and_names_that_lie(tmp_path):
    files = {f"{n}.txt": os.urandom(2000) for n in range(50)}
    for name in ("a.tar.gz", "a.tar.xz", "a.tar.bz2", "a.zip", "a.tar"):
        whole = pack(files, tmp_path / name)
        assert dict(shared.members(whole)) == files
        lying = whole.rename(tmp_path / f"{name}.txt")
        assert dict(shared.members(lying)) == files
        lying.write_bytes(lying.read_bytes()[: 60_000 if name == "a.tar" else -2000])
        with pytest.raises(UserError, match="cannot be read to its end"):
            list(shared.members(lying))
    # the checksum stands after the tar's own end: it is looked at all the same
    whole = pack(files, tmp_path / "b.tar.gz")
    whole.write_bytes(whole.read_bytes()[:-8] + bytes(8))
    with pytest.raises(UserError, match="cannot be read to its end"):
        list(shared.members(whole))


# ---------------------------------------------------------------------------------------------------
# stdlib


def test_stdlib_from_python_itself(tmp_path):
    out = tmp_path / "stdlib"
    prepare("stdlib", "--out_dir", out, cwd=tmp_path)
    meta, arrays = load(out)
    sizes = {name: split["bytes"] for name, split in meta["splits"].items()}
    total = sum(sizes.values())
    assert total > 5e6 and abs(sizes["train"] / total - 0.9) < 0.03 and meta["lossless"] is True
    assert meta["source"]["python"] == sys.version.split()[0]
    everything = np.concatenate([arrays[name] for name in ("train", "val", "test")]).tobytes()
    files = everything.split(b"\0")[1:]
    assert everything[:1] == b"\0" and len(files) == sum(split["documents"] for split in meta["splits"].values())
    texts = set(files)
    assert Path(argparse_file()).read_bytes() in texts  # a file of the library, whole
    assert not any(b"import pytest" in text for text in texts)
    assert "nothing to do" in prepare("stdlib", "--out_dir", out, cwd="/").stdout


def argparse_file():
    import argparse

    return argparse.__file__


def test_stdlib_from_a_source(tmp_path):
    kept = {f"pkg/m{n}.py": b"x = %d\n" % n * (n + 1) for n in range(40)} | {"odd.py": b"a\0b\r\nc\n"}
    left = {"test/test_a.py": b"no", "pkg/tests/a.py": b"no", "idlelib/idle_test/a.py": b"no", "a.txt": b"no",
            "site-packages/x/a.py": b"no", "_sysconfigdata__linux.py": b"no", "pkg/__pycache__/a.py": b"no",
            "pkg/__init__.py": b""}
    folder = pack(kept | left, tmp_path / "Lib")
    archive = pack({f"Python-9/Lib/{name}": data for name, data in (kept | left).items()}, tmp_path / "py.tar.xz")
    seen = []
    for n, source in enumerate((folder, archive)):
        prepare("stdlib", "--source", source, "--out_dir", tmp_path / str(n), cwd=tmp_path)
        meta, arrays = load(tmp_path / str(n))
        seen.append({name: tokens.tobytes() for name, tokens in arrays.items()})
    assert seen[0] == seen[1]  # packed or not, the same files make the same bytes
    clean = {name: data.replace(b"\r\n", b"\n").replace(b"\0", b" ") for name, data in kept.items()}
    order = sorted(clean, key=lambda name: hashlib.sha256(name.encode()).digest())
    stream = b"".join(b"\0" + clean[name] for name in order)
    assert b"".join(seen[0][name] for name in ("train", "val", "test")) == stream
    start, want = 0, {"train": b"", "val": b"", "test": b""}
    for name in order:
        split = "train" if start < 0.9 * len(stream) else "val" if start < 0.95 * len(stream) else "test"
        want[split] += b"\0" + clean[name]
        start += len(clean[name]) + 1
    assert seen[0] == want
    at = [stdlib.split_of(start, 100) for start in (0, 89, 90, 94, 95, 99)]
    assert at == ["train", "train", "val", "val", "test", "test"]
    done = prepare("stdlib", "--source", pack({"a.py": b"x"}, tmp_path / "b.zip"), "--out_dir=o", cwd=tmp_path, code=2)
    assert "found 1" in done.stderr


# ---------------------------------------------------------------------------------------------------
# enwik8

WIKI = ("abcdé " * 200 + "ß漢" * 20 + "é𝔸z" * 20).encode()


def test_enwik8_bytes(tmp_path):
    source = wrap(WIKI, tmp_path / "a.zip", "enwik8")
    done = prepare("enwik8", "--source", source, "--out_dir=out", cwd=tmp_path, code=2)
    assert f"expected 100,000,000 bytes, found {len(WIKI):,}" in done.stderr and "--partial" in done.stderr
    prepare("enwik8", "--source", source, "--out_dir=out", "--partial", cwd=tmp_path)
    meta, arrays = load(tmp_path / "out")
    a, b = len(WIKI) * 90 // 100, len(WIKI) * 95 // 100
    assert [arrays[name].tobytes() for name in ("train", "val", "test")] == [WIKI[:a], WIKI[a:b], WIKI[b:]]
    assert meta["partial"] is True and meta["source"]["content_bytes"] == len(WIKI) and meta["mark"] is None
    assert enwik8.cuts(bytes(10**8), False) == [0, 90_000_000, 95_000_000, 100_000_000]


def test_enwik8_chars(tmp_path):
    (tmp_path / "enwik8").write_bytes(WIKI[:-2])  # ends inside the "𝔸z": without z and the last byte of 𝔸
    done = prepare("enwik8", "--source=enwik8", "--out_dir=out", "--partial", "--chars", cwd=tmp_path)
    meta, arrays = load(tmp_path / "out")
    text = {name: Tokenizer(meta).decode(tokens) for name, tokens in arrays.items()}
    whole = WIKI[:-5].decode()
    assert meta["vocab"] == ["<unk>"] + sorted(set(text["train"]))
    assert "𝔸" not in meta["vocab"] and "<unk>" in done.stdout and meta["lossless"] is False
    assert "".join(text.values()) == "".join(c if c in meta["vocab"] else "\ufffd" for c in whole)
    assert sum(split["bytes"] for split in meta["splits"].values()) == len(WIKI) - 5
    unknown = {name: int((tokens == 0).sum()) for name, tokens in arrays.items()}
    assert {name: split["unknown"] for name, split in meta["splits"].items()} == unknown and unknown["test"] > 0


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1 << 20])
def test_enwik8_cuts_are_whole_characters(step, monkeypatch):
    monkeypatch.setattr(enwik8, "STEP", step)
    for length in range(len(WIKI) - 120, len(WIKI) + 1):
        at = enwik8.cuts(WIKI[:length], True)
        assert all(WIKI[a:b].decode() is not None for a, b in zip(at, at[1:]))
        assert 0 <= at[1] - length * 90 // 100 < 4 and 0 <= at[2] - length * 95 // 100 < 4 and 0 <= length - at[3] < 4
    with shared.Progress("x") as progress:
        decoded = [chr(p) for points in enwik8.code_points(WIKI, 0, len(WIKI), progress) for p in points]
    assert "".join(decoded) == WIKI.decode()


def test_folders_of_enwik8_are_two(tmp_path):
    """--chars is another folder by default, so neither overwrites the other."""
    seen = []
    for argv in ([], ["--chars"], ["--out_dir", "x", "--chars"]):
        args = shared.arguments("", argv, enwik8.HERE, more=lambda p: p.add_argument("--chars", action="store_true"),
                                name=lambda args: "enwik8_chars" if args.chars else "enwik8")
        seen.append(args.out_dir)
    assert seen == [ROOT / "data/enwik8", ROOT / "data/enwik8_chars", Path("x")]


# ---------------------------------------------------------------------------------------------------
# IMDb

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
    found = {}
    for split in meta["splits"]:
        offsets, tokens = arrays[split + ".offsets"], arrays[split].tolist()
        labels = arrays.get(split + ".labels", [None] * (len(offsets) - 1))
        for a in offsets[:-1]:
            assert tokens[a] == meta["mark"]
        assert tokens.count(meta["mark"]) == len(offsets) - 1  # no text encodes to the mark
        found[split] = [(tokens[a + 1 : b], label) for a, b, label in zip(offsets, offsets[1:], labels)]
    return found, meta


def texts_of(folder):
    found, meta = documents(folder)
    decode = Tokenizer(meta).decode
    return {split: [(decode(ids), label) for ids, label in rows] for split, rows in found.items()}, meta


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
    import base64

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


def test_imdb_as_words_exactly():
    texts = {"train": ["B b a.", "a b"], "val": ["c a"], "test": [""], "unsup": ["c c c c"]}
    entries, encoded = imdb.as_words(texts, 2)
    assert entries == {"vocab_size": 4, "mark": 0, "vocab": ["<s>", "<unk>", "b", "a"]}
    assert {name: (ids.tolist(), list(ends)) for name, (ids, ends) in encoded.items()} == {
        "train": ([0, 2, 2, 3, 1, 0, 3, 2], [0, 5, 8]), "val": ([0, 1, 3], [0, 3]), "test": ([0], [0, 1]),
        "unsup": ([0, 1, 1, 1, 1], [0, 5]),
    }
    assert imdb.as_words({**texts, "train": ["b a d c"]}, 3)[0]["vocab"][2:] == ["a", "b", "c"]  # ties: the alphabet


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
    import tiktoken

    top, folders = made
    meta, _ = load(folders["bytes"])
    own = tiktoken.Encoding("gpt2", pat_str=r"\s|\S+", mergeable_ranks={bytes([b]): b for b in range(256)},
                            special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: own)
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


@pytest.mark.parametrize("make, said", [
    (lambda f: {}, "reviews in train/pos, found 0"),
    (lambda f: {"aclImdb/train/pos": b"x"}, "reviews in train/pos, found 0"),
    (lambda f: {n: d for n, d in f.items() if "unsup/" not in n}, "expected 50,000 reviews in train/unsup, found 0"),
    (lambda f: change(f, train__urls_neg=None), "expected 40 lines in train/urls_neg.txt, one for each"),
    (lambda f: change(f, test__pos__3_7=None), "expected 39 lines in test/urls_pos.txt, one for each review in test/pos"),
    (lambda f: change(change(f, test__pos__3_7=None), test__pos__77_7=b"x"), "found no review 3"),
    (lambda f: f | {"copy/train/pos/3_8.txt": b"x"}, "train/pos holds review 3 twice"),
    (lambda f: f | {"aclImdb/train/neg/3_0.txt": b"\xff"}, "expected UTF-8"),
], ids="empty nothing no-unsup no-urls fewer-files wrong-number twice not-utf8".split())
def test_imdb_refused(tmp_path, make, said):
    files = make(reviews(40, 8))
    source = pack(files, tmp_path / "a.zip") if files else tmp_path / "a.zip"
    if not files:
        source.mkdir()
    done = prepare("imdb", "--source", source, "--partial", "--out_dir=out", cwd=tmp_path, code=2)
    assert said in done.stderr and untouched(tmp_path / "out")


def test_imdb_partial_has_to_be_asked_for(made, tmp_path):
    done = prepare("imdb", "--source", made[0] / "a.tar.gz", "--out_dir=out", cwd=tmp_path, code=2)
    assert "expected 12,500 reviews in train/pos, found 40" in done.stderr and "--partial" in done.stderr
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes((made[0] / "a.tar.gz").read_bytes()[:-3000])
    done = prepare("imdb", "--source", cut, "--partial", "--out_dir=out", cwd=tmp_path, code=2)
    assert "cut.tar.gz cannot be read to its end" in done.stderr and untouched(tmp_path / "out")


@pytest.mark.parametrize("options, said", [
    (["--tokenizer=bytes", "--vocab_size=300"], "bytes has a vocabulary of its own"),
    (["--tokenizer=bpe", "--vocab_size=100"], "expected at least 258 for bpe, got 100"),
    (["--vocab_size=0"], "expected at least 1 for words, got 0"),
])
def test_imdb_options(options, said):
    with pytest.raises(UserError, match=said):
        imdb.main(options)


# ---------------------------------------------------------------------------------------------------
# downloads

BODY = bytes(range(256)) * 4000
DIGEST = "sha256:" + hashlib.sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """/file resumes; /plain does not; /cut breaks off; /broken is an error; /other sends something else."""

    asked = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        Server.asked.append((self.path, wanted))
        if self.path == "/broken":
            self.send_error(503)
            return
        body = b"<html>sign in</html>" if self.path == "/other" else BODY
        start = int(wanted[6:-1]) if wanted and self.path != "/plain" else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            sent = start + 1 if self.path == "/shifted" else start
            self.send_header("Content-Range", f"bytes {sent}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : len(body) // 2] if self.path == "/cut" else body[start:])

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    Server.asked.clear()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("size", [len(BODY), None])
@pytest.mark.parametrize("digest", [DIGEST, "md5:" + hashlib.md5(BODY).hexdigest()])
def test_download(server, tmp_path, size, digest):
    path = tmp_path / "a.zip"
    assert shared.download(f"{server}/file", path, size, digest) == path
    assert path.read_bytes() == BODY and [f.name for f in tmp_path.iterdir()] == ["a.zip"]
    shared.download(f"{server}/file", path, size, digest)
    assert Server.asked == [("/file", None)]  # the second time it was there


@pytest.mark.parametrize("where, ranges", [
    ("/file", ["bytes=1000-"]), ("/plain", ["bytes=1000-"]),
], ids=["resumes", "server-does-not"])
def test_download_goes_on(server, tmp_path, where, ranges):
    (tmp_path / "a.part").write_bytes(BODY[:1000])
    shared.download(server + where, tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY and [r for _, r in Server.asked] == ranges
    assert not (tmp_path / "a.part").exists()


def test_download_breaks_off_and_goes_on(server, tmp_path):
    with pytest.raises(UserError, match="broke off after 5..,... bytes .*run again to go on.*--source"):
        shared.download(f"{server}/cut", tmp_path / "a", len(BODY), DIGEST)
    assert [f.name for f in tmp_path.iterdir()] == ["a.part"]
    have = (tmp_path / "a.part").stat().st_size
    assert have > 500_000
    shared.download(f"{server}/file", tmp_path / "a", None, DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY and Server.asked[-1] == ("/file", f"bytes={have}-")


def test_download_of_a_part_that_is_whole(server, tmp_path):
    for size, asked in ((len(BODY), []), (None, [("/file", f"bytes={len(BODY)}-")])):
        Server.asked.clear()
        (tmp_path / "a.part").write_bytes(BODY)
        shared.download(f"{server}/file", tmp_path / "a", size, DIGEST)
        assert (tmp_path / "a").read_bytes() == BODY and Server.asked == asked
        (tmp_path / "a").unlink()


@pytest.mark.parametrize("part", [b"wrong" * 100, BODY + b"too long"])
def test_download_of_a_wrong_part(server, tmp_path, part):
    (tmp_path / "a.part").write_bytes(part)
    try:
        shared.download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    except UserError as error:  # its beginning was wrong: seen at the end, thrown away, right the next time
        assert "expected sha256" in str(error) and "run again" in str(error) and not list(tmp_path.iterdir())
        shared.download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY


@pytest.mark.parametrize("where, size, digest, said", [
    ("/other", None, DIGEST, "expected sha256 .*, got "),
    ("/other", len(BODY), DIGEST, r"expected 1,024,000 bytes, got 20"),
    ("/file", 1000, None, r"expected 1,000 bytes, got "),
    ("/broken", None, DIGEST, "answered 503 .*try later.*--source"),
], ids="digest size too-long error".split())
def test_download_refused(server, tmp_path, where, size, digest, said):
    with pytest.raises(UserError, match=said):
        shared.download(server + where, tmp_path / "a", size, digest)
    assert not list(tmp_path.iterdir())


def test_download_of_another_range(server, tmp_path):
    (tmp_path / "a.part").write_bytes(BODY[:1000])
    with pytest.raises(UserError, match="asked for the bytes from 1,000, the server sent 'bytes 1001-"):
        shared.download(f"{server}/shifted", tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a.part").read_bytes() == BODY[:1000]


def test_download_without_a_server(tmp_path):
    with pytest.raises(UserError, match="broke off before the first byte .*ConnectionError"):
        shared.download("http://127.0.0.1:9/x", tmp_path / "a", 10, DIGEST)
    assert not list(tmp_path.iterdir())


def test_download_onto_a_full_disk(server, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not write .*a.part: File too large; run again to go on, or give a local copy"):
            shared.download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    shared.download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY and Server.asked[-1] == ("/file", "bytes=100000-")


def test_download_replaces_a_wrong_file(server, tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"from elsewhere")
    shared.download(f"{server}/file", tmp_path / "a", len(BODY), DIGEST)
    assert (tmp_path / "a").read_bytes() == BODY and "expected 1,024,000 bytes, got 14" in capsys.readouterr().err


def test_a_script_downloads_checks_and_prepares(server, tmp_path, monkeypatch):
    monkeypatch.setattr(enwik8, "URL", f"{server}/file")
    monkeypatch.setattr(enwik8, "HERE", tmp_path)
    monkeypatch.setattr(enwik8, "SIZE", len(BODY))
    monkeypatch.setattr(enwik8, "DIGEST", DIGEST)
    monkeypatch.setattr(enwik8, "BYTES", len(BODY))
    enwik8.main(["--out_dir", str(tmp_path / "out")])
    meta, arrays = load(tmp_path / "out")
    assert meta["partial"] is False and meta["source"]["file"] == "enwik8.zip" and meta["source"]["bytes"] == len(BODY)
    assert arrays["train"].tobytes() == BODY[: len(BODY) * 90 // 100]


# ---------------------------------------------------------------------------------------------------
# the rest


def test_progress_off_a_terminal_is_sparse(capsys):
    with shared.Progress("working", 1000, "things") as progress:
        for _ in range(1000):
            progress.add(1)
    assert capsys.readouterr().err.splitlines() == ["working ...", "working: 1,000 of 1,000 things, 0 s"]


def test_dtypes():
    assert [shared.little(n).str for n in (2, 256, 257, 65536, 65537)] == ["|u1", "|u1", "<u2", "<u2", "<u4"]


@pytest.mark.parametrize("name", ["toy", "shakespeare_char", "stdlib", "enwik8", "imdb"])
def test_help(name, tmp_path):
    shown = prepare(name, "--help", cwd=tmp_path).stdout
    assert f"python data/{name}/prepare.py" in shown and "--source" in shown and "--out_dir" in shown
    assert ("--partial" in shown) == (name not in ("toy", "stdlib"))


def test_what_is_written_is_not_committed():
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    made = ["data/imdb/train.bin", "data/imdb/meta.json", "data/imdb/a.tar.gz", "data/imdb/a.tar.gz.part",
            "data/enwik8_chars/x", "data/imdb.part-abc/x", "data/shakespeare_char/input.txt", "data/enwik8/enwik8.zip"]
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", *made], capture_output=True, text=True).stdout
    assert ignored.split() == made
    kept = ["data/imdb/prepare.py", "data/common.py"]
    assert not subprocess.run(["git", "-C", str(ROOT), "check-ignore", *kept], capture_output=True, text=True).stdout
