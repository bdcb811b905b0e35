"""Archives are read safely: links, names that point outside, sizes that are too large or forged, cut files."""

import os
import stat
import struct
import tarfile
import time
import zipfile

import pytest
from sources import PLAY, add, load, pack, prepare, wrap

from core.archive import members
from core.config import UserError


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
    assert list(members(source)) == [("good/input.txt", PLAY)]
    assert sorted(tmp_path.rglob("*")) == before
    prepare("shakespeare_char", "--source", source, "--partial", "--out_dir", inside / "out", cwd=inside)
    assert load(inside / "out")[0]["source"]["content_bytes"] == len(PLAY)


@pytest.mark.parametrize("name", ["bomb.zip", "bomb.tar.xz", "bomb.gz", "folder"])
def test_size_bound(tmp_path, name):
    source = wrap(b"\0" * 2_000_000, tmp_path / name)
    with pytest.raises(UserError, match="more than the 1,000 bytes"):
        list(members(source, limit=1000))


def test_cut_tars_and_names_that_lie(tmp_path):
    files = {f"{n}.txt": os.urandom(2000) for n in range(50)}
    for name in ("a.tar.gz", "a.tar.xz", "a.tar.bz2", "a.zip", "a.tar"):
        whole = pack(files, tmp_path / name)
        assert dict(members(whole)) == files
        lying = whole.rename(tmp_path / f"{name}.txt")
        assert dict(members(lying)) == files
        lying.write_bytes(lying.read_bytes()[: 60_000 if name == "a.tar" else -2000])
        with pytest.raises(UserError, match="cannot be read to its end"):
            list(members(lying))
    # the checksum stands after the tar's own end: it is looked at all the same
    whole = pack(files, tmp_path / "b.tar.gz")
    whole.write_bytes(whole.read_bytes()[:-8] + bytes(8))
    with pytest.raises(UserError, match="cannot be read to its end"):
        list(members(whole))


# ---- headers that claim ------------------------------------------------------------------------


def tar_that_claims(path, name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    return path


def zip_that_claims(path, name, size):
    """Its central directory says another size than is there."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"hello\n")
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2")
    data[place + 24 : place + 28] = struct.pack("<I", size)
    path.write_bytes(data)
    return path


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    return path


@pytest.mark.parametrize("make", [
    lambda path: tar_that_claims(path, "toy.txt", 10**12), lambda path: tar_that_claims(path, "other", 10**12),
    lambda path: tar_that_claims(path, "../toy.txt", 10**12), lambda path: tar_that_claims(path, "toy.txt", 1 << 21),
    lambda path: zip_that_claims(path, "toy.txt", 2**32 - 2), sparse, lambda path: sparse(path).parent,
], ids=["tar", "tar, another file", "tar, outside", "tar, small", "zip", "sparse", "folder"])
def test_a_size_that_is_claimed_is_refused_at_once(tmp_path, make):
    began = time.monotonic()
    with pytest.raises(UserError, match="claims [0-9,]+ bytes, more than the [0-9,]+ bytes expected"):
        list(members(make(tmp_path / "source"), lambda name: name != "other", 1 << 20))
    assert time.monotonic() - began < 2
