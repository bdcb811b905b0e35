"""What all pictures share: figures, colours, legends, and PNG files. Pictures need matplotlib."""

import io
import math
import sys
import warnings

from core.config import UserError
from core.runs import write_whole

_dpi = 110  # dots per inch of new figures


def set_dpi(dpi):
    """Set the dots per inch of the figures made from here on."""
    global _dpi
    _dpi = dpi


# Distinct for every kind of colour vision (Okabe and Ito 2008, without black, and without yellow, too pale on white).
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def figure(width, height):
    """An empty figure, in inches. Raises UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen
    except ImportError as error:
        raise UserError(f"pictures need matplotlib ({error}): {sys.executable} -m pip install matplotlib")
    return Figure(figsize=(width, height), dpi=_dpi, layout="constrained")


def png(fig, colours=256):
    """A figure as a PNG (bytes) with a palette of `colours`: a third of the size of one in full colour."""
    from PIL import Image  # a dependency of matplotlib

    drawn, compressed = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the picture shows a box for it
        fig.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    image.save(compressed, "png", optimize=True)
    return compressed.getvalue()


def write(fig, path, colours=256):
    """Write a figure as a PNG file and print its path. Raises SaveError."""
    write_whole(path, lambda file: file.write(png(fig, colours)))
    print(path)


def file_name(kind, name, runs):
    """The name of a picture that each of `runs` has for itself."""
    return f"{kind}.png" if len(runs) == 1 else f"{kind}-{name.replace('/', '-')}.png"


def escape_math(text):
    """A text in which matplotlib reads no formula."""
    return str(text).replace("$", r"\$")


def ranges(numbers):
    """'0-2, 5' for [0, 1, 2, 5]."""
    ends = [n for n in numbers if n + 1 not in numbers]
    starts = [n for n in numbers if n - 1 not in numbers]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends))


def line_style(n):
    """The style of line number n, as keyword arguments of `Axes.plot`."""
    return {"color": PALETTE[n % 6], "linestyle": ("-", "--", ":")[n // 6 % 3], "marker": "os^Dv*P"[n % 7],
            "markersize": 4}


def blues():
    """The colour map of weights and masks: 0 is pale grey; NaN, no pair at all, stays white."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("weight", ["#e4e8ee", "#08306b"])


def grid(count, most):
    """(rows, columns) for `count` panels, at most `most` in a row."""
    rows = -(-count // most)
    return rows, -(-count // rows)


def panels(count, most, width, height, extra=(0, 0)):
    """(figure, `count` axes, columns): panels of width x height inches, at most `most` in a row, and `extra` inches."""
    rows, columns = grid(count, most)
    fig = figure(width * columns + extra[0], height * rows + extra[1])
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return fig, axes[:count], columns


def legend_below(ax, columns=1):
    """Put the legend of a panel below it, where it covers nothing."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=8, frameon=False)


def figure_legend_below(fig, ax, columns=3):
    """Put one legend for all panels below the figure, with the lines of the panel `ax`."""
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def hide_start(ax, curves):
    """Limit a panel's y axis to the later parts of `curves`, [(steps, values)], which the steep start would flatten.

    The later part begins where a curve has come three quarters of the way to its value farthest from the first.
    """
    later = []
    for _, values in curves:
        values = [y for y in values if math.isfinite(y)]
        farthest = max((abs(y - values[0]) for y in values), default=0)
        later += values[next((n for n, y in enumerate(values) if abs(y - values[0]) >= 0.75 * farthest), 0) :]
    if later and max(later) > min(later):
        margin = 0.06 * (max(later) - min(later))
        ax.set_ylim(min(later) - margin, max(later) + margin)
