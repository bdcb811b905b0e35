"""What a trained model looks at, for plot.py: attention between tokens as heat maps, and reviews with their words shaded.

Letters: B batch, T time, H heads; n of the T tokens are shown.
"""

import json
import textwrap

import numpy as np
import torch

from core import figures, readers
from core.config import UserError
from core.inference import encode, predict, review_batch

TOKENS, TOKENS_MANY = 64, 32  # shown by one heat map, and by each of several: as many as can be read
COLUMNS, LINES = 100, 110  # of a page
SIZE = 9  # points of its letters, DejaVu Sans Mono's, which are 0.602 of that wide


def read_reviews(path, classes):
    """[{"text", "label" (0, 1 or None), "kind" (str)}] of a file of JSON lines; a label may be the class's name."""
    names, found = {name: n for n, name in enumerate(classes)} | {0: 0, 1: 1, None: None}, []
    try:
        lines = readers.read_bytes(path).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the reviews {path}: {error}; give a file of JSON lines")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append({"text": row["text"], "label": names[row.get("label")], "kind": str(row.get("kind") or "")})
            if not row["text"].strip():
                raise ValueError("an empty text")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f'{path}, line {number}: expected {{"text": "...", "label": 0, 1 or one of {", ".join(classes)}, '
                            f'"kind": "..."}}, the last two optional; got {line[:60]} ({error!r})')
    if not found:
        raise UserError(f"{path} holds no reviews")
    return found


def words_of(tokenizer, ids, weights):
    """[(word, weight)] of tokens: what ends before a space is one word with the space before it, the weights added up;
    where tokens are words, and for the document mark, each token for itself."""
    found, alone = [], True
    for i, weight in zip(ids, weights):
        piece = tokenizer.token(i).encode() if i == tokenizer.mark else tokenizer.decode_bytes([i])
        before, (word, _) = alone, found[-1] if found else (b"", 0)
        alone = i == tokenizer.mark or tokenizer.kind == "words"
        if before or alone or word.strip() and (piece[:1].isspace() or word[-1:].isspace()):
            found.append([b"", 0.0])
        found[-1][0] += piece
        found[-1][1] += float(weight)
    return [(word.decode("utf-8", "replace").strip() or "␣", weight) for word, weight in found]


# ---- pages of shaded words -----------------------------------------------------------------------


def wrap(words, width):
    """Lines [[(column, word, weight)]] of words one space apart; a word longer than a line is cut."""
    lines, column = [[]], 0
    for word, weight in words:
        for piece in (word[n : n + width] for n in range(0, len(word), width)):
            if column and column + len(piece) > width:
                lines.append([])
                column = 0
            lines[-1].append((column, piece, weight))
            column += len(piece) + 1
    return lines


def shades(words):
    """How dark each of [(word, weight)] is, from 0 for the mean weight and less to 1 for the largest."""
    weights = np.array([weight for _, weight in words])
    room = weights.max() - weights.mean()
    return np.clip((weights - weights.mean()) / room, 0, 1) if room > 1e-6 * weights.max() else np.zeros(len(weights))


def draw_page(blocks, title, path):
    """Texts one under another. blocks: [(heading, its colour, [(word, weight)])]; those that the page has room for."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("weight", ["white", figures.PALETTE[4]])  # black letters can be read on all of it
    rows, shown = [], 0  # a list a line, of (column, text, colour, shade), the shade of a heading None
    for heading, colour, words in blocks:
        block = [[(0, line, colour, None)] for line in textwrap.wrap(heading, COLUMNS)]
        lit = [(word, shade) for (word, _), shade in zip(words, shades(words))]
        block += [[(column, word, "black", shade) for column, word, shade in line] for line in wrap(lit, COLUMNS)] + [[]]
        if rows and len(rows) + len(block) > LINES:
            break
        rows, shown = rows + block, shown + 1
    if shown < len(blocks):
        title += f"; shown: the first {shown} of {len(blocks)}, as many as fit"
    titles = textwrap.wrap(f"{title}; shaded: words of more than the mean weight, the darkest has the most", COLUMNS)
    rows = [[(0, line, "black", None)] for line in titles] + [[]] + rows
    fig = figures.figure((COLUMNS + 4) * 0.602 * SIZE / 72, (len(rows) + 0.5) * 1.6 * SIZE / 72)
    fig.set_layout_engine("none")
    ax = fig.add_axes([0, 0, 1, 1])
    ax.axis("off")
    ax.set(xlim=(-2, COLUMNS + 2), ylim=(len(rows), -0.5))
    for line, row in enumerate(rows):
        for column, word, colour, shade in row:
            if shade:
                ax.add_patch(Rectangle((column - 0.2, line + 0.05), len(word) + 0.4, 0.9, color=colours(shade), linewidth=0))
            ax.text(column, line + 0.5, word, family="monospace", size=SIZE, color=colour, va="center", parse_math=False,
                    weight="normal" if shade is not None else "bold")
    figures.write(fig, path, 64)


def draw_reviews(name, run, rows, path):
    """The page of reviews: what the model says, the truth, and the words that weighed most. rows: see `read_reviews`."""
    model, tokenizer, classes = run
    blocks, right = [], []
    predicted = predict(model, tokenizer, [row["text"] for row in rows], "cpu", "float32").tolist()
    for n, (row, p) in enumerate(zip(rows, predicted), 1):
        x, lengths = review_batch(model, tokenizer, [row["text"]], "cpu")
        ids = x[0, : lengths[0]].tolist()
        words = words_of(tokenizer, ids, model.word_weights(x, lengths)[0].tolist())
        said, colour = f"{n}. {classes[p > 0.5]} {max(p, 1 - p):.2f}", "black"
        if row["label"] is not None:
            right.append((p > 0.5) == row["label"])
            said += f", truth {classes[row['label']]}: {'right' if right[-1] else 'WRONG'}"
            colour = figures.PALETTE[0] if right[-1] else figures.PALETTE[1]
        most = sorted(words, key=lambda pair: -pair[1])[:3]
        said += f", {row['kind']}" * bool(row["kind"]) + "; most: " + ", ".join(f"{w}\xa0{100 * x:.0f}\xa0%" for w, x in most)
        cut = len(ids) == model.config.block_size
        blocks.append((said + f"; read: the first {len(ids):,} tokens" * cut, colour, words))
    scored = f": {sum(right)} of {len(right)} right" if right else ""
    draw_page(blocks, f"{name}, reviews{scored}", path)


# ---- heat maps -----------------------------------------------------------------------------------


def maps_of(run, text):
    """(token ids, their number in the whole text, [(H, T, T) or (1, 1, T) a layer]) of what the model reads of a text."""
    model, tokenizer, _ = run
    if model.config.causal:
        ids, lengths = encode(tokenizer, text), None
        total = len(ids)
        ids = ids[: min(TOKENS, model.config.block_size)]  # what comes later changes nothing before it, and is not shown
        x = torch.tensor([ids])
    else:
        x, lengths = review_batch(model, tokenizer, [text], "cpu")
        ids = x[0].tolist()
        total = len(ids)
    if not ids:
        raise UserError("a text of no token has no heat map; give a longer one")
    return ids, total, [layer[0].float().numpy() for layer in model.maps(x, lengths)]


def pick(what, n, count):
    """The numbers below `count` that -1 or n chooses, or UserError."""
    if not -1 <= n < count:
        raise UserError(f"{what} must be from 0 to {count - 1}, or -1; got {n}")
    return range(count) if n == -1 else [n]


def draw_heat(name, run, text, layer, head, path):
    """Attention within a text in one layer, a panel a head: a row a query, a column a key."""
    model, tokenizer, _ = run
    ids, total, layers = maps_of(run, text)
    if not layers:
        print(f"no heat map: {name} has no attention")
        return
    layer = pick("layer", layer, len(layers))[-1]
    heads = pick("head", head, len(layers[layer]))
    if layers[layer].shape[1] == 1 < len(ids):  # one query, which is no token: the context vector of additive attention
        draw_page([("", "black", words_of(tokenizer, ids, layers[layer][0, 0]))], f"{name}: attention", path)
        return
    from matplotlib.colors import LinearSegmentedColormap

    n = min(len(ids), TOKENS if len(heads) == 1 else TOKENS_MANY)
    tokens = [token if len(token) < 15 else token[:13] + "…" for token in map(tokenizer.token, ids[:n])]
    rows, columns = figures.grid(len(heads), max(1, min(4, 128 // max(n, 16))))
    side, longest = max(1.7, 0.12 * n), max(map(len, tokens))
    turned = 90 if longest > 1 else 0
    fig = figures.figure(columns * side + 0.06 * longest + 0.4, rows * (side + 0.2) + 0.06 * longest + 0.5)
    fig.set_layout_engine("compressed")
    axes = fig.subplots(rows, columns, squeeze=False)
    blues = LinearSegmentedColormap.from_list("weight", ["#e4e8ee", "#08306b"])  # nan stays white
    for place, ax in enumerate(axes.flat):
        if place >= len(heads):
            ax.remove()
            continue
        weights = layers[layer][heads[place], :n, :n]
        ax.imshow(np.where(weights > 0, weights, np.nan), cmap=blues, vmin=0, vmax=weights.max())
        ax.set_title(f"head {heads[place]}, darkest {weights.max():.2f}", fontsize=8)
        ax.set_xticks(range(n), tokens if place + columns >= len(heads) else [""] * n, parse_math=False,
                      rotation=turned)
        ax.set_yticks(range(n), tokens if place % columns == 0 else [""] * n, parse_math=False)
        ax.tick_params(labelsize=6, length=1.5, labelfontfamily="monospace")
        ax.set_xlabel("key" if place + columns >= len(heads) else "", fontsize=8)
        ax.set_ylabel("query" if place % columns == 0 else "", fontsize=8)
    cut = f"; the first {n} of {total:,} tokens" * (n < total)
    more = f" (--head=N shows {min(TOKENS, len(ids))})" * (n < len(ids) and len(heads) > 1)
    title = textwrap.wrap(f"{name}: attention in layer {layer}{cut}{more}", int(11 * fig.get_figwidth()))
    fig.suptitle("\n".join(title), fontsize=9, parse_math=False)
    figures.write(fig, path)


# ---- what plot.py calls --------------------------------------------------------------------------


def draw_texts(runs, target, text, reviews, layer, head):
    """Heat maps of `text`, and the page of it and the file `reviews`, for runs {name: (model, tokenizer, class names)}, into
    the folder `target`.

    Raises UserError for a language model asked for reviews, and for a layer or head that there is not.
    """
    for name, run in runs.items():
        if reviews and run[0].config.causal:
            raise UserError(f"{name} is a language model, which says nothing of reviews; give --text, or a classifier's folder")
        if text:
            draw_heat(name, run, text, layer, head, target / figures.own("heat", name, runs))
        if not run[0].config.causal:
            rows = [{"text": text, "label": None, "kind": ""}] if text else []
            rows += read_reviews(reviews, run[2]) if reviews else []
            draw_reviews(name, run, rows, target / figures.own("reviews", name, runs))
