"""Where generated text ends: at the mark between documents, and before a stop text, whatever the tokens are."""

import pytest
import torch
from hypothesis import given, settings, strategies
from test_sample import BYTES, CHARS, MARKED, REVIEWS, Fixed, Terminal, samples, write_checkpoint

import sample
from core import demo, inference
from core.checkpoint import save
from core.dataset import Dataset
from core.tokenizer import Tokenizer
from helpers import call

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def written(monkeypatch):
    """A function: what sample.py prints of a model that draws the given ids, and each piece that it wrote."""

    def run(ids, stops=(), meta=BYTES, prompt="> "):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", terminal)
            for name, value in {"num_samples": 1, "device": "cpu", "stop": list(stops)}.items():
                patch.setattr(sample, name, value)
            sample.write_text(Fixed(ids), Tokenizer(meta), prompt)
        return samples(terminal.getvalue())[0].removeprefix(prompt), terminal.writes

    return run


def cut(text, stops):
    """The text before the stop text that is complete first, of several the longest; slowly, character by character."""
    for end in range(len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ended))]
    return text


@pytest.mark.parametrize("text, stops, expected", [
    ("one END two", ["END"], "one "), ("one EN two", ["END"], "one EN two"), ("one EN", ["END"], "one EN"),
    ("aab", ["ab"], "a"), ("ababc", ["abc"], "ab"), ("x\n\ny", ["\n\n"], "x"), ("END", ["END"], ""),
    ("abcd", ["abcd", "bc"], "a"), ("abc", ["bc", "abc"], ""), ("a b c", ["c", "b"], "a "), ("é🙂ü", ["🙂ü"], "é"),
    ("héllo", ["\ufffd"], "héllo"), ("no stop", [], "no stop")])
def test_text_ends_before_a_stop_text(written, text, stops, expected):
    """Nothing that is written belongs to the stop text, even when only a later character completes it."""
    shown, writes = written(text.encode(), stops)
    assert shown == expected == cut(text, stops)
    assert "".join(writes) == "> " + expected + "\n" + "-" * 40 + "\n"  # a terminal takes nothing back


def test_only_what_may_begin_a_stop_text_is_held_back():
    printer = inference.Printer(Tokenizer(BYTES), stops=["--END", "\n\n"])
    assert [printer([b]) for b in b"a-b--E--EN\n-"] == ["a", "", "-b", "", "", "", "--E", "", "", "", "--EN", "\n"]
    assert printer([], final=True) == "-" and not printer.ended


STOPS = strategies.lists(strategies.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(strategies.text("ab\n", max_size=14), STOPS, strategies.lists(strategies.integers(0, 14), max_size=6))
@settings(max_examples=300, deadline=None)
def test_the_text_does_not_depend_on_its_tokens(text, stops, borders):
    """Tokens of one character or of many: the same text; what is written never runs ahead of it."""
    printer, shown = inference.Printer(Tokenizer(BYTES), stops=stops), ""
    borders = [0, *sorted(borders), 14]
    for first, last in zip(borders, borders[1:]):
        shown += printer(list(text[first:last].encode()))
        assert cut(text, stops).startswith(shown)
    assert shown + printer([], final=True) == cut(text, stops)
    assert printer.ended == any(stop in text for stop in stops)


def test_the_document_mark_ends_the_text(written):
    """It is not shown; what was held back for a stop text is."""
    assert written([*b"ab", 0, *b"cd"], meta=MARKED)[0] == "ab"
    assert written([*b"abE", 0, *b"ND"], ["END"], MARKED)[0] == "abE"
    assert written([0], meta=MARKED)[0] == ""
    assert written([*b"a\xc3", 0], meta=MARKED)[0] == "a\ufffd"  # half of an é
    printer = inference.Printer(Tokenizer(MARKED))
    assert printer([*b"ab", 0, *b"cd"]) == "ab" and printer.ended and printer(list(b"e")) == ""


def test_words_have_their_spaces_before_a_stop_text(written):
    words = {"tokenizer": "words", "vocab_size": 4, "mark": 0, "vocab": ["<s>", "deep", "is", "."]}
    assert written([1, 2, 1, 3, 1], ["."], words, "is")[0] == " deep is deep"
    assert written([1, 2, 0, 1], [" is"], words, "is ")[0] == "deep"
    assert written([1, 2, 0, 1], [], words, "is ")[0] == "deep is"


@pytest.fixture
def shown(capsys):
    """A function of sample.py's arguments: (its samples, the numbers of tokens that it counts)."""

    def run(*arguments):
        capsys.readouterr()
        assert not call(sample, *arguments)
        printed = capsys.readouterr()
        return samples(printed.out), [int(line.split()[0]) for line in printed.err.splitlines()]

    return run


def test_each_sample_ends_by_itself(tmp_path, shown):
    """Samples with a stop text are the samples without it, cut; no token is drawn beyond."""
    common = (f"--out_dir={write_checkpoint(tmp_path / 'out', CHARS)}", "--start=ab", "--num_samples=6",
              "--max_new_tokens=40")
    whole, counts = shown(*common)
    assert counts == [40] * 6
    for argument, stops in (("cc", ["cc"]), ("['abc', 'cb']", ["abc", "cb"]), ("", []), ("zz", ["zz"])):
        got, counts = shown(*common, f"--stop={argument}")
        assert got == ["ab" + cut(text[2:], stops) for text in whole]
        ends = [next((n for n in range(41) if any(text[2 : 2 + n].endswith(s) for s in stops)), 40) for text in whole]
        assert counts == ends and (len(set(ends)) > 2) == (argument[:1] in ("c", "["))


def test_each_sample_ends_at_its_document(tmp_path, shown):
    """The checkpoint knows the mark: it holds the description of its data's tokens."""
    common = ("--num_samples=6", "--max_new_tokens=40")
    whole, _ = shown(f"--out_dir={write_checkpoint(tmp_path / 'out', CHARS)}", "--start=cab",
                     *common)  # the mark, then ab
    whole = [text[1:] for text in whole]
    file = tmp_path / "out" / "best.pt"
    save(file, {**torch.load(file), "meta": {**CHARS, "mark": 2}})  # the character c
    got, counts = shown(f"--out_dir={tmp_path / 'out'}", "--start=ab", *common)
    assert got == [text.partition("c")[0] for text in whole] and len(set(got)) > 2
    assert counts == [len(text[2:].partition("c")[0]) + ("c" in text) for text in whole]


def test_prepared_data_name_their_mark(toy, reviews, text):
    """Those without a mark between documents have none."""
    assert [Dataset(folder).tokenizer.mark for folder in (toy, reviews, text)] == [0, 0, None]


def test_the_page_ends_likewise():
    """`demo.stream`, which the page shows: the same text, and a note."""
    for ids, stops, expected in ((b"one END", ["END"], "one "), (b"one EN", ["END"], "one EN"),
                                 (b"one\0END", [], "one")):
        model, tokenizer = Fixed(ids), Tokenizer(MARKED)
        model.config = type("Config", (), {"block_size": 8})
        state, tokens = demo.stream(model, tokenizer, "cpu", "> ", stops, 1, len(ids), 1.0, 0, 1.0)
        for _ in tokens:
            assert ("> " + expected).startswith(state["text"])
        assert state["text"] == "> " + expected and ("ended" in state["note"]) == (ids != b"one EN")


def test_refused(tmp_path, refused):
    out = write_checkpoint(tmp_path / "out", MARKED)
    for argument, said in (("[3]", "stop expects a text, or a list of texts like ['END', '###'], got [3]"),
                           ("['']", "stop expects a text"), ("['a', None]", "stop expects a text")):
        assert said in refused(sample, f"--out_dir={out}", f"--stop={argument}")
    judge = write_checkpoint(tmp_path / "judge", REVIEWS)
    assert "judge holds a classifier, which draws no tokens: leave stop out" in refused(
        sample, f"--out_dir={judge}", "--stop=a", "--start=a film")
