"""Pictures of runs, for plot.py and app.py, from what train.py logged and predicted. A log alone needs no torch."""

import itertools
import math

import numpy as np

from core import figures, readers
from core.config import UserError

SCORES = {"loss": "loss (nats)", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}
MOST_LAYERS, MOST_HEADS, MOST_POINTS = 16, 16, 400  # in one picture: as many as are legible, and drawn in seconds


def draw_runs(runs, target):
    """Write all pictures of what `runs`, {name: folder}, logged and predicted into the folder `target`."""
    logs = {name: readers.read_log(folder / "log.jsonl") for name, folder in runs.items()}
    pictures = {"curves.png": draw_curves(logs), "kept.png": draw_kept(logs)}
    pictures |= {figures.file_name("spans", name, runs): draw_spans(records) for name, (records, _) in logs.items()}
    split, predictions = read_predictions(runs)
    if predictions:
        classes = class_names(runs[next(iter(predictions))])
        pictures["confusion.png"] = draw_confusion(predictions, classes, split)
        pictures["roc.png"] = draw_roc(predictions, classes, split)
        pictures["lengths.png"] = draw_lengths(predictions, split)
    for name, fig in pictures.items():
        if fig:
            figures.write(fig, target / name)


# ---- scores over the steps ---------------------------------------------------------------------


def series(records, key, split=""):
    """(steps, values) of the records that have the key; of those of one split, where it is given."""
    records = [r for r in records if key in r and split in ("", r["split"])]
    return [r["step"] for r in records], [r[key] for r in records]


def training_series(records, key):
    """(steps, values) of the training split: the loss of each batch, other scores as --eval_train=True logs them."""
    return series(records, "loss", "train") if key == "loss" else series(records, f"train_{key}")


def draw_curves(logs):
    """The figure of the loss and the other logged scores over the steps. logs: {name: `read_log`}."""
    keys = [key for key in SCORES if any(key in r for records, _ in logs.values() for r in records)]
    one = len(logs) == 1
    fig = figures.figure(5.5 * len(keys), 4.3 if one else 3.8 + 0.18 * -(-len(logs) // 2))
    for ax, key in zip(np.ravel(fig.subplots(1, len(keys))), keys):
        if one:
            curves_of_one(ax, key, *next(iter(logs.values())))
        else:
            curves_of_many(ax, key, logs)
        ax.set(xlabel="step", ylabel=SCORES[key])
        ax.grid(alpha=0.3)
        figures.legend_below(ax, 2 if len(logs) > 2 else 1)
    many = "lines: validation (thin: training); numbers: best weights, whole splits"
    fig.suptitle(figures.escape_math(*logs) if one else many, fontsize=10)
    return fig


def curves_of_one(ax, key, records, whole):
    """Draw a score of one run: training, validation, and marks for the best weights on whole splits."""
    training = training_series(records, key)
    if training[0]:
        ax.plot(*training, color=figures.PALETTE[5], linewidth=1, label="training")
    ax.plot(*series(records, key, "val"), color=figures.PALETTE[0], marker="o", markersize=3, label="validation")
    for n, r in enumerate(r for r in whole if key in r):
        ax.plot(r["step"], r[key], color=figures.PALETTE[1 + n % 5], marker="o^"[n % 2], markersize=9, linestyle="",
                fillstyle="none", label=f"best weights, whole {r['split']} split: {r[key]:.4f}")


def curves_of_many(ax, key, logs):
    """Draw a score of many runs: a colour a run, training thin, the whole splits' scores in the legend."""
    drawn = []
    for n, (name, (records, whole)) in enumerate(logs.items()):
        style, training, validation = figures.line_style(n), training_series(records, key), series(records, key, "val")
        drawn += training, validation
        if training[0]:
            ax.plot(*training, color=style["color"], linewidth=0.6, alpha=0.4)
        scores = "".join(f", {r['split']} {r[key]:.4f}" for r in whole if key in r)
        ax.plot(*validation, **style, linewidth=1.2, label=figures.escape_math(name) + scores)
    figures.hide_start(ax, drawn)


# ---- what the mechanisms log -------------------------------------------------------------------


def sample_evenly(count, most):
    """At most `most` of the numbers below `count`, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def sample_note(shown, count, what):
    """'24 of 300 layers' where not all are shown, else ''."""
    return f"{len(shown)} of {count:,} {what}" * (len(shown) < count)


def kept_lines(logs):
    """({label: (steps, kept pairs in %)}, a note): of one run a line for the layers that are alike, at most
    MOST_LAYERS, of many the mean over layers."""
    lines, note = {}, ""
    for name, (records, _) in logs.items():
        records = [r for r in records if any("kept_share" in layer for layer in r.get("stats", []))]
        steps = [r["step"] for r in records]
        shares = np.array([[100 * layer.get("kept_share", math.nan) for layer in r["stats"]] for r in records])
        if not records:
            continue
        if len(logs) > 1:
            lines[figures.escape_math(name)] = steps, np.nanmean(shares, 1)
            continue
        layers = {}  # {column of `shares` (records, layers): the layers that have it}
        for n, column in enumerate(shares.T):
            if np.isfinite(column).any():
                layers.setdefault(tuple(column), []).append(n)
        shown = sample_evenly(len(layers), MOST_LAYERS)
        note = sample_note(shown, shares.shape[1], "layers") * (len(shown) < len(layers))
        for column, alike in (list(layers.items())[n] for n in shown):
            lines[f"layer{'s' * (len(alike) > 1)} {figures.ranges(alike)}"] = steps, column
    return lines, note


def draw_kept(logs):
    """The figure of the share of pairs that attention keeps; None where every layer always keeps all."""
    lines, note = kept_lines(logs)
    if all(np.nanmin(shares) >= 100 for _, shares in lines.values()):
        return None
    fig = figures.figure(6.5, 3.6 + 0.18 * -(-len(lines) // 3))
    ax = fig.subplots()
    for n, (label, (steps, shares)) in enumerate(lines.items()):
        ax.plot(steps, shares, **figures.line_style(n), linewidth=1.2, label=f"{label}: {shares[-1]:.1f} %")
    ax.set(xlabel="step", ylabel="kept pairs (%)", ylim=(0, 104))
    ax.grid(alpha=0.3)
    title = "pairs kept, of those of dense attention" + ", mean over layers" * (len(logs) > 1)
    ax.set_title(title + f"\n{note}" * bool(note), fontsize=10)
    figures.figure_legend_below(fig, ax)
    return fig


def draw_spans(records):
    """The figure of the spans of each layer and head over the steps, periods below; None where none were logged.

    Of more than MOST_LAYERS layers, MOST_HEADS heads or MOST_POINTS evaluations evenly spaced ones are drawn.
    """
    records = [r for r in records if any("spans" in layer for layer in r.get("stats", []))]
    if not records:
        return None
    last, records = records[-1]["stats"], [records[n] for n in sample_evenly(len(records), MOST_POINTS)]
    keys = [key for key in ("spans", "periods") if any(layer.get(key) for layer in last)] or ["spans"]
    layers, n_head = sample_evenly(len(last), MOST_LAYERS), max(len(layer.get(k, [])) for layer in last for k in keys)
    heads = sample_evenly(n_head, MOST_HEADS)
    rows, columns = figures.grid(len(layers), 6)
    fig, lines = figures.figure(1 + 2.1 * columns, 2.1 * rows * len(keys)), {}
    axes_of_keys = fig.subplots(rows * len(keys), columns, sharex=True, squeeze=False).reshape(len(keys), -1)
    for key, axes in zip(keys, axes_of_keys):
        for ax in axes[1:]:
            ax.sharey(axes[0])
        for ax in axes[len(layers) :]:
            ax.remove()
        for place, (ax, layer) in enumerate(zip(axes, layers)):
            lines |= spans_of_layer(ax, key, records, layer, heads)
            is_lowest, is_first = place + columns >= len(layers), place % columns == 0
            kept = last[layer].get("kept_share", math.nan) if key == "spans" else math.nan
            ax.set_title(f"layer {layer}" + f", keeps {100 * kept:.1f} %" * math.isfinite(kept), fontsize=9)
            ax.set(xlabel="step" * is_lowest, ylabel=f"{key[:-1]} (tokens)" * is_first)
            ax.grid(alpha=0.3)
            ax.tick_params(labelsize=8, labelleft=is_first, labelbottom=is_lowest)
    notes = sample_note(layers, len(last), "layers"), sample_note(heads, n_head, "heads")
    if any(notes):
        fig.suptitle(", ".join(filter(None, notes)), fontsize=10)
    fig.legend(lines.values(), lines, loc="outside right upper", fontsize=8)
    return fig


def spans_of_layer(ax, key, records, layer, heads):
    """Draw the spans or periods (key) of a layer's heads over the steps: {label: line}."""
    lines, steps = {}, [r["step"] for r in records]
    for n, head in enumerate(heads):
        if head < len(records[-1]["stats"][layer].get(key, [])):
            values = [r["stats"][layer][key][head] for r in records]
            style = {**figures.line_style(n), "linewidth": 1.2, "markevery": -(-len(steps) // 8)}
            lines[f"head {head}"] = ax.plot(steps, values, **style)[0]
    return lines


# ---- classifiers -------------------------------------------------------------------------------


def read_predictions(runs):
    """(split, {name: (p (N,), labels (N,), scores, groups)}) of `runs`, {name: folder}: the probability of class 1 of
    each text, its class, `evaluation.scores`, and `evaluation.accuracy_by_length`, [] where lengths are unknown; of the
    test split, or of validation where more runs predicted that."""
    paths = {"test": {}, "val": {}}
    for split, (name, folder) in itertools.product(paths, runs.items()):
        if (path := folder / f"predictions-{split}.npz").exists():
            paths[split][name] = path
    split = max(paths, key=lambda split: len(paths[split]))  # the first of equals
    predictions = {name: readers.read_predictions(path) for name, path in paths[split].items()}
    if not predictions:
        return split, {}
    for name in runs.keys() - predictions.keys():
        print(f"{name} holds no predictions-{split}.npz; it is left out of the pictures of predictions")
    from core.evaluation import accuracy_by_length, scores  # here, since it imports torch

    return split, {name: (p, labels, scores(p, labels), accuracy_by_length(p, labels, lengths) if lengths.any() else [])
                   for name, (p, labels, lengths) in predictions.items()}


def class_names(folder):
    """The names of the two classes in the data that a run was trained on; 'class 0' and 'class 1' where it is gone."""
    from core.dataset import find
    from core.meta import read_meta

    try:
        settings = readers.read_config(folder / "config.json")["settings"]
        first, second = read_meta(find(str(settings.get("dataset"))))["classes"]
        return [first, second]
    except (OSError, ValueError, KeyError, UserError):
        return ["class 0", "class 1"]


def draw_confusion(predictions, classes, split):
    """The figure of the confusion matrices, a panel a run: a row a true class, a column a predicted one."""
    fig, axes, _ = figures.panels(len(predictions), 4, 3.2, 3.3, extra=(0, 0.4))
    for ax, (name, (p, labels, scores, _)) in zip(axes, predictions.items()):
        positive = p > 0.5
        counts = np.array([[((labels == truth) & (positive == answer)).sum() for answer in (0, 1)] for truth in (0, 1)])
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # of each true class
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for truth, answer in np.ndindex(2, 2):
            ax.text(answer, truth, f"{counts[truth, answer]:,}\n{100 * shares[truth, answer]:.1f} %", fontsize=10,
                    ha="center", va="center", color="white" if shares[truth, answer] > 0.5 else "black")
        ax.set_xticks([0, 1], classes, fontsize=9)
        ax.set_yticks([0, 1], classes, fontsize=9, rotation=90, va="center")
        ax.set(xlabel="predicted", ylabel="true")
        ax.set_title(f"{figures.escape_math(name)}: accuracy {scores['accuracy']:.4f}", fontsize=9)
    wide = len(predictions) > 1
    fig.suptitle(f"{split} split: texts,{' ' if wide else chr(10)}and their share of the true class", fontsize=10)
    return fig


def roc(p, labels):
    """The ROC curve, (false positive rates, true positive rates), from (0, 0) to (1, 1), a point a threshold."""
    order = np.argsort(-p, kind="stable")
    last = np.append(np.diff(p[order]) != 0, True)  # texts of equal p pass a threshold together
    rates = [np.append(0, np.cumsum(hit[order])[last] / max(1, hit.sum())) for hit in (~labels, labels)]
    return rates[0], rates[1]


def draw_roc(predictions, classes, split):
    """The figure of the ROC curves of all runs, with the area under each."""
    fig = figures.figure(5, 4.9 + 0.18 * len(predictions))
    ax = fig.subplots()
    ax.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1, label="chance: AUC 0.5")
    for n, (name, (p, labels, scores, _)) in enumerate(predictions.items()):
        style = {**figures.line_style(n), "marker": ""}
        ax.plot(*roc(p, labels), **style, linewidth=1.3, label=f"{figures.escape_math(name)}: AUC {scores['auc']:.4f}")
    negative, positive = map(figures.escape_math, classes)
    ax.set(xlabel=f"share of {negative} texts predicted {positive}", aspect="equal",
           ylabel=f"share of {positive} texts predicted {positive}")
    ax.set_title(f"ROC curve, {split} split", fontsize=10)
    ax.grid(alpha=0.3)
    figures.figure_legend_below(fig, ax, 1)
    return fig


def draw_lengths(predictions, split):
    """The figure of the accuracy on texts of each group of lengths; None where no lengths are known. Runs on data of
    different tokenizers have different lengths, one below the other on the axis."""
    runs = {name: groups for name, (*_, groups) in predictions.items() if groups}
    if not runs:
        return None
    fig = figures.figure(5.5, 4.2 + 0.18 * len(runs))
    ax, labels = fig.subplots(), {}  # labels: {place: [lengths]}
    for n, (name, groups) in enumerate(runs.items()):
        for place, (shortest, longest, *_) in enumerate(groups):
            labels.setdefault(place, []).append(f"{shortest:,}-{longest:,}")
        _, _, texts, accuracy = np.array(groups).T
        places = np.arange(len(groups)) + 0.3 * ((n + 0.5) / len(runs) - 0.5)  # beside each other
        ax.errorbar(places, accuracy, 1.96 * np.sqrt(accuracy * (1 - accuracy) / texts), **figures.line_style(n),
                    linewidth=1.2, capsize=2, label=figures.escape_math(name))
    ax.set_xticks(list(labels), ["\n".join(dict.fromkeys(lengths)) for lengths in labels.values()], fontsize=9)
    ax.set(xlabel="length of the texts (tokens)", ylabel="accuracy, with 95 % interval")
    ax.set_title(f"accuracy by length, {split} split", fontsize=10)
    ax.grid(alpha=0.3, axis="y")
    figures.figure_legend_below(fig, ax, 1)
    return fig
