"""Charts of results/*.json, for plot.py: what compare.py and `bench.py attention` wrote."""

import math

import numpy as np

from core import figures, readers
from core.config import UserError


def machine(saved):
    """What a saved file was measured on, in words."""
    of = saved.get("machine") or {}
    return of.get("gpu") or f"{of.get('processor')}, {of.get('threads')} threads"


def draw(path, folder):
    """The pictures of a JSON file, into a folder. Raises UserError where it is of neither kind."""
    compared = b'"variants"' in readers.read_bytes(path)
    (draw_comparison if compared else draw_bench)(path, folder)


# ---- a comparison ------------------------------------------------------------------------------


TIMES = (60, "hours"), (1, "minutes"), (1 / 60, "seconds")
FLOPS = (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")


def read_comparison(path):
    """What compare.py wrote: (its entries, {variant: {"score": (low, mean, high), "minutes", "work", "curve",
    "verdict", "hard"}}). A curve is (steps, mean, least, most) over the seeds, at the steps that all of them have."""
    saved, found = readers.read_comparison(path), {}
    for variant in saved["variants"]:
        curves = [dict(run["curve"]) for run in saved["runs"] if run["variant"] == variant["variant"]]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        values = np.array([[curve[step] for step in steps] for curve in curves], float)  # (seeds, steps)
        score = variant["scores"][saved["score"]]
        low, mean, high = (score["mean"] if score.get(key) is None else score[key]  # one seed has no interval
                           for key in ("low", "mean", "high"))
        found[variant["variant"]] = {
            "score": (low, mean, high), "minutes": variant["seconds_per_step"] * variant["steps"] / 60, "work": variant["work"],
            "curve": (steps, values.mean(0), values.min(0), values.max(0)) if steps else ([],) * 4,
            "verdict": (variant.get("difference") or {}).get("verdict") or "", "hard": variant.get("hard") or {}}
    if not found:
        raise UserError(f"{path} holds no variants; compare.py writes them when its runs are done")
    unit = {"work": "TFLOP"}.get(saved["budget"], saved["budget"])
    saved["name"] = figures.plain(saved.get("title") or saved["compare"])
    saved["towards"] = saved["score"].replace("_", " ") + " (lower is better)" * (saved["score"] in ("bits_per_byte", "loss"))
    saved["about"] = f"{len(saved['seeds'])} seeds, {saved['amount']:,g} {unit} each, {saved.get('dtype')}; {machine(saved)}"
    return saved, found


def beside(places):
    """(places, limits of their axis): those so close that one would hide the other, side by side. The axis covers at
    least a quarter of the largest, so that small differences look small."""
    span = max(max(places) - min(places), max(places) / 4)
    clusters = []
    for n in sorted(range(len(places)), key=places.__getitem__):
        if clusters and places[n] - places[clusters[-1][-1]] < 0.03 * span:
            clusters[-1].append(n)
        else:
            clusters.append([n])
    moved = dict(enumerate(places))
    for cluster in clusters:
        middle = sum(places[n] for n in cluster) / len(cluster)
        moved |= {n: middle + 0.03 * span * (k - (len(cluster) - 1) / 2) for k, n in enumerate(cluster)}
    middle = (max(places) + min(places)) / 2
    return [moved[n] for n in range(len(places))], (middle - 0.6 * span, middle + 0.6 * span)


def dots(ax, places, found, looks, upright=True):
    """A dot for each variant at its place, with the interval of its score: upright, or from left to right."""
    for place, of, look in zip(places, found.values(), looks):
        low, mean, high = of["score"]
        x, y, error = (place, mean, "yerr") if upright else (mean, place, "xerr")
        ax.errorbar(x, y, **{error: [[mean - low], [high - mean]]}, color=look["color"], marker=look["marker"], markersize=6,
                    capsize=3, linewidth=1.3)


def draw_comparison(path, folder=None):
    """FILE.png: validation while training, the final score of each variant with its interval, and that against time and
    work; and FILE_hard.png: accuracy on hard reviews, where there are some. Into a folder, by default the file's."""
    (saved, found), folder = read_comparison(path), folder or path.parent
    validation, final = f"validation {saved['towards']}", f"{saved['split']} {saved['towards']}".replace("val ", "validation ")
    looks = [figures.style(0) | {"color": "black", "marker": "X"}, *(figures.style(n) for n in range(len(found) - 1))]
    fig = figures.figure(11, 7.6 + 0.2 * -(-len(found) // 4))
    (curves, finals), scatters = fig.subplots(2, 2)
    for look, (name, of) in zip(looks, found.items()):
        steps, mean, least, most = of["curve"]
        curves.plot(steps, mean, **look, linewidth=1.3, label=figures.plain(name))
        curves.fill_between(steps, least, most, color=look["color"], alpha=0.15, linewidth=0)
    figures.focus(curves, [(of["curve"][0], edge) for of in found.values() for edge in of["curve"][2:]])
    curves.set(xlabel="step", ylabel=validation)
    curves.set_title("while training: mean, and lowest to highest of the seeds", fontsize=10)

    dots(finals, range(len(found)), found, looks, upright=False)
    finals.axvline(next(iter(found.values()))["score"][1], color="gray", linestyle=":", linewidth=1)
    for n, of in enumerate(found.values()):
        finals.annotate(f"{of['score'][1]:.4f}{', ' * bool(of['verdict'])}{of['verdict']}", (of["score"][1], n), (0, 6),
                        textcoords="offset points", ha="center", fontsize=7.5)
    finals.set_yticks(range(len(found)), [figures.plain(name) for name in found], fontsize=9)
    finals.set(xlabel=final, ylim=(len(found) - 0.5, -0.7))
    finals.margins(x=0.2)
    finals.set_title("final score, 95 % interval over seeds", fontsize=10)

    for ax, key, name, units in zip(scatters, ("minutes", "work"), ("measured time", "work of training"), (TIMES, FLOPS)):
        most = max(of[key] for of in found.values())
        size, unit = next((pair for pair in units if most >= 2 * pair[0]), units[-1])
        places = [of[key] / size for of in found.values()]
        moved, limits = beside(places)
        dots(ax, moved, found, looks)
        ax.set(xlabel=f"{name} ({unit})", ylabel=final, xlim=limits)
        ax.set_title(f"final score against {name}{'; equal ones side by side' * (moved != places)}", fontsize=10)
    for ax in fig.axes:
        ax.grid(alpha=0.3)
    fig.suptitle(f"{saved['name']}\n{saved['about']}", fontsize=11)
    figures.below_all(fig, curves, 4)
    figures.write(fig, folder / f"{path.stem}.png")
    if any(of["hard"] for of in found.values()):
        draw_hard(found, looks, saved["name"], folder / f"{path.stem}_hard.png")


def draw_hard(found, looks, title, path):
    """Accuracy on hard reviews, a dot for each variant and kind."""
    kinds = list(dict.fromkeys(kind for of in found.values() for kind in of["hard"]))
    fig = figures.figure(7.5, 1.6 + len(kinds) * (0.25 + 0.13 * len(found)) + 0.2 * -(-len(found) // 4))
    ax = fig.subplots()
    for n, (look, (name, of)) in enumerate(zip(looks, found.items())):
        rows = [row + 0.7 * ((n + 0.5) / len(found) - 0.5) for row, kind in enumerate(kinds) if kind in of["hard"]]
        ax.plot([of["hard"][kind] for kind in kinds if kind in of["hard"]], rows, **{**look, "linestyle": "", "markersize": 6},
                label=figures.plain(name))
    for row in range(1, len(kinds)):
        ax.axhline(row - 0.5, color="gray", linewidth=0.5)
    ax.axvline(0.5, color="gray", linestyle=":", linewidth=1)
    ax.set_yticks(range(len(kinds)), [figures.plain(kind) for kind in kinds], fontsize=9)
    ax.set(xlabel="accuracy (dotted: chance)", xlim=(-0.03, 1.03), ylim=(len(kinds) - 0.5, -0.5))
    ax.set_title(f"{title}: hard reviews", fontsize=10)
    ax.grid(alpha=0.3, axis="x")
    figures.below_all(fig, ax, 4)
    figures.write(fig, path)


# ---- a benchmark -------------------------------------------------------------------------------


def read_rows(path):
    """({label: {T: (milliseconds, MiB)}}, what the figures are of, the file's other entries).

    Medians where a point was measured more than once, as the fused call is beside every mechanism.
    Where the shapes differ in more than T, the figures are divided by batch x heads.
    """
    rows, saved = [], readers.read_benchmark(path)
    for row in saved["rows"]:
        if "attention" in row:
            B, H, T = map(int, row["batch x heads x time"].split("x"))
            rows.append((row["attention"], B, H, T, row.get("ms"), row.get("MiB more")))
            rows.append(("fused call", B, H, T, row.get("fused call, ms"), row.get("fused, MiB more")))
    rows = [(label, B, H, T, *(math.nan if x is None else float(x) for x in values)) for label, B, H, T, *values in rows]
    if not rows:
        raise UserError(f"{path} holds no rows of `python bench.py attention --results=FILE`, the one mode that is drawn")
    shapes = {(B, H) for _, B, H, *_ in rows}
    what = "batch {}, {} heads".format(*min(shapes)) if len(shapes) == 1 else "one head of one example"
    found = {}
    for label, B, H, T, *values in rows:
        found.setdefault(label, {}).setdefault(T, []).append(np.array(values) / (1 if len(shapes) == 1 else B * H))
    return {label: {T: np.median(found[label][T], 0) for T in sorted(found[label])} for label in found}, what, saved


def draw_bench(path, folder):
    """Time and memory against T on log axes, a line a mechanism, with its exponent."""
    found, what, saved = read_rows(path)
    labels = sorted(found, key="fused call".__eq__)  # the fused call last, the others in the file's order
    every = sorted({T for points in found.values() for T in points})
    fig = figures.figure(11, 4.2 + 0.2 * -(-len(labels) // 2))
    from matplotlib.ticker import LogLocator, NullLocator

    for n, (ax, name) in enumerate(zip(fig.subplots(1, 2), ("forward + backward (ms)", "memory beyond the inputs (MiB)"))):
        for line, label in enumerate(labels):
            points = [(T, values[n]) for T, values in found[label].items() if values[n] > 0]  # log axes; nan: not measured
            look = {"color": "black", "linestyle": "--", "marker": "x"} if label == "fused call" else figures.style(line)
            if len(points) > 1:
                label += f": $T^{{{np.polyfit(*np.log(points).T, 1)[0]:.2f}}}$"  # a straight line on log axes
            if points:
                ax.plot(*zip(*points), label=label, linewidth=1.3, **look)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5), numticks=30), minor_locator=NullLocator(), major_formatter="{x:,g}")
        ax.tick_params(labelsize=8)
        ax.set_xticks(every, [f"{T:,}" for T in every])
        ax.set(xlabel="T (tokens)", ylabel=name)
        ax.grid(alpha=0.3)
        figures.below(ax, 2)
    fig.suptitle(f"attention alone, {what}, {saved.get('dtype')}; {machine(saved)}", fontsize=10)
    figures.write(fig, folder / f"{path.stem}.png")
