"""A mechanism's pattern, as text and as a picture, and whether its kernels agree with its formula: attention.py NAME.

Only the picture (--out=FILE.png) needs matplotlib.
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

SHADES = ".:+*#"  # dropped, three steps of a soft mask, kept; ASCII, since some terminals have no block characters


def merge_equal(matrices):
    """[(matrix, [(layer, head), ...])] from {(layer, head): matrix}, each different matrix once."""
    groups = []
    for place, matrix in matrices.items():
        places = next((places for other, places in groups if np.array_equal(matrix, other, equal_nan=True)), None)
        if places is None:
            groups.append((matrix, [place]))
        else:
            places.append(place)
    return groups


def format_places(places):
    """'layers 0-1, heads 0-3' for [(layer, head), ...]."""
    layers_of = {}  # {heads as text: layers}
    for layer in sorted({layer for layer, _ in places}):
        layers_of.setdefault(figures.ranges([h for n, h in places if n == layer]), []).append(layer)
    return "; ".join(f"layer{'s' * (len(layers) > 1)} {figures.ranges(layers)}, "
                     f"head{'s' * (not heads.isdigit())} {heads}" for heads, layers in layers_of.items())


def format_matrix(matrix, columns):
    """A (T, T) matrix of values from 0 to 1 as lines of SHADES, blank at NaN: two characters a position if the columns
    suffice, else one character for the mean of size x size positions."""
    T = len(matrix)
    size = -(-T // columns)
    n = -(-T // size)
    cells = np.pad(matrix, (0, n * size - T), constant_values=math.nan)
    cells = cells.reshape(n, size, n, size).swapaxes(1, 2).reshape(n, n, size * size)
    is_pair = ~np.isnan(cells)
    mean = np.where(is_pair, cells, 0).sum(-1) / np.maximum(is_pair.sum(-1), 1)
    shade = np.where(mean >= 1, 4, np.where(mean <= 0, 0, 1 + np.clip(np.floor(3 * mean), 0, 2))).astype(int)
    lines = [[SHADES[s] if drawn else " " for s, drawn in zip(*row)] for row in zip(shade, is_pair.any(-1))]
    return "\n".join((" " * (2 * T <= columns)).join(line).rstrip() for line in lines)


def patterns(layers, name, T):
    """The matrices to draw, equal ones once: ([(title, mask)], [(title, factor)]), (T, T) with NaN for no pair.

    A mask is exp(bias): 1 keeps, 0 drops. A factor is a softmax weight after `reweigh` divided by the weight before,
    for a random query and key at each position, the same for all heads.
    """
    i = torch.arange(T)
    masks, factors, facts = {}, {}, {}
    q, k = torch.randn(2, 1, 1, T, layers[0].head_size, generator=torch.Generator().manual_seed(0))
    for n, layer in enumerate(layers):
        bias = layer.bias_at(i, i).expand(layer.n_head, T, T)
        mask = bias.exp()
        unseen = (i[:, None] < i) & (mask == 0) if layer.causal else torch.zeros_like(mask, dtype=torch.bool)
        of_heads = {key[:-1]: v for key, v in layer.stats().items() if isinstance(v, list) and len(v) == layer.n_head}
        for h in range(layer.n_head):
            masks[n, h] = torch.where(unseen[h], math.nan, mask[h]).numpy()
            kind = getattr(layer, "patterns", [name] * layer.n_head)[h]
            facts[n, h] = {"": kind, **{key: f"{v[h]:.3g}" for key, v in of_heads.items()}}
        if layer.reweighs:
            p = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.size(3)) + bias, -1)  # (1, H, T, T)
            variation = matrix_variation(p.square().sum(-1, keepdim=True)) if layer.scope == "matrix" else None
            factor = (layer.reweigh(p, (bias > -math.inf)[None].sum(-1, keepdim=True), variation) / p)[0]
            factors |= {(n, h): torch.where(p[0, h] > 0, factor[h], math.nan).numpy() for h in range(layer.n_head)}
    dense = T * (T + 1) / 2 if layers[0].causal else T * T
    titled = []
    for mask, places in merge_equal(masks):
        keys = [key for key in facts[places[0]] if all(key in facts[place] for place in places)]
        values = [f"{key} {'/'.join(dict.fromkeys(facts[place][key] for place in places))}".strip() for key in keys]
        share = 100 * (mask > 0).sum() / dense
        titled.append((f"{format_places(places)}: {', '.join(values)}, keeps {share:.1f} %", mask))
    return titled, [(f"{format_places(places)}: factor on the weights of random q and k", factor)
                    for factor, places in merge_equal(factors)]


def draw_pattern(masks, factors):
    """The figure of `patterns`, a panel for each."""
    fig, axes, _ = figures.panels(len(masks) + len(factors), 4, 2.8, 3.5, extra=(1, 0))
    largest = max([np.nanmax(np.abs(factor - 1)) for _, factor in factors], default=0) or 1
    is_soft = any(((0 < mask) & (mask < 1)).any() for _, mask in masks)
    kinds = ((masks, axes[: len(masks)], figures.blues(), 0, 1, "mask" * is_soft),
             (factors, axes[len(masks) :], "PuOr_r", 1 - largest, 1 + largest, "factor"))
    for matrices, axes, colours, low, high, bar in kinds:
        for ax, (title, matrix) in zip(axes, matrices):
            image = ax.imshow(matrix, cmap=colours, vmin=low, vmax=high)
            lines = (line.replace(" ", "\xa0").replace(",\xa0", ", ") for line in title.split(": "))  # break at commas
            lines = "\n".join(textwrap.fill(line, 40, break_on_hyphens=False) for line in lines)
            ax.set_title(lines.replace("\xa0", " "), fontsize=8)
            ax.set(xlabel="key", ylabel="query")
            for axis in (ax.xaxis, ax.yaxis):
                axis.get_major_locator().set_params(integer=True)
        if matrices and bar:
            fig.colorbar(image, ax=axes, shrink=0.6, label=bar, format="%.2f")
    return fig


def check_kernels(layers, T):
    """A sentence on how all kernels of the layers agree with the reference. Raises UserError where one differs."""
    worst, missed, lengths = {}, 0, torch.tensor([T, max(1, T // 2)])
    for layer in layers:
        layer.double()
        errors = {kernel: contract.error(layer, kernel, T, lengths) for kernel in ("engine", "flex")}
        if layer.causal:
            errors["decoding"] = contract.decoding_error(layer, T + 9, max(1, T // 2), 1)
        worst = {name: max(errors[name], worst.get(name, 0.0)) for name in errors}
        missed += contract.cells_missed(layer, T)
    wrong = [name for name, error in worst.items() if not error < 1e-9] + ["the block mask of flex"] * (missed > 0)
    text = ", ".join(f"{name} {error:.0e}" for name, error in worst.items())
    if wrong:
        raise UserError(f"not as the formula says: {' and '.join(wrong)} (differences in float64: {text})")
    return (f"as the formula says: {text} (largest difference in float64, outputs and gradients); blocks hold every "
            "kept pair once")


def read_settings(name, defaults, arguments):
    """(settings, T, options) of a mechanism's pattern. Raises UserError for a setting that cannot be."""
    settings, options = {"n_layer": 1, "n_head": 4, "causal": True, "out": ""}, mechanism(name)[1]
    for key in defaults.keys() - {*settings, *options, "T"}:
        raise UserError(f"{name} has no option {key}; there are {', '.join([*settings, *options])}")
    settings |= options | defaults
    T = settings.pop("T", 48)
    settings["__doc__"] = f"""The pattern of {name} attention, as text and as a picture (out; default
pattern-{name}.png), and whether engine, flex and decoding agree with its formula.

--T={T} positions, in n_layer layers of n_head heads, causal or in both directions;
the other settings are the mechanism's."""
    settings, more = configure(settings, arguments, more=lambda settings: {"T": T})
    if not 1 <= more["T"] <= 2048:
        raise UserError(f"T must be from 1 to 2048 (a T x T picture is drawn), got {more['T']}")
    for key in ("n_layer", "n_head"):
        if settings[key] < 1:
            raise UserError(f"{key} must be at least 1, got {settings[key]}")
    settings["out"] = settings["out"] or f"pattern-{name}.png"
    if (path := Path(settings["out"])).suffix != ".png":
        raise UserError(f"out expects the name of a PNG file, like {path.stem}.png, got {settings['out']!r}")
    return settings, more["T"], {key: settings[key] for key in options}


def pattern(name, defaults, arguments=None):
    """Draw the mechanism `name` as text and as a picture, and check its kernels: what `python attention.py NAME` does.

    defaults: replace those of the mechanism's options, T, n_layer, n_head, causal and out. arguments: the command line.
    """
    settings, T, options = read_settings(name, defaults, arguments)
    torch.manual_seed(0)  # of periods that begin at random
    H = settings["n_head"]
    config = SimpleNamespace(block_size=T, n_layer=settings["n_layer"], n_head=H, n_embd=16 * H, dropout=0.0,
                             bias=False, document_mask=False, causal=settings["causal"], kernel="auto", n_kv_head=H,
                             qk_norm=False, attention_sink=False, pos="rope", options=options)
    layers = [mechanism(name)[0](config, n).eval() for n in range(config.n_layer)]
    for layer in layers:
        contract.check(layer, name)
    with torch.no_grad():
        masks, factors = patterns(layers, name, T)
    columns = shutil.get_terminal_size().columns
    mean = f"; a character is the mean of {size} x {size} pairs" if (size := -(-T // columns)) > 1 else ""
    print(f"a line a query, a column a key; {SHADES[-1]} kept, {SHADES[1:-1]} in part, {SHADES[0]} dropped{mean}\n")
    for title, mask in masks:
        print(f"{title} of the pairs of dense attention\n{format_matrix(mask, columns)}\n")
    for title, factor in factors:
        low, high = np.nanmin(factor), np.nanmax(factor)
        fifths = np.clip(np.floor(5 * (factor - low) / (high - low or 1)), 0, 4) / 4
        print(f"{title}, {SHADES} from {low:.3f} to {high:.3f}\n{format_matrix(fifths, columns)}\n")
    try:
        fig = draw_pattern(masks, factors)
    except UserError as error:  # without matplotlib; the text needs none
        print(f"no picture: {error}")
    else:
        figures.write(fig, Path(settings["out"]))
    print(check_kernels(layers, min(T, 256)))


def show_pattern():
    """`python attention.py [NAME] [--T=64] [--key=value ...]`: the mechanism of NAME.py (default: dense)."""
    has_name = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    name = sys.argv[1].removesuffix(".py") if has_name else "dense"
    run_main(lambda: pattern(name, {}, sys.argv[1 + has_name :]))
