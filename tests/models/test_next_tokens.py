"""The next tokens that a model expects after a prompt, as sample.py --next prints them."""

import io
import re
import sys

import pytest
import torch
from test_sample import BYTES, CHARS, MARKED, REVIEWS, write_checkpoint

import sample
from core import inference
from core.checkpoint import save
from core.tokenizer import Tokenizer
from helpers import call
from model import load

LINE = re.compile(r"  ([01]\.\d{4})  (.+)")
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def expected_after(capsys):
    """A function of sample.py's arguments: {prompt: [(token, probability)]}, in the order printed."""

    def run(out, *arguments):
        capsys.readouterr()
        assert not call(sample, f"--out_dir={out}", "--dtype=float32", *arguments)
        printed, found = capsys.readouterr(), {}
        assert printed.err == "probabilities before temperature, top_k and top_p\n"
        for line in printed.out.splitlines():
            if line.startswith("after "):
                found[line.removeprefix("after ")] = rows = []
            else:
                p, token = LINE.fullmatch(line).groups()
                rows.append((token, float(p)))
        return found

    return run


def probabilities(out, ids):
    """The model's own probabilities (V,) after ids."""
    with torch.no_grad():
        return load(out / "best.pt")[0](torch.tensor([ids]))[0][0, -1].softmax(-1).tolist()


@pytest.mark.parametrize("how", [(), ("--temperature=0",), ("--temperature=3", "--top_k=1", "--top_p=0.1")])
def test_the_likeliest_come_first_whatever_the_temperature(tmp_path, expected_after, how):
    out = write_checkpoint(tmp_path / "out", MARKED)
    ((prompt, rows),) = expected_after(out, "--next=5", "--start=a b", *how).items()
    p = probabilities(out, [0, *b"a b"])
    order = sorted(range(256), key=lambda n: (-p[n], n))[:5]
    assert prompt == "a␣b" and len({p[n] for n in order}) == 5
    assert rows == [(Tokenizer(MARKED).token(n), float(f"{p[n]:.4f}")) for n in order]


def test_blanks_and_line_ends_are_visible():
    """Each token is on one line, and no two look alike; the mark has a name."""
    tokenizer = Tokenizer(MARKED)

    def model(idx):
        return torch.zeros(1, 1, 256).index_fill(2, torch.tensor([0, 10, 32, 9, 200]), 1.0), None

    rows = inference.next_tokens(model, tokenizer, torch.tensor([[97]]), 5)
    assert [token for token, _ in rows] == ["<s>", "\\t", "\\n", "␣", "\\xc8"]  # equal ones in the order of their ids
    names = [token for token, _ in inference.next_tokens(model, tokenizer, torch.tensor([[97]]), 999)]
    assert len(set(names)) == 256 and all(name.strip() and len(name.splitlines()) == 1 for name in names)
    assert sum(p for _, p in inference.next_tokens(model, tokenizer, torch.tensor([[97]]), 999)) == pytest.approx(1)


def test_every_line_is_a_prompt(tmp_path, expected_after, monkeypatch):
    """Of a file and of standard input; empty lines are none, those of blanks are; a long one is shown by its end."""
    out = write_checkpoint(tmp_path / "out", MARKED, block_size=128)
    lines = ["héllo", "  ", "", "x" * 90 + "y", "tab\there"]
    (tmp_path / "prompts").write_text("\n".join(lines) + "\n")
    found = expected_after(out, "--next=3", f"--start=FILE:{tmp_path / 'prompts'}")
    assert list(found) == ["héllo", "␣␣", "..." + "x" * 76 + "y", "tab\\there"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert expected_after(out, "--next=3", "--start=-") == found
    for line, rows in zip(filter(None, lines), found.values()):
        assert list(expected_after(out, "--next=3", f"--start={line}").values()) == [rows]


@pytest.mark.parametrize("pos", ["rope", "learned", "sinusoidal"])
def test_a_long_prompt_is_read_from_its_end(tmp_path, expected_after, pos):
    out = write_checkpoint(tmp_path / "out", BYTES, block_size=8, pos=pos)
    (rows,) = expected_after(out, "--next=4", "--start=" + "abc" * 9).values()
    (end,) = expected_after(out, "--next=4", "--start=bcabcabc").values()
    assert rows == end


def test_the_first_is_what_greedy_sampling_draws(tmp_path, expected_after):
    """Also after an empty prompt, with a mark or without, and from a vocabulary that is smaller than `next`."""
    for meta, start in ((MARKED, "ab"), (MARKED, ""), (BYTES, ""), (CHARS, "ab"), (CHARS, "")):
        out = write_checkpoint(tmp_path / "out", meta)
        ((prompt, rows),) = expected_after(out, "--next=7", f"--start={start}").items()
        assert len(rows) == min(7, meta["vocab_size"]) and prompt == (start or "(no prompt)")
        model, tokenizer = sample.read_run(out / "best.pt")[:2]
        ids = {"ab": [97, 98], "": []}[start] if meta["tokenizer"] == "bytes" else [0, 1][: len(start)]
        ids = [0] * (meta is MARKED) + ids or [10 if meta is BYTES else 0]  # a line end, or any token
        assert rows[0][0] == tokenizer.token(model.generate(torch.tensor([ids]), 1, temperature=0)[0, -1])


def test_refused(tmp_path, refused):
    out, judge = write_checkpoint(tmp_path / "out", CHARS), write_checkpoint(tmp_path / "judge", REVIEWS)
    (tmp_path / "empty").write_text("\n\n")
    assert "next must be at least 0, got -1" in refused(sample, f"--out_dir={out}", "--next=-1")
    assert "judge holds a classifier, which draws no tokens: leave next out" in refused(
        sample, f"--out_dir={judge}", "--next=5", "--start=a film")
    assert "expected a prompt on each line, got none" in refused(
        sample, f"--out_dir={out}", "--next=5", f"--start=FILE:{tmp_path / 'empty'}")
    assert "the prompt: the character 'x' is not in the vocabulary" in refused(
        sample, f"--out_dir={out}", "--next=5", "--start=abx")
    checkpoint = torch.load(out / "best.pt")
    for name, weight in checkpoint["model"].items():
        if name.startswith("layers"):
            weight.uniform_(-1e38, 1e38)
    save(out / "best.pt", checkpoint)
    assert "scores are not finite" in refused(sample, f"--out_dir={out}", "--next=5", "--start=ab")
