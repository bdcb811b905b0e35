"""What the prepare.py scripts share: their arguments, and the folder of tokens that they write.

`write` describes the format. A folder never looks finished before it is. Everything that can be wrong with a user's
files ends as a UserError, or an OSError of the system, which `run_script` prints as one line.
"""

from core import startup  # first: it handles a missing package

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from core import ROOT
from core.archive import identity
from core.config import UserError, run_main, short_repr
from core.meta import FORMAT, PARTS, digest_of, files_of, mismatch, read_meta

OUR_FILE = re.compile(r"[\w-]+(\.offsets|\.labels|\.distances)?\.bin", re.ASCII)  # what `write` writes, of any split
USUAL_FILE = re.compile(r"(train|val|test|unsup)(\.offsets|\.labels|\.distances)?\.bin")
MOVING = "meta.json.part"  # a JSON list of the files that are being replaced, in a folder that is not finished


def run_script(main):
    """Call main(argv) as a script; see `run_main`. SIGTERM removes temporary folders."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    stopped = "stopped: nothing was written (what was downloaded is kept, run again to go on)"
    run_main(lambda: main(sys.argv[1:]), stopped)


def path_argument(text):
    """The Path of an option's text. Raises UserError for an empty one, which would be the working folder."""
    if not text:
        raise UserError("--source and --out_dir expect a path, got nothing: give one, or leave the option out")
    return Path(os.path.expanduser(text))  # the shell leaves the ~ of --source=~/notes as it is


def make_parser(doc, out_dir, partial=""):
    """The argparse parser of a script, with --source, --out_dir (Paths or None) and --partial; it may add others.

    doc: the script's docstring, for --help; out_dir: the default, or None for one that depends on other options.
    partial: the published size, for the help of --partial; empty: no such option.
    """
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=as_written, allow_abbrev=False)
    parser.set_defaults(partial=False)
    parser.add_argument("--source", type=path_argument, metavar="FILE_OR_FOLDER",
                        help="a local copy: the plain file or folder, or a zip, gz, xz, bz2 or tar of it")
    parser.add_argument("--out_dir", type=path_argument, metavar="FOLDER", default=out_dir,
                        help="where to write (default: this script's folder, or one beside it)")
    if partial:
        parser.add_argument("--partial", action="store_true",
                            help=f"accept a source smaller than the published {partial}; meta.json will say so")
    return parser


def add_tokenizer(parser, kinds):
    """Add --tokenizer and --vocab_size. kinds: the tokenizers to choose from, the default first."""
    parser.add_argument("--tokenizer", choices=kinds, default=kinds[0])
    parser.add_argument("--vocab_size", type=int, metavar="N",
                        help="words: the N most frequent, besides <s> and <unk> (default 10000); "
                             "bpe: N tokens in all (default 8192)")


def tokenizer_options(args):
    """The options of `add_tokenizer` as a dict for meta.json. Raises UserError for a wrong vocab_size."""
    default, least = {"words": (10_000, 1), "bpe": (8192, 258)}.get(args.tokenizer, (None, None))
    if default is None:
        if args.vocab_size is not None:
            raise UserError(f"--vocab_size: {args.tokenizer} has a vocabulary of its own; leave the option out")
        return {"tokenizer": args.tokenizer}
    size = default if args.vocab_size is None else args.vocab_size
    if size < least:
        raise UserError(f"--vocab_size: expected at least {least} for {args.tokenizer}, got {size}")
    return {"tokenizer": args.tokenizer, "vocab_size": size}


def token_dtype(vocab_size):
    """The smallest unsigned little-endian dtype that holds ids below vocab_size."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def finished(args, options, source=None):
    """Whether args.out_dir is complete and was made with these options from this source; if so, its counts are printed.

    options: the dict that will be in meta.json. source: the identity to compare with; the default is that of
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
    # A renamed copy is the same source. Meta may hold more of a source than its identity.
    same = all(meta["source"].get(key) == value for key, value in (source or {}).items() if key != "file")
    if not same or meta.get("options") != options or meta.get("partial", True) and not args.partial:
        return False
    for name, (size, digest) in files_of(meta).items():
        path = args.out_dir / name
        if not path.is_file() or mismatch(path, size, digest and f"sha256:{digest}"):
            return False
    (args.out_dir / MOVING).unlink(missing_ok=True)  # of a run that was killed right after its last file
    print(f"{args.out_dir.name} is already prepared like this: nothing to do (to redo it, remove its train.bin)")
    print_counts(meta)
    return True


def print_counts(meta):
    """Print the counts of a finished folder."""
    partial = ", PARTIAL" if meta["partial"] else ""
    print(f"{meta['name']}: {meta['tokenizer']}, vocabulary {meta['vocab_size']:,}, {meta['dtype']}{partial}")
    for name, split in meta["splits"].items():
        counts = [f"{n:>12,} {key.replace('_', ' ')}" for key, n in split.items() if type(n) is int]
        print(f"  {name:5s} {', '.join(counts)}")


def replaceable(out_dir):
    """The names of the files in out_dir that `write` wrote, a set: it may replace and remove them, and no others.

    The list MOVING names them if `write` was killed half-way, meta.json in a finished folder. Without either, files of
    the usual names count in a folder of data/, which is made for them, and beside a damaged meta.json and nothing else.
    Raises UserError for any other folder that is not empty.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is a file: give a folder")
    for read_names in (moving_names, lambda folder: files_of(read_meta(folder))):
        with contextlib.suppress(OSError, UserError, ValueError, RecursionError):  # a file is missing or damaged
            return set(read_names(out_dir))
    names = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    usual = {name for name in names if USUAL_FILE.fullmatch(name)}
    in_data = out_dir.resolve().parent == ROOT / "data"
    damaged = usual and names == usual | {"meta.json"} and resembles_meta(out_dir / "meta.json")
    if names and not in_data and not damaged:
        raise UserError(f"--out_dir {out_dir} holds {short_repr(min(names))} and no meta.json that names it: "
                        "it is a folder of something else; give a new or an empty one")
    return usual


def moving_names(out_dir):
    """The list MOVING. Raises OSError if there is none, ValueError if it is not one that `write` wrote."""
    names = json.loads((out_dir / MOVING).read_text("utf-8"))
    if type(names) is not list or not all(type(name) is str and OUR_FILE.fullmatch(name) for name in names):
        raise ValueError("expected a list of files that `write` writes")
    return names


def resembles_meta(path):
    """Whether a file is a damaged meta.json of a preparation, rather than JSON of something else."""
    try:
        return "splits" in json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return True
    except (OSError, TypeError):
        return False


def is_ours(name):
    """Whether a file of this name, in a folder of `write`, may be one of its files."""
    return bool(OUR_FILE.fullmatch(name)) or name in ("meta.json", MOVING)


def remove_leftovers(out_dir):
    """Remove the temporary folders of runs that were killed. One younger than an hour may be in use."""
    leftover = re.compile(re.escape(out_dir.name) + r"\.part-[a-z0-9_]{8}")
    for folder in out_dir.parent.iterdir():
        if leftover.fullmatch(folder.name) and folder.is_dir() and time.time() - folder.stat().st_mtime > 3600:
            if all(is_ours(path.name) for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)


def write(out_dir, meta, splits):
    """Write a finished folder and print its counts.

    meta: dict with name, kind, tokenizer, vocab_size, mark, options, source, split_rule, ... (see meta.py's `check`).
    splits: {"train": {...}, ...}, each with `tokens` (integers, (tokens,)) and `bytes` (the UTF-8 bytes they stand
    for, a mark counting one), and optionally `offsets` (documents + 1,), `labels` (documents,), `distances` (tokens,)
    and plain counts.

    The folder then holds, for each split, SPLIT.bin (flat, the smallest unsigned type, little-endian),
    SPLIT.offsets.bin (int64; document n is tokens[offsets[n]:offsets[n + 1]]), SPLIT.labels.bin (uint8; 1 = positive),
    SPLIT.distances.bin (uint16; 0: the token has no loss; else what determines it stands so many tokens before), and
    meta.json with the sha256 of each. All files are written to a folder beside and then moved, meta.json last: it
    marks a finished folder. Other files in out_dir are left as they are. Raises UserError for a folder of something
    else, and if the system refuses to write.
    """
    out_dir, dtype = Path(out_dir).absolute(), token_dtype(meta["vocab_size"])
    earlier = replaceable(out_dir)
    with workspace(out_dir) as temporary:
        counts = {name: write_split(temporary, name, split, dtype) for name, split in splits.items()}
        meta = {"format": FORMAT, **meta, "dtype": dtype.name, "splits": counts}
        move_files(temporary, out_dir, meta, earlier)
    print_counts(meta)


@contextlib.contextmanager
def workspace(out_dir):
    """Within, the Path of a temporary folder beside out_dir, on the same disk. Raises UserError for an OSError within:
    what reads a source must raise its own."""
    out_dir = Path(out_dir).absolute()
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out_dir)
        beside = {"prefix": f"{out_dir.name}.part-", "dir": out_dir.parent}
        with tempfile.TemporaryDirectory(**beside, ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"could not write {out_dir}: {reason}; when that is mended, run it again") from error


def write_split(folder, name, split, dtype):
    """Write the files of one split. Returns its counts and digests, a dict for meta.json."""
    counts = {"tokens": len(split["tokens"])} | {key: int(value) for key, value in split.items() if key not in PARTS}
    for (part, (suffix, key)), kind in zip(PARTS.items(), (dtype, "<i8", "u1", "<u2"), strict=True):
        if part in split:
            path = folder / f"{name}{suffix}.bin"
            with open(path, "wb") as file:  # NumPy's tofile does not say why it could not write
                file.write(np.ascontiguousarray(split[part], dtype=kind))
            counts[key] = digest_of(path)
    return counts


def move_files(temporary, out_dir, meta, earlier):
    """Move the files of `temporary`, and then meta.json, into out_dir; remove the `earlier` files. If this is killed
    half-way, the folder has no meta.json, and `replaceable` still knows which files are ours."""
    files = [path.name for path in temporary.iterdir()]
    if foreign := [name for name in files if name not in earlier and os.path.lexists(out_dir / name)]:
        raise UserError(f"--out_dir {out_dir} holds {foreign[0]}, which its meta.json does not name: move it away, "
                        "or give another folder")
    text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
    (temporary / "meta.json").write_bytes(text.encode("utf-8", "replace"))  # a file's name may hold other bytes
    (temporary / MOVING).write_text(json.dumps(sorted({*files, *earlier})))
    out_dir.mkdir(exist_ok=True)
    os.replace(temporary / MOVING, out_dir / MOVING)
    for name in ["meta.json", *earlier]:  # without meta.json the folder is not finished
        (out_dir / name).unlink(missing_ok=True)
    for name in [*files, "meta.json"]:
        os.replace(temporary / name, out_dir / name)
    (out_dir / MOVING).unlink()
