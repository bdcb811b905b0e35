"""Forged files of a run: logs, predictions, comparisons, benchmarks. Each ends in a picture or in one sentence,
soon."""

import contextlib
import json
import os
import re
import signal
import time
import zipfile

import numpy as np
import pytest
from fault_injection import count
from test_charts import comparison, row, write_rows
from test_plot import classifier, drawn, panels, write_log  # noqa: F401  a fixture

import plot
from core import curves, demo, figures, readers
from core.config import UserError
from helpers import ROOT, call

BAD = [None, True, "x", [], {}, -1, 2.5, 1e400, float("nan"), 10**400, "9" * 400, [[1]], {"a": 1}]


@contextlib.contextmanager
def within(seconds):
    """Fail where the body takes longer, also where it waits for a file for good."""
    def late(*_):
        raise AssertionError(f"took longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def places(value, path=()):
    """The path of each value within a JSON value, the outermost left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def forged(value, place, bad):
    """A copy of a JSON value with `bad` at a place."""
    if not place:
        return bad
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = forged(value[place[0]], place[1:], bad)
    return copy


def ends_well(module, *arguments):
    """Whether a script made its pictures; False where it refused with one sentence."""
    try:
        call(module, *arguments)
        return True
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700, error
        return False


def special(path, kind):
    """A file at `path` that is no regular file."""
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"zero": "/dev/zero", "dangling": path.with_name("nowhere")}[kind])


@pytest.fixture
def pictures(monkeypatch):
    """{file name: the figure that was written there}, of any size; skips where matplotlib is not installed."""
    pytest.importorskip("matplotlib")
    made, write = {}, figures.write

    def remembered(fig, path, *colours):
        write(fig, path, *colours)
        made[path.name] = fig

    monkeypatch.setattr(figures, "write", remembered)
    return made


# ---- logs --------------------------------------------------------------------------------------


def spans(layers, heads, step):
    """A record of an evaluation with spans and periods of each layer and head."""
    return {"step": step, "split": "val", "loss": 3.0, "stats": [
        {"kept_share": (layer + 1) / (layers + 1), "spans": [1.0 * layer + head + step for head in range(heads)],
         "periods": [2.0 + layer + head for head in range(heads)]} for layer in range(layers)]}


@pytest.mark.parametrize("layers, heads, records", [(300, 2, 2), (1, 400, 2), (1, 1, 5000)])
def test_many_layers_are_sampled(tmp_path, pictures, layers, heads, records):
    """As many panels, lines and points as can be told apart, spread evenly, and the picture says so."""
    write_log(tmp_path / "out", *(spans(layers, heads, step) for step in range(records)))
    with within(30):
        began = time.process_time()
        call(plot, tmp_path / "out")
        assert time.process_time() - began < 10  # on a machine that is shared; about 4
    axes = panels(pictures["spans.png"])
    assert len(axes) <= 2 * curves.MOST_LAYERS and max(len(ax.lines) for ax in axes) <= curves.MOST_HEADS
    assert axes[0].get_title().startswith("layer 0, ") and f"layer {layers - 1}" in [ax.get_title()[:9] for ax in axes]
    said = pictures["spans.png"].get_suptitle()
    assert ("of 300 layers" in said) == (layers == 300) and ("of 400 heads" in said) == (heads == 400)
    x = axes[0].lines[0].get_xdata()
    assert len(x) <= curves.MOST_POINTS and (x[0], x[-1]) == (0, records - 1)
    (ax,) = pictures["kept.png"].axes
    assert len(ax.lines) <= curves.MOST_LAYERS
    assert ("of 300 layers" in ax.get_title()) == (layers == 300)


def test_forged_logs(tmp_path, drawn):
    """A record of another shape is left out; the others are drawn."""
    good = spans(2, 2, 5)
    for place in places(good):
        for bad in BAD:
            write_log(tmp_path / "out", spans(2, 2, 0), forged(good, place, bad), spans(2, 2, 9))
            records, _ = readers.read_log(tmp_path / "out" / "log.jsonl")
            assert {records[0]["step"], records[-1]["step"]} >= {0}, (place, bad)
            assert demo.kind_of(tmp_path / "out") == "lm"
    call(plot, tmp_path / "out")
    count("forged logs, predictions, comparisons and benchmarks")


@pytest.mark.parametrize("kind", ["fifo", "zero"])
@pytest.mark.parametrize("name", ["log.jsonl", "predictions-val.npz", "config.json", "x.json", "reviews.jsonl"])
def test_no_regular_file(tmp_path, refused, drawn, kind, name):
    run = classifier(tmp_path / "out", "val", [0.9, 0.1], [1, 0])
    (run / name).unlink(missing_ok=True)
    special(run / name, kind)
    with within(20):
        if name == "config.json":  # only the classes' names are from there
            assert call(plot, run) is None
        elif name == "reviews.jsonl":
            assert ends_well(plot, run, f"--reviews={run / name}") is False
        else:
            line = refused(plot, run / name if name == "x.json" else run)
            assert "expected a regular file" in line and name in line
            count("forged logs, predictions, comparisons and benchmarks", refused=1)


# ---- predictions -------------------------------------------------------------------------------


@pytest.mark.parametrize("p, label, said", [
    ([0.5, np.nan], [1, 0], "from 0 to 1"), ([0.5, 1.5], [1, 0], "from 0 to 1"), ([0.5, -1e30], [1, 0], "from 0 to 1"),
    ([0.5 + 1j, 0.5], [1, 0], "complex128"), ([[0.5, 0.5]], [[1, 0]], "shape"), (0.5, 1, "shape"),
    ([0.5], [7], "0 and 1"),
    ([0.5], [1.5], "float64"), ([True], [1], "bool"), (np.array(["2020-01-01"], "M8[D]"), [1], "datetime64"),
    ([0.5], ["1"], "<U1"), (np.array([None]), [1], "allow_pickle"), ([0.5, 0.5], [1], "shape"), ([], [], "shape"),
])
def test_forged_predictions(tmp_path, refused, drawn, p, label, said):
    run = write_log(tmp_path / "out", {"step": 0, "split": "val", "loss": 3.0})
    np.savez(run / "predictions-val.npz", p=np.array(p), label=np.array(label))
    line = refused(plot, run)
    assert line.startswith(f"plot.py: {run / 'predictions-val.npz'} is damaged (") and said in line, line
    count("forged logs, predictions, comparisons and benchmarks", refused=1)


def test_predictions_that_claim_more_than_they_hold(tmp_path, refused, drawn):
    """A header of 10^13 numbers, and a small file that unpacks to 2 GB."""
    run = write_log(tmp_path / "out", {"step": 0, "split": "val", "loss": 3.0})
    path = run / "predictions-val.npz"
    np.savez(path, p=np.zeros(16), label=np.zeros(16, np.uint8))
    content = path.read_bytes()
    changed = content.replace(b"(16,), }" + b" " * 11, b"(" + b"9" * 13 + b",), }", 1)
    assert len(changed) == len(content) and changed != content
    path.write_bytes(changed)
    with within(20):
        assert "is damaged (" in refused(plot, run)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("p.npy", bytes(2**20))
        archive.infolist()[0].file_size = 2**31  # as the file's directory then says
    with within(20):
        assert "expected at most 1 GiB when unpacked" in refused(plot, run)
    count("forged logs, predictions, comparisons and benchmarks", 2, refused=2)


# ---- comparisons and benchmarks ----------------------------------------------------------------

NEEDED = {"compare", "budget", "amount", "seeds", "dtype", "score", "split", "variants", "runs"}


def test_forged_comparisons(tmp_path, monkeypatch):
    """Whatever stands at any place: a picture where nothing drawn depends on it, else one sentence. Nothing
    half-drawn."""
    pytest.importorskip("matplotlib")
    from core import charts

    monkeypatch.setattr(figures, "write", lambda fig, path, *colours: None)
    monkeypatch.setattr(charts, "draw_hard", lambda *arguments: None)
    path = comparison(tmp_path / "x.json", ["a", "b"], seeds=[1, 2])
    good, refusals, tried = json.loads(path.read_text()), 0, 0
    for place in places(good):
        for bad in BAD[:: 1 if len(place) == 1 else 4]:
            path.write_text(json.dumps(forged(good, place, bad)))
            try:
                saved, found = charts.read_comparison(path)
                assert set(saved) >= NEEDED and found
            except UserError as error:
                assert re.search("is not what compare.py writes|holds no variants",
                                 str(error)) and len(str(error)) < 500, error
                refusals += 1
            tried += 1
    assert refusals > 150
    count("forged logs, predictions, comparisons and benchmarks", tried, refused=refusals)
    for change in ({"score": 1e400}, {"amount": "x"}, {"seeds": 3}, {"machine": {"gpu": ["x"]}}, {"machine": "x"},
                   {"score": "f1"},
                   {"variants": good["variants"] * 100}, {"title": "x" * 10**6}, {"split": ["test"]},
                   {"dtype": {"a": 1}}):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match="is not what compare.py writes"):
            charts.read_comparison(path)


def test_what_is_accepted_is_drawn(tmp_path, pictures):
    """The largest comparison that is accepted."""
    names = [f"variant {n}" for n in range(16)]
    with within(60):
        assert ends_well(plot, comparison(tmp_path / "x.json", names))


def test_forged_benchmarks(tmp_path):
    from core import charts

    path = write_rows(tmp_path / "x.json", row("dense", "1x8x256", 1.0, 2.0), row("local", "1x8x512", 3.0, 2.0))
    good, refusals, tried = json.loads(path.read_text()), 0, 0
    for place in places(good):
        for bad in [*BAD, "0x1x1", "1x1x-5", "1e3x1x1", "1x8x" + "9" * 5000, "1x8x256x2"]:
            path.write_text(json.dumps(forged(good, place, bad)))
            try:
                charts.read_rows(path)
            except UserError as error:
                assert "python bench.py attention" in str(error) and len(str(error)) < 500, error
                refusals += 1
            tried += 1
    assert refusals > 100
    count("forged logs, predictions, comparisons and benchmarks", tried, refused=refusals)
    path.write_text(json.dumps({**good, "rows": [row(f"a{n}", "1x8x256", 1.0, 2.0) for n in range(500)]}))
    with pytest.raises(UserError, match="python bench.py attention"):
        charts.read_rows(path)


def test_results_are_accepted():
    """What compare.py and bench.py really wrote."""
    pytest.importorskip("matplotlib")
    from core import charts

    for path in (ROOT / "results").glob("*.json"):
        if path.name.startswith("compare_"):
            assert charts.read_comparison(path)[1]
        elif path.name in ("bench_attention.json", "bench_dense.json"):
            assert charts.read_rows(path)[0]


# ---- the page ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best.pt", "log.jsonl"])
def test_runs_that_cannot_be_read_are_skipped(tmp_path, monkeypatch, name):
    """The others are shown, and each one skipped is named with the reason."""
    monkeypatch.chdir(tmp_path)
    for n, other in enumerate(("old", "new")):
        (tmp_path / other).mkdir()
        (tmp_path / other / name).write_text("{}")
        os.utime(tmp_path / other / name, (n, n))
    for kind in ("dangling", "fifo", "zero"):
        (tmp_path / kind).mkdir()
        special(tmp_path / kind / name, kind)
    with within(20):
        runs, skipped = demo.find_runs(name)
    assert list(runs) == ["new", "old"]
    assert sorted(line.split("/")[0] for line in skipped) == ["dangling", "fifo", "zero"]
    assert "No such file" in "".join(skipped) and "expected a regular file" in "".join(skipped)


def test_kind_of_a_forged_run(tmp_path):
    for content in ("[1]", '{"stats": [3], "step": 0, "split": "val", "loss": 1}', "\udcff", "[" * 3000, '{"stats": 5}',
                    "3"):
        write_log(tmp_path / "out", end="")
        (tmp_path / "out" / "log.jsonl").write_bytes(content.encode("utf-8", "surrogateescape") + b"\n")
        record = demo.first_record(tmp_path / "out")
        assert all(isinstance(layer, dict) for layer in record.get("stats", []))
        assert demo.kind_of(tmp_path / "out") in ("", "lm")
    (tmp_path / "out" / "log.jsonl").unlink()
    os.mkfifo(tmp_path / "out" / "log.jsonl")
    with within(5):
        assert demo.first_record(tmp_path / "out") == {}
