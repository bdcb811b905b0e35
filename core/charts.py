"""Charts of results/*.json, for plot.py and compare.py: what compare.py and `bench.py attention` wrote.

`read_comparison` and `read_rows` gather what is drawn; both take files that core.readers has checked.
"""

import math

import numpy as np

from core import figures, readers, recall
from core.config import UserError


def machine(saved):
    """The machine that a file was measured on (str)."""
    facts = saved.get("machine") or {}
    return facts.get("gpu") or f"{facts.get('processor')}, {facts.get('threads')} threads"


def draw(path, folder):
    """Write the pictures of a JSON file into a folder. Raises UserError for a file of neither kind."""
    is_comparison = b'"variants"' in readers.read_bytes(path)
    (draw_comparison if is_comparison else draw_bench)(path, folder)


TIMES = (60, "hours"), (1, "minutes"), (1 / 60, "seconds")
FLOPS = (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")


def read_comparison(path):
    """A file of compare.py: (its entries, {variant: {"score": (low, mean, high), "minutes", "work", "curve", "verdict",
    "hard", "kept", "by_distance"}}). A curve is (steps, mean, lowest, highest) over the seeds, at the steps that all
    seeds have."""
    saved, variants = readers.read_comparison(path), {}
    for variant in saved["variants"]:
        curves = [dict(run["curve"]) for run in saved["runs"] if run["variant"] == variant["variant"]]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        values = np.array([[curve[step] for step in steps] for curve in curves], float)  # (seeds, steps)
        score = variant["scores"][saved["score"]]
        mean = score["mean"]
        low, high = (mean if score.get(key) is None else score[key] for key in ("low", "high"))  # one seed: no interval
        variants[variant["variant"]] = {
            "score": (low, mean, high), "minutes": variant["seconds_per_step"] * variant["steps"] / 60,
            "work": variant["work"], "hard": variant.get("hard") or {}, "kept": variant.get("kept_share"),
            "by_distance": variant.get("accuracy_by_distance") or [],
            "curve": (steps, values.mean(0), values.min(0), values.max(0)) if steps else ([],) * 4,
            "verdict": (variant.get("difference") or {}).get("verdict") or ""}
    if not variants:
        raise UserError(f"{path} holds no variants; compare.py writes them when its runs are done")
    unit = {"work": "TFLOP"}.get(saved["budget"], saved["budget"])
    saved["name"] = figures.escape_math(saved.get("title") or saved["compare"])
    lower_is_better = saved["score"] in ("bits_per_byte", "loss")
    saved["axis"] = saved["score"].replace("_", " ") + " (lower is better)" * lower_is_better
    budget = f"{len(saved['seeds'])} seeds, {saved['amount']:,g} {unit} each"
    saved["about"] = f"{budget}, {saved.get('dtype')}; {machine(saved)}"
    return saved, variants


def spread(places):
    """(places, limits of their axis): places so close that one dot would hide another, side by side. The axis covers
    at least a quarter of the largest place, so that small differences look small."""
    span = max(max(places) - min(places), max(places) / 4)
    clusters = []
    for n in sorted(range(len(places)), key=places.__getitem__):
        if clusters and places[n] - places[clusters[-1][-1]] < 0.03 * span:
            clusters[-1].append(n)
        else:
            clusters.append([n])
    moved = list(places)
    for cluster in clusters:
        middle = sum(places[n] for n in cluster) / len(cluster)
        for k, n in enumerate(cluster):
            moved[n] = middle + 0.03 * span * (k - (len(cluster) - 1) / 2)
    middle = (max(places) + min(places)) / 2
    return moved, (middle - 0.6 * span, middle + 0.6 * span)


def draw_scores(ax, places, variants, styles, horizontal=False):
    """Draw the score of each variant at its place on the other axis, with the interval."""
    for place, facts, style in zip(places, variants.values(), styles):
        low, mean, high = facts["score"]
        x, y, error = (mean, place, "xerr") if horizontal else (place, mean, "yerr")
        ax.errorbar(x, y, **{error: [[mean - low], [high - mean]]}, color=style["color"], marker=style["marker"],
                    markersize=6, capsize=3, linewidth=1.3)


def draw_comparison(path, folder=None):
    """Write FILE.png: validation while training, the final score of each variant with its interval, and that against
    time and work; FILE_hard.png: accuracy on hard reviews, if there are any; and FILE_recall.png: accuracy by distance,
    if there is one. folder: default that of the file."""
    (saved, variants), folder = read_comparison(path), folder or path.parent
    styles = [figures.line_style(0) | {"color": "black", "marker": "X"}]
    styles += [figures.line_style(n) for n in range(len(variants) - 1)]
    fig = figures.figure(11, 7.6 + 0.2 * -(-len(variants) // 4))
    (curves, finals), scatters = fig.subplots(2, 2)
    draw_training(curves, variants, styles)
    curves.set(xlabel="step", ylabel=f"validation {saved['axis']}")
    draw_finals(finals, variants, styles)
    final = f"{'validation' if saved['split'] == 'val' else saved['split']} {saved['axis']}"
    finals.set_xlabel(final)
    axes = ("minutes", "measured time", TIMES), ("work", "work of training", FLOPS)
    for ax, (key, name, units) in zip(scatters, axes):
        most = max(facts[key] for facts in variants.values())
        size, unit = next((pair for pair in units if most >= 2 * pair[0]), units[-1])
        places = [facts[key] / size for facts in variants.values()]
        moved, limits = spread(places)
        draw_scores(ax, moved, variants, styles)
        ax.set(xlabel=f"{name} ({unit})", ylabel=final, xlim=limits)
        ax.set_title(f"final score against {name}{'; equal ones side by side' * (moved != places)}", fontsize=10)
    for ax in fig.axes:
        ax.grid(alpha=0.3)
    fig.suptitle(f"{saved['name']}\n{saved['about']}", fontsize=11)
    figures.figure_legend_below(fig, curves, 4)
    figures.write(fig, folder / f"{path.stem}.png")
    if any(facts["hard"] for facts in variants.values()):
        draw_hard(variants, styles, saved["name"], folder / f"{path.stem}_hard.png")
    if all(facts["by_distance"] for facts in variants.values()):
        figures.write(recall.draw(variants, f"{saved['name']}\n{saved['about']}"), folder / f"{path.stem}_recall.png")


def draw_training(ax, variants, styles):
    """Draw the mean validation score of each variant over the steps, in a band from the lowest to the highest seed."""
    for style, (name, facts) in zip(styles, variants.items()):
        steps, mean, lowest, highest = facts["curve"]
        ax.plot(steps, mean, **style, linewidth=1.3, label=figures.escape_math(name))
        ax.fill_between(steps, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)
    figures.hide_start(ax, [(facts["curve"][0], edge) for facts in variants.values() for edge in facts["curve"][2:]])
    ax.set_title("while training: mean, and lowest to highest of the seeds", fontsize=10)


def draw_finals(ax, variants, styles):
    """Draw a row for each variant: its final score with the interval and the verdict."""
    draw_scores(ax, range(len(variants)), variants, styles, horizontal=True)
    ax.axvline(next(iter(variants.values()))["score"][1], color="gray", linestyle=":", linewidth=1)
    for n, facts in enumerate(variants.values()):
        ax.annotate(", ".join(filter(None, [f"{facts['score'][1]:.4f}", facts["verdict"]])), (facts["score"][1], n),
                    (0, 6), textcoords="offset points", ha="center", fontsize=7.5)
    ax.set_yticks(range(len(variants)), [figures.escape_math(name) for name in variants], fontsize=9)
    ax.set_ylim(len(variants) - 0.5, -0.7)
    ax.margins(x=0.2)
    ax.set_title("final score, 95 % interval over seeds", fontsize=10)


def draw_hard(variants, styles, title, path):
    """Write the accuracy on hard reviews: a row a kind, a dot a variant."""
    kinds = list(dict.fromkeys(kind for facts in variants.values() for kind in facts["hard"]))
    height = 1.6 + len(kinds) * (0.25 + 0.13 * len(variants)) + 0.2 * -(-len(variants) // 4)
    fig = figures.figure(7.5, height)
    ax = fig.subplots()
    for n, (style, (name, facts)) in enumerate(zip(styles, variants.items())):
        offset = 0.7 * ((n + 0.5) / len(variants) - 0.5)
        accuracies = [facts["hard"].get(kind, math.nan) for kind in kinds]
        ax.plot(accuracies, np.arange(len(kinds)) + offset, **{**style, "linestyle": "", "markersize": 6},
                label=figures.escape_math(name))
    for row in range(1, len(kinds)):
        ax.axhline(row - 0.5, color="gray", linewidth=0.5)
    ax.axvline(0.5, color="gray", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(kinds)), [figures.escape_math(kind) for kind in kinds], fontsize=9)
    ax.set(xlabel="accuracy (dotted: chance)", xlim=(-0.03, 1.03), ylim=(len(kinds) - 0.5, -0.5))
    ax.set_title(f"{title}: hard reviews", fontsize=10)
    ax.grid(alpha=0.3, axis="x")
    figures.figure_legend_below(fig, ax, 4)
    figures.write(fig, path)


def read_rows(path):
    """({label: {T: (milliseconds, MiB)}}, what the figures are of (str), the file's entries).

    Medians of the points that were measured more than once, as the fused call is beside every mechanism.
    If the shapes differ in more than T, the figures are divided by batch x heads.
    """
    points, saved = [], readers.read_benchmark(path)
    for row in saved["rows"]:
        if "attention" in row:
            shape = tuple(map(int, row["batch x heads x time"].split("x")))
            points.append((row["attention"], shape, row.get("ms"), row.get("MiB more")))
            points.append(("fused call", shape, row.get("fused call, ms"), row.get("fused, MiB more")))
    if not points:
        raise UserError(f"{path} holds no rows of `python bench.py attention --results=FILE`; only that mode is drawn")
    shapes = {shape[:2] for _, shape, *_ in points}
    of = "batch {}, {} heads".format(*min(shapes)) if len(shapes) == 1 else "one head of one example"
    lines = {}
    for label, (B, H, T), *values in points:
        values = np.array([math.nan if x is None else float(x) for x in values]) / (1 if len(shapes) == 1 else B * H)
        lines.setdefault(label, {}).setdefault(T, []).append(values)
    return {label: {T: np.median(line[T], 0) for T in sorted(line)} for label, line in lines.items()}, of, saved


def draw_bench(path, folder):
    """Write time and memory against T on log axes: a line a mechanism, with its exponent."""
    lines, of, saved = read_rows(path)
    labels = sorted(lines, key="fused call".__eq__)  # the fused call last, the others in the file's order
    lengths = sorted({T for line in lines.values() for T in line})
    fig = figures.figure(11, 4.2 + 0.2 * -(-len(labels) // 2))
    from matplotlib.ticker import LogLocator, NullLocator

    names = "forward + backward (ms)", "memory beyond the inputs (MiB)"
    for n, (ax, name) in enumerate(zip(fig.subplots(1, 2), names)):
        for line, label in enumerate(labels):
            points = [(T, values[n]) for T, values in lines[label].items() if values[n] > 0]  # NaN: not measured
            style = figures.line_style(line)
            if label == "fused call":
                style = {"color": "black", "linestyle": "--", "marker": "x"}
            if len(points) > 1:
                label += f": $T^{{{np.polyfit(*np.log(points).T, 1)[0]:.2f}}}$"  # a straight line on log axes
            if points:
                ax.plot(*zip(*points), label=label, linewidth=1.3, **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=30), minor_locator=NullLocator(),
                     major_formatter="{x:,g}")
        ax.tick_params(labelsize=8)
        ax.set_xticks(lengths, [f"{T:,}" for T in lengths])
        ax.set(xlabel="T (tokens)", ylabel=name)
        ax.grid(alpha=0.3)
        figures.legend_below(ax, 2)
    fig.suptitle(f"attention alone, {of}, {saved.get('dtype')}; {machine(saved)}", fontsize=10)
    figures.write(fig, folder / f"{path.stem}.png")
