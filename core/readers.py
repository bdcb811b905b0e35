"""Readers of the files that runs, comparisons and benchmarks write, one function per format.

Each reads regular files only, checks types, shapes and ranges once, and returns plain data: a dict, a list or arrays, of
which every value that the pictures use is what it should be. Raises UserError with the file, what was expected and what
came, and OSError where the file cannot be opened.

A checker is a function of a JSON value and its place in the file; it raises ValueError, or KeyError for a missing key.
"""

import json
import os
import re
import stat
import zipfile

import numpy as np

from core.config import PLAIN, UserError, short_repr

LARGEST = 2**30  # bytes of a file, unpacked: larger ones are none of ours
MOST_LINES = 64  # of a chart of a comparison or a benchmark: more cannot be told apart


# ---- files -------------------------------------------------------------------------------------


def check_regular(path):
    """Raise UserError where `path` is no regular file (a pipe would block, a device has no end), OSError where it is missing."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        raise UserError(f"{path}: expected a regular file, got {kinds.get(stat.S_IFMT(mode), 'a device')}; take it away")


def open_regular(path):
    """A regular file of at most LARGEST bytes, open for bytes; see `check_regular`."""
    check_regular(path)
    if (size := os.stat(path).st_size) > LARGEST:
        raise UserError(f"{path}: expected at most {LARGEST / 2**30:g} GiB, got {size / 2**30:.1f}; it is another file")
    return open(path, "rb")


def read_bytes(path):
    """The content of a regular file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_json(path, checker, writer):
    """The JSON value at `path`, checked. writer: what writes such files, for the message."""
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
        checker(value, "the file")
        return value
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not what {writer} writes ({short_repr(error, 200)})")


# ---- checkers ----------------------------------------------------------------------------------


def expect(holds, expected, value, place):
    """Raise ValueError unless `holds`."""
    if not holds:
        raise ValueError(f"{place}: expected {expected}, got {short_repr(value, 40)}")


def number(least=-1e30, most=1e30, whole=False):
    """A checker of finite numbers in a range."""
    def check(value, place):
        expect(type(value) in ((int,) if whole else (int, float)) and least <= value <= most,
               f"a {'whole ' * whole}number from {least:g} to {most:g}", value, place)
    return check


def text(most=200):
    """A checker of texts of at most so many characters."""
    def check(value, place):
        expect(type(value) is str and len(value) <= most, f"a text of at most {most} characters", value, place)
    return check


def listing(item, most):
    """A checker of lists of at most so many items."""
    def check(value, place):
        expect(type(value) is list and len(value) <= most, f"a list of at most {most} items", value, place)
        for n, each in enumerate(value):
            item(each, f"{place}[{n}]")
    return check


def pair(first, second):
    """A checker of lists of two items."""
    def check(value, place):
        expect(type(value) is list and len(value) == 2, "a pair", value, place)
        first(value[0], f"{place}[0]")
        second(value[1], f"{place}[1]")
    return check


def mapping(item, most):
    """A checker of objects with any names and items of one kind."""
    def check(value, place):
        expect(isinstance(value, dict) and len(value) <= most, f"an object of at most {most} entries", value, place)
        for name, each in value.items():
            text()(name, f"a name in {place}")
            item(each, f"{place}[{short_repr(name, 40)}]")
    return check


def record(needed, further={}):
    """A checker of objects with these entries, the further ones may be missing or null; there may be others."""
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
    """A checker of objects: of these entries those that are there, also where they are null; there may be others."""
    def check(value, place):
        record({})(value, place)
        record({name: item for name, item in items.items() if name in value})(value, place)
    return check


def plain(value, place):
    """The checker of values of settings: booleans, numbers, texts, and lists of those."""
    expect(type(value) in PLAIN, "a boolean, a number, a text or a list", value, place)
    if type(value) is list:
        listing(plain, 10_000)(value, place)


def flag(value, place):
    """The checker of booleans."""
    expect(type(value) is bool, "True or False", value, place)


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


def record_of(line):
    """The entries of a line of log.jsonl that are as train.py writes them (dict); ValueError where step, split or loss are not."""
    try:
        found = json.loads(line)
        if not (type(found["step"]) is int and 0 <= found["step"] < 1e15 and is_number(found["loss"])
                and found["split"] in ("train", "val", "test")):
            raise ValueError("expected a step, a split and a loss")
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"expected a record of train.py ({error!r})")
    kept = {key: value for key, value in found.items() if key in ("split", "whole") or key != "stats" and is_number(value)}
    layers = found.get("stats")
    if isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers):
        kept["stats"] = [{name: value for name, value in layer.items() if is_statistic(name, value)} for layer in layers]
    return kept


def statistics_shape(record):
    """The names of each layer's statistics, with the number of heads (None: one number of the layer)."""
    return [{name: len(value) if isinstance(value, list) else None for name, value in layer.items()} for layer in record["stats"]]


def read_first_record(path):
    """The first record of a log.jsonl (dict). Raises ValueError where the line is none."""
    with open_regular(path) as file:
        return record_of(file.readline().decode("utf-8", "replace"))


def read_log(path):
    """The records of a log.jsonl: (those written while training, those of the best weights on whole splits).

    A line that is no record is left out, as are the statistics of records that are of another model than the last.
    Raises UserError where there is none.
    """
    if not path.exists():
        raise UserError(f"{path.parent} holds no log.jsonl; give the out_dir of a run of train.py")
    records = []
    for line in read_bytes(path).decode("utf-8", "replace").splitlines():
        try:
            records.append(record_of(line))
        except ValueError:
            pass  # cut by a crash, or being written now
    if not records:
        raise UserError(f"{path} holds no records yet; train.py writes the first one after its first evaluation")
    last = next((statistics_shape(r) for r in reversed(records) if "stats" in r), None)
    for r in records:
        if "stats" in r and statistics_shape(r) != last:
            del r["stats"]
    return [r for r in records if "whole" not in r], [r for r in records if "whole" in r]


def read_predictions(path):
    """(p (N,) float64, labels (N,) bool) of a predictions-SPLIT.npz: each text's probability of class 1, and whether it is."""
    try:
        with open_regular(path) as file:
            if sum(part.file_size for part in zipfile.ZipFile(file).infolist()) > LARGEST:
                raise ValueError(f"expected at most {LARGEST / 2**30:g} GiB when unpacked")
            with np.load(file, allow_pickle=False) as arrays:
                p, labels = arrays["p"], arrays["label"]
        if not (p.ndim == 1 and p.shape == labels.shape and p.size):
            raise ValueError(f"expected p and label of one shape (N,), got {p.shape} and {labels.shape}")
        if p.dtype.kind != "f" or labels.dtype.kind not in "iu":
            raise ValueError(f"expected p of floats and label of integers, got {p.dtype} and {labels.dtype}")
        if not ((p >= 0) & (p <= 1)).all():
            raise ValueError(f"expected p from 0 to 1, got {p[~((p >= 0) & (p <= 1))][0]}")
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(f"expected label of 0 and 1, got {labels[(labels != 0) & (labels != 1)][0]}")
    except (OSError, ValueError, KeyError, EOFError, MemoryError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({str(error)[:200]}); train again, or take it away")
    return p.astype(np.float64), labels == 1


def read_config(path):
    """A run's config.json (dict) with its "settings", a dict of plain values."""
    return read_json(path, record({"settings": mapping(plain, 1000)}), "train.py")


# ---- comparisons and benchmarks ----------------------------------------------------------------

VARIANT = record({"variant": text(), "scores": record({}), "seconds_per_step": number(0), "steps": COUNT, "work": number()},
                 {"difference": record({}, {"verdict": text()}), "hard": mapping(number(), MOST_LINES)})
CURVE = listing(pair(COUNT, number()), 100_000)
COMPARISON = record(
    {"variants": listing(VARIANT, MOST_LINES), "runs": listing(record({"variant": text(), "curve": CURVE}), 10_000),
     "compare": text(), "budget": text(), "amount": number(0), "seeds": listing(number(0, 2**63, whole=True), 10_000),
     "score": text(), "split": text()},
    {"title": text(), **MACHINE})


def check_comparison(saved, place):
    """The checker of a comparison: COMPARISON, and an interval of the score that it names for each variant."""
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


def check_shape(value, place):
    """The checker of a shape like 1x8x1024."""
    text()(value, place)
    expect(re.fullmatch(r"[1-9]\d{0,11}(x[1-9]\d{0,11}){2}", value, re.A), "BATCHxHEADSxTIME like 1x8x1024", value, place)


ROW = record({"attention": text(), "batch x heads x time": check_shape},
             dict.fromkeys(("ms", "fused call, ms", "MiB more", "fused, MiB more"), number()))


def check_benchmark(saved, place):
    """The checker of a benchmark: of its rows those of the mode `attention`, as many lines and texts' lengths as can be drawn."""
    record({"rows": listing(record({}), 10_000)}, MACHINE)(saved, place)
    rows = [row for row in saved["rows"] if "attention" in row]
    for n, row in enumerate(rows):
        ROW(row, f"row {n}")
    for name in ("attention", "batch x heads x time"):
        count = len({row[name] for row in rows})
        expect(count <= MOST_LINES, f"at most {MOST_LINES} different values", count, f"{name} of the rows")


def read_benchmark(path):
    """The JSON file of `python bench.py MODE --results=FILE` (dict)."""
    return read_json(path, check_benchmark, "`python bench.py attention --results=FILE`")
