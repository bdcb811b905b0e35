"""data/stdlib and data/enwik8: which bytes become which tokens, and where the splits are cut."""

import hashlib
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from sources import load, pack, prepare, wrap

from core.download import Progress
from core.tokenizer import Tokenizer
from helpers import ROOT

enwik8 = importlib.import_module("data.enwik8.prepare")
stdlib = importlib.import_module("data.stdlib.prepare")

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
    with Progress("x") as progress:
        decoded = [chr(p) for points in enwik8.code_points(WIKI, 0, len(WIKI), progress) for p in points]
    assert "".join(decoded) == WIKI.decode()


def test_folders_of_enwik8_are_two(tmp_path):
    """--chars is another folder by default, so neither overwrites the other."""
    seen = [enwik8.parse(argv).out_dir for argv in ([], ["--chars"], ["--out_dir", "x", "--chars"])]
    assert seen == [ROOT / "data/enwik8", ROOT / "data/enwik8_chars", Path("x")]
