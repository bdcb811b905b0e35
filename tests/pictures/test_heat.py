"""Heat maps and pages of reviews show what the model's own weights say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_plot import drawn, panels  # noqa: F401  a fixture

import plot
import train
from core import explain, figures, heat
from core.inference import encode, predict, review_batch
from core.tokenizer import Tokenizer
from helpers import call
from model import load

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=128", "--batch_size=4", "--max_iters=2",
        "--eval_interval=2",
        "--eval_iters=1", "--device=cpu", "--dtype=float32", "--warmup_iters=0"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, reviews, text):
    """{name: folder} of runs of two steps: a classifier, a language model, BiLSTMs."""
    from core import hardware

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "matmul_rate", lambda device, dtype: 1e9)
        folders = {}
        for name in ("gpt", "lm", "additive", "none", "multihead"):
            folders[name] = tmp_path_factory.mktemp("runs") / name
            kind = [] if name in ("gpt", "lm") else ["--model=bilstm", "--hidden=8", f"--attention={name}",
                                                     "--pool=max"]
            call(train, f"--dataset={text if name == 'lm' else reviews}", f"--out_dir={folders[name]}", *TINY, *kind)
    return folders


def words(ax):
    """[(word, colour of its shade or None)] of a page, in reading order, the bold lines left out."""
    from matplotlib.colors import to_hex

    shades = {(round(patch.get_x() + 0.2), round(patch.get_y() - 0.05)): to_hex(patch.get_facecolor())
              for patch in ax.patches}
    places = [(text.get_text(), *text.get_position()) for text in ax.texts if text.get_weight() == "normal"]
    return [(word, shades.get((x, round(y - 0.5)))) for word, x, y in places]


def headings(ax):
    return " ".join(text.get_text() for text in ax.texts if text.get_weight() == "bold")


# ---- heat maps -----------------------------------------------------------------------------------


def test_heat_of_a_classifier(tmp_path, tiny, drawn, capsys):
    """All heads of the last layer, or those asked for; the axes carry the tokens."""
    call(plot, tiny["gpt"], "--text=so $ good$", f"--out={tmp_path}")
    assert capsys.readouterr().out == f"{tmp_path / 'heat.png'}\n{tmp_path / 'reviews.png'}\n"
    model, checkpoint = load(tiny["gpt"] / "best.pt")
    x, lengths = review_batch(model, Tokenizer(checkpoint["meta"]), ["so $ good$"], "cpu")
    maps = [layer[0].numpy() for layer in model.maps(x, lengths)]
    axes = panels(drawn["heat.png"])
    assert len(axes) == 2 and "attention weights in layer 1" in drawn["heat.png"].get_suptitle()
    bars = [ax for ax in drawn["heat.png"].axes if ax not in axes]
    assert [bar.get_ylim() for bar in bars] == [(0, pytest.approx(maps[1][n].max())) for n in range(2)]
    for n, ax in enumerate(axes):
        np.testing.assert_allclose(ax.images[0].get_array(), maps[1][n])
        assert ax.get_title() == f"head {n}, darkest {maps[1][n].max():.2f}"
    tokens = ["<s>", *"so␣$␣good$"]
    for labels in (axes[0].get_yticklabels(), axes[0].get_xticklabels()):
        assert [tick.get_text() for tick in labels] == tokens
    assert axes[0].yaxis_inverted() and (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("key", "query")
    call(plot, tiny["gpt"], "--text=so $ good$", "--layer=0", "--head=1", f"--out={tmp_path}")
    (ax,) = panels(drawn["heat.png"])
    np.testing.assert_allclose(ax.images[0].get_array(), maps[0][1])


def test_heat_of_a_prompt(tmp_path, tiny, drawn, capsys):
    """A language model's keys after the query are left white, and it has no page of reviews."""
    call(plot, tiny["lm"], "--text=def f(x):", f"--out={tmp_path}")
    assert capsys.readouterr().out == f"{tmp_path / 'heat.png'}\n"
    shown = np.ma.masked_invalid(drawn["heat.png"].axes[0].images[0].get_array())
    assert np.array_equal(np.ma.getmaskarray(shown), np.triu(np.ones((9, 9)), 1)) and np.allclose(shown.sum(1), 1)


def test_a_long_text_is_cut_to_what_can_be_read(tmp_path, tiny, drawn):
    for name, start, total in (("lm", "", 300), ("gpt", "<s>", 128)):  # the classifier reads its block size, 128
        for more, n in (([], 32), (["--head=0"], 64)):
            call(plot, tiny[name], f"--text={'abc' * 100}", f"--out={tmp_path}", *more)
            ax, title = drawn["heat.png"].axes[0], " ".join(drawn["heat.png"].get_suptitle().split())
            assert ax.images[0].get_array().shape == (n, n) and f"the first {n} of {total} tokens" in title
            assert ("--head=N shows 64" in title) == (n == 32)
    model, checkpoint = load(tiny["lm"] / "best.pt")  # what the prompt's end would have changed: nothing
    ids = encode(Tokenizer(checkpoint["meta"]), "abc" * 30)
    call(plot, tiny["lm"], f"--text={'abc' * 30}", f"--out={tmp_path}", "--head=1", "--layer=1")
    shown = np.nan_to_num(drawn["heat.png"].axes[0].images[0].get_array())
    np.testing.assert_allclose(shown, model.maps(torch.tensor([ids]))[1][0, 1, :64, :64], atol=1e-6)


def test_heat_of_a_bilstm(tmp_path, tiny, drawn, capsys):
    """Additive weights are shaded words, multi-head ones heat maps, and without attention there is a word on it."""
    call(plot, tiny["multihead"], "--text=good", f"--out={tmp_path}")
    assert len(panels(drawn["heat.png"])) == 2 and drawn["heat.png"].axes[0].images[0].get_array().shape == (5, 5)
    call(plot, tiny["additive"], "--text=so good a film", f"--out={tmp_path}")
    (ax,) = drawn["heat.png"].axes
    assert [word for word, _ in words(ax)] == ["<s>", "so", "good", "a",
                                               "film"] and "additive: attention" in headings(ax)
    capsys.readouterr()
    drawn.clear()
    call(plot, tiny["none"], "--text=good", f"--out={tmp_path}")
    assert "no heat map: none has no attention\n" in capsys.readouterr().out and list(drawn) == ["reviews.png"]


def test_each_run_has_its_own(tmp_path, tiny, drawn):
    call(plot, tiny["gpt"], tiny["lm"], "--text=good", f"--out={tmp_path}")
    assert list(drawn) == ["heat-gpt.png", "reviews-gpt.png", "heat-lm.png"]


# ---- pages of reviews ----------------------------------------------------------------------------


def test_reviews(tmp_path, tiny, drawn):
    """Each with the prediction and its probability, the truth and the kind; shaded by attention."""
    rows = [{"text": "so good a film", "label": 1, "kind": "plain"}, {"text": "A film, a film", "label": "negative"},
            {"text": "mute"}]
    file = tmp_path / "hard.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)), "utf-8")
    call(plot, tiny["gpt"], f"--reviews={file}", "--explain=attention", f"--out={tmp_path}")
    assert list(drawn) == ["reviews.png"]
    (ax,) = drawn["reviews.png"].axes
    model, checkpoint = load(tiny["gpt"] / "best.pt")
    tokenizer = Tokenizer(checkpoint["meta"])
    said, right = headings(ax), 0
    predicted = predict(model, tokenizer, [row["text"] for row in rows], "cpu", "float32").tolist()
    for n, (row, p) in enumerate(zip(rows, predicted), 1):
        sure = f"{n}. {'positive' if p > 0.5 else 'negative'} {max(p, 1 - p):.2f}"
        truth = {1: (1, "positive"), "negative": (0, "negative"), None: (None, "")}[row.get("label")]
        right += truth[0] == (p > 0.5)
        judged = f", truth {truth[1]}: {'right' if truth[0] == (p > 0.5) else 'WRONG'}" if truth[1] else ""
        assert f"{sure}{judged}{', plain' if n == 1 else ''}; most: " in said
    assert f"gpt, reviews: {right} of 2 right" in said
    found = words(ax)
    assert [word for word, _ in found] == "<s> so good a film <s> A film, a film <s> mute".split()
    x, lengths = review_batch(model, tokenizer, ["so good a film"], "cpu")
    weights = explain.attention_weights(model, x, lengths)[0].tolist()
    by_word = [weights[0], *(sum(weights[a:b]) for a, b in ((1, 3), (3, 8), (8, 10), (10, 15)))]
    shaded = [shade is not None for _, shade in found[:5]]
    assert shaded == [weight > sum(by_word) / 5 for weight in by_word]
    top = sorted(zip(by_word, ["<s>", "so", "good", "a", "film"]), reverse=True)[:3]
    assert "most: " + ", ".join(f"{word}\xa0{100 * weight:.0f}\xa0%" for weight, word in top) in said
    assert dict(found[:5])[top[0][1]] == figures.PALETTE[4].lower()  # the darkest


def test_reviews_are_shaded_by_what_moves_the_answer(tmp_path, tiny, drawn):
    """By default: orange for words that support the answer, blue for words that oppose it."""
    from matplotlib.colors import to_rgb

    call(plot, tiny["gpt"], "--text=so good a film", f"--out={tmp_path}")
    (ax,) = drawn["reviews.png"].axes
    model, checkpoint = load(tiny["gpt"] / "best.pt")
    tokenizer = Tokenizer(checkpoint["meta"])
    batch = review_batch(model, tokenizer, ["so good a film"], "cpu")
    names, scores = explain.word_scores("occlusion", model, tokenizer, *batch)
    assert names == "<s> so good a film".split() and scores[0] == 0 and min(map(abs, scores[1:])) > 0
    for (word, colour), name, score in zip(words(ax), names, scores):
        red, _, blue = to_rgb(colour or "white")
        assert word == name and (red > blue) == (score > 0) and (red < blue) == (score < 0), (word, colour, score)
    top = sorted(zip(names, scores), key=lambda pair: -abs(pair[1]))[:3]
    assert "most: " + ", ".join(f"{word}\xa0{score:+.2f}" for word, score in top) in headings(ax)
    assert "orange words support the answer, blue words oppose it" in headings(ax)


def test_words_of_tokens():
    """Tokens between spaces are one word, of any tokenizer; broken characters are shown as such."""
    own = SimpleNamespace(kind="bytes", mark=0, token=lambda i: "<s>", decode_bytes=lambda ids: bytes(ids))
    text = b"\0a bc\n d\xc3\xa9 \xff"
    assert list(zip(*explain.split_words(own, list(text)))) == [
        ("<s>", 1), ("a", 1), ("bc", 3), ("dé", 5), ("\ufffd", 2)]
    own = SimpleNamespace(kind="words", mark=None, decode_bytes=lambda ids: [b" so", b" good", b"."][ids[0]])
    assert list(zip(*explain.split_words(own, [0, 1, 2]))) == [("so", 1), ("good", 1), (".", 1)]


def test_wrap():
    assert heat.wrap([("aa", 1), ("bbb", 2), ("c", 3), ("ddddddd", 4)], 6) == [
        [(0, "aa", 1), (3, "bbb", 2)], [(0, "c", 3)], [(0, "dddddd", 4)], [(0, "d", 4)]]


def test_shades():
    """0 for what weighs the mean or less, 1 for the most; equal weights stay unshaded."""
    assert explain.shades("attention", [0.1, 0.2, 0.3, 0.6]) == pytest.approx([0, 0, 0, 1])
    assert explain.shades("attention", [0.1, 0.3, 0.5]) == pytest.approx([0, 0, 1])
    assert explain.shades("attention", [0.0, 0.5, 0.75, 0.0]) == pytest.approx([0, 3 / 7, 1, 0])
    assert not any(explain.shades("attention", [0.25] * 4)) and not any(explain.shades("attention", [0.1, 0.1 + 1e-9]))


def test_a_page_has_an_end(tmp_path, tiny, drawn):
    """Reviews that do not fit are counted; one alone always fits."""
    file = tmp_path / "many.jsonl"
    file.write_text('{"text": "a film"}\n' * 60)
    call(plot, tiny["gpt"], f"--reviews={file}", f"--out={tmp_path}")
    (ax,) = drawn["reviews.png"].axes
    assert "the first 36 of 60" in headings(ax) and len([w for w, _ in words(ax) if w == "film"]) == 36
    figures.write(heat.draw_page([("h", "black", [("w" * 98, 0.1)] * 120)], "long"), tmp_path / "long.png")
    assert len(words(drawn["long.png"].axes[0])) == 120


# ---- what is refused -----------------------------------------------------------------------------


def test_refused(tmp_path, tiny, refused):
    (tmp_path / "run").mkdir()
    assert "no checkpoint at" in refused(plot, tmp_path / "run", "--text=a")
    assert "layer must be from 0 to 1, or -1; got 2" in refused(plot, tiny["gpt"], "--text=a", "--layer=2")
    assert "head must be from 0 to 1, or -1; got 7" in refused(plot, tiny["gpt"], "--text=a", "--head=7")
    assert "head must be from 0 to 0, or -1; got 1" in refused(plot, tiny["additive"], "--text=a", "--head=1")
    line = refused(plot, tiny["gpt"], "--text=a", "--explain=occlusio")
    assert "unknown explain 'occlusio'; did you mean occlusion?" in line
    assert "is a language model, which does not classify reviews" in refused(plot, tiny["lm"], "--reviews=x")
    assert "cannot read the reviews" in refused(plot, tiny["gpt"], f"--reviews={tmp_path / 'none'}")
    file = tmp_path / "bad.jsonl"
    for line in ("text", "[1]", '{"label": 1}', '{"text": "a", "label": 2}', '{"text": "a", "label": "good"}',
                 '{"text": " "}',
                 '{"text": 3}', '{"text": "a", "label": [1]}'):
        file.write_text('{"text": "a", "label": 1}\n' + line)
        assert f'{file}, line 2: expected {{"text": "...", "label": 0, 1 or one of negative, positive' in refused(
            plot, tiny["gpt"], f"--reviews={file}")
    file.write_text("\n")
    assert "holds no reviews" in refused(plot, tiny["gpt"], f"--reviews={file}")
