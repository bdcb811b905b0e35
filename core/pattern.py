"""A mechanism's pattern, as text and as a picture, and whether its kernels keep to its formula: python attention.py NAME.

The picture (--out=FILE.png) needs matplotlib; the text comes without.
"""

import math
import shutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from core import contract, figures
from core.config import UserError, configure, run_main
from core.mechanisms import mechanism
from core.ops import matrix_variation

SHADES = ".:+*#"  # dropped, three steps of a soft mask, kept; ASCII, since not every terminal has blocks


def merged(found):
    """[(matrix, [(layer, head), ...])] from {(layer, head): matrix}: equal ones once."""
    groups = []
    for place, matrix in found.items():
        for other, places in groups:
            if np.array_equal(matrix, other, equal_nan=True):
                places.append(place)
                break
        else:
            groups.append((matrix, [place]))
    return groups


def where(places):
    """'layers 0-1, heads 0-3' for [(layer, head), ...]."""
    by_heads = {}
    for layer in sorted({layer for layer, _ in places}):
        by_heads.setdefault(figures.ranges([h for n, h in places if n == layer]), []).append(layer)
    return "; ".join(f"layer{'s' * (len(layers) > 1)} {figures.ranges(layers)}, head{'s' * (not heads.isdigit())} {heads}"
                     for heads, layers in by_heads.items())


def text(matrix, columns):
    """A (T, T) matrix as lines of SHADES, from 0 to 1, blank where it is nan: two characters a position
    where the columns suffice, else one for the mean of so many positions that they do."""
    T = len(matrix)
    size = -(-T // columns)
    n = -(-T // size)
    cells = np.pad(matrix, (0, n * size - T), constant_values=math.nan)
    cells = cells.reshape(n, size, n, size).swapaxes(1, 2).reshape(n, n, size * size)
    there = ~np.isnan(cells)
    mean = np.where(there, cells, 0).sum(-1) / np.maximum(there.sum(-1), 1)
    shade = np.where(mean >= 1, 4, np.where(mean <= 0, 0, 1 + np.clip(np.floor(3 * mean), 0, 2))).astype(int)
    lines = [[SHADES[s] if t else " " for s, t in zip(*row)] for row in zip(shade, there.any(-1))]
    return "\n".join((" " * (2 * T <= columns)).join(line).rstrip() for line in lines)


def patterns(layers, name, T):
    """What there is to draw: ([(title, mask)], [(title, factor)]), (T, T) with nan where no pair is;
    equal ones once.

    A mask is exp(bias): 1 keeps, 0 drops. A factor is what `reweigh` makes of a softmax weight, divided by it,
    for a random query and key at each position, the same for all heads.
    """
    i = torch.arange(T)
    masks, factors, said = {}, {}, {}
    q, k = torch.randn(2, 1, 1, T, layers[0].head_size, generator=torch.Generator().manual_seed(0))
    for n, layer in enumerate(layers):
        bias = layer.bias_at(i, i).expand(layer.n_head, T, T)
        mask = bias.exp()
        unseen = (i[:, None] < i) & (mask == 0) if layer.causal else torch.zeros_like(mask, dtype=torch.bool)
        each = {key[:-1]: of for key, of in layer.stats().items() if isinstance(of, list) and len(of) == layer.n_head}
        for h in range(layer.n_head):
            masks[n, h] = torch.where(unseen[h], math.nan, mask[h]).numpy()
            said[n, h] = {"": getattr(layer, "pattern", name), **{key: f"{each[key][h]:.3g}" for key in each}}
        if layer.reweighs:
            p = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.size(3)) + bias, -1)  # (1, H, T, T)
            variation = matrix_variation(p.square().sum(-1, keepdim=True)) if layer.scope == "matrix" else None
            factor = (layer.reweigh(p, (bias > -math.inf)[None].sum(-1, keepdim=True), variation) / p)[0]
            factors |= {(n, h): torch.where(p[0, h] > 0, factor[h], math.nan).numpy() for h in range(layer.n_head)}
    dense = T * (T + 1) / 2 if layers[0].causal else T * T
    titles = []
    for mask, places in merged(masks):
        values = {key: dict.fromkeys(said[place][key] for place in places if key in said[place]) for key in said[places[0]]}
        what = ", ".join(f"{key} {'/'.join(each)}".strip() for key, each in values.items())
        titles.append((f"{where(places)}: {what}, keeps {100 * (mask > 0).sum() / dense:.1f} %", mask))
    return titles, [(f"{where(places)}: factor on the weights of random q and k", factor)
                    for factor, places in merged(factors)]


def at_commas(line, width=40):
    """A line in lines of so many characters where it has commas for that."""
    return textwrap.fill(line.replace(" ", "\xa0").replace(",\xa0", ", "), width, break_on_hyphens=False).replace("\xa0", " ")


def draw_pattern(fig, masks, factors, path):
    """One picture with a panel for each of `patterns`."""
    from matplotlib.colors import LinearSegmentedColormap

    rows, columns = figures.grid(len(masks) + len(factors), 4)
    fig.set_size_inches(2.8 * columns + 1, 3.5 * rows)
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    most = max([np.nanmax(np.abs(factor - 1)) for _, factor in factors], default=0) or 1
    blues = LinearSegmentedColormap.from_list("kept", ["#e4e8ee", "#08306b"])  # nan stays white
    soft = any(((0 < mask) & (mask < 1)).any() for _, mask in masks)
    kinds = (masks, blues, 0, 1, "mask", soft), (factors, "PuOr_r", 1 - most, 1 + most, "factor", True)
    for panels, colours, low, high, label, bar in kinds:
        here = [axes.pop(0) for _ in panels]
        for ax, (title, matrix) in zip(here, panels):
            image = ax.imshow(matrix, cmap=colours, vmin=low, vmax=high)
            ax.set_title("\n".join(map(at_commas, title.split(": "))), fontsize=8)
            ax.set(xlabel="key", ylabel="query")
            for axis in (ax.xaxis, ax.yaxis):
                axis.get_major_locator().set_params(integer=True)
        if panels and bar:
            fig.colorbar(image, ax=here, shrink=0.6, label=label, format="%.2f")
    for ax in axes:
        ax.remove()
    figures.write(fig, path)


def laws(layers, T):
    """Whether all kernels of a mechanism's layers agree with the reference, in words; differences are the largest in float64."""
    worst, lengths = {}, torch.tensor([T, max(1, T // 2)])
    for layer in layers:
        layer.double()
        found = {kernel: contract.error(layer, kernel, T, lengths) for kernel in ("engine", "flex")}
        if layer.causal:
            found["decoding"] = contract.decoding_error(layer, T + 9, max(1, T // 2), 1)
        worst = {name: max(found[name], worst.get(name, 0.0)) for name in found}
        missed = contract.cells_missed(layer, T)
    wrong = [name for name, error in worst.items() if not error < 1e-9] + ["the block mask of flex"] * (missed > 0)
    text = ", ".join(f"{name} {error:.0e}" for name, error in worst.items())
    if wrong:
        raise UserError(f"not as the formula says: {' and '.join(wrong)} (differences in float64: {text})")
    return f"as the formula says: {text} (largest difference in float64, outputs and gradients); blocks hold every kept pair once"


def pattern(name, defaults, arguments=None):
    """Draw the mechanism `name` as text and as a picture, and check its kernels: what `python attention.py NAME` does.

    defaults: of its options, T, n_layer, n_head, causal and out, other than they are elsewhere; arguments: the command line.
    """
    own = {"n_layer": 1, "n_head": 4, "causal": True, "out": ""}
    kind, options = mechanism(name)
    for key in defaults.keys() - {*own, *options, "T"}:
        raise UserError(f"{name} has no option {key}; there are {', '.join([*own, *options])}")
    settings = {**own, **options, **defaults}
    T = settings.pop("T", 48)
    settings["__doc__"] = (f"The pattern of {name} attention, as text and as a picture (out; default pattern-{name}.png),\n"
                           f"and whether engine, flex and decoding agree with its formula.\n\n"
                           f"--T={T} positions, in n_layer layers of n_head heads, causal or in both directions;\n"
                           f"the other settings are the mechanism's.")
    settings, more = configure(settings, arguments, more=lambda settings: {"T": T})
    T, path = more["T"], Path(settings["out"] or f"pattern-{name}.png")
    if not 1 <= T <= 2048:
        raise UserError(f"T must be from 1 to 2048 (a T x T picture is drawn), got {T}")
    for key in ("n_layer", "n_head"):
        if settings[key] < 1:
            raise UserError(f"{key} must be at least 1, got {settings[key]}")
    if path.suffix != ".png":
        raise UserError(f"out expects the name of a PNG file, like {path.stem}.png, got {settings['out']!r}")
    torch.manual_seed(0)  # of periods that begin at random
    options = {key: settings[key] for key in options}
    H = settings["n_head"]
    config = SimpleNamespace(block_size=T, n_layer=settings["n_layer"], n_head=H, n_embd=16 * H, dropout=0.0, bias=False,
                             causal=settings["causal"], kernel="auto", options=options)
    layers = [kind(config, n).eval() for n in range(config.n_layer)]
    for layer in layers:
        contract.check(layer, name)
    with torch.no_grad():
        masks, factors = patterns(layers, name, T)
    columns = shutil.get_terminal_size().columns
    mean = f"; a character is the mean of {size} x {size} pairs" if (size := -(-T // columns)) > 1 else ""
    print(f"a line a query, a column a key; {SHADES[-1]} kept, {SHADES[1:-1]} in part, {SHADES[0]} dropped{mean}\n")
    for title, mask in masks:
        print(f"{title} of the pairs of dense attention\n{text(mask, columns)}\n")
    for title, factor in factors:
        low, high = np.nanmin(factor), np.nanmax(factor)
        fifths = np.clip(np.floor(5 * (factor - low) / (high - low or 1)), 0, 4) / 4
        print(f"{title}, {SHADES} from {low:.3f} to {high:.3f}\n{text(fifths, columns)}\n")
    try:
        fig = figures.figure()
    except UserError as error:  # the text alone is worth having
        print(f"no picture: {error}")
    else:
        draw_pattern(fig, masks, factors, path)
    print(laws(layers, min(T, 256)))


def show_pattern():
    """`python attention.py [NAME] [--T=64] [--key=value ...]`: the mechanism of NAME.py (default: dense)."""
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    name = sys.argv[1].removesuffix(".py") if named else "dense"
    run_main(lambda: pattern(name, {}, sys.argv[1 + named :]))
