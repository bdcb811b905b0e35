"""Pictures: python plot.py OUT_DIR, or python plot.py results/FILE.json [--dpi=110]

OUT_DIR   a run of train.py: its losses (curves.png) and, where its attention learns spans, those (spans.png)
FILE      what `bench.py attention --results=FILE` wrote: time and memory against T (FILE.png, beside it)

A mechanism's own pattern is drawn by its own file: python sparse.py. Pictures need matplotlib.
"""

import io
import json
import math
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np

from configurator import UserError, configure, run
from runs import write_whole

dpi = 110  # dots per inch

# Told apart by every kind of colour vision (Okabe and Ito 2008, without black and the yellow that white swallows).
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
SHADES = ".:+*#"  # dropped, three steps of a soft mask, kept; ASCII, since not every terminal has blocks


def figure(width=1, height=1):
    """An empty figure of so many inches. Raises UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # not pyplot: that looks for a screen
    except ImportError as error:
        raise UserError(f"pictures need matplotlib ({error}): pip install matplotlib")
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def write(fig, path):
    """Write a figure as a PNG of 256 colours, a third of the bytes of one of all, and say where it is."""
    from PIL import Image  # comes with matplotlib

    drawn = io.BytesIO()
    fig.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
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


# ---- a run -----------------------------------------------------------------------------------


def read_log(path):
    """The records of a log.jsonl, (the running ones, those of the best weights on whole splits)."""
    if not path.exists():
        raise UserError(f"{path.parent} holds no log.jsonl; give the out_dir of a run of train.py")
    records = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"]), "loss": float(record["loss"]), "split": record["split"]})
        except (ValueError, KeyError, TypeError):
            pass  # a line cut by a crash, or that is being written just now
    if not records:
        raise UserError(f"{path} holds no records yet; train.py writes the first one after its first evaluation")
    return [r for r in records if "whole" not in r], [r for r in records if "whole" in r]


def series(records, key):
    """(steps, values) of the records that have the key."""
    there = [r for r in records if key in r]
    return [r["step"] for r in there], [r[key] for r in there]


def draw_curves(folder):
    """Losses over the steps, and accuracy where there is one."""
    records, whole = read_log(folder / "log.jsonl")
    splits = {split: [r for r in records if r["split"] == split] for split in ("train", "val")}
    keys = {"loss": "loss (nats)"} | ({"accuracy": "accuracy"} if any("accuracy" in r for r in records) else {})
    fig = figure(5.5 * len(keys), 3.8)
    for ax, (key, label) in zip(np.ravel(fig.subplots(1, len(keys))), keys.items()):
        if key == "loss":
            ax.plot(*series(splits["train"], key), color=PALETTE[5], linewidth=1, label="training")
        ax.plot(*series(splits["val"], key), color=PALETTE[0], marker="o", markersize=3, label="validation")
        for n, record in enumerate(r for r in whole if key in r):
            bits = f" ({record['bits_per_byte']:.4f} bits per byte)" if "bits_per_byte" in record and key == "loss" else ""
            ax.plot(record["step"], record[key], color=PALETTE[1 + n % 5], marker="o^"[n % 2], markersize=9, fillstyle="none",
                    linestyle="", label=f"best weights, whole {record['split']} split: {record[key]:.4f}{bits}")
        ax.set(xlabel="step", ylabel=label)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.suptitle(folder.resolve().name, fontsize=10)
    write(fig, folder / "curves.png")


def draw_spans(folder):
    """Spans per layer and head over the steps, and periods below them; nothing where none were logged."""
    records = [r for r in read_log(folder / "log.jsonl")[0] if any("spans" in layer for layer in r.get("stats", []))]
    if not records:
        return
    last = records[-1]["stats"]
    keys = [key for key in ("spans", "periods") if any(layer.get(key) for layer in last)]
    rows, columns = grid(len(last), 6)
    fig = figure(1 + 2.1 * columns, 2.1 * rows * len(keys))
    axes = fig.subplots(rows * len(keys), columns, sharex=True, squeeze=False)
    lines = {}
    for first, key in zip(range(0, rows * len(keys), rows), keys):
        for n, ax in enumerate(axes[first : first + rows].flat):
            if n >= len(last):
                ax.remove()
                continue
            ax.sharey(axes[first, 0])
            for head in range(len(last[n].get(key, []))):
                steps, values = zip(*[(r["step"], r["stats"][n][key][head]) for r in records])
                look = {**style(head), "linewidth": 1.2, "markevery": -(-len(steps) // 8)}
                lines[f"head {head}"] = ax.plot(steps, values, **look)[0]
            kept = f", keeps {100 * last[n]['kept_share']:.1f} %" if key == "spans" and "kept_share" in last[n] else ""
            ax.set_title(f"layer {n}{kept}", fontsize=9)
            ax.grid(alpha=0.3)
            ax.tick_params(labelsize=8, labelleft=n % columns == 0, labelbottom=n + columns >= len(last))
            ax.set_xlabel("step" if n + columns >= len(last) else "")
            ax.set_ylabel(key[:-1] + " (tokens)" if n % columns == 0 else "")
    fig.legend(lines.values(), lines, loc="outside right upper", fontsize=8)
    write(fig, folder / "spans.png")


# ---- a benchmark -------------------------------------------------------------------------------


def read_rows(path):
    """({label: {T: (milliseconds, MiB)}}, what the figures are of, the file's other entries).

    Medians where a point was measured more than once, as the fused call is beside every mechanism.
    Where the shapes differ in more than T, the figures are divided by batch x heads.
    """
    rows = []
    try:
        saved = json.loads(path.read_text("utf-8"))
        for row in saved["rows"]:
            if "attention" in row:
                B, H, T = map(int, row["batch x heads x time"].split("x"))
                rows.append((row["attention"], B, H, T, row["ms"], row["MiB more"]))
                rows.append(("fused call", B, H, T, row["fused call, ms"], row["fused, MiB more"]))
        rows = [(label, B, H, T, *(math.nan if x is None else float(x) for x in figures)) for label, B, H, T, *figures in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not what `python bench.py attention --results=FILE` writes ({error!r})")
    if not rows:
        raise UserError(f"{path} holds no rows of `python bench.py attention --results=FILE`, the one mode that is drawn")
    shapes = {(B, H) for _, B, H, *_ in rows}
    what = "batch {}, {} heads".format(*min(shapes)) if len(shapes) == 1 else "one head of one example"
    found = {}
    for label, B, H, T, *figures in rows:
        found.setdefault(label, {}).setdefault(T, []).append(np.array(figures) / (1 if len(shapes) == 1 else B * H))
    return {label: {T: np.median(found[label][T], 0) for T in sorted(found[label])} for label in found}, what, saved


def draw_bench(path):
    """Time and memory against T on log axes, a line a mechanism, with its exponent."""
    found, what, saved = read_rows(path)
    labels = sorted(found, key="fused call".__eq__)  # the fused call last, the others in the file's order
    every = sorted({T for points in found.values() for T in points})
    fig = figure(11, 4.2 + 0.2 * -(-len(labels) // 2))
    from matplotlib.ticker import LogLocator, NullLocator

    for n, (ax, name) in enumerate(zip(fig.subplots(1, 2), ("forward + backward (ms)", "memory beyond the inputs (MiB)"))):
        for line, label in enumerate(labels):
            points = [(T, figures[n]) for T, figures in found[label].items() if figures[n] > 0]  # log axes; nan: not measured
            look = {"color": "black", "linestyle": "--", "marker": "x"} if label == "fused call" else style(line)
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
        if ax.lines:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False)
    machine = saved.get("machine") or {}
    where = machine.get("gpu") or f"{machine.get('processor')}, {machine.get('threads')} threads"
    fig.suptitle(f"attention alone, {what}, {saved.get('dtype')}; {where}", fontsize=10)
    write(fig, path.with_suffix(".png"))


# ---- a mechanism's pattern ---------------------------------------------------------------------


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
        by_heads.setdefault(ranges([h for n, h in places if n == layer]), []).append(layer)
    return "; ".join(f"layer{'s' * (len(layers) > 1)} {ranges(layers)}, head{'s' * (not heads.isdigit())} {heads}"
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


def patterns(model, name, T):
    """What there is to draw: ([(title, mask)], [(title, factor)]), (T, T) with nan where no pair is;
    equal ones once.

    A mask is exp(bias): 1 keeps, 0 drops. A factor is what `reweigh` makes of a softmax weight, divided by it,
    for a random query and key at each position, the same for all heads.
    """
    import torch

    i = torch.arange(T)
    masks, factors, said = {}, {}, {}
    q, k = torch.randn(2, 1, 1, T, model.layers[0].attention.head_size, generator=torch.Generator().manual_seed(0))
    for n, layer in enumerate(layer.attention for layer in model.layers):
        bias = layer.bias(i, i).expand(layer.n_head, T, T)
        mask = bias.exp()
        unseen = (i[:, None] < i) & (mask == 0) if layer.causal else torch.zeros_like(mask, dtype=torch.bool)
        each = {key[:-1]: of for key, of in layer.stats().items() if isinstance(of, list) and len(of) == layer.n_head}
        for h in range(layer.n_head):
            masks[n, h] = torch.where(unseen[h], math.nan, mask[h]).numpy()
            said[n, h] = {"": getattr(layer, "pattern", name), **{key: f"{each[key][h]:.3g}" for key in each}}
        if layer.reweighs:
            p = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.size(3)) + bias, -1)  # (1, H, T, T)
            factor = (layer.reweigh(p, (bias > -math.inf)[None].sum(-1, keepdim=True)) / p)[0]
            factors |= {(n, h): torch.where(p[0, h] > 0, factor[h], math.nan).numpy() for h in range(layer.n_head)}
    dense = T * (T + 1) / 2 if model.config.causal else T * T
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

    rows, columns = grid(len(masks) + len(factors), 4)
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
    write(fig, path)


def pattern(name, defaults):
    """`show_pattern`, with errors as exceptions."""
    import torch
    from model import GPT, GPTConfig, mechanism

    own = {"n_layer": 1, "n_head": 4, "causal": True, "out": ""}
    settings = {**own, **mechanism(name)[1], **defaults}
    T = settings.pop("T", 48)
    settings["__doc__"] = (f"The pattern of {name} attention, as text and as a picture (out; default pattern-{name}.png).\n\n"
                           f"--T={T} positions, in n_layer layers of n_head heads, causal or in both directions;\n"
                           f"the rest is the mechanism's own.")
    settings, more = configure(settings, more=lambda settings: {"T": T})
    T, path = more["T"], Path(settings["out"] or f"pattern-{name}.png")
    if not 1 <= T <= 2048:
        raise UserError(f"T must be from 1 to 2048 (a T x T picture is drawn), got {T}")
    if path.suffix != ".png":
        raise UserError(f"out expects the name of a PNG file, like {path.stem}.png, got {settings['out']!r}")
    torch.manual_seed(0)  # of periods that begin at random
    config = GPTConfig(block_size=T, vocab_size=1, n_layer=settings["n_layer"], n_head=settings["n_head"],
                       n_embd=16 * settings["n_head"], n_class=0 if settings["causal"] else 2, attention=name,
                       options={key: value for key, value in settings.items() if key not in own})
    masks, factors = patterns(GPT(config).eval().requires_grad_(False), name, T)
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
        fig = figure()
    except UserError as error:  # the text alone is worth having
        print(f"no picture: {error}")
    else:
        draw_pattern(fig, masks, factors, path)


def show_pattern(name, **defaults):
    """Draw the mechanism `name` as text and as a picture, from the command line: what its file does alone.

    defaults: of the mechanism's options, T, n_layer, n_head, causal and out, other than they are elsewhere.
    """
    run(lambda: pattern(name, defaults))


def main():
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and arguments[0][0] != "-" else ""
    configure(globals(), arguments)
    if not 20 <= dpi <= 1000:
        raise UserError(f"dpi must be from 20 to 1000, got {dpi}")
    path = Path(name)
    if not name or not path.exists():
        raise UserError(f"expected the folder of a run or a JSON file of bench.py, got {name or 'nothing'}"
                        f"{', which does not exist' * bool(name)}: python plot.py OUT_DIR")
    if path.is_dir():
        draw_curves(path)
        draw_spans(path)
    elif path.suffix == ".json":
        draw_bench(path)
    else:
        raise UserError(f"expected the folder of a run or a JSON file of bench.py, got the file {path}")


if __name__ == "__main__":
    run(main)
