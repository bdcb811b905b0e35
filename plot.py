"""Pictures: python plot.py OUT_DIR [OUT_DIR ...] [--key=value], or python plot.py results/FILE.json

OUT_DIR   a run of train.py; of several, pictures for all together. Into the first one's folder, or --out=FOLDER:
    curves.png      loss, and accuracy or bits per byte, over the steps
    kept.png        the share of pairs that attention keeps, where it drops some
    spans.png       the spans and periods that heads have learned
    confusion.png   a classifier's answers against the truth, and roc.png: over the test split where it was opened,
                    else over validation
  and with a text, in their place, from best.pt:
    --text="..."      heat.png: attention within a prompt or a review, in --layer=N by --head=N; and for a classifier the
                      page reviews.png: what it says, and the words that weighed most
    --reviews=FILE    that page for reviews, each a line {"text": "...", "label": 1, "kind": "..."}; no label, no truth
FILE      what compare.py wrote (FILE.png, FILE_hard.png), or `bench.py attention --results=FILE` (FILE.png)

A mechanism's pattern is drawn by python attention.py NAME. Pictures need matplotlib.
"""

from core import startup  # first: torch reads its settings when it is loaded

import math
import sys
from pathlib import Path

import numpy as np

from core import figures, readers
from core.config import UserError, configure, run_main
from core.readers import read_log

out = ""  # the folder for pictures; default: that of the first run, or of the JSON file
dpi = 110  # dots per inch
text = ""  # show what the model looks at in this text
reviews = ""  # a file of reviews, to show what the model says of them
layer = -1  # of heat maps; -1: the last one
head = -1  # of heat maps; -1: all of the layer

# ---- runs --------------------------------------------------------------------------------------


def names_of(folders):
    """{name: folder} of different folders: as much of each one's end as tells it from the others."""
    folders = {folder.resolve(): folder for folder in folders}
    depth = 1
    while len({path.parts[-depth:] for path in folders}) < len(folders):
        depth += 1
    return {"/".join(path.parts[-depth:]): folder for path, folder in folders.items()}


def series(records, key):
    """(steps, values) of the records that have the key."""
    there = [r for r in records if key in r]
    return [r["step"] for r in there], [r[key] for r in there]


SCORES = {"loss": "loss (nats)", "accuracy": "accuracy", "bits_per_byte": "bits per byte"}


def draw_curves(logs, path):
    """Losses over the steps, and what other scores there are. logs: {name: `read_log`}; many of them have a colour
    each and their scores in the legend, one alone shows its training loss in another colour, and its scores as marks."""
    keys = [key for key in SCORES if any(key in r for records, _ in logs.values() for r in records)]
    one = len(logs) == 1
    fig = figures.figure(5.5 * len(keys), 4.3 if one else 3.8 + 0.18 * -(-len(logs) // 2))
    for ax, key in zip(np.ravel(fig.subplots(1, len(keys))), keys):
        points = []
        for n, (name, (records, whole)) in enumerate(logs.items()):
            validation = series([r for r in records if r["split"] == "val"], key)
            training = series([r for r in records if r["split"] == "train"], key)
            if key != "loss":  # of batches there is only the loss; --eval_train=True logs the others
                training = series(records, f"train_{key}")
            points += validation, training
            look = {"color": figures.PALETTE[0], "marker": "o", "markersize": 3} if one else figures.style(n)
            whole = [r for r in whole if key in r]
            if training[0] and one:
                ax.plot(*training, color=figures.PALETTE[5], linewidth=1, label="training")
            elif training[0]:
                ax.plot(*training, color=look["color"], linewidth=0.6, alpha=0.4)
            if one:
                ax.plot(*validation, **look, label="validation")
                for m, r in enumerate(whole):
                    ax.plot(r["step"], r[key], color=figures.PALETTE[1 + m % 5], marker="o^"[m % 2], markersize=9, fillstyle="none",
                            linestyle="", label=f"best weights, whole {r['split']} split: {r[key]:.4f}")
            else:
                ends = "".join(f", {r['split']} {r[key]:.4f}" for r in whole)
                ax.plot(*validation, **look, linewidth=1.2, label=figures.plain(name) + ends)
        if not one:
            figures.focus(ax, points)
        ax.set(xlabel="step", ylabel=SCORES[key])
        ax.grid(alpha=0.3)
        figures.below(ax, 1 if one or len(logs) < 3 else 2)
    fig.suptitle(figures.plain(*logs) if one else "lines: validation (thin: training); figures: best weights, whole splits", fontsize=10)
    figures.write(fig, path)


MOST_LAYERS, MOST_HEADS, MOST_POINTS = 16, 16, 400  # of one picture: as many as can be told apart, and drawn in seconds


def spread(count, most):
    """At most `most` of the numbers below `count`, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def shown_of(chosen, count, what):
    """'24 of 300 layers' where not all are chosen, else ''."""
    return f"{len(chosen)} of {count:,} {what}" * (len(chosen) < count)


def draw_kept(logs, path):
    """The share of pairs that attention keeps over the steps: of one run a line for the layers that are alike, of
    many the mean over layers, a line each. Nothing where every layer always keeps all."""
    lines, chosen = {}, ""
    for name, (records, _) in logs.items():
        records = [r for r in records if any("kept_share" in layer for layer in r.get("stats", []))]
        steps, layers = [r["step"] for r in records], {}
        shares = np.array([[100 * layer.get("kept_share", math.nan) for layer in r["stats"]] for r in records])
        for n, column in enumerate(shares.T):  # shares: (records, layers)
            if np.isfinite(column).any():
                layers.setdefault(tuple(column), []).append(n)
        if len(logs) > 1 and layers:
            lines[figures.plain(name)] = steps, np.nanmean(shares, 1)
        elif len(logs) == 1:
            columns = list(layers.items())
            picked = spread(len(columns), MOST_LAYERS)
            chosen = shown_of(picked, shares.shape[-1], "layers") * (len(picked) < len(columns))
            for column, same in (columns[n] for n in picked):
                lines[f"layer{'s' * (len(same) > 1)} {figures.ranges(same)}"] = steps, column
    if all(np.nanmin(shares) >= 100 for _, shares in lines.values()):
        return
    fig = figures.figure(6.5, 3.6 + 0.18 * -(-len(lines) // 3))
    ax = fig.subplots()
    for n, (label, points) in enumerate(lines.items()):
        ax.plot(*points, **figures.style(n), linewidth=1.2, label=f"{label}: {points[1][-1]:.1f} %")
    ax.set(xlabel="step", ylabel="kept pairs (%)", ylim=(0, 104))
    ax.grid(alpha=0.3)
    title = "share of the pairs of dense attention that are kept" + ", mean over layers" * (len(logs) > 1)
    ax.set_title(title + f"\n{chosen}" * bool(chosen), fontsize=10)
    figures.below_all(fig, ax)
    figures.write(fig, path)


def draw_spans(records, path):
    """Spans per layer and head over the steps, and periods below them; nothing where none were logged.

    Of more than MOST_LAYERS layers, MOST_HEADS heads or MOST_POINTS evaluations evenly spaced ones are drawn.
    """
    records = [r for r in records if any("spans" in layer for layer in r.get("stats", []))]
    if not records:
        return
    last, records = records[-1]["stats"], [records[n] for n in spread(len(records), MOST_POINTS)]
    keys = [key for key in ("spans", "periods") if any(layer.get(key) for layer in last)]
    layers = spread(len(last), MOST_LAYERS)
    most = max(len(layer.get(key, [])) for layer in last for key in keys or ["spans"])
    heads = spread(most, MOST_HEADS)
    rows, columns = figures.grid(len(layers), 6)
    fig = figures.figure(1 + 2.1 * columns, 2.1 * rows * max(1, len(keys)))
    axes = fig.subplots(rows * max(1, len(keys)), columns, sharex=True, squeeze=False)
    lines = {}
    for first, key in zip(range(0, rows * len(keys), rows), keys):
        for place, ax in enumerate(axes[first : first + rows].flat):
            if place >= len(layers):
                ax.remove()
                continue
            n = layers[place]
            ax.sharey(axes[first, 0])
            for line, head in enumerate(heads):
                if head >= len(last[n].get(key, [])):
                    continue
                steps, values = zip(*[(r["step"], r["stats"][n][key][head]) for r in records])
                look = {**figures.style(line), "linewidth": 1.2, "markevery": -(-len(steps) // 8)}
                lines[f"head {head}"] = ax.plot(steps, values, **look)[0]
            kept = f", keeps {100 * last[n]['kept_share']:.1f} %" if key == "spans" and "kept_share" in last[n] else ""
            lowest = place + columns >= len(layers)
            ax.set_title(f"layer {n}{kept}", fontsize=9)
            ax.grid(alpha=0.3)
            ax.tick_params(labelsize=8, labelleft=place % columns == 0, labelbottom=lowest)
            ax.set_xlabel("step" if lowest else "")
            ax.set_ylabel(key[:-1] + " (tokens)" if place % columns == 0 else "")
    chosen = [part for part in (shown_of(layers, len(last), "layers"), shown_of(heads, most, "heads")) if part]
    if chosen:
        fig.suptitle(", ".join(chosen), fontsize=10)
    fig.legend(lines.values(), lines, loc="outside right upper", fontsize=8)
    figures.write(fig, path)


# ---- classifiers -------------------------------------------------------------------------------


def read_predictions(runs):
    """(split, {name: (p, labels)}) of {name: folder}: the probability of the second class of each text, and its
    class, over the test split, or over validation where no more runs opened the test split."""
    found = {split: {name: folder / f"predictions-{split}.npz" for name, folder in runs.items()} for split in ("test", "val")}
    found = {split: {name: path for name, path in files.items() if path.exists()} for split, files in found.items()}
    split = max(found, key=lambda split: len(found[split]))  # of equals the first
    for name in runs.keys() - found[split].keys() if found[split] else []:
        print(f"{name} holds no predictions-{split}.npz; it is left out of the pictures of predictions")
    for name, path in found[split].items():
        found[split][name] = readers.read_predictions(path)
    return split, found[split]


def class_names(folder):
    """What the data that a run was trained on calls its two classes, where it is still there."""
    from core.dataset import find
    from core.meta import read_meta

    try:
        settings = readers.read_config(folder / "config.json")["settings"]
        first, second = read_meta(find(str(settings.get("dataset"))))["classes"]
        return [first, second]
    except (OSError, ValueError, KeyError, UserError):
        return ["class 0", "class 1"]


def draw_confusion(predictions, classes, split, path):
    """How many texts of each class were said to be of which, a panel a run."""
    from core.evaluation import scores

    rows, columns = figures.grid(len(predictions), 4)
    fig = figures.figure(3.2 * columns, 3.3 * rows + 0.3)
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(predictions) :]:
        ax.remove()
    for ax, (name, (p, labels)) in zip(axes.flat, predictions.items()):
        said = p > 0.5
        counts = np.array([[(labels == truth)[said == answer].sum() for answer in (0, 1)] for truth in (0, 1)])
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # of each class's texts
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for truth, answer in np.ndindex(2, 2):
            ax.text(answer, truth, f"{counts[truth, answer]:,}\n{100 * shares[truth, answer]:.1f} %", ha="center", va="center",
                    fontsize=10, color="white" if shares[truth, answer] > 0.5 else "black")
        ax.set_xticks([0, 1], classes, fontsize=9)
        ax.set_yticks([0, 1], classes, fontsize=9, rotation=90, va="center")
        ax.set(xlabel="said", ylabel="true")
        ax.set_title(f"{figures.plain(name)}: accuracy {scores(p, labels)['accuracy']:.4f}", fontsize=9)
    fig.suptitle(f"{split} split: texts, and the share of each true class", fontsize=10)
    figures.write(fig, path)


def roc(p, labels):
    """The ROC curve, (false positive rates, true positive rates), from (0, 0) to (1, 1), a point a threshold."""
    order = np.argsort(-p, kind="stable")
    last = np.append(np.diff(p[order]) != 0, True)  # texts of equal p pass a threshold together
    rates = [np.append(0, np.cumsum(hit[order])[last] / max(1, hit.sum())) for hit in (~labels, labels)]
    return rates[0], rates[1]


def draw_roc(predictions, classes, split, path):
    """ROC curves of all runs, with the area under each."""
    from core.evaluation import scores

    fig = figures.figure(5, 4.9 + 0.18 * len(predictions))
    ax = fig.subplots()
    ax.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1, label="chance: AUC 0.5")
    for n, (name, (p, labels)) in enumerate(predictions.items()):
        look = figures.style(n)
        look.pop("marker")
        ax.plot(*roc(p, labels), **look, linewidth=1.3, label=f"{figures.plain(name)}: AUC {scores(p, labels)['auc']:.4f}")
    ax.set(xlabel=f"share of {figures.plain(classes[0])} texts said to be {figures.plain(classes[1])}",
           ylabel=f"share of {figures.plain(classes[1])} texts said to be {figures.plain(classes[1])}", aspect="equal")
    ax.set_title(f"ROC curve, {split} split", fontsize=10)
    ax.grid(alpha=0.3)
    figures.below_all(fig, ax, 1)
    figures.write(fig, path)


def draw_runs(folders, target):
    """All pictures of what these runs logged, into the folder `target`."""
    runs = names_of(folders)
    logs = {name: read_log(folder / "log.jsonl") for name, folder in runs.items()}
    draw_curves(logs, target / "curves.png")
    draw_kept(logs, target / "kept.png")
    for name, (records, _) in logs.items():
        draw_spans(records, target / figures.own("spans", name, runs))
    split, predictions = read_predictions(runs)
    if predictions:
        classes = class_names(runs[next(iter(predictions))])
        draw_confusion(predictions, classes, split, target / "confusion.png")
        draw_roc(predictions, classes, split, target / "roc.png")


def main():
    arguments = sys.argv[1:]
    paths = [Path(name) for name in arguments if name[:1] != "-"]
    configure(globals(), [argument for argument in arguments if argument[:1] == "-"])
    if not 20 <= dpi <= 1000:
        raise UserError(f"dpi must be from 20 to 1000, got {dpi}")
    for path in paths:
        if not (path.is_dir() or path.exists() and path.suffix == ".json"):
            raise UserError(f"expected the folder of a run, or a JSON file of compare.py or bench.py, got {path}"
                            f"{', which does not exist' * (not path.exists())}: python plot.py OUT_DIR")
    folders = [path for path in paths if path.is_dir()]
    texts = bool(text or reviews)
    if not paths or texts and not folders:
        raise UserError(f"expected the folder of a run{', or a JSON file of compare.py or bench.py' * (not texts)}, got "
                        f"{', '.join(map(str, paths)) or 'nothing'}: python plot.py OUT_DIR")
    if (layer, head) != (-1, -1) and not text:
        raise UserError('layer and head choose among the heat maps of a text: give --text="..."')
    figures.set_dpi(dpi)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path not in folders:
            from core import charts

            charts.draw(path, Path(out or path.parent))
    if texts:
        import sample
        from core import heat

        loaded = {name: sample.read_run(folder / "best.pt") for name, folder in names_of(folders).items()}
        heat.draw_texts(loaded, Path(out or folders[0]), text, reviews, layer, head)
    elif folders:
        draw_runs(folders, Path(out or folders[0]))


if __name__ == "__main__":
    run_main(main)
