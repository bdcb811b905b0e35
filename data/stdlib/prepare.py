"""
The source text of Python's own standard library, as bytes. Every Python has it: no network.

    python data/stdlib/prepare.py

writes data/stdlib in a second: about 12 MB, 90 / 5 / 5 by file. Each Python version has its own text, so a score
on it compares with scores of the same version only; meta.json says which it was. --source takes another folder or
archive of Python files.
"""

import hashlib
import os
import platform
import re
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from core import prepare  # first: it handles a missing package

import numpy as np

from core.archive import identity, members
from core.config import UserError

# Tests, what others installed, and what the build generated for this machine.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
GENERATED = re.compile(r"_sysconfigdata|config-|sitecustomize|usercustomize")


def wanted(name):
    """Whether the file of this relative posix name belongs to the text."""
    parts = name.split("/")
    return name.endswith(".py") and not LEFT_OUT.intersection(parts) and not any(map(GENERATED.match, parts))


def split_of(start, total):
    """The split of a file that begins at byte `start` of `total`."""
    return "train" if start * 100 < total * 90 else "val" if start * 100 < total * 95 else "test"


def main(argv):
    args = prepare.make_parser(__doc__, HERE).parse_args(argv)
    own = {"file": f"standard library of Python {platform.python_version()}", "python": platform.python_version()}
    if prepare.finished(args, {}, own if args.source is None else None):
        return
    folder = args.source or Path(sysconfig.get_paths()["stdlib"])
    source = own if args.source is None else identity(folder)
    files = {name: data for name, data in members(folder, wanted) if data}
    # An archive's top folder is no part of a name: the same files are split the same way, packed or not.
    top = os.path.commonpath([os.path.dirname(name) for name in files]) if files else ""
    named = ((name[len(top) + 1 :] if top else name, data) for name, data in files.items())
    order = sorted(named, key=lambda pair: hashlib.sha256(pair[0].encode("utf-8", "surrogateescape")).digest())
    # Byte 0 is the document mark and must be nothing else; line ends differ between systems and say nothing.
    documents = [b"\0" + data.replace(b"\r\n", b"\n").replace(b"\0", b" ") for _, data in order]
    total, start = sum(map(len, documents)), 0
    splits = {"train": [], "val": [], "test": []}
    for document in documents:
        splits[split_of(start, total)].append(document)
        start += len(document)
    if not all(splits.values()):
        raise UserError(f"{folder.name}: expected enough Python files for three splits, found {len(documents)}: "
                        "give the folder Lib of a Python with --source")
    texts = {name: b"".join(parts) for name, parts in splits.items()}
    splits = {
        name: {"tokens": np.frombuffer(text, np.uint8), "bytes": len(text), "documents": len(splits[name])}
        for name, text in texts.items()
    }
    meta = {
        "name": "stdlib", "kind": "lm", "tokenizer": "bytes", "vocab_size": 256, "mark": 0, "lossless": True,
        "partial": False, "options": {}, "source": {**source, "content_bytes": total - len(documents)},
        "split_rule": "files in the order of the sha256 of their names; a file goes to train, val or test by whether "
                      "it begins in the first 90 %, the next 5 % or the last 5 % of the bytes",
    }
    prepare.write(args.out_dir, meta, splits)


if __name__ == "__main__":
    prepare.run_script(main)
