"""A mechanism shows its own pattern, as text and as a picture, with or without matplotlib."""

import math
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_plot import drawn, panels, without_matplotlib  # noqa: F401  fixtures

from attention import Attention
from core import contract, figures, pattern
from core.config import UserError
from core.mechanisms import mechanisms
from helpers import ROOT, call
from model import GPTConfig


@pytest.fixture
def in_folder(monkeypatch, tmp_path):
    """The current folder is empty, and the terminal 80 columns wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def alone(name, *arguments, **defaults):
    """pattern.pattern called as a mechanism's file would be, with these arguments."""
    return call(SimpleNamespace(__name__=name, main=lambda: pattern.pattern(name, defaults)), *arguments)


HEAD = "a line a query, a column a key; # kept, :+* in part, . dropped"


def test_text(in_folder, capsys, drawn):
    assert alone("dense", "--T=4", n_head=2) is None
    out, _, agreement = capsys.readouterr().out.rpartition("as the formula says: ")
    assert re.fullmatch(r"engine \de-1\d, flex \de-1\d, decoding \de-1\d \(largest .*\n", agreement)
    assert out == f"""{HEAD}

layer 0, heads 0-1: dense, keeps 100.0 % of the pairs of dense attention
#
# #
# # #
# # # #

pattern-dense.png
"""
    (ax,) = drawn["pattern-dense.png"].axes
    assert ax.get_title() == "layer 0, heads 0-1\ndense, keeps 100.0 %"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query") and ax.yaxis_inverted()
    shown = ax.images[0].get_array()
    assert np.array_equal(shown.mask if np.ma.isMA(shown) else np.isnan(shown), np.triu(np.ones((4, 4)), 1))


def test_both_directions(in_folder, capsys, without_matplotlib):
    alone("dense", "--causal=False", T=2)
    said = capsys.readouterr().out
    assert "layer 0, heads 0-3: dense, keeps 100.0 % of the pairs of dense attention\n# #\n# #\n\n" in said


def test_pattern_of_a_file(in_folder, capsys, without_matplotlib):
    """Options come from the file, the call and the line, in this order; layers of one pattern share a panel."""
    alone("sparse", "--window=2", "--n_layer=3", sparse_pattern="local,dense", window=3, T=4)
    assert capsys.readouterr().out.startswith(f"""{HEAD}

layers 0, 2, heads 0-3: local, keeps 70.0 % of the pairs of dense attention
#
# #
. # #
. . # #

layer 1, heads 0-3: dense, keeps 100.0 % of the pairs of dense attention
#
""")


class Steps(Attention):
    """Soft masks: each head and layer has what `rows` says of the distances 0, 1, ..."""

    rows = {0: [[1, 0.5, 0, 0.01], [1, 1, 1, 1], [1, 0.5, 0, 0.01]], 1: [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0.9, 0.4, 0]]}

    def bias(self, h, i, j):
        return torch.tensor(self.rows[self.layer])[h, (i - j).clamp(min=0)].log()

    def stats(self):
        return {"kept_share": 0.5, "spans": [1.25, 300.0, 1.25], "names": ["a"]}


class Doubles(Attention):
    """The first key's weight counts double where a query sees more than two."""

    reweighs = True

    def reweigh(self, p, keys, variation=None):
        first = torch.zeros_like(p)
        first[..., 0] = 1
        return p * (1 + first * (keys > 2))


def stand_in(kind, layers=1, T=4, **config):
    """Layers of a mechanism that has no file."""
    config = GPTConfig(n_head=3, n_embd=24, block_size=T, **config)
    return [kind(config, n) for n in range(layers)]


def test_soft_masks_and_merging():
    masks, factors = pattern.patterns(stand_in(Steps, 2), "steps", 4)
    assert [title for title, _ in masks] == [
        "layer 0, heads 0, 2: steps, span 1.25, keeps 80.0 %",  # 4 + 3 + 1 of 10 pairs
        "layer 0, head 1; layer 1, heads 0-1: steps, span 300/1.25, keeps 100.0 %",
        "layer 1, head 2: steps, span 1.25, keeps 90.0 %"]
    assert factors == []
    nan = math.nan
    expected = [[1, nan, nan, nan], [0.5, 1, nan, nan], [0, 0.5, 1, nan], [0.01, 0, 0.5, 1]]
    np.testing.assert_allclose(masks[0][1], expected, rtol=1e-6)
    assert pattern.format_matrix(masks[0][1], 80) == "#\n+ #\n. + #\n: . + #"
    assert pattern.format_matrix(masks[2][1], 7) == "#\n*#\n+*#\n.+*#"


def test_a_key_after_its_query_is_shown():
    """A mechanism that looks ahead is seen doing it."""
    class Ahead(Attention):
        def total_bias(self, h, i, j):
            return torch.where(j - i <= 1, 0.0, -math.inf)

    ((_, mask),), _ = pattern.patterns(stand_in(Ahead), "ahead", 4)
    assert pattern.format_matrix(mask, 80) == "# #\n# # #\n# # # #\n# # # #"


def test_factor():
    masks, ((title, factor),) = pattern.patterns(stand_in(Doubles, 2), "doubles", 4)
    nan = math.nan
    assert len(masks) == 1 and title == "layers 0-1, heads 0-2: factor on the weights of random q and k"
    np.testing.assert_array_equal(factor, [[1, nan, nan, nan], [1, 1, nan, nan], [2, 1, 1, nan], [2, 1, 1, 1]])
    _, ((_, factor),) = pattern.patterns(stand_in(Doubles, T=2, n_class=2), "doubles", 3)
    np.testing.assert_array_equal(factor, [[2, 1, 1]] * 3)


def test_picture_of_factors(tmp_path, drawn):
    masks, factors = pattern.patterns(stand_in(Doubles), "doubles", 4)
    figures.write(pattern.draw_pattern(masks, factors), tmp_path / "a.png")
    mask, factor = panels(drawn["a.png"])
    assert mask.images[0].get_clim() == (0, 1) and factor.images[0].get_clim() == (0, 2)  # white is 1
    (bar,) = set(drawn["a.png"].axes) - {mask, factor}
    assert bar.get_ylabel() == "factor"  # and none for a mask of zeros and ones


def test_large_patterns_are_averaged():
    """5 positions on 3 columns: characters of 2 x 2 pairs, the last of what is left."""
    mask = np.where(np.tri(5), np.tri(5) - np.tri(5, k=-2), math.nan)  # the last two keys
    assert pattern.format_matrix(mask, 3) == "#\n:#\n.+#"


def test_without_matplotlib(in_folder, capsys, monkeypatch, without_matplotlib):
    """The text comes all the same, with a word on the picture, and that is no failure."""
    monkeypatch.setattr(sys, "argv", ["attention.py", "--T=3"])
    with pytest.raises(SystemExit) as left:
        pattern.show_pattern()
    out, err = capsys.readouterr()
    assert left.value.code in (None, 0) and err == "" and "\n#\n# #\n# # #\n" in out
    assert out.splitlines()[-2].startswith("no picture: pictures need matplotlib (") and "pip install matplotlib" in out
    assert list(in_folder.iterdir()) == []


@pytest.mark.parametrize("name", mechanisms())
def test_each_mechanism_is_shown(name, in_folder, capsys, monkeypatch, drawn):
    """attention.py NAME prints the mechanism's pattern, in ASCII, draws it, in both directions, and says that its
    kernels agree."""
    for more in ([], ["--causal=False", "--out=both.png"]):
        monkeypatch.setattr(sys, "argv", ["attention.py", *[name] * (name != "dense"), "--T=20", *more])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "attention.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert left.value.code in (None, 0) and err == "" and out.isascii()
        assert out.splitlines()[-1].startswith("as the formula says: engine ")
        assert "layer 0, head" in out and "% of the pairs of dense attention\n#" in out
        assert out.splitlines()[-2] in drawn and max(map(len, out.splitlines())) < 180
    assert "both.png" in drawn and len(drawn) == 2


@pytest.mark.parametrize("name, arguments, defaults, says", [
    ("dense", ["--T=0"], {}, "T must be from 1 to 2048"),
    ("dense", ["--T=long"], {}, "T expects int"),
    ("dense", ["--n_heads=3"], {}, "unknown key 'n_heads'; did you mean n_head?"),
    ("dense", ["--n_head=0"], {}, "n_head must be at least 1"),
    ("dense", ["--out=a.txt"], {}, "out expects the name of a PNG file, like a.png, got 'a.txt'"),
    ("dense", [], {"windw": 3}, "dense has no option windw"),
    ("spars", [], {}, "unknown attention 'spars'; did you mean sparse?"),
    ("sparse", ["--sparse_pattern=locl"], {}, "unknown sparse_pattern 'locl'; did you mean local?"),
])
def test_pattern_refused(in_folder, name, arguments, defaults, says):
    with pytest.raises(UserError) as error:
        alone(name, *arguments, **defaults)
    assert says in str(error.value) and list(in_folder.iterdir()) == []


def test_what_is_wrong_is_said(in_folder, monkeypatch):
    """A kernel that does not agree is named, with the difference."""
    monkeypatch.setattr(contract, "decoding_error", lambda *how: 0.25)
    said = r"not as the formula says: decoding \(differences in float64: engine .*, decoding 2e-01\)"
    with pytest.raises(UserError, match=said):
        alone("dense", "--T=3")


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        alone("sparse", "--help", window=5)
    out = capsys.readouterr().out
    assert left.value.code == 0 and "--T=48" in out and "n_layer = 1" in out and "window = 5" in out
