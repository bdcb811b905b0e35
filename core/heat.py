"""A model's attention within a text as heat maps, and a classifier's answers with shaded words: for plot.py.

Letters: B batch, T time, H heads; n of the T tokens are shown.
"""

import json
import textwrap

import numpy as np
import torch

from core import explain, figures, readers
from core.config import UserError, check_choice
from core.inference import encode, predict, review_batch

TOKENS, TOKENS_MANY = 64, 32  # shown by one heat map, and by each of several: as many as are legible
COLUMNS, LINES = 100, 110  # of a page
SIZE = 9  # points of its font, DejaVu Sans Mono, whose letters are 0.602 of that wide


def draw_texts(runs, target, text, reviews, method, layer, head):
    """Write heat maps of `text`, and pages of it and of the file `reviews`, into the folder `target`.

    runs: {name: (model, tokenizer, class names)}; method: one of explain.METHODS, which shades the pages.
    Raises UserError for a language model with reviews, and for a method, layer or head that does not exist.
    """
    check_choice("explain", method, explain.METHODS)
    for name, run in runs.items():
        if reviews and run[0].config.causal:
            raise UserError(f"{name} is a language model, which does not classify reviews; give --text, or the folder "
                            "of a classifier")
        pictures = {}
        if text:
            pictures["heat"] = draw_heat(name, run, text, layer, head)
        if not run[0].config.causal:
            rows = [{"text": text, "label": None, "kind": ""}] if text else []
            rows += read_reviews(reviews, run[2]) if reviews else []
            pictures["reviews"] = draw_reviews(name, run, rows, method)
        for kind, fig in pictures.items():
            if fig:
                figures.write(fig, target / figures.file_name(kind, name, runs), 256 if kind == "heat" else 64)


def read_reviews(path, classes):
    """[{"text", "label" (0, 1 or None), "kind" (str)}] of a file of JSON lines; a label may be the class's name."""
    labels, rows = {name: n for n, name in enumerate(classes)} | {0: 0, 1: 1, None: None}, []
    try:
        lines = readers.read_bytes(path).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the reviews {path}: {error}; give a file of JSON lines")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({"text": row["text"], "label": labels[row.get("label")], "kind": str(row.get("kind") or "")})
            if not row["text"].strip():
                raise ValueError("an empty text")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f'{path}, line {number}: expected {{"text": "...", "label": 0, 1 or one of '
                            f'{", ".join(classes)}, "kind": "..."}}, the last two optional; got {line[:60]} '
                            f"({error!r})")
    if not rows:
        raise UserError(f"{path} holds no reviews")
    return rows


def wrap(words, width):
    """Lines [[(column, word, shade)]] of [(word, shade)], one space apart; a word longer than a line is cut."""
    lines, column = [[]], 0
    for word, shade in words:
        for piece in (word[n : n + width] for n in range(0, len(word), width)):
            if column and column + len(piece) > width:
                lines.append([])
                column = 0
            lines[-1].append((column, piece, shade))
            column += len(piece) + 1
    return lines


def draw_page(blocks, title):
    """The figure of texts one below another. blocks: [(heading, its colour, [(word, shade from -1 to 1)])], of which as
    many are drawn as fit."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("shade", [figures.PALETTE[5], "white", figures.PALETTE[4]])
    rows, shown = [], 0  # a list a line, of (column, text, colour, shade), the shade of a heading None
    for heading, colour, words in blocks:
        block = [[(0, line, colour, None)] for line in textwrap.wrap(heading, COLUMNS)]
        for line in [*wrap(words, COLUMNS), []]:
            block.append([(column, word, "black", shade) for column, word, shade in line])
        if rows and len(rows) + len(block) > LINES:
            break
        rows, shown = rows + block, shown + 1
    title += f"; the first {shown} of {len(blocks)}, as many as fit" * (shown < len(blocks))
    rows = [[(0, line, "black", None)] for line in textwrap.wrap(title, COLUMNS)] + [[]] + rows
    fig = figures.figure((COLUMNS + 4) * 0.602 * SIZE / 72, (len(rows) + 0.5) * 1.6 * SIZE / 72)
    fig.set_layout_engine("none")
    ax = fig.add_axes([0, 0, 1, 1])
    ax.axis("off")
    ax.set(xlim=(-2, COLUMNS + 2), ylim=(len(rows), -0.5))
    for line, row in enumerate(rows):
        for column, word, colour, shade in row:
            if shade:
                ax.add_patch(Rectangle((column - 0.2, line + 0.05), len(word) + 0.4, 0.9, linewidth=0,
                                       color=colours((1 + shade) / 2)))
            ax.text(column, line + 0.5, word, family="monospace", size=SIZE, color=colour, va="center",
                    parse_math=False, weight="normal" if shade is not None else "bold")
    return fig


def draw_reviews(name, run, rows, method):
    """The page of reviews: the model's answer, the truth, and the words shaded. rows: see `read_reviews`."""
    model, tokenizer, classes = run
    blocks, right = [], []
    predicted = predict(model, tokenizer, [row["text"] for row in rows], "cpu", "float32").tolist()
    for n, (row, p) in enumerate(zip(rows, predicted), 1):
        x, lengths = review_batch(model, tokenizer, [row["text"]], "cpu")
        words, scores = explain.word_scores(method, model, tokenizer, x, lengths)
        heading, colour = f"{n}. {classes[p > 0.5]} {max(p, 1 - p):.2f}", "black"
        if row["label"] is not None:
            right.append((p > 0.5) == row["label"])
            heading += f", truth {classes[row['label']]}: {'right' if right[-1] else 'WRONG'}"
            colour = figures.PALETTE[0] if right[-1] else figures.PALETTE[1]
        most = sorted(zip(words, scores), key=lambda pair: -abs(pair[1]))[:3]
        most = [f"{word}\xa0{s:+.2f}" if method == "occlusion" else f"{word}\xa0{100 * s:.0f}\xa0%" for word, s in most]
        heading += f", {row['kind']}" * bool(row["kind"]) + f"; most: {', '.join(most)}"
        heading += f"; read: the first {x.size(1):,} tokens" * (x.size(1) == model.config.block_size)
        blocks.append((heading, colour, list(zip(words, explain.shades(method, scores)))))
    accuracy = f": {sum(right)} of {len(right)} right" if right else ""
    return draw_page(blocks, f"{name}, reviews{accuracy}; {explain.METHODS[method]}")


def attention_maps(run, text):
    """(token ids that the model reads of a text, their number in the whole text, [(H, T, T) or (1, 1, T) a layer])."""
    model, tokenizer, _ = run
    if model.config.causal:
        ids, lengths = encode(tokenizer, text), None
        total = len(ids)
        x = torch.tensor([ids[: min(TOKENS, model.config.block_size)]])  # later tokens change nothing before them
    else:
        x, lengths = review_batch(model, tokenizer, [text], "cpu")
        total = x.size(1)
    if not total:
        raise UserError("a text without tokens has no heat map; give a longer text")
    return x[0].tolist(), total, [layer[0].float().numpy() for layer in model.maps(x, lengths)]


def pick(what, n, count):
    """The numbers below `count` that n chooses, all for -1. Raises UserError for another n."""
    if not -1 <= n < count:
        raise UserError(f"{what} must be from 0 to {count - 1}, or -1; got {n}")
    return range(count) if n == -1 else [n]


def draw_heat(name, run, text, layer, head):
    """The figure of attention within a text in one layer, a panel a head: a row a query, a column a key. Of additive
    attention, whose one query is no token, the figure of shaded words. None, and a message, without attention."""
    ids, total, layers = attention_maps(run, text)
    if not layers:
        print(f"no heat map: {name} has no attention")
        return None
    layer = pick("layer", layer, len(layers))[-1]
    heads = pick("head", head, len(layers[layer]))
    if layers[layer].shape[1] == 1 < len(ids):
        words, sizes = explain.split_words(run[1], ids)
        weights = [float(part.sum()) for part in np.split(layers[layer][0, 0], np.cumsum(sizes)[:-1])]
        title = f"{name}: attention; {explain.METHODS['attention']}"
        return draw_page([("", "black", list(zip(words, explain.shades("attention", weights))))], title)
    n = min(len(ids), TOKENS if len(heads) == 1 else TOKENS_MANY)
    tokens = [token if len(token) < 15 else token[:13] + "…" for token in map(run[1].token, ids[:n])]
    side, longest = max(1.7, 0.12 * n), max(map(len, tokens))
    margin = 0.06 * longest + 0.4  # for the labels
    most = max(1, min(4, 128 // max(n, 16)))
    fig, axes, columns = figures.panels(len(heads), most, side + 0.5, side + 0.2, (margin, margin))
    fig.set_layout_engine("compressed")
    for place, (ax, head) in enumerate(zip(axes, heads)):
        weights, is_lowest, is_first = layers[layer][head, :n, :n], place + columns >= len(heads), place % columns == 0
        image = ax.imshow(np.where(weights > 0, weights, np.nan), cmap=figures.blues(), vmin=0, vmax=weights.max())
        ax.set_title(f"head {head}, darkest {weights.max():.2f}", fontsize=8)
        ax.set_xticks(range(n), tokens if is_lowest else [""] * n, parse_math=False, rotation=90 if longest > 1 else 0)
        ax.set_yticks(range(n), tokens if is_first else [""] * n, parse_math=False)
        ax.tick_params(labelsize=6, length=1.5, labelfontfamily="monospace")
        ax.set_xlabel("key" * is_lowest, fontsize=8)
        ax.set_ylabel("query" * is_first, fontsize=8)
        fig.colorbar(image, ax=ax, fraction=0.05, pad=0.02).ax.tick_params(labelsize=6, length=1.5)
    cut = f"; the first {n} of {total:,} tokens" * (n < total)
    more = f" (--head=N shows {min(TOKENS, len(ids))})" * (n < len(ids) and len(heads) > 1)
    title = f"{name}: attention weights in layer {layer}{cut}{more}"
    fig.suptitle("\n".join(textwrap.wrap(title, int(11 * fig.get_figwidth()))), fontsize=9, parse_math=False)
    return fig
