"""Pictures of runs show what was logged and predicted."""

import json
import subprocess
import sys

import numpy as np
import pytest

import plot
from core import curves, figures
from core.runs import check_folder
from helpers import ROOT, call


@pytest.fixture
def drawn(monkeypatch):
    """{file name: the figure that was written there}; skips where matplotlib is not installed."""
    pytest.importorskip("matplotlib")
    pictures, write = {}, figures.write

    def keep(fig, path, *colours):
        write(fig, path, *colours)
        pictures[path.name] = fig
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 100_000

    monkeypatch.setattr(figures, "write", keep)
    return pictures


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)


def lines(ax):
    """{label: (x, y)} of what a panel shows."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


def covers_nothing(fig, ax):
    """Whether the legend of a panel lies outside all panels."""
    fig.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    return not any(legend.overlaps(other.get_window_extent()) for other in fig.axes)


def panels(fig):
    return [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]


# ---- a run -----------------------------------------------------------------------------------


def write_log(folder, *records, end=""):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + end, "utf-8")
    return folder


def test_curves(tmp_path, drawn, capsys):
    run = write_log(
        tmp_path / "out-x",
        {"step": 0, "split": "val", "loss": 5.5, "bits_per_byte": 7.9, "stats": [{"kept_share": 1.0}]},
        {"step": 0, "split": "train", "loss": 5.4, "lr": 1e-3}, {"step": 10, "split": "train", "loss": 3.0, "lr": 1e-3},
        {"step": 20, "split": "val", "loss": 2.5, "bits_per_byte": 3.6},
        {"step": 20, "split": "val", "whole": True, "loss": 2.6, "bits_per_byte": 3.75},
        end='{"step": 30, "split": "tr')
    assert call(plot, run) is None
    assert capsys.readouterr().out == f"{run / 'curves.png'}\n" and list(drawn) == ["curves.png"]  # and no spans.png
    loss, bits = drawn["curves.png"].axes
    assert lines(loss) == {"training": ([0, 10], [5.4, 3.0]), "validation": ([0, 20], [5.5, 2.5]),
                           "best weights, whole val split: 2.6000": ([20], [2.6])}
    assert lines(bits) == {"validation": ([0, 20], [7.9, 3.6]), "best weights, whole val split: 3.7500": ([20], [3.75])}
    assert (loss.get_ylabel(), bits.get_ylabel(), bits.get_xlabel()) == ("loss (nats)", "bits per byte", "step")
    for ax in (loss, bits):
        assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines(ax))
        assert covers_nothing(drawn["curves.png"], ax)


def test_accuracy_has_a_panel(tmp_path, drawn):
    run = write_log(tmp_path / "out", {"step": 0, "split": "val", "loss": 0.7, "accuracy": 0.5, "f1": 0.4},
                    {"step": 5, "split": "val", "loss": 0.4, "accuracy": 0.8, "f1": 0.8},
                    {"step": 5, "split": "val", "whole": True, "loss": 0.41, "accuracy": 0.81},
                    {"step": 5, "split": "test", "whole": True, "loss": 0.45, "accuracy": 0.79})
    call(plot, run)
    loss, accuracy = drawn["curves.png"].axes
    assert lines(loss)["validation"] == ([0, 5], [0.7, 0.4]) and "training" not in lines(loss)
    assert lines(accuracy) == {"validation": ([0, 5], [0.5, 0.8]),
                               "best weights, whole val split: 0.8100": ([5], [0.81]),
                               "best weights, whole test split: 0.7900": ([5], [0.79])}


def test_accuracy_of_the_training_split(tmp_path, drawn):
    """Where --eval_train=True logged it."""
    out = write_log(tmp_path / "out", {"step": 0, "split": "val", "loss": 0.7, "accuracy": 0.5, "train_accuracy": 0.6},
                    {"step": 9, "split": "val", "loss": 0.4, "accuracy": 0.8, "train_accuracy": 0.9})
    call(plot, out)
    assert lines(drawn["curves.png"].axes[1])["training"] == ([0, 9], [0.6, 0.9])


def test_curves_of_many_runs(tmp_path, drawn, capsys):
    """A colour a run, the same in both panels; their folders' names, made longer where they are the same; and no
    room given to the fall at the beginning."""
    for n, name in enumerate(("a/x", "b/x", "b/$y$")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_log(tmp_path / name, {"step": 0, "split": "val", "loss": 5.0, "bits_per_byte": 8.0},
                  *({"step": step, "split": split, "loss": 2.0 - step / 100 - n / 10, "bits_per_byte": 3.0 - n}
                    for step in (10, 20) for split in ("train", "val")),
                  *[{"step": 20, "split": "val", "whole": True, "loss": 1.9, "bits_per_byte": 2.5}] * (n == 0))
    call(plot, *(tmp_path / name for name in ("a/x", "b/x", "b/$y$", "a/x")))
    assert capsys.readouterr().out == f"{tmp_path / 'a/x/curves.png'}\n"
    loss, bits = drawn["curves.png"].axes
    named = {label: xy for label, xy in lines(loss).items() if label[0] != "_"}
    assert list(named) == ["a/x, val 1.9000", "b/x", r"b/\$y\$"]
    assert np.allclose(named["b/x"], ([0, 10, 20], [5.0, 1.8, 1.7]))
    assert [text.get_text() for text in bits.get_legend().get_texts()] == ["a/x, val 2.5000", "b/x", r"b/\$y\$"]
    colours = [[line.get_color() for line in ax.lines if line.get_label()[0] != "_"] for ax in (loss, bits)]
    assert colours[0] == colours[1] and len(set(colours[0])) == 3
    training = [line for line in loss.lines if line.get_label()[0] == "_"]
    assert [line.get_color() for line in training] == colours[0] and list(training[0].get_ydata()) == [1.9, 1.8]
    assert all(line.get_linewidth() < 1 for line in training)
    assert loss.get_ylim()[1] < 2 and loss.get_ylim()[0] < 1.6 and covers_nothing(drawn["curves.png"], loss)
    call(plot, tmp_path / "a/x", tmp_path / "b/x", f"--out={tmp_path / 'new/pictures'}")
    assert (tmp_path / "new/pictures/curves.png").exists()


def kept(*shares):
    return {"split": "val", "loss": 3.0, "stats": [{} if share is None else {"kept_share": share} for share in shares]}


def test_kept_share(tmp_path, drawn, capsys):
    """Layers that are alike have one line; those without attention none; a run that keeps all no picture."""
    run = write_log(tmp_path / "a", {"step": 0, **kept(1.0, 0.5, 1.0, None)}, {"step": 9, **kept(1.0, 0.25, 1.0, None)})
    call(plot, run)
    (ax,) = drawn["kept.png"].axes
    assert lines(ax) == {"layers 0, 2: 100.0 %": ([0, 9], [100, 100]), "layer 1: 25.0 %": ([0, 9], [50, 25])}
    assert ax.get_ylabel() == "kept pairs (%)" and ax.get_ylim()[0] == 0
    dense = write_log(tmp_path / "b", {"step": 0, **kept(1.0, 1.0)}, {"step": 9, **kept(1.0, 1.0)})
    none = write_log(tmp_path / "c", {"step": 0, "split": "val", "loss": 3.0})
    drawn.clear()
    for folder in (dense, none):
        call(plot, folder)
    assert list(drawn) == ["curves.png"]
    call(plot, run, dense, none)
    (ax,) = drawn["kept.png"].axes
    assert lines(ax) == {"a: 75.0 %": ([0, 9], [pytest.approx(250 / 3), 75]), "b: 100.0 %": ([0, 9], [100, 100])}


def test_spans(tmp_path, drawn, capsys):
    """A panel a layer, a line a head; periods below; a layer without spans stays empty."""
    def stats(step):
        return [{"kept_share": 0.5 - step / 100, "spans": [100.0 - step, 50.0], "periods": [2.0, 8.0],
                 "ratios": [0.0, 0.1]},
                {"kept_share": 1.0}]

    run = write_log(tmp_path / "out",
                    *({"step": n, "split": "val", "loss": 3.0, "stats": stats(n)} for n in (0, 10, 20)))
    call(plot, run)
    assert capsys.readouterr().out.splitlines() == [str(run / name) for name in ("curves.png", "kept.png", "spans.png")]
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


# ---- a classifier ------------------------------------------------------------------------------


def classifier(folder, split, p, labels, **more):
    write_log(folder, {"step": 0, "split": "val", "loss": 0.7, "accuracy": 0.5})
    np.savez(folder / f"predictions-{split}.npz", p=np.array(p, np.float32), label=np.array(labels, np.uint8), **more)
    return folder


def test_roc_of_known_predictions():
    """Ties pass a threshold together; the area is that of evaluation.scores."""
    false, true = curves.roc(np.array([0.9, 0.8, 0.8, 0.3, 0.1]), np.array([True, True, False, True, False]))
    assert np.allclose(false, [0, 0, 0.5, 0.5, 1]) and np.allclose(true, [0, 1 / 3, 2 / 3, 1, 1])
    random = np.random.default_rng(0)
    p, labels = random.integers(0, 30, 400) / 30, random.random(400) < 0.4
    from core.evaluation import scores

    false, true = curves.roc(p, labels)
    assert (np.diff(true) * (false[1:]
                             + false[:-1]) / 2).sum() == pytest.approx(1 - scores(p, labels)["auc"], abs=1e-12)


def test_confusion_and_roc(tmp_path, drawn, reviews, capsys):
    """Of the test split where there is one, with the data's names of the classes."""
    run = classifier(tmp_path / "out", "val", [0.5], [1])
    classifier(run, "test", [0.9, 0.2, 0.6, 0.7, 0.4, 0.1, 0.8], [1, 1, 0, 1, 0, 1, 1])
    (run / "config.json").write_text(json.dumps({"settings": {"dataset": str(reviews)}}))
    call(plot, run)
    assert [line.rsplit("/", 1)[1]
            for line in capsys.readouterr().out.split()] == ["curves.png", "confusion.png", "roc.png"]
    (ax,) = drawn["confusion.png"].axes
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {
        ((0, 0), "1\n50.0 %"), ((1, 0), "1\n50.0 %"), ((0, 1), "2\n40.0 %"), ((1, 1), "3\n60.0 %")}
    assert ax.get_title() == "out: accuracy 0.5714" and "test split" in drawn["confusion.png"].get_suptitle()
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["negative", "positive"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true") and ax.yaxis_inverted()
    fig, width = drawn["confusion.png"], drawn["confusion.png"].bbox.width
    fig.draw_without_rendering()
    for title in (fig._suptitle, ax.title):  # none is cut
        assert 0 <= title.get_window_extent().x0 and title.get_window_extent().x1 <= width
    (ax,) = drawn["roc.png"].axes
    x, y = lines(ax)["out: AUC 0.6000"]  # 6 of 10 pairs in order
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert ax.get_xlabel() == "share of negative texts predicted positive"


def test_predictions_of_many_runs(tmp_path, drawn, capsys):
    """All of one split, that of the most runs; the others are named."""
    a, b, c = (classifier(tmp_path / name, "val", [0.9, 0.4, min(1, 0.3 + n)], [1, 1, 0])
               for n, name in enumerate("abc"))
    classifier(a, "test", [0.9, 0.1], [1, 0])
    call(plot, a, b, c)
    assert "val split" in drawn["roc.png"].axes[0].get_title()
    assert list(lines(drawn["roc.png"].axes[0])) == ["chance: AUC 0.5", "a: AUC 1.0000", "b: AUC 0.0000",
                                                     "c: AUC 0.0000"]
    assert [ax.get_title()[:2] for ax in drawn["confusion.png"].axes] == ["a:", "b:", "c:"]
    assert [t.get_text() for t in drawn["confusion.png"].axes[0].get_xticklabels()] == ["class 0", "class 1"]
    classifier(b, "test", [0.9, 0.1], [0, 1])
    capsys.readouterr()
    for name in "ac":
        (tmp_path / name / "predictions-val.npz").unlink()
    call(plot, a, b, c)
    assert list(lines(drawn["roc.png"].axes[0]))[1:] == ["a: AUC 1.0000", "b: AUC 0.0000"]
    assert "c holds no predictions-test.npz; it is left out of the pictures of predictions\n" in capsys.readouterr().out


def test_accuracy_by_length(tmp_path, drawn, capsys):
    """Of each run whose predictions hold the lengths; those of another tokenizer are below, an earlier run is left
    out."""
    p, labels = [0.9] * 30 + [0.1] * 10, [1] * 20 + [0] * 10 + [1] * 5 + [0] * 5
    lengths = np.repeat([5, 12, 1200, 7000], 10)
    a = classifier(tmp_path / "a", "val", p, labels, length=lengths)
    b = classifier(tmp_path / "b", "val", p[::-1], labels[::-1], length=4 * lengths[::-1].astype(np.uint32))
    call(plot, a)
    assert f"{a / 'lengths.png'}\n" in capsys.readouterr().out
    (ax,) = drawn["lengths.png"].axes
    assert list(ax.lines[0].get_ydata()) == [1, 1, 0, 0.5] and list(ax.lines[0].get_xdata()) == [0, 1, 2, 3]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["5-5", "12-12", "1,200-1,200", "7,000-7,000"]
    (bars,) = ax.collections
    assert np.ptp(bars.get_segments()[3][:, 1]) == pytest.approx(2 * 1.96 * (0.25 / 10) ** 0.5)
    call(plot, a, b, classifier(tmp_path / "c", "val", p, labels))
    (ax,) = drawn["lengths.png"].axes
    assert ax.get_legend_handles_labels()[1] == ["a", "b"]
    assert [label.get_text() for label in ax.get_xticklabels()][1:3] == ["12-12\n48-48", "1,200-1,200\n4,800-4,800"]
    assert check_folder(a) is None  # a new run may replace this one


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", {"p": [0.5]}, {"p": [0.5], "label": [1, 0]},
                                     {"p": [], "label": []}, {"p": ["a"], "label": [1]},
                                     {"p": [0.5], "label": [1], "length": [3, 3]},
                                     {"p": [0.5], "label": [1], "length": [-1]},
                                     {"p": [0.5], "label": [1], "length": [3.0]},
                                     {"p": [0.5], "label": [1], "length": ["3"]}])
def test_damaged_predictions(tmp_path, refused, drawn, content):
    run = write_log(tmp_path / "out", {"step": 0, "split": "val", "loss": 3.0})
    path = run / "predictions-val.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    assert refused(plot, run).startswith(f"plot.py: {path} is damaged (")


def test_logs_alone_need_no_torch(tmp_path):
    """Pictures of what was logged start in the time that matplotlib takes."""
    pytest.importorskip("matplotlib")
    run = write_log(tmp_path / "out", {"step": 0, **kept(0.5)})
    line = f"import sys, plot; sys.argv = ['plot.py', {str(run)!r}]; plot.main(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT).returncode == 0 and (run / "kept.png").exists()


def test_as_a_script(tmp_path):
    """--dpi reaches the files that plot.py leaves the drawing to."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    file = ROOT / "results" / "bench_attention.json"
    done = subprocess.run([sys.executable, str(ROOT / "plot.py"), str(file), "--dpi=20", f"--out={tmp_path}"],
                          cwd=tmp_path)
    assert done.returncode == 0 and Image.open(tmp_path / "bench_attention.png").width == 220


def test_a_run_without_matplotlib(tmp_path, refused, without_matplotlib):
    run = write_log(tmp_path / "out", {"step": 0, "split": "val", "loss": 3.0})
    assert refused(plot, run).endswith(f"{sys.executable} -m pip install matplotlib")
    assert not (run / "curves.png").exists()


# ---- what is refused -----------------------------------------------------------------------------


def test_refused(tmp_path, refused):
    write_log(tmp_path / "empty")
    write_log(tmp_path / "cut", end='{"step": 0, "spl\n[1]\n3\n{"loss": 2}\n')
    (tmp_path / "text.txt").write_text("a")
    for name, says in {
        ".": "holds no log.jsonl; give the out_dir of a run", "empty": "holds no records yet",
        "cut": "holds no records yet",
        "nowhere": "which does not exist",
        "text.txt": "expected the folder of a run, or a JSON file of compare.py or bench.py",
    }.items():
        assert says in refused(plot, tmp_path / name)
    assert "got nothing" in refused(plot)
    assert "unknown key 'dip'; did you mean dpi?" in refused(plot, tmp_path, "--dip=3")
    assert "dpi must be from 20" in refused(plot, tmp_path, "--dpi=0")
    said = refused(plot, tmp_path, "--layer=0")
    assert 'layer and head choose among the heat maps of a text: give --text="..."' in said
    assert "expected the folder of a run, got" in refused(plot, ROOT / "results" / "bench_attention.json", "--text=a")
    assert "plot.py:" in refused(plot, write_log(tmp_path / "a", {"step": 0, "loss": 1, "split": "val"}),
                                 tmp_path / "empty")
