"""Pictures show what was logged and measured, and a mechanism shows its own pattern, with or without matplotlib."""

import json
import math
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call

import bench
import plot
from attention import Attention
from configurator import UserError
from model import GPTConfig

MECHANISMS = [file for file in sorted(ROOT.glob("*.py")) if "\nclass Attention(" in file.read_text("utf-8")]


@pytest.fixture
def drawn(monkeypatch):
    """{file name: the figure that was written there}; skips where matplotlib is not installed."""
    pytest.importorskip("matplotlib")
    figures, write = {}, plot.write

    def keep(fig, path):
        write(fig, path)
        figures[path.name] = fig
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 100_000

    monkeypatch.setattr(plot, "write", keep)
    return figures


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def in_folder(monkeypatch, tmp_path):
    """The current folder is empty, and the terminal 80 columns wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def lines(ax):
    """{label: (x, y)} of what a panel shows."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


def panels(fig):
    return [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]


# ---- a run -----------------------------------------------------------------------------------


def write_log(folder, *records, end=""):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + end, "utf-8")
    return folder


def test_curves(tmp_path, drawn, capsys):
    run = write_log(
        tmp_path / "out-x", {"step": 0, "split": "val", "loss": 5.5, "bits_per_byte": 7.9, "stats": [{"kept_share": 1.0}]},
        {"step": 0, "split": "train", "loss": 5.4, "lr": 1e-3}, {"step": 10, "split": "train", "loss": 3.0, "lr": 1e-3},
        {"step": 20, "split": "val", "loss": 2.5, "bits_per_byte": 3.6},
        {"step": 20, "split": "val", "whole": True, "loss": 2.6, "bits_per_byte": 3.75}, end='{"step": 30, "split": "tr')
    assert call(plot, run) is None
    assert capsys.readouterr().out == f"{run / 'curves.png'}\n" and list(drawn) == ["curves.png"]  # and no spans.png
    (ax,) = drawn["curves.png"].axes
    assert lines(ax) == {"training": ([0, 10], [5.4, 3.0]), "validation": ([0, 20], [5.5, 2.5]),
                         "best weights, whole val split: 2.6000 (3.7500 bits per byte)": ([20], [2.6])}
    assert ax.get_xlabel() == "step" and ax.get_ylabel() == "loss (nats)"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines(ax))


def test_accuracy_has_a_panel(tmp_path, drawn):
    run = write_log(tmp_path / "out", {"step": 0, "split": "val", "loss": 0.7, "accuracy": 0.5, "f1": 0.4},
                    {"step": 5, "split": "val", "loss": 0.4, "accuracy": 0.8, "f1": 0.8},
                    {"step": 5, "split": "val", "whole": True, "loss": 0.41, "accuracy": 0.81},
                    {"step": 5, "split": "test", "whole": True, "loss": 0.45, "accuracy": 0.79})
    call(plot, run)
    loss, accuracy = drawn["curves.png"].axes
    assert lines(loss)["validation"] == ([0, 5], [0.7, 0.4]) and lines(loss)["training"] == ([], [])
    assert lines(accuracy) == {"validation": ([0, 5], [0.5, 0.8]), "best weights, whole val split: 0.8100": ([5], [0.81]),
                               "best weights, whole test split: 0.7900": ([5], [0.79])}


def test_spans(tmp_path, drawn, capsys):
    """A panel a layer, a line a head; periods below; a layer without spans stays empty."""
    def stats(step):
        return [{"kept_share": 0.5 - step / 100, "spans": [100.0 - step, 50.0], "periods": [2.0, 8.0], "ratios": [0.0, 0.1]},
                {"kept_share": 1.0}]

    run = write_log(tmp_path / "out", *({"step": n, "split": "val", "loss": 3.0, "stats": stats(n)} for n in (0, 10, 20)))
    call(plot, run)
    assert capsys.readouterr().out.splitlines() == [str(run / "curves.png"), str(run / "spans.png")]
    axes = panels(drawn["spans.png"])
    assert [ax.get_title() for ax in axes] == ["layer 0, keeps 30.0 %", "layer 1, keeps 100.0 %", "layer 0", "layer 1"]
    (spans, no_spans, periods, no_periods) = ([line.get_ydata() for line in ax.lines] for ax in axes)
    assert np.array_equal(spans, [[100, 90, 80], [50, 50, 50]]) and np.array_equal(periods, [[2, 2, 2], [8, 8, 8]])
    assert no_spans == no_periods == [] and list(axes[0].lines[0].get_xdata()) == [0, 10, 20]
    assert [text.get_text() for text in drawn["spans.png"].legends[0].get_texts()] == ["head 0", "head 1"]
    assert axes[0].get_ylabel() == "span (tokens)" and axes[2].get_ylabel() == "period (tokens)"
    assert axes[0].get_ylim() == axes[1].get_ylim() != axes[2].get_ylim() == axes[3].get_ylim()


def test_spans_of_many_layers_and_heads(tmp_path, drawn):
    """13 layers of 16 heads: three rows of five, one panel a layer, no two heads drawn the same way."""
    layer = {"kept_share": 0.5, "spans": list(range(16))}
    call(plot, write_log(tmp_path / "out", {"step": 0, "split": "val", "loss": 3.0, "stats": [layer] * 13}))
    axes = drawn["spans.png"].axes
    assert [ax.get_title() for ax in axes] == [f"layer {n}, keeps 50.0 %" for n in range(13)]
    assert [n for n, ax in enumerate(axes) if ax.get_xlabel()] == [8, 9, 10, 11, 12]  # the lowest of each column
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes[12].lines}
    assert len(axes[12].lines) == len(looks) == 16 and axes[0].get_gridspec().get_geometry() == (3, 5)


# ---- a benchmark -------------------------------------------------------------------------------


def row(label, shape, ms, fused, more=1.0, fused_more=1.0):
    return {"attention": label, "batch x heads x time": shape, "ms": ms, "fused call, ms": fused, "times as fast": fused / ms,
            "MiB more": more, "fused, MiB more": fused_more}


def write_rows(path, *rows, **more):
    machine = {"processor": "A", "threads": 2, "gpu": None}
    path.write_text(json.dumps({"machine": machine, "dtype": "bfloat16", "rows": rows, **more}), "utf-8")
    return path


def test_bench(tmp_path, drawn, capsys):
    """A line a mechanism with its exponent, and the fused call's median; what was not measured is left out."""
    rows = [row(label, f"1x8x{T}", (T / 256) ** b, fused * (T / 256) ** 2, None if label == "strided" else T / 512, T / 1024)
            for T in (256, 512, 1024) for label, b, fused in (("dense", 2, 3), ("strided", 1.5, 5), ("local", 1, 4))]
    file = write_rows(tmp_path / "bench.json", *rows, growth=[{"growth": "dense", "time ~ T^": 2.0}])
    call(plot, file)
    assert capsys.readouterr().out == f"{tmp_path / 'bench.png'}\n"
    time, memory = drawn["bench.png"].axes
    assert list(lines(time)) == ["dense: $T^{2.00}$", "strided: $T^{1.50}$", "local: $T^{1.00}$", "fused call: $T^{2.00}$"]
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
    found, what, _ = plot.read_rows(file)
    assert list(found) == ["dense", "fused call"] and list(found["dense"]) == [32, 64] and what == "batch 1, 2 heads"
    assert found["dense"][64][0] == json.loads(file.read_text())["rows"][1]["ms"] > 0


# ---- patterns ----------------------------------------------------------------------------------


def alone(name, *arguments, **defaults):
    """plot.pattern called as a mechanism's file would be, with these arguments."""
    return call(SimpleNamespace(__name__=name, main=lambda: plot.pattern(name, defaults)), *arguments)


HEAD = "a line a query, a column a key; # kept, :+* in part, . dropped"


def test_text(in_folder, capsys, drawn):
    assert alone("dense", "--T=4", n_head=2) is None
    assert capsys.readouterr().out == f"""{HEAD}

layer 0, heads 0-1: dense, keeps 100.0 % of the pairs of dense attention
#
# #
# # #
# # # #

pattern-dense.png
"""
    (ax,) = drawn["pattern-dense.png"].axes
    assert ax.get_title() == "layer 0, heads 0-1\ndense, keeps 100.0 %"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query") and ax.yaxis_inverted()
    shown = ax.images[0].get_array()
    assert np.array_equal(shown.mask if np.ma.isMA(shown) else np.isnan(shown), np.triu(np.ones((4, 4)), 1))


def test_both_directions(in_folder, capsys, without_matplotlib):
    alone("dense", "--causal=False", T=2)
    assert "layer 0, heads 0-3: dense, keeps 100.0 % of the pairs of dense attention\n# #\n# #\n\n" in capsys.readouterr().out


def test_pattern_of_a_file(in_folder, capsys, without_matplotlib):
    """Options come from the file, the call and the line, in this order; layers of one pattern share a panel."""
    alone("sparse", "--window=2", "--n_layer=3", sparse_pattern="local,dense", window=3, T=4)
    assert capsys.readouterr().out.startswith(f"""{HEAD}

layers 0, 2, heads 0-3: local, keeps 70.0 % of the pairs of dense attention
#
# #
. # #
. . # #

layer 1, heads 0-3: dense, keeps 100.0 % of the pairs of dense attention
#
""")


class Steps(Attention):
    """Soft masks: each head and layer has what `rows` says of the distances 0, 1, ..."""

    rows = {0: [[1, 0.5, 0, 0.01], [1, 1, 1, 1], [1, 0.5, 0, 0.01]], 1: [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0.9, 0.4, 0]]}

    def bias(self, i, j):
        distance = i[:, None] - j[None]
        far = torch.tensor(self.rows[self.layer])[:, distance.clamp(min=0)]
        return far.where(distance >= 0, 0).log()

    def stats(self):
        return {"kept_share": 0.5, "spans": [1.25, 300.0, 1.25], "names": ["a"]}


class Doubles(Attention):
    """The first key's weight counts double where a query sees more than two."""

    def reweigh(self, p, keys, statistic=None):
        first = torch.zeros_like(p)
        first[..., 0] = 1
        return p * (1 + first * (keys > 2))


def stand_in(kind, layers=1, T=4, **config):
    """What `patterns` needs of a model whose mechanism has no file."""
    config = GPTConfig(n_head=3, n_embd=24, block_size=T, **config)
    return SimpleNamespace(config=config, layers=[SimpleNamespace(attention=kind(config, n)) for n in range(layers)])


def test_soft_masks_and_merging():
    masks, factors = plot.patterns(stand_in(Steps, 2), "steps", 4)
    assert [title for title, _ in masks] == [
        "layer 0, heads 0, 2: steps, span 1.25, keeps 80.0 %",  # 4 + 3 + 1 of 10 pairs
        "layer 0, head 1; layer 1, heads 0-1: steps, span 300/1.25, keeps 100.0 %",
        "layer 1, head 2: steps, span 1.25, keeps 90.0 %"]
    assert factors == []
    nan = math.nan
    expected = [[1, nan, nan, nan], [0.5, 1, nan, nan], [0, 0.5, 1, nan], [0.01, 0, 0.5, 1]]
    np.testing.assert_allclose(masks[0][1], expected, rtol=1e-6)
    assert plot.text(masks[0][1], 80) == "#\n+ #\n. + #\n: . + #"
    assert plot.text(masks[2][1], 7) == "#\n*#\n+*#\n.+*#"


def test_a_key_after_its_query_is_shown():
    """A mechanism that looks ahead is seen doing it."""
    class Ahead(Attention):
        def bias(self, i, j):
            return torch.where(j[None] - i[:, None] <= 1, 0.0, -math.inf)[None]

    ((_, mask),), _ = plot.patterns(stand_in(Ahead), "ahead", 4)
    assert plot.text(mask, 80) == "# #\n# # #\n# # # #\n# # # #"


def test_factor():
    masks, ((title, factor),) = plot.patterns(stand_in(Doubles, 2), "doubles", 4)
    nan = math.nan
    assert len(masks) == 1 and title == "layers 0-1, heads 0-2: factor on the weights of random q and k"
    np.testing.assert_array_equal(factor, [[1, nan, nan, nan], [1, 1, nan, nan], [2, 1, 1, nan], [2, 1, 1, 1]])
    _, ((_, factor),) = plot.patterns(stand_in(Doubles, T=2, n_class=2), "doubles", 3)
    np.testing.assert_array_equal(factor, [[2, 1, 1]] * 3)


def test_picture_of_factors(tmp_path, drawn):
    masks, factors = plot.patterns(stand_in(Doubles), "doubles", 4)
    plot.draw_pattern(plot.figure(), masks, factors, tmp_path / "a.png")
    mask, factor = panels(drawn["a.png"])
    assert mask.images[0].get_clim() == (0, 1) and factor.images[0].get_clim() == (0, 2)  # white is 1
    (bar,) = set(drawn["a.png"].axes) - {mask, factor}
    assert bar.get_ylabel() == "factor"  # and none for a mask of zeros and ones


def test_large_patterns_are_averaged():
    """5 positions on 3 columns: characters of 2 x 2 pairs, the last of what is left."""
    mask = np.where(np.tri(5), np.tri(5) - np.tri(5, k=-2), math.nan)  # the last two keys
    assert plot.text(mask, 3) == "#\n:#\n.+#"


def test_without_matplotlib(in_folder, capsys, monkeypatch, without_matplotlib):
    """The text comes all the same, with a word on the picture, and that is no failure."""
    monkeypatch.setattr(sys, "argv", ["attention.py", "--T=3"])
    with pytest.raises(SystemExit) as left:
        plot.show_pattern("dense")
    out, err = capsys.readouterr()
    assert left.value.code in (None, 0) and err == "" and "\n#\n# #\n# # #\n" in out
    assert out.splitlines()[-1].startswith("no picture: pictures need matplotlib (") and "pip install matplotlib" in out
    assert list(in_folder.iterdir()) == []


def test_a_run_without_matplotlib(tmp_path, refused, without_matplotlib):
    run = write_log(tmp_path / "out", {"step": 0, "split": "val", "loss": 3.0})
    assert refused(plot, run).endswith("pip install matplotlib") and not (run / "curves.png").exists()


@pytest.mark.parametrize("file", MECHANISMS, ids=lambda file: file.stem)
def test_each_mechanism_shows_itself(file, in_folder, capsys, monkeypatch, drawn):
    """Run alone, a mechanism's file prints its pattern, in ASCII, and draws it; so it does in both directions."""
    for more in ([], ["--causal=False", "--out=both.png"]):
        monkeypatch.setattr(sys, "argv", [file.name, *more])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(file), run_name="__main__")
        out, err = capsys.readouterr()
        assert left.value.code in (None, 0) and err == "" and out.isascii()
        assert "layer 0, head" in out and "% of the pairs of dense attention\n#" in out
        assert out.splitlines()[-1] in drawn and max(map(len, out.splitlines())) < 130
    assert "both.png" in drawn and len(drawn) == 2


# ---- what is refused -----------------------------------------------------------------------------


def test_refused(tmp_path, refused):
    write_log(tmp_path / "empty")
    write_log(tmp_path / "cut", end='{"step": 0, "spl\n[1]\n3\n{"loss": 2}\n')
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    write_rows(tmp_path / "step.json", {"step": "here", "ms": 3})
    write_rows(tmp_path / "short.json", {"attention": "dense", "batch x heads x time": "1x8"})
    for name, says in {
        ".": "holds no log.jsonl; give the out_dir of a run", "empty": "holds no records yet", "cut": "holds no records yet",
        "nowhere": "which does not exist", "text.txt": "expected the folder of a run or a JSON file of bench.py, got the file",
        "broken.json": "is not what `python bench.py attention", "list.json": "is not what `python bench.py attention",
        "short.json": "is not what `python bench.py attention", "step.json": "holds no rows of `python bench.py attention",
    }.items():
        assert says in refused(plot, tmp_path / name)
    assert "got nothing" in refused(plot)
    assert "unknown key 'dip'; did you mean dpi?" in refused(plot, tmp_path, "--dip=3")
    assert "dpi must be from 20" in refused(plot, tmp_path, "--dpi=0")


@pytest.mark.parametrize("name, arguments, defaults, says", [
    ("dense", ["--T=0"], {}, "T must be from 1 to 2048"),
    ("dense", ["--T=long"], {}, "T expects int"),
    ("dense", ["--n_heads=3"], {}, "unknown key 'n_heads'; did you mean n_head?"),
    ("dense", ["--n_head=0"], {}, "n_head must be at least 1"),
    ("dense", ["--out=a.txt"], {}, "out expects the name of a PNG file, like a.png, got 'a.txt'"),
    ("dense", [], {"windw": 3}, "dense has no option windw"),
    ("spars", [], {}, "unknown attention 'spars'; did you mean sparse?"),
    ("sparse", ["--sparse_pattern=locl"], {}, "unknown sparse_pattern 'locl'; did you mean local?"),
])
def test_pattern_refused(in_folder, name, arguments, defaults, says):
    with pytest.raises(UserError) as error:
        alone(name, *arguments, **defaults)
    assert says in str(error.value) and list(in_folder.iterdir()) == []


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        alone("sparse", "--help", window=5)
    out = capsys.readouterr().out
    assert left.value.code == 0 and "--T=48" in out and "n_layer = 1" in out and "window = 5" in out
