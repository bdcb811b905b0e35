"""What the pictures share: figures, colours, legends, and PNG files. Pictures need matplotlib."""

import io
import math
import warnings

from core.config import UserError
from core.runs import write_whole

_dpi = 110  # dots per inch of new figures


def set_dpi(dpi):
    """Set the dots per inch of the figures made from here on."""
    global _dpi
    _dpi = dpi


# Told apart by every kind of colour vision (Okabe and Ito 2008, without black and the yellow that white swallows).
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def figure(width=1, height=1):
    """An empty figure of so many inches. Raises UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # not pyplot: that looks for a screen
    except ImportError as error:
        raise UserError(f"pictures need matplotlib ({error}): pip install matplotlib")
    return Figure(figsize=(width, height), dpi=_dpi, layout="constrained")


def write(fig, path, colours=256):
    """Write a figure as a PNG of so many colours, a third of the bytes of one of all, and say where it is."""
    from PIL import Image  # comes with matplotlib

    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the picture shows a box for it
        fig.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    write_whole(path, lambda file: picture.save(file, "png", optimize=True))
    print(path)


def style(n):
    """How line number n is drawn."""
    return {"color": PALETTE[n % 6], "linestyle": ("-", "--", ":")[n // 6 % 3], "marker": "os^Dv*P"[n % 7], "markersize": 4}


def grid(count, most):
    """(rows, columns) for so many panels, at most `most` in a row."""
    rows = -(-count // most)
    return rows, -(-count // rows)


def ranges(numbers):
    """'0-2, 5' for [0, 1, 2, 5]."""
    ends = [n for n in numbers if n + 1 not in numbers]
    starts = [n for n in numbers if n - 1 not in numbers]
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends))


def plain(text):
    """A text in which matplotlib sees no formula."""
    return str(text).replace("$", r"\$")


def below(ax, columns=1):
    """The legend of a panel, under it: there it covers nothing."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=8, frameon=False)


def below_all(fig, ax, columns=3):
    """One legend for all panels, with the lines of one of them, under the picture."""
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def focus(ax, points):
    """Limit a panel to the scores that `points`, [(steps, scores)], have after they came three quarters of the way from their
    first to the one farthest from it, so that the beginning does not flatten all that follows."""
    shown = []
    for _, scores in points:
        scores = [y for y in scores if math.isfinite(y)]
        far = max((abs(y - scores[0]) for y in scores), default=0)
        arrived = next((n for n, y in enumerate(scores) if abs(y - scores[0]) >= 0.75 * far), 0)
        shown += scores[arrived:]
    if shown and max(shown) > min(shown):
        room = 0.06 * (max(shown) - min(shown))
        ax.set_ylim(min(shown) - room, max(shown) + room)


def own(kind, name, runs):
    """The file name of a picture that each run has for itself."""
    return f"{kind}.png" if len(runs) == 1 else f"{kind}-{name.replace('/', '-')}.png"
