"""Charts of results/*.json show what compare.py and bench.py measured."""

import json

import numpy as np
import pytest
from test_plot import drawn, lines  # noqa: F401  a fixture

import bench
import plot
from core import charts, recall
from helpers import call

# ---- a benchmark -------------------------------------------------------------------------------


def row(label, shape, ms, fused, more=1.0, fused_more=1.0):
    return {"attention": label, "batch x heads x time": shape, "ms": ms, "fused call, ms": fused,
            "times as fast": fused / ms,
            "MiB more": more, "fused, MiB more": fused_more}


def write_rows(path, *rows, **more):
    machine = {"processor": "A", "threads": 2, "gpu": None}
    path.write_text(json.dumps({"machine": machine, "dtype": "bfloat16", "rows": rows, **more}), "utf-8")
    return path


def test_bench(tmp_path, drawn, capsys):
    """A line a mechanism with its exponent, and the fused call's median; what was not measured is left out."""
    rows = [row(label, f"1x8x{T}", (T / 256) ** b, fused * (T / 256) ** 2, None if label == "strided" else T / 512,
                T / 1024)
            for T in (256, 512, 1024) for label, b, fused in (("dense", 2, 3), ("strided", 1.5, 5), ("local", 1, 4))]
    file = write_rows(tmp_path / "bench.json", *rows, growth=[{"growth": "dense", "time ~ T^": 2.0}])
    call(plot, file)
    assert capsys.readouterr().out == f"{tmp_path / 'bench.png'}\n"
    time, memory = drawn["bench.png"].axes
    assert list(lines(time)) == ["dense: $T^{2.00}$", "strided: $T^{1.50}$", "local: $T^{1.00}$",
                                 "fused call: $T^{2.00}$"]
    assert list(lines(memory)) == ["dense: $T^{1.00}$", "local: $T^{1.00}$", "fused call: $T^{1.00}$"]
    assert lines(time)["fused call: $T^{2.00}$"] == ([256, 512, 1024], [4, 16, 64])
    assert lines(memory)["local: $T^{1.00}$"] == ([256, 512, 1024], [0.5, 1, 2])
    for ax in (time, memory):
        assert ax.get_xscale() == ax.get_yscale() == "log"
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["256", "512", "1,024"]
    assert drawn["bench.png"].get_suptitle() == "attention alone, batch 1, 8 heads, bfloat16; A, 2 threads"


def test_shapes_that_differ_are_brought_to_one_head(tmp_path, drawn):
    rows = row("dense", "16x6x256", 96.0, 192.0, 960.0), row("dense", "1x8x512", 32.0, 64.0, 160.0)
    call(plot, write_rows(tmp_path / "bench.json", *rows))
    time, memory = drawn["bench.png"].axes
    assert lines(time)["dense: $T^{2.00}$"] == ([256, 512], [1, 4])
    assert lines(memory)["dense: $T^{1.00}$"] == ([256, 512], [10, 20])
    assert "one head of one example" in drawn["bench.png"].get_suptitle()


def test_reads_what_bench_writes(tmp_path, quick):
    file = tmp_path / "rows.json"
    call(bench, "attention", "--attention=dense", '--shapes=["1x2x32", "1x2x64"]', "--head_size=8", "--repeat=1",
         "--dtype=float32", f"--results={file}")
    found, what, _ = charts.read_rows(file)
    assert list(found) == ["dense", "fused call"] and list(found["dense"]) == [32, 64] and what == "batch 1, 2 heads"
    assert found["dense"][64][0] == json.loads(file.read_text())["rows"][1]["ms"] > 0


@pytest.mark.parametrize("saved, says", [
    ("{", "is not what `python bench.py attention"), ("[1]", "is not what `python bench.py attention"),
    ('{"rows": [{"attention": "dense", "batch x heads x time": "1x8"}]}', "is not what `python bench.py attention"),
    ('{"rows": [{"step": "here", "ms": 3}]}', "holds no rows of `python bench.py attention"),
    ('{"variants": [{"variant": "a"}]}', "is not what compare.py writes (KeyError"),
    ('{"variants": []}', "is not what compare.py writes (KeyError"),
    ('["variants"]', "is not what compare.py writes ("),
])
def test_other_files_are_refused(tmp_path, refused, saved, says):
    (tmp_path / "x.json").write_text(saved)
    assert says in refused(plot, tmp_path / "x.json") and list(tmp_path.iterdir()) == [tmp_path / "x.json"]


# ---- a comparison ------------------------------------------------------------------------------


def comparison(path, names=("dense", "local", "log"), score="accuracy", hard=True, seeds=(1, 2, 3), **more):
    """What compare.py would write: variant n scores 0.8 + n / 100 + seed / 1000."""
    runs = [{"variant": name, "seed": seed, "scores": {},
             "curve": [[0, 0.5], [10, 0.7 + n / 100 + seed / 1000], [20, 0.8 + n / 100]]}
            for n, name in enumerate(names) for seed in seeds]
    variants = [{"variant": name, "parameters": 1000, "steps": 20, "seconds_per_step": 60.0 * (n + 1),
                 "minutes": 20.0 * (n + 1),
                 "work": 4e15 - n * 1e15, "kept_share": None,
                 "scores": {score: {"mean": 0.8 + n / 100, "low": 0.79 + n / 100, "high": 0.82 + n / 100}, "f1": {}},
                 "difference": {"mean": 0.1, "low": 0, "high": 0.2, "p": 0.5, "p_holm": 0.5, "verdict": "better"} if n
                 else None,
                 **({"hard": {"negation": 0.25 * n, "contrast": 0.5}} if hard else {})}
                for n, name in enumerate(names)]
    saved = {"compare": "compare_x", "title": "Three for $5", "kind": "classify", "score": score, "split": "test",
             "budget": "steps", "amount": 2000, "dataset": "imdb", "seeds": list(seeds), "dtype": "bfloat16",
             "machine": {"processor": "A", "threads": 2, "gpu": None}, "variants": variants, "runs": runs, **more}
    path.write_text(json.dumps(saved), "utf-8")
    return path


def test_comparison(tmp_path, drawn, capsys):
    call(plot, comparison(tmp_path / "x.json"))
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}\n{tmp_path / 'x_hard.png'}\n"
    curves, finals, time, work = drawn["x.png"].axes
    assert lines(curves)["local"][0] == [0, 10, 20] and np.allclose(lines(curves)["local"][1], [0.5, 0.712, 0.81])
    bands = [collection.get_paths()[0].vertices for collection in curves.collections]
    edges = [y for x, y in bands[1] if x == 10]
    assert len(bands) == 3 and (min(edges), max(edges)) == pytest.approx((0.711, 0.713))
    assert [tick.get_text() for tick in finals.get_yticklabels()] == ["dense", "local", "log"]
    ends = [line.get_segments()[0]
            for line in finals.collections]  # the intervals, from left to right, the first on top
    assert np.allclose(ends, [[[0.79 + n / 100, n], [0.82 + n / 100, n]] for n in range(3)]) and finals.yaxis_inverted()
    assert [text.get_text() for text in finals.texts] == ["0.8000", "0.8100, better", "0.8200, better"]
    assert [ax.get_xlabel() for ax in drawn["x.png"].axes] == ["step", "test accuracy", "measured time (minutes)",
                                                               "work of training (PFLOP)"]
    for ax, places in ((time, [20, 40, 60]), (work, [4, 3, 2])):
        assert np.allclose([line.get_segments()[0] for line in ax.collections],
                           [[[x, 0.79 + n / 100], [x, 0.82 + n / 100]] for n, x in enumerate(places)])
    assert drawn["x.png"].get_suptitle() == "Three for \\$5\n3 seeds, 2,000 steps each, bfloat16; A, 2 threads"
    assert [text.get_text() for text in drawn["x.png"].legends[0].get_texts()] == ["dense", "local", "log"]
    drawn["x.png"].draw_without_rendering()
    legend = drawn["x.png"].legends[0].get_window_extent()
    assert not any(legend.overlaps(ax.get_tightbbox()) for ax in drawn["x.png"].axes)


def test_equal_ones_stand_side_by_side():
    places, (low, high) = charts.spread([100.0, 50.0, 100.5, 20.0])
    assert places == pytest.approx([99.05, 50, 101.45, 20], abs=0.01)
    assert (low, high) == pytest.approx((11.95, 108.55), abs=0.01)
    places, (low, high) = charts.spread([8.0, 8.0, 8.0])  # a quarter of 8: 2
    assert places == pytest.approx([7.94, 8, 8.06]) and (low, high) == pytest.approx((6.8, 9.2))


def test_one_variant_looks_the_same_in_all_panels(tmp_path, drawn):
    names = [f"variant {n}" for n in range(9)]
    call(plot, comparison(tmp_path / "x.json", names))
    curves, *others = drawn["x.png"].axes
    colours = [line.get_color() for line in curves.lines]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in curves.lines}
    assert len(looks) == 9
    from matplotlib.colors import to_hex

    for ax in others:
        assert [to_hex(line.get_color()[0]) for line in ax.collections] == [to_hex(colour) for colour in colours]
    assert [line.get_color() for line in drawn["x_hard.png"].axes[0].lines[:9]] == colours


def test_hard_reviews(tmp_path, drawn):
    """A row a kind, a dot a variant; a comparison without them has no such picture."""
    call(plot, comparison(tmp_path / "x.json"))
    (ax,) = drawn["x_hard.png"].axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["negation", "contrast"]
    dots = {name: xy for name, xy in lines(ax).items() if name[0] != "_"}
    assert [x for x, _ in dots.values()] == [[0, 0.5], [0.25, 0.5], [0.5, 0.5]]
    assert [np.round(y).tolist() for _, y in dots.values()] == [[0, 1]] * 3
    assert len({y[0] for _, y in dots.values()}) == 3  # none hides another
    call(plot, comparison(tmp_path / "y.json", hard=False), f"--out={tmp_path / 'new'}")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["y.png"]


def recalled(path, **more):
    """A comparison of associative recall: "dense" is always right, "local" up to distance 5, "log" half of the time."""
    file = comparison(path, hard=False, seeds=[1, 2], **more)
    saved = json.loads(file.read_text())
    accuracies = {"dense": [1.0] * 4, "local": [1.0, 1.0, 1.0, 0.0], "log": [0.5] * 4}
    for variant, kept in zip(saved["variants"], (1.0, 0.25, 0.125)):
        name = variant["variant"]
        variant |= {"kept_share": kept, "accuracy_by_distance": [list(p) for p in zip((1, 3, 5, 9), accuracies[name])]}
        variant["scores"]["accuracy"] = dict.fromkeys(("mean", "low", "high"), float(np.mean(accuracies[name])))
    file.write_text(json.dumps(saved))
    return file


def test_recall_by_distance(tmp_path, drawn, capsys):
    """A strip a variant, the best on top, white where nothing was asked; and each variant's kept pairs."""
    call(plot, recalled(tmp_path / "x.json"))
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}\n{tmp_path / 'x_recall.png'}\n"
    strips, points = drawn["x_recall.png"].axes[:2]
    assert [tick.get_text() for tick in strips.get_yticklabels()] == ["dense", "local", "log"]
    shades = strips.collections[0]
    expected = [[1, 1, 1, np.nan, 1], [1, 1, 1, np.nan, 0], [0.5, 0.5, 0.5, np.nan, 0.5]]
    assert np.allclose(np.ma.filled(shades.get_array(), np.nan), expected, equal_nan=True)
    assert shades.get_clim() == (0, 1)
    assert [text.get_text() for text in strips.texts] == ["100 %", "75 %", "50 %"]
    places = {text.get_text(): text.xy for text in points.texts}
    assert {name: (pytest.approx(x), y)
            for name, (x, y) in places.items()} == {"dense": (100, 100), "local": (25, 75), "log": (12.5, 50)}
    assert points.get_xlabel() == "kept pairs (% of dense attention)" and points.get_xscale() == "log"


def test_labels_of_equal_points_are_one(tmp_path, drawn):
    """Names stand apart from each other, and those of the same point are lines of one label."""
    accuracy = {"a": (1.0, 1.0), "b": (1.0, 0.995), "c": (0.9, 0.97), "d": (0.2, 0.96)}
    rows = {name: {"by_distance": [[1, y], [3, y]], "score": (y, y, y), "kept": x} for name, (x, y) in accuracy.items()}
    fig = recall.draw(rows, "title")
    fig.draw_without_rendering()
    labels = fig.axes[1].texts
    assert [text.get_text() for text in labels] == ["a\nb", "c", "d"]
    boxes = [text.get_window_extent() for text in labels]
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


def test_many_distances_share_columns():
    rows = {"a": {"by_distance": [[d, d % 2] for d in range(1, 1001)]}}
    table, edges = recall.columns_of(rows)
    assert table.shape == (1, 63) and edges[1] - edges[0] == 16 and np.allclose(table[0, :-1], 0.5)


def test_comparison_of_text_by_work(tmp_path, drawn):
    """Bits per byte are better when lower, and the axis says so; unequal steps are drawn where all seeds have them."""
    file = comparison(tmp_path / "x.json", ["a", "b"], "bits_per_byte", hard=False, seeds=[1, 2], budget="work",
                      split="val")
    saved = json.loads(file.read_text())
    saved["runs"][0]["curve"] = [[0, 8.0], [7, 3.0], [20, 2.5]]
    saved["variants"][1]["scores"]["bits_per_byte"] |= {"low": None, "high": None}  # what one seed has
    file.write_text(json.dumps(saved))
    call(plot, file)
    curves, finals, *_ = drawn["x.png"].axes
    assert lines(curves)["a"] == ([0, 20], [4.25, 1.65])
    assert curves.get_ylabel() == "validation bits per byte (lower is better)"
    assert finals.get_xlabel() == "validation bits per byte (lower is better)"
    assert np.allclose(finals.collections[1].get_segments()[0], [[0.81, 1], [0.81, 1]])
    assert "2 seeds, 2,000 TFLOP each" in drawn["x.png"].get_suptitle()
