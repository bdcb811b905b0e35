"""The picture of recall: who remembers how far, and at what cost. For comparisons and for runs."""

import numpy as np

from core import figures

MOST_COLUMNS = 64  # of distances: more cannot be told apart


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
    ax.set_xscale("log")
    for n, (name, row) in enumerate(rows.items()):
        low, mean, high = row["score"]
        ax.errorbar(100 * row["kept"], 100 * mean, yerr=[[100 * (mean - low)], [100 * (high - mean)]],
                    color=figures.PALETTE[0], marker="o", markersize=5, capsize=2, linewidth=1)
    kept = [100 * row["kept"] for row in rows.values()]
    ax.set(xlim=(min(kept, default=1) / 1.5, 160), ylim=(-4, 106), xlabel="kept pairs (% of dense attention)",
           ylabel="answers right (%)")
    ax.set_title("accuracy against cost, 95 % interval over seeds", fontsize=10)
    ax.xaxis.set(major_formatter="{x:g}", minor_formatter="")
    ax.grid(alpha=0.3)
    label_points(ax, rows)


def label_points(ax, rows, gap=5.0):
    """Write the name of each row beside its point, on the emptier side; names that would overlap are moved down."""
    middle = np.sqrt(np.prod(ax.get_xlim()))
    for is_right in (False, True):
        height = np.inf
        for name, row in rows.items():  # from the highest accuracy to the lowest
            x, y = 100 * row["kept"], 100 * row["score"][1]
            if (x > middle) == is_right:
                height = min(y, height - gap)
                line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.5} if height < y else None
                ax.annotate(figures.escape_math(name), (x, y), (-9 if is_right else 9, 0), fontsize=8.5,
                            xytext=(x / 1.12 if is_right else x * 1.12, height), textcoords="data", va="center",
                            ha="right" if is_right else "left", arrowprops=line)
