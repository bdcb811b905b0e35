"""The picture of recall: who remembers how far, and at what cost. For comparisons and for runs."""

import numpy as np

from core import figures

MOST_COLUMNS = 64  # of distances: more cannot be told apart
LINE, CHARACTER = 4.0, 0.017  # of a label: the height of a line in % of accuracy, a width as a share of the panel's


def draw(rows, title):
    """The figure: on the left a strip a row, the accuracy at each distance; on the right accuracy against kept pairs.

    rows: {name: {"by_distance": [[distance, accuracy], ...], "score": (low, mean, high), "kept": share or None}}.
    """
    ordered = sorted(rows, key=lambda name: -rows[name]["score"][1])
    fig = figures.figure(11, max(4.2, 1.7 + 0.3 * len(rows)))
    strips, points = fig.subplots(1, 2, width_ratios=(1.15, 1))
    draw_strips(strips, {name: rows[name] for name in ordered})
    draw_points(points, {name: rows[name] for name in ordered if rows[name]["kept"]})
    fig.suptitle(title, fontsize=11)
    return fig


def columns_of(rows):
    """(accuracies (rows, columns), NaN where there is no answer; the first distance of each column and the end)."""
    last = max(distance for row in rows.values() for distance, _ in row["by_distance"])
    steps = {b - a for row in rows.values() for (a, _), (b, _) in zip(row["by_distance"], row["by_distance"][1:])}
    width = max(min(steps, default=1), -(-last // MOST_COLUMNS))
    edges = np.arange(1, last + width + 1, width)
    table = np.full((len(rows), len(edges) - 1), np.nan)
    for line, row in zip(table, rows.values()):
        distances, accuracies = np.array(row["by_distance"]).T
        index = np.searchsorted(edges, distances, side="right") - 1
        counts = np.bincount(index, minlength=len(line))
        with np.errstate(invalid="ignore"):
            line[:] = np.bincount(index, accuracies, len(line)) / counts
    return table, edges


def draw_strips(ax, rows):
    """Draw the accuracy of each row at each distance as a shade, and its mean beside it."""
    table, edges = columns_of(rows)
    shades = ax.pcolormesh(edges, np.arange(len(rows) + 1), table, cmap=figures.blues(), vmin=0, vmax=1)
    for line in range(1, len(rows)):
        ax.axhline(line, color="white", linewidth=2)
    for n, row in enumerate(rows.values()):
        ax.annotate(f"{100 * row['score'][1]:.0f} %", (1, n + 0.5), (4, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(np.arange(len(rows)) + 0.5, [figures.escape_math(name) for name in rows], fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="distance from the query back to the value (tokens)", ylim=(len(rows), 0))
    ax.set_title("answers right at each distance; in all", fontsize=10)
    bar = ax.figure.colorbar(shades, ax=ax, location="bottom", aspect=40, shrink=0.5, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0", "50", "100 % right"])
    bar.ax.tick_params(labelsize=8)


def draw_points(ax, rows):
    """Draw the accuracy of each row, with its interval, against the pairs that it keeps; a label at each point."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_xscale("log")
    for n, (name, row) in enumerate(rows.items()):
        low, mean, high = row["score"]
        ax.errorbar(100 * row["kept"], 100 * mean, yerr=[[100 * (mean - low)], [100 * (high - mean)]],
                    color=figures.PALETTE[0], marker="o", markersize=5, capsize=2, linewidth=1)
    kept = [100 * row["kept"] for row in rows.values()]
    ax.set(xlim=(min(kept, default=1) / 1.5, 160), ylim=(-4, 106), xlabel="kept pairs (% of dense attention)",
           ylabel="answers right (%)")
    ax.set_title("accuracy against cost, 95 % interval over seeds", fontsize=10)
    ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    ax.grid(alpha=0.3)
    label_points(ax, rows)


def label_points(ax, rows):
    """Write the name of each row beside its point, to the inner side, moved down where it would overlap another label;
    rows with the same point share a label."""
    labels, placed = {}, []  # {(log x, y): names}; boxes (left, right, top, bottom) of the points and labels so far
    for name, row in rows.items():  # from the highest accuracy to the lowest
        x, y = np.log(100 * row["kept"]), 100 * row["score"][1]
        near = next((point for point in labels if abs(x - point[0]) < 0.05 and abs(y - point[1]) < 2), (x, y))
        labels.setdefault(near, []).append(figures.escape_math(name))
    left, right = np.log(ax.get_xlim())
    dot = 0.015 * (right - left)
    placed += [(x - dot, x + dot, y + LINE / 2, y - LINE / 2) for x, y in labels]
    for (x, y), names in labels.items():
        sign = -1 if x > (left + right) / 2 else 1
        start, top = x + sign * 0.03 * (right - left), y + LINE / 2
        ends = sorted((start, start + sign * CHARACTER * (right - left) * max(map(len, names))))
        height = LINE * len(names)
        beside = [box for box in placed if box[0] < ends[1] and ends[0] < box[1]]
        while hit := [box for box in beside if box[3] < top and top - height < box[2]]:
            top = min(box[3] for box in hit)
        placed.append((*ends, top, top - height))
        moved = {"arrowstyle": "-", "color": "gray", "linewidth": 0.5} if top < y else None
        ax.annotate("\n".join(names), (np.exp(x), y), (np.exp(start), top), va="top",
                    ha="left" if sign > 0 else "right", fontsize=8.5, arrowprops=moved)
