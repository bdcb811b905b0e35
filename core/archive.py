"""The source of a data set: a folder, an archive or a file, compressed or not.

Archives are read in memory and never extracted, so no member's name can reach the disk. Everything that can be wrong
with a source ends as a UserError, or as an OSError of the system.
"""

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from functools import partial
from pathlib import Path, PurePosixPath

from core.config import UserError, short_repr
from core.meta import digest_of

OPENERS = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\0", lzma.open), (b"BZh", bz2.open))  # by a file's first bytes
SKIPPED_LIMIT = 1 << 30  # bytes of a member of a tar: those not asked for are read too, to get to the next one
# What the readers of archives raise for a damaged one.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, OSError, RuntimeError)


def identity(source, wanted=lambda name: True):
    """A dict for meta.json that tells whether two sources are the same: base name, size in bytes, and sha256 of a file.

    The digest of a folder is over the names, sizes and times of its files for which `wanted(name)` holds: 100,000 files
    would take long to read.
    """
    source = Path(source)
    if source.is_file():
        return {"file": source.name, "bytes": source.stat().st_size, "sha256": digest_of(source)}
    if not source.is_dir():
        raise UserError(f"--source {source}: there is no such file or folder; give the path of a local copy, "
                        "or leave --source out to download")
    hasher, total = hashlib.sha256(), 0
    for name, _, info in filter(lambda file: wanted(file[0]), folder_files(source)):
        total += info.st_size
        hasher.update(f"{name}\0{info.st_size}\0{info.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return {"file": source.resolve().name, "bytes": total, "listing_sha256": hasher.hexdigest()}


def members(source, wanted=lambda name: True, limit=1 << 26):
    """Yield (name, bytes) of each regular file in `source` for which `wanted(name)` holds.

    source: a folder, a zip, a tar (plain, gz, xz, bz2), or a single file, compressed or not, whose name is without the
    compression's suffix. An archive is read once, in its order. Links, devices and names that point outside are
    ignored. limit: bytes that one file may hold. Raises UserError for a missing, empty, cut or damaged source.
    """
    source = Path(source)
    with reading(source):
        for name, size, open_member in entries(source):
            if name is not None and wanted(name):
                check_limit(size, name, limit, "claims")
                with open_member() as file:
                    data = file.read(limit + 1)  # a header may claim less than there is
                check_limit(len(data), name, limit, "holds at least")
                yield name, data


def streams(source, wanted=lambda name: True, size=1 << 20):
    """`members` of any size: yield (name, iterator over the content in pieces of `size` bytes). A content must be read
    before the next file is asked for; it need not be read to its end."""
    source = Path(source)

    def pieces(open_member):
        with reading(source), open_member() as file:
            while data := file.read(size):
                yield data

    with reading(source):
        for name, _, open_member in entries(source):
            if name is not None and wanted(name):
                yield name, pieces(open_member)


@contextlib.contextmanager
def reading(source):
    """Raise UserError if `source` (Path) is missing or empty, or cannot be read within this context."""
    if not source.is_dir() and not source.is_file():
        raise UserError(f"{source}: there is no such file or folder")
    if source.is_file() and source.stat().st_size == 0:
        raise UserError(f"{source.name} is empty: copy or download it again")
    try:
        yield
    except OSError if source.is_dir() else DAMAGE as error:
        if source.is_dir():
            raise UserError(f"{error.filename or source} cannot be read ({error.strerror or error})") from error
        raise UserError(f"{source.name} cannot be read to its end ({type(error).__name__}: {error}): "
                        "it is cut, damaged or not what its name says; copy or download it again") from error


def single(source, names, limit):
    """The content (bytes) of the one file that `source` is or holds; of several files, of the one named as in `names`.

    limit: the most bytes it may have. Raises UserError if there is no such file or it is longer.
    """
    listed = []
    for _ in members(source, wanted=listed.append):  # append returns None: no content is read
        pass
    chosen = [name for name in listed if PurePosixPath(name).name in names] if len(listed) > 1 else listed
    if len(chosen) != 1:
        raise UserError(f"{Path(source).name} holds {len(listed):,} files, {len(chosen)} of them named "
                        f"{' or '.join(names)}: expected one; give the file itself with --source")
    (_, data), = members(source, wanted=lambda name: name == chosen[0], limit=limit)
    return data


def decode_utf8(data, name):
    """The text of `data` (bytes). name: the file's, for the UserError that says where it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: expected UTF-8 text, found {data[error.start:error.end]!r} at byte {error.start:,}: "
                        "it is damaged or another file; check --source") from error


def next_character(data, at):
    """The first position from `at` on that is not inside a character of UTF-8. data: bytes, or an mmap of them."""
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at


def check_size(source, size, expected, partial, unit="bytes"):
    """Whether `size` is less than expected. Raises UserError if it is more, or less without `partial`, or 0."""
    if size != expected and not (partial and 0 < size < expected):
        hint = "give the whole file, or --partial to go on with this one" if 0 < size < expected else "check --source"
        raise UserError(f"{Path(source).name}: expected {expected:,} {unit}, found {size:,}: {hint}")
    return size < expected


def entries(source):
    """Yield (name, claimed size in bytes, function that opens it) of each regular file in `source`. The name is None if
    it points outside its archive."""
    if source.is_dir():
        for name, path, info in folder_files(source):
            yield name, info.st_size, partial(open, path, "rb")
        return
    with open_decompressed(source) as stream:
        head = stream.read(tarfile.BLOCKSIZE)
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    yield safe_name(info.filename), info.file_size, partial(archive.open, info)
    elif is_tar_header(head):
        with open_decompressed(source) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # otherwise a record of every member is kept
                check_limit(info.size, info.name, SKIPPED_LIMIT, "claims")
                if info.isreg():
                    yield safe_name(info.name), info.size, partial(archive.extractfile, info)
            while stream.read(1 << 20):  # to the end, where gzip, xz and bz2 keep their checksums
                pass
    else:
        name = source.stem if source.suffix in (".gz", ".xz", ".bz2") else source.name
        yield name, source.stat().st_size, partial(open_decompressed, source)


def folder_files(source):
    """[(relative posix name, path, os.stat_result)] of a folder's regular files by name; folders that are links are
    skipped."""
    files = []
    for folder, _, names in os.walk(source):
        parent = os.path.relpath(folder, source).replace(os.sep, "/") + "/"
        for name in names:
            path = os.path.join(folder, name)
            if os.path.exists(path) and stat.S_ISREG((info := os.stat(path)).st_mode):
                files.append(((parent + name).removeprefix("./"), path, info))
    return sorted(files)


def safe_name(name):
    """A member's name with forward slashes and no leading "./", or None if it points outside its archive."""
    name = name.replace("\\", "/")
    outside = name.startswith("/") or name[1:2] == ":" or ".." in PurePosixPath(name).parts
    return None if outside else PurePosixPath(name).as_posix()


def check_limit(size, name, limit, verb):
    """Raise UserError unless 0 <= size <= limit. verb: how the size is known."""
    if not 0 <= size <= limit:
        raise UserError(f"{short_repr(name)} {verb} {size:,} bytes, more than the {limit:,} bytes expected: "
                        "this is another file; check --source")


def open_decompressed(path):
    """A file as a binary stream, decompressed if its first bytes say so."""
    with open(path, "rb") as file:
        head = file.read(8)
    return next((opener for magic, opener in OPENERS if head.startswith(magic)), open)(path, "rb")


def is_tar_header(block):
    try:
        return bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
    except tarfile.TarError:
        return False
