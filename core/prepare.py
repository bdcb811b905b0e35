"""What the prepare.py scripts share: their arguments, where the source comes from, how it is read and
checked, and how a folder of tokens is written so that it never looks finished when it is not.

Everything that can be wrong with a user's file ends as a UserError (or an OSError of the system),
which `run` prints as one line. The format of a finished folder is described at `write`.
"""

from core import startup  # first: it handles a missing package

import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import signal
import stat
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np

from core import ROOT
from core.config import UserError, run_main, short_repr
from core.meta import FORMAT, PARTS, files_of, read_meta


def run_script(main):
    """Calls main(argv) as a script: errors are one line on stderr and exit 2, Ctrl-C is exit 130, no traceback."""

    def end(number, frame):  # as an exception, so that temporary folders are removed on the way out
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    stopped = "stopped: nothing was written (what was downloaded is kept, run again to go on)"
    run_main(lambda: main(sys.argv[1:]), stopped)


def path_of(text):
    """The Path of an option's text; an empty one, which would be the working folder, is refused."""
    if not text:
        raise UserError("--source and --out_dir expect a path, got nothing: give one, or leave the option out")
    return Path(text)


def arguments(doc, argv, here, partial="", more=None, name=None):
    """The parsed options of a script.

    doc: its docstring, for --help; argv: list of str; here: Path of the script's folder, where it writes unless told.
    partial: the published size, for --partial's help; empty where there is none, and then no such option.
    more: a function that adds options to the parser. name: a function of the options that names another folder beside.
    Returns a namespace with source (Path or None), out_dir (Path), partial (bool) and what `more` added.
    """
    plain = argparse.RawDescriptionHelpFormatter  # keeps the docstring's lines
    parser = argparse.ArgumentParser(description=doc, formatter_class=plain, allow_abbrev=False)
    parser.set_defaults(partial=False)
    parser.add_argument("--source", type=path_of, metavar="FILE_OR_FOLDER",
                        help="a local copy: the plain file or folder, or a zip, gz, xz, bz2 or tar of it")
    parser.add_argument("--out_dir", type=path_of, metavar="FOLDER", help=f"where to write (default data/{here.name})")
    if partial:
        parser.add_argument("--partial", action="store_true",
                            help=f"accept a source smaller than the published {partial}; meta.json will say so")
    if more:
        more(parser)
    args = parser.parse_args(argv)
    args.out_dir = args.out_dir or (here.parent / name(args) if name else here)
    return args


# ---- progress --------------------------------------------------------------------------------


class Progress:
    """A line on stderr that is rewritten on a terminal, and a line every few seconds elsewhere.

    label: what is being done; total: how many units, or None; unit: their name, or "B" for bytes.
    """

    def __init__(self, label, total=None, unit="B"):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.terminal = sys.stderr.isatty()
        self.every = 0.2 if self.terminal else 5.0
        self.start = self.last = time.monotonic()
        if not self.terminal:
            print(f"{label} ...", file=sys.stderr, flush=True)

    def _show(self):
        mega = self.unit == "B"
        counts = [f"{n / 1e6:,.1f}" if mega else f"{n:,}" for n in (self.done, self.total) if n is not None]
        unit, seconds = "MB" if mega else self.unit, time.monotonic() - self.start
        line = f"{self.label}: {' of '.join(counts)} {unit}, {seconds:.0f} s"
        start, end = ("\r", "\x1b[K") if self.terminal else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)

    def add(self, n):
        """n more units are done."""
        self.done += n
        if (now := time.monotonic()) - self.last >= self.every:
            self.last = now
            self._show()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self._show()
        print(end="\n" if self.terminal else "", file=sys.stderr)


# ---- where the source comes from -------------------------------------------------------------


def digest_of(path, algorithm="sha256"):
    """The hexadecimal digest (str) of a file, read in pieces."""
    h = hashlib.new(algorithm)
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            h.update(piece)
    return h.hexdigest()


def identity(source):
    """What makes a source the same one, as a dict for meta.json: the base name, the size in bytes, and the sha256 of
    a file. A folder of 100,000 files is not read for this: its digest is over their names, sizes and times.
    """
    source = Path(source)
    if source.is_file():
        return {"file": source.name, "bytes": source.stat().st_size, "sha256": digest_of(source)}
    if not source.is_dir():
        raise UserError(f"--source {source}: there is no such file or folder; give the path of a local copy, "
                        "or leave --source out to download")
    h, total = hashlib.sha256(), 0
    for name, path in _folder(source):
        info = path.stat()
        total += info.st_size
        h.update(f"{name}\0{info.st_size}\0{info.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return {"file": source.resolve().name, "bytes": total, "listing_sha256": h.hexdigest()}


def _verify(path, size, digest):
    """None if the file has the size (bytes or None) and the digest ("algorithm:hex" or None), else what is wrong."""
    if size is not None and (got := path.stat().st_size) != size:
        return f"expected {size:,} bytes, got {got:,}"
    if digest is not None:
        algorithm, want = digest.split(":")
        if (have := digest_of(path, algorithm)) != want:
            return f"expected {algorithm} {want}, got {have}"
    return None


def download(url, path, size=None, digest=None, timeout=60):
    """The file of `url` at `path` (Path), checked, and at once if it is there already.

    size: bytes, or None to take the server's word. digest: "sha256:..." or "md5:...", or None.
    It grows as NAME.part, which a later call continues where it stopped (HTTP Range), and gets its name only when
    size and digest are right. Raises UserError for whatever goes wrong.
    """
    if path.is_file():
        if (wrong := _verify(path, size, digest)) is None:
            return path
        print(f"{path.name} is there but is not the published file ({wrong}): downloading it again", file=sys.stderr)
        path.unlink()
    part = path.with_name(path.name + ".part")
    local = "or give a local copy with --source"
    have = part.stat().st_size if part.is_file() else 0
    if not have or have != size:
        size = _fetch(url, part, have, size, timeout, local)
    if (wrong := _verify(part, size, digest)) is not None:
        part.unlink()
        raise UserError(f"{url}: {wrong}; the file was removed: run again to start over, {local}")
    os.replace(part, path)
    return path


def _fetch(url, part, have, size, timeout, local):
    """Appends to `part`, which has `have` bytes, what is missing of `url`. Returns the size in bytes of the whole."""
    import requests

    if size is not None and have > size:
        have = 0
    # identity: a server that compresses on the way would make sizes and ranges mean something else
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            if answer.status_code == 416:  # the part is as long as the file, or longer: its digest will tell
                return size
            if answer.status_code not in (200, 206):
                raise UserError(f"{url}: the server answered {answer.status_code} {answer.reason}: try later, {local}")
            sent = answer.headers.get("Content-Range", "no Content-Range")
            if answer.status_code == 200:
                have = 0  # it does not resume: from the beginning
            elif not sent.startswith(f"bytes {have}-"):
                raise UserError(f"{url}: asked for the bytes from {have:,}, the server sent {sent!r}: "
                                f"remove {part.name} and run again, {local}")
            if size is None and "Content-Length" in answer.headers:
                size = have + int(answer.headers["Content-Length"])
            with Progress(f"downloading {part.name[:-5]}", size) as progress, open(part, "ab" if have else "wb") as f:
                progress.done = have
                for piece in answer.iter_content(1 << 13):  # where it breaks off, what has come of a piece is lost
                    f.write(piece)
                    progress.add(len(piece))
                    if size is not None and progress.done > size:
                        break  # more than was published: the check of the size will say so
    except requests.RequestException as error:
        got = part.stat().st_size if part.is_file() else 0
        came = f"after {got:,} bytes" if got else "before the first byte"
        raise UserError(f"{url}: the download broke off {came} ({type(error).__name__}): run again to go on, "
                        f"{local}") from error
    except OSError as error:  # of the disk; those of the network are all RequestExceptions
        raise UserError(f"could not write {part}: {error.strerror}; run again to go on, {local}") from error
    return size


# ---- reading a source: always in memory, never extracted, so no member's name can reach the disk ---

_OPENERS = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\0", lzma.open), (b"BZh", bz2.open))
SKIPPED = 1 << 30  # bytes of a tar's file that nobody asked for; it is read all the same, to get to the next one
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, OSError, RuntimeError)


@contextmanager
def _whole(source):
    """Turns whatever a reader of archives raises on a cut or damaged one into a UserError."""
    try:
        yield
    except _BROKEN as error:
        raise UserError(f"{source.name} cannot be read to its end ({type(error).__name__}: {error}): "
                        "it is cut, damaged or not what its name says; copy or download it again") from error


def _open(path):
    """The decompressed content of a file (or the file itself) as a binary stream, by its first bytes."""
    with open(path, "rb") as f:
        head = f.read(8)
    opener = next((opener for magic, opener in _OPENERS if head.startswith(magic)), open)
    return opener(path, "rb")


def _folder(source):
    """(relative posix name, Path) of the files under a folder, ordered by name. Links to folders are not followed."""
    found = []
    for folder, _, files in os.walk(source):
        inside = os.path.relpath(folder, source).replace(os.sep, "/")
        found += [(name if inside == "." else f"{inside}/{name}", Path(folder, name)) for name in files]
    return sorted((pair for pair in found if pair[1].is_file()), key=lambda pair: pair[0])


def _tame(name):
    """A member's name with forward slashes and no leading "./", or None if it points outside its archive."""
    name = name.replace("\\", "/")
    if name.startswith("/") or name[1:2] == ":" or ".." in PurePosixPath(name).parts:
        return None
    return PurePosixPath(name).as_posix()


def _read(stream, name, limit):
    """All of a stream as bytes; UserError beyond `limit` bytes, whatever its header promised."""
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{short_repr(name)} holds more than the {limit:,} bytes expected: this is another file; check --source")
    return data


def _claims(size, name, limit):
    """Refuses a file that by what its header or folder says has more than `limit` bytes, before anything of it is read."""
    if not 0 <= size <= limit:
        raise UserError(f"{short_repr(name)} claims {size:,} bytes, more than the {limit:,} bytes expected: this is another file; check "
                        "--source")


def _is_tar(path):
    with _open(path) as f:
        block = f.read(512)
    try:
        return bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
    except tarfile.TarError:
        return False


def members(source, wanted=lambda name: True, limit=1 << 26):
    """Yields (name, bytes) of each regular file in `source` that `wanted(name)` asks for: a folder, a zip, a tar
    (plain, gz, xz, bz2), or a single file, compressed or not, named without the compression's suffix.

    Archives are read once, in their order, in memory. Links, devices and names that point outside are ignored.
    limit: bytes that one file may hold. Raises UserError for a missing, empty, cut or damaged source.
    """
    source = Path(source)
    if source.is_dir():
        for name, path in _folder(source):
            if wanted(name):
                _claims(path.stat().st_size, name, limit)
                with open(path, "rb") as f:
                    yield name, _read(f, name, limit)
        return
    if not source.is_file():
        raise UserError(f"{source}: there is no such file or folder")
    if source.stat().st_size == 0:
        raise UserError(f"{source.name} is empty: copy or download it again")
    with open(source, "rb") as f:
        head = f.read(4)
    if head == b"PK\x03\x04":
        with _whole(source), zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                name = _tame(info.filename)
                plain = not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
                if name is not None and plain and wanted(name):
                    _claims(info.file_size, name, limit)
                    with archive.open(info) as f:
                        yield name, _read(f, name, limit)
        return
    with _whole(source):
        if not _is_tar(source):
            name = source.stem if source.suffix in (".gz", ".xz", ".bz2") else source.name
            if wanted(name):
                _claims(source.stat().st_size, source.name, limit)
                with _open(source) as f:
                    yield name, _read(f, name, limit)
            return
        with _open(source) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # it would keep a record of every member that went by
                name = _tame(info.name)
                asked = name is not None and info.isreg() and wanted(name)
                _claims(info.size, info.name, limit if asked else SKIPPED)
                if asked:
                    yield name, _read(archive.extractfile(info), name, limit)
            while stream.read(1 << 20):  # to the end, where gzip, xz and bz2 keep their checksums
                pass


def single(source, names, limit):
    """The content (bytes) of the one file that `source` is or holds; among several, of the one with a name in `names`.
    limit: the most bytes it may have. Raises UserError if there is no such file or it is longer.
    """
    there = []
    for _ in members(source, wanted=lambda name: there.append(name)):  # append gives None: nothing is asked for
        pass
    chosen = [name for name in there if PurePosixPath(name).name in names] if len(there) > 1 else there
    if len(chosen) != 1:
        raise UserError(f"{Path(source).name} holds {len(there):,} files, {len(chosen)} of them named "
                        f"{' or '.join(names)}: expected one; give the file itself with --source")
    (_, data), = members(source, wanted=lambda name: name == chosen[0], limit=limit)
    return data


def utf8(data, name):
    """`data` (bytes) decoded; UserError with the place where it is not UTF-8. name: the file's, for the message."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: expected UTF-8 text, found {data[error.start:error.end]!r} at byte {error.start:,}: "
                        "it is damaged or another file; check --source") from error


def check_size(source, found, expected, partial, unit="bytes"):
    """Raises UserError unless found == expected, or found is less and `partial` allows it. Returns found < expected."""
    if found == expected or (partial and 0 < found < expected):
        return found < expected
    way = "give the whole file, or --partial to go on with this one" if 0 < found < expected else "check --source"
    raise UserError(f"{Path(source).name}: expected {expected:,} {unit}, found {found:,}: {way}")


# ---- the finished folder ---------------------------------------------------------------------


def finished(args, options, source=None):
    """Whether args.out_dir is whole and was made with these options from this source; if so, says so with its counts.

    options: the dict that will stand in meta.json. source: the identity to compare with, by default that of
    args.source, and without one any source will do. Raises UserError, before any long work, for a folder that `write`
    would refuse.
    """
    replaceable(args.out_dir)
    if args.source is not None and source is None:
        source = identity(args.source)
    try:
        meta = read_meta(args.out_dir)
    except (OSError, UserError):
        return False
    # a renamed copy is the same source; meta may know more of a source than its identity
    same = all(meta["source"].get(key) == value for key, value in (source or {}).items() if key != "file")
    if not same or meta.get("options") != options or meta.get("partial", True) and not args.partial:
        return False
    for name, (size, digest) in files_of(meta).items():
        path = args.out_dir / name
        if not path.is_file() or _verify(path, size, digest and f"sha256:{digest}"):
            return False
    (args.out_dir / _MOVING).unlink(missing_ok=True)  # of a run that was ended right after its last file
    print(f"{args.out_dir.name} is already prepared like this: nothing to do (to redo it, remove its train.bin)")
    report(meta)
    return True


def report(meta):
    """Prints the counts of a finished folder."""
    part = ", PARTIAL" if meta["partial"] else ""
    print(f"{meta['name']}: {meta['tokenizer']}, vocabulary {meta['vocab_size']:,}, {meta['dtype']}{part}")
    shown = {"documents": "documents", "positive": "positive", "movies": "movies", "unknown": "unknown",
             "held_out_documents": "documents of val's movies"}
    for name, split in meta["splits"].items():
        more = "".join(f", {split[key]:,} {text}" for key, text in shown.items() if key in split)
        print(f"  {name:5s} {split['tokens']:>12,} tokens, {split['bytes']:>12,} bytes{more}")


def little(vocab_size):
    """The smallest unsigned little-endian dtype that holds ids below vocab_size."""
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


_OURS = re.compile(r"[\w-]+(\.offsets|\.labels)?\.bin", re.ASCII)  # what `write` writes, for splits of any name
_USUAL = re.compile(r"(train|val|test|unsup)(\.offsets|\.labels)?\.bin")
_MOVING = "meta.json.part"  # the names of the files that are being replaced, a JSON list, in a folder that is not finished


def _names(out_dir, read):
    """The names that `read(out_dir)` gives, a set; None where its file is missing or damaged."""
    try:
        return set(read(out_dir))
    except (OSError, UserError, ValueError, TypeError, RecursionError):
        return None


def _moving(out_dir):
    """The list `_MOVING`. Raises OSError where there is none, ValueError where it is not one that `write` wrote."""
    names = json.loads((out_dir / _MOVING).read_text("utf-8"))
    if type(names) is not list or not all(type(name) is str and _OURS.fullmatch(name) for name in names):
        raise ValueError("it is no list of files that `write` writes")
    return names


def _seems_ours(path):
    """Whether a meta.json that is damaged may be one of `write`'s: it is no JSON, or some of its entries are there."""
    try:
        return "splits" in json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return True
    except (OSError, TypeError):
        return False


def replaceable(out_dir):
    """The names of the files in out_dir that `write` wrote, a set: it may replace and remove them, and no others.

    A finished folder's meta.json names them; where `write` was ended half-way, the list `_MOVING` does. Without either,
    files of the usual names count in a folder of data/, which is made for them, and where meta.json is damaged and there
    is nothing else. Raises UserError for any other folder that is not empty.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is a file: give a folder")
    there = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    finished, moving = _names(out_dir, lambda folder: files_of(read_meta(folder))), _names(out_dir, _moving)
    if finished is not None or moving is not None:
        return (finished or set()) | (moving or set())
    usual = {name for name in there if _USUAL.fullmatch(name)}
    at_home = out_dir.resolve().parent == ROOT / "data"
    damaged = usual and there == usual | {"meta.json"} and _seems_ours(out_dir / "meta.json")
    if there and not at_home and not damaged:
        raise UserError(f"--out_dir {out_dir} holds {short_repr(min(there))} and no meta.json that names it: it is a folder of "
                        "something else; give a new or an empty one")
    return usual


def _remove_leftovers(out_dir):
    """Removes the temporary folders of runs that were killed outright; a younger one may be at work."""
    name = re.compile(re.escape(out_dir.name) + r"\.part-[a-z0-9_]{8}")
    for old in out_dir.parent.iterdir():
        if name.fullmatch(old.name) and old.is_dir() and time.time() - old.stat().st_mtime > 3600:
            if all(_OURS.fullmatch(path.name) or path.name in ("meta.json", _MOVING) for path in old.iterdir()):
                shutil.rmtree(old, ignore_errors=True)


def write(out_dir, meta, splits):
    """Writes a finished folder and prints its counts.

    meta: dict with name, kind, tokenizer, vocab_size, mark, options, source, split_rule, ... (see below).
    splits: {"train": {...}, ...}, each with `tokens` (integers, (tokens,)) and `bytes` (the UTF-8 bytes they stand
    for, a mark counting one), and optionally `offsets` (documents + 1,), `labels` (documents,) and plain counts.

    The folder then holds, for each split, SPLIT.bin (flat, the smallest unsigned type, little-endian),
    SPLIT.offsets.bin (int64; document n is tokens[offsets[n]:offsets[n + 1]]), SPLIT.labels.bin (uint8; 1 = positive),
    and meta.json, which tells the sha256 of each. All is written to a folder beside and moved in, meta.json last: it
    marks a finished folder. Other files in out_dir stay as they are. Raises UserError for a folder of something else,
    and where the system refuses to write.
    """
    out_dir, dtype = Path(out_dir).absolute(), little(meta["vocab_size"])
    before, temporary = replaceable(out_dir), None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out_dir)
        temporary = Path(tempfile.mkdtemp(prefix=f"{out_dir.name}.part-", dir=out_dir.parent))
        files, counts = [], {}
        for name, split in splits.items():
            plain = {key: int(value) for key, value in split.items() if key not in PARTS}
            counts[name] = {"tokens": len(split["tokens"]), **plain}
            for (part, (suffix, key)), kind in zip(PARTS.items(), (dtype, "<i8", "u1")):
                if part in split:
                    files.append(f"{name}{suffix}.bin")
                    with open(temporary / files[-1], "wb") as file:  # numpy's tofile does not say why it could not write
                        file.write(np.ascontiguousarray(split[part], dtype=kind))
                    counts[name][key] = digest_of(temporary / files[-1])
        meta = {"format": FORMAT, **meta, "dtype": dtype.name, "splits": counts}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if foreign := [name for name in files if name not in before and os.path.lexists(out_dir / name)]:
            raise UserError(f"--out_dir {out_dir} holds {foreign[0]}, which its meta.json does not name: move it away, or give "
                            "another folder")
        _move_in(temporary, out_dir, files, before)
    except OSError as error:
        raise UserError(f"could not write {out_dir}: {error.strerror or error}; when that is mended, run it again") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    report(meta)


def _move_in(temporary, out_dir, files, before):
    """Moves `files` and meta.json into out_dir, where those named `before` are replaced or removed. Ended half-way, it
    leaves a folder without meta.json, of which `replaceable` still tells what is whose."""
    (temporary / _MOVING).write_text(json.dumps(sorted({*files, *before})))
    out_dir.mkdir(exist_ok=True)
    os.replace(temporary / _MOVING, out_dir / _MOVING)
    (out_dir / "meta.json").unlink(missing_ok=True)  # from here until it is back the folder is not finished
    for name in before:
        (out_dir / name).unlink(missing_ok=True)
    for name in [*files, "meta.json"]:
        os.replace(temporary / name, out_dir / name)
    (out_dir / _MOVING).unlink()
