"""Readers of the files that runs, comparisons and benchmarks write, one function per format.

A reader reads regular files only, checks types, shapes and ranges, and returns plain data (a dict, a list or arrays)
in which every value that the pictures use is valid. It raises UserError with the file, what was expected and what came,
and OSError if the file cannot be opened.

A checker is a function of a JSON value and its place in the file. It raises ValueError, or KeyError for a missing key.
"""

import contextlib
import json
import os
import re
import stat
import zipfile

import numpy as np

from core.config import PLAIN, UserError, short_repr

MAX_GIB = 1  # of a file, unpacked: no script here writes a larger one
MAX_LINES = 64  # in a chart of a comparison or a benchmark: more cannot be told apart


# ---- files -------------------------------------------------------------------------------------


def check_regular(path):
    """Raise UserError unless `path` is a regular file (a pipe would block, a device has no end), OSError if missing."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise UserError(f"{path}: expected a regular file, got {kind}; take it away")


def open_regular(path):
    """A regular file of at most MAX_GIB GiB, open for bytes; see `check_regular`."""
    check_regular(path)
    if (size := os.stat(path).st_size) > MAX_GIB * 2**30:
        raise UserError(f"{path}: expected at most {MAX_GIB:g} GiB, got {size / 2**30:.1f}; it is another file")
    return open(path, "rb")


def read_bytes(path):
    """The content of a regular file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_json(path, checker, writer):
    """The JSON value at `path`, checked. writer: the script that writes such files, for the message."""
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
        checker(value, "the file")
        return value
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not what {writer} writes ({short_repr(error, 200)})")


# ---- checkers ----------------------------------------------------------------------------------


def expect(holds, expected, value, place=""):
    """Raise ValueError, which says what was expected and what came, unless `holds`."""
    if not holds:
        raise ValueError(f"{place}{': ' * bool(place)}expected {expected}, got {short_repr(value, 40)}")


def checker(holds, expected):
    """A checker of one condition. holds: a function of the value; expected: words for the message."""
    return lambda value, place: expect(holds(value), expected, value, place)


def number(least=-1e30, most=1e30, whole=False):
    """A checker of numbers in a range."""
    types = (int,) if whole else (int, float)
    return checker(lambda value: type(value) in types and least <= value <= most,
                   f"a {'whole ' * whole}number from {least:g} to {most:g}")


def text(most=200):
    """A checker of texts of at most `most` characters."""
    return checker(lambda value: type(value) is str and len(value) <= most, f"a text of at most {most} characters")


def listing(item, most):
    """A checker of lists of at most `most` items."""
    def check(value, place):
        expect(type(value) is list and len(value) <= most, f"a list of at most {most} items", value, place)
        for n, element in enumerate(value):
            item(element, f"{place}[{n}]")
    return check


def pair(first, second):
    """A checker of lists of two items."""
    def check(value, place):
        expect(type(value) is list and len(value) == 2, "a pair", value, place)
        first(value[0], f"{place}[0]")
        second(value[1], f"{place}[1]")
    return check


def mapping(item, most):
    """A checker of objects with any names, and items of one kind."""
    def check(value, place):
        expect(isinstance(value, dict) and len(value) <= most, f"an object of at most {most} entries", value, place)
        for name, element in value.items():
            text()(name, f"a name in {place}")
            item(element, f"{place}[{short_repr(name, 40)}]")
    return check


def record(needed, further={}):
    """A checker of objects with the needed entries; further ones may be missing or null, others are not checked."""
    def check(value, place):
        expect(isinstance(value, dict), "an object", value, place)
        for name, item in needed.items():
            if name not in value:
                raise KeyError(f"{place}: {name}")
            item(value[name], f"{place}[{name!r}]")
        for name, item in further.items():
            if value.get(name) is not None:
                item(value[name], f"{place}[{name!r}]")
    return check


def optional_record(items):
    """A checker of objects in which any of `items` may be missing, but not null; others are not checked."""
    def check(value, place):
        record({})(value, place)
        record({name: item for name, item in items.items() if name in value})(value, place)
    return check


def plain(value, place):
    """The checker of values of settings: booleans, numbers, texts, and lists of those."""
    expect(type(value) in PLAIN, "a boolean, a number, a text or a list", value, place)
    if type(value) is list:
        listing(plain, 10_000)(value, place)


flag = checker(lambda value: type(value) is bool, "True or False")
COUNT = number(0, 1e15, whole=True)
MACHINE = {"machine": record({}, {"gpu": text(), "processor": text(), "threads": COUNT}), "dtype": text()}


# ---- a run -------------------------------------------------------------------------------------


def is_number(value):
    """Whether a value of a log is a number that can be drawn."""
    return type(value) in (int, float) and abs(value) < 1e300


def is_statistic(name, value):
    """Whether a layer's statistic is a number, or numbers of its heads, as its name demands."""
    if isinstance(value, list):
        return name != "kept_share" and all(map(is_number, value))
    return name not in ("spans", "periods") and is_number(value)


BY_DISTANCE = listing(pair(COUNT, number(0, 1)), 2**16)  # [[distance, accuracy], ...]
RECORD = record({"step": COUNT, "loss": number(-1e300, 1e300),
                 "split": checker(lambda value: value in ("train", "val", "test"), "train, val or test")})


def parse_record(line):
    """The valid entries (dict) of a line of log.jsonl. Raises ValueError unless step, split and loss are valid."""
    try:
        entries = json.loads(line)
        RECORD(entries, "the record")
    except (KeyError, RecursionError) as error:
        raise ValueError(f"expected a record of train.py ({error!r})")
    layers = entries.pop("stats", None)
    valid = {key: value for key, value in entries.items() if key in ("split", "whole") or is_number(value)}
    with contextlib.suppress(ValueError):  # missing, or not what train.py writes
        BY_DISTANCE(entries.get("accuracy_by_distance"), "accuracy_by_distance")
        valid["accuracy_by_distance"] = entries["accuracy_by_distance"]
    if isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers):
        valid["stats"] = [{name: x for name, x in layer.items() if is_statistic(name, x)} for layer in layers]
    return valid


def heads_of_statistics(record):
    """For each layer, the number of heads by the name of the statistic (None: one number for the layer)."""
    return [{name: len(value) if isinstance(value, list) else None for name, value in layer.items()}
            for layer in record["stats"]]


def read_first_record(path):
    """The first record of a log.jsonl (dict). Raises ValueError if the line is not a record."""
    with open_regular(path) as file:
        return parse_record(file.readline().decode("utf-8", "replace"))


def read_log(path):
    """The records of a log.jsonl: (those written while training, those of the best weights on whole splits).

    Lines that are not records are left out, as are statistics of another model than the last record's. Raises UserError
    if there is no record.
    """
    if not path.exists():
        raise UserError(f"{path.parent} holds no log.jsonl; give the out_dir of a run of train.py")
    records = []
    for line in read_bytes(path).decode("utf-8", "replace").splitlines():
        try:
            records.append(parse_record(line))
        except ValueError:
            pass  # cut by a crash, or being written now
    if not records:
        raise UserError(f"{path} holds no records yet; train.py writes the first one after its first evaluation")
    last = next((heads_of_statistics(record) for record in reversed(records) if "stats" in record), None)
    for record in records:
        if "stats" in record and heads_of_statistics(record) != last:
            del record["stats"]
    return [r for r in records if "whole" not in r], [r for r in records if "whole" in r]


def read_predictions(path):
    """(p (N,) float64, labels (N,) bool, lengths (N,)) of a predictions-SPLIT.npz: for each text, the probability of
    class 1, whether that is its label, and its tokens (all 0 in files of earlier versions, which do not tell)."""
    try:
        with open_regular(path) as file:
            size = sum(part.file_size for part in zipfile.ZipFile(file).infolist())
            expect(size <= MAX_GIB * 2**30, f"at most {MAX_GIB:g} GiB when unpacked", size)
            with np.load(file, allow_pickle=False) as arrays:
                p, labels = arrays["p"], arrays["label"]
                lengths = arrays["length"] if "length" in arrays else np.zeros(p.shape, np.int64)
        shapes = p.ndim == 1 and p.shape == labels.shape == lengths.shape and p.size
        expect(shapes, "p, label and length of one shape (N,)", (p.shape, labels.shape, lengths.shape))
        dtypes = p.dtype, labels.dtype, lengths.dtype
        is_numeric = p.dtype.kind == "f" and {labels.dtype.kind, lengths.dtype.kind} <= {"i", "u"}
        expect(is_numeric, "p of floats, label and length of integers", [str(dtype) for dtype in dtypes])
        expect(lengths.min() >= 0, "length of at least 0", lengths.min())
        valid = (p >= 0) & (p <= 1)  # false for NaN
        expect(valid.all(), "p from 0 to 1", p[~valid][:1].tolist())
        valid = (labels == 0) | (labels == 1)
        expect(valid.all(), "label of 0 and 1", labels[~valid][:1].tolist())
    except (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({str(error)[:200]}); train again, or take it away")
    return p.astype(np.float64), labels == 1, lengths


def read_config(path):
    """A run's config.json (dict) with its "settings", a dict of plain values."""
    return read_json(path, record({"settings": mapping(plain, 1000)}), "train.py")


# ---- comparisons and benchmarks ----------------------------------------------------------------

VARIANT = record(
    {"variant": text(), "scores": record({}), "seconds_per_step": number(0), "steps": COUNT, "work": number()},
    {"difference": record({}, {"verdict": text()}), "hard": mapping(number(), MAX_LINES), "kept_share": number(0, 1),
     "accuracy_by_distance": BY_DISTANCE})
CURVE = listing(pair(COUNT, number()), 100_000)
COMPARISON = record(
    {"variants": listing(VARIANT, MAX_LINES), "runs": listing(record({"variant": text(), "curve": CURVE}), 10_000),
     "compare": text(), "budget": text(), "amount": number(0), "seeds": listing(number(0, 2**63, whole=True), 10_000),
     "score": text(), "split": text()},
    {"title": text(), **MACHINE})


def check_comparison(saved, place):
    """The checker of a comparison: COMPARISON, and for each variant an interval of the comparison's score."""
    COMPARISON(saved, place)
    interval = record({"mean": number()}, {"low": number(), "high": number()})
    for variant in saved["variants"]:
        record({saved["score"]: interval})(variant["scores"], f"the scores of {variant['variant']}")
        score = variant["scores"][saved["score"]]
        low, high = (score["mean"] if score.get(key) is None else score[key] for key in ("low", "high"))
        expect(low <= score["mean"] <= high, "low <= mean <= high", score, f"the scores of {variant['variant']}")


def read_comparison(path):
    """The JSON file of compare.py (dict)."""
    return read_json(path, check_comparison, "compare.py")


SHAPE = re.compile(r"[1-9]\d{0,11}(x[1-9]\d{0,11}){2}", re.A)
check_shape = checker(lambda value: type(value) is str and SHAPE.fullmatch(value), "BATCHxHEADSxTIME like 1x8x1024")
ROW = record({"attention": text(), "batch x heads x time": check_shape},
             dict.fromkeys(("ms", "fused call, ms", "MiB more", "fused, MiB more"), number()))


def check_benchmark(saved, place):
    """The checker of a benchmark: its rows of the mode `attention`, and that their lines can be drawn."""
    record({"rows": listing(record({}), 10_000)}, MACHINE)(saved, place)
    rows = [row for row in saved["rows"] if "attention" in row]
    for n, row in enumerate(rows):
        ROW(row, f"row {n}")
    for name in ("attention", "batch x heads x time"):
        count = len({row[name] for row in rows})
        expect(count <= MAX_LINES, f"at most {MAX_LINES} different values", count, f"{name} of the rows")


def read_benchmark(path):
    """The JSON file of `python bench.py MODE --results=FILE` (dict)."""
    return read_json(path, check_benchmark, "`python bench.py attention --results=FILE`")
