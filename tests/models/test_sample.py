"""Sampling as its user runs it: prompts, streams, labels, and checkpoints that are none."""

import codecs
import io
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings, strategies

import sample
from core import inference
from core.checkpoint import save
from core.tokenizer import UNKNOWN, Tokenizer
from helpers import ROOT, Trap, call
from model import GPT, GPTConfig, load

BYTES = {"tokenizer": "bytes", "vocab_size": 256, "mark": None}
MARKED = {**BYTES, "mark": 0}
REVIEWS = {**MARKED, "classes": ["negative", "positive"]}
CHARS = {"tokenizer": "chars", "vocab_size": 3, "mark": None, "vocab": ["a", "b", "c"]}
pytestmark = pytest.mark.usefixtures("quick")


def write_checkpoint(folder, meta, name="best.pt", **shape):
    """A checkpoint of a small random model, with weights large enough to have opinions."""
    torch.manual_seed(len(meta))
    config = GPTConfig(**{"block_size": 32, "vocab_size": meta["vocab_size"], "n_layer": 2, "n_head": 2, "n_embd": 16,
                          "n_class": len(meta.get("classes", [])), **shape})
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    folder.mkdir(exist_ok=True)
    save(folder / name, {"model": model.state_dict(), "model_config": asdict(config), "meta": meta, "settings": {}})
    return folder


@pytest.fixture
def out(tmp_path):
    return write_checkpoint(tmp_path / "out", MARKED)


@pytest.fixture
def shown(capsys):
    """A function of sample.py's arguments; gives what it printed."""

    def run(*arguments):
        capsys.readouterr()
        assert not call(sample, *arguments)
        return capsys.readouterr().out

    return run


def samples(text):
    """The samples of an output."""
    assert text.endswith("\n" + "-" * 40 + "\n")
    return text.split("\n" + "-" * 40 + "\n")[:-1]


# ---- text --------------------------------------------------------------------------------------


def test_the_prompt_from_everywhere(out, tmp_path, shown, monkeypatch):
    (tmp_path / "prompt").write_text("héllo\n")
    common = (f"--out_dir={out}", "--num_samples=1", "--max_new_tokens=9")
    given = shown(*common, "--start=héllo\n")
    assert given.startswith("héllo\n") and given == shown(*common, f"--start=FILE:{tmp_path / 'prompt'}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("héllo\n"))
    assert given == shown(*common, "--start=-")


def test_as_many_tokens_and_samples_as_asked(tmp_path, shown):
    out = write_checkpoint(tmp_path / "out", CHARS)  # a token is a character
    got = samples(shown(f"--out_dir={out}", "--start=ab", "--num_samples=4", "--max_new_tokens=40"))
    assert len(got) == 4 and all(re.fullmatch("ab[abc]{40}", text) for text in got) and len(set(got)) == 4


def test_the_seed_decides(out, shown):
    common = (f"--out_dir={out}", "--num_samples=2", "--max_new_tokens=30", "--start=x")
    first = shown(*common, "--seed=1")
    torch.manual_seed(5)
    assert shown(*common, "--seed=1") == first != shown(*common, "--seed=2")
    # sample n of seed s is sample 0 of seed s + n
    assert samples(shown(*common, "--seed=2"))[0] == samples(first)[1]


def test_greedy_is_the_models_likeliest(out, shown):
    model, saved = load(out / "best.pt")
    ids = torch.tensor([[0, *b"abc"]])
    for _ in range(8):
        ids = torch.cat([ids, model(ids)[0].argmax(-1)], 1)
    got = samples(shown(f"--out_dir={out}", "--start=abc", "--temperature=0", "--max_new_tokens=8"))
    assert got == ["abc" + Tokenizer(saved["meta"]).decode(ids[0, 4:].tolist())] * 3


@pytest.mark.parametrize("temperature", ["1e-300", "1e-45", "1e-40", "1e-37", "1e-30", "1e-9"])
@pytest.mark.parametrize("more", [(), ("--top_k=3",), ("--top_p=0.9",)])
def test_a_tiny_temperature_is_greedy(out, shown, temperature, more):
    common = (f"--out_dir={out}", "--start=abc", "--num_samples=1", "--max_new_tokens=8", *more)
    assert shown(*common, f"--temperature={temperature}") == shown(*common, "--temperature=0")


def test_logits_that_are_not_finite(out, judge, refused):
    """Weights that are finite but too large: a sentence, not an error of PyTorch's, and no text of token 0."""
    for folder, start in ((out, "abc"), (judge, "abc")):
        checkpoint = torch.load(folder / "best.pt")
        for name, weight in checkpoint["model"].items():
            if name.startswith("layers"):
                weight.uniform_(-1e38, 1e38)
        save(folder / "best.pt", checkpoint)
        for more in ((), ("--temperature=0",)):
            assert "scores are not finite" in refused(sample, f"--out_dir={folder}", f"--start={start}",
                                                      "--num_samples=1", *more)


@pytest.mark.parametrize("meta",
                         [MARKED, BYTES, CHARS,
                          {**BYTES, "tokenizer": "words", "vocab": [f"a{n}" for n in range(256)]}])
@pytest.mark.parametrize("start", ["", " "])
def test_an_empty_prompt(tmp_path, shown, refused, meta, start):
    out = write_checkpoint(tmp_path / "out", meta)
    common = (f"--out_dir={out}", "--num_samples=1", "--max_new_tokens=5", f"--start={start}")
    if meta is CHARS and start:
        assert "the character ' ' is not in the vocabulary" in refused(sample, *common)
    else:
        assert len(samples(shown(*common))) == 1


MECHANISMS = [(file.stem, {}) for file in ROOT.glob("*.py") if "\nclass Attention(" in file.read_text("utf-8")]
MECHANISMS += [("adaptive_attention_span", {"use_triangle_wave_masking": True}),
               ("adaptive_attention_span", {"use_triangle_wave_masking": True, "snap_periods": True}),
               ("sparse", {"sparse_pattern": "strided,log", "window": 4}), ("sparse", {"sparse_pattern": "fixed"})]


@pytest.mark.parametrize("attention, options", MECHANISMS)
def test_in_bfloat16_every_mechanism_keeps_its_mask(tmp_path, shown, attention, options):
    """Distances and learned spans are exact whatever the weights are in, and text comes out."""
    name = attention if attention != "attention" else "dense"
    out = write_checkpoint(tmp_path / "out", CHARS, attention=name, options=options, block_size=1024)
    model, _ = load(out / "best.pt")
    j = torch.arange(1024)
    before = [layer.attention.bias_at(j[-1:], j) for layer in model.layers]
    inference.convert_for_inference(model, torch.bfloat16)
    for layer, bias in zip(model.layers, before):
        torch.testing.assert_close(layer.attention.bias_at(j[-1:], j), bias, rtol=0, atol=0)
    common = (f"--out_dir={out}", "--start=" + "abc" * 340, "--num_samples=1", "--max_new_tokens=20",
              "--dtype=bfloat16")
    assert re.fullmatch("(abc){340}[abc]{20}", *samples(shown(*common)))


@pytest.mark.parametrize("pos", ["rope", "learned", "sinusoidal"])
def test_far_past_the_block(tmp_path, shown, pos):
    out = write_checkpoint(tmp_path / "out", CHARS, pos=pos, block_size=8)
    got = samples(shown(f"--out_dir={out}", "--start=" + "abc" * 9, "--num_samples=1", "--max_new_tokens=50"))
    assert len(got[0]) == 77


def test_the_last_checkpoint_where_there_is_no_best(tmp_path, shown):
    out = write_checkpoint(tmp_path / "out", MARKED, "ckpt.pt")
    common = (f"--out_dir={out}", "--max_new_tokens=5")
    last = shown(*common)
    write_checkpoint(tmp_path / "out", MARKED, "best.pt", n_embd=32)
    assert shown(*common) != last == shown(*common, "--checkpoint=ckpt.pt")


# ---- streaming ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Remembers what was on the screen after each write."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


class Fixed:
    """A model that says the same tokens whatever the prompt."""

    def __init__(self, ids):
        self.ids = ids

    def generate_stream(self, idx, max_new_tokens, *how):
        for token in self.ids:
            yield torch.tensor([token])


def streamed(meta, prompt, ids, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sample, "num_samples", 1)
    monkeypatch.setattr(sample, "device", "cpu")
    monkeypatch.setattr(sample, "dtype", "float32")
    sample.write_text(Fixed(ids), Tokenizer(meta), prompt)
    monkeypatch.undo()
    return samples(terminal.getvalue())[0], terminal.writes


def test_text_comes_as_it_is_made_and_no_character_half(monkeypatch):
    said = "aé€🙂b"
    text, writes = streamed(BYTES, "> ", said.encode(), monkeypatch)
    assert text == "> " + said and not any("\ufffd" in write for write in writes)
    assert [write for write in writes if write][: 1 + len(said)] == ["> ", *said]


@given(strategies.binary(max_size=12))
@settings(max_examples=100, deadline=None)
def test_broken_bytes_are_shown_as_one_decoding_shows_them(data):
    printer = inference.Printer(Tokenizer(BYTES))
    assert "".join(map(lambda b: printer([b]), data)) + printer([], final=True) == data.decode("utf-8", "replace")


WORDS = ["<s>", UNKNOWN, "deep", "is", ",", ".", "(", ")", "don't"]


@given(strategies.lists(strategies.integers(0, len(WORDS) - 1), max_size=9), 
       strategies.sampled_from(["", "deep", "is ("]))
@settings(max_examples=200, deadline=None)
def test_words_come_with_the_spaces_of_one_decoding(ids, prompt):
    tokenizer = Tokenizer({"tokenizer": "words", "vocab_size": len(WORDS), "mark": 0, "vocab": WORDS})
    printer = inference.Printer(tokenizer, prompt[-1:])
    got = prompt + "".join(printer([i]) for i in ids) + printer([], final=True)
    before, ids = tokenizer.encode(prompt), ids[: ids.index(0)] if 0 in ids else ids  # the mark ends the text
    assert got == prompt + tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


def test_words_after_a_space(monkeypatch):
    meta = {"tokenizer": "words", "vocab_size": len(WORDS), "mark": 0, "vocab": WORDS}
    assert streamed(meta, "deep ", [3, 4, 2], monkeypatch)[0] == "deep is, deep"


# ---- labels ------------------------------------------------------------------------------------


@pytest.fixture
def judge(tmp_path):
    return write_checkpoint(tmp_path / "judge", REVIEWS)


LINE = re.compile(r"(negative|positive) (0\.[5-9]\d\d|1\.000)  (.*)")


def test_a_label_for_a_text(judge, shown):
    got = LINE.fullmatch(shown(f"--out_dir={judge}", "--start=a fine\nfilm").rstrip("\n"))
    assert got[3] == "a fine film"
    model, saved = load(judge / "best.pt")
    p = model(torch.tensor([[0, *b"a fine\nfilm"]]))[0].softmax(-1)[0]
    assert saved["meta"]["classes"][int(p.argmax())] == got[1] and f"{p.max():.3f}" == got[2]


def cut(line):
    """A line as it is printed: of at most 80 characters, with an ellipsis where it is cut."""
    return line if len(line) <= 80 else line[:77] + "..."


def test_a_line_for_each_line(judge, tmp_path, shown, monkeypatch):
    lines = [f"review {n} " + "x" * (n * 13 % 50) for n in range(40)] + ["one\x85line\u2028still", "é" * 100]
    (tmp_path / "reviews").write_bytes("\r\n\n".join(lines).encode() + b"\n")
    got = shown(f"--out_dir={judge}", f"--start=FILE:{tmp_path / 'reviews'}").splitlines()
    assert [LINE.fullmatch(line)[3] for line in got] == [cut(" ".join(line.split())) for line in lines]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert shown(f"--out_dir={judge}", "--start=-").splitlines() == got
    # a text's label does not depend on the texts beside it
    alone = [shown(f"--out_dir={judge}", f"--start={line}").rstrip("\n") for line in lines[:3] + lines[-2:]]
    assert alone == got[:3] + got[-2:]


def test_line_ends_written_as_html(judge, shown):
    plain, html = shown(f"--out_dir={judge}", "--start=a\nb"), shown(f"--out_dir={judge}", "--start=a<BR />b")
    assert plain.split()[:2] == html.split()[:2]


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_checkpoints_that_are_none(tmp_path, out, refused):
    whole, file = (out / "best.pt").read_bytes(), out / "best.pt"
    other, trap = io.BytesIO(), tmp_path / "sprung"
    torch.save({"model": {}, "settings": {}}, other)
    zipped = io.BytesIO()
    torch.save({"model": Trap(trap), "model_config": {}}, zipped)
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"just text\n", b"PK\3\4" + b"x" * 200,
                    other.getvalue(),
                    pickle.dumps(Trap(trap)), pickle.dumps({"model": Trap(trap)}), zipped.getvalue(),
                    codecs.encode(whole[:99], "hex")):
        file.write_bytes(content)
        line = refused(sample, f"--out_dir={out}")
        assert "best.pt is damaged or not a checkpoint of train.py" in line and len(line) < 400
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap))).close()
    assert trap.exists()  # so it was a trap
    file.unlink()
    assert re.search("sample.py: no checkpoint at .*ckpt.pt; train one first", refused(sample, f"--out_dir={out}"))
    file.mkdir()
    assert "best.pt" in refused(sample, f"--out_dir={out}")


def test_weights_of_another_shape(out, refused):
    checkpoint = torch.load(out / "best.pt")
    for change in ({"n_embd": 32}, {"n_layer": 3}, {"no_such": 1}, {"n_head": "two"}, {"attention": "no_such_file"}):
        save(out / "best.pt", {**checkpoint, "model_config": {**checkpoint["model_config"], **change}})
        refused(sample, f"--out_dir={out}")
    save(out / "best.pt", {**checkpoint, "meta": {"tokenizer": "runes"}})
    assert "has no tokenizer that is known here" in refused(sample, f"--out_dir={out}")


@pytest.mark.parametrize("argument, said", [
    ("--num_samples=0", "num_samples must be at least 1, got 0"),
    ("--max_new_tokens=-5", "max_new_tokens must be at least 1, got -5"),
    ("--temperature=-1", "temperature must be at least 0, got -1.0"),
    ("--top_k=-1", "top_k must be at least 0, got -1"),
    ("--top_p=0", "top_p must be above 0 and at most 1, got 0.0"),
    ("--top_p=1.5", "top_p must be above 0 and at most 1"),
    ("--temperature=1e999", "temperature expects float (like 0.8), finite, got float inf"),
    ("--temperature=nan", "temperature expects float"),
    ("--seed=-1", "seed must be at least 0, got -1"), (f"--seed={2**64}", f"below 2**63 in size, got int {2**64}"),
    (f"--seed={2**63}", f"below 2**63 in size, got int {2**63}"), (f"--seed={10**30}", "below 2**63 in size"),
    ("--device=gpu", "unknown device 'gpu'; did you mean cpu?"), ("--dtype=int8", "unknown dtype 'int8'"),
    ("--strat=x", "--strat: unknown key 'strat'; did you mean start?"),
    ("--start=FILE:/no/such/file", "cannot read the prompt FILE:/no/such/file: [Errno 2] No such file"),
    ("--start=FILE:", "cannot read the prompt FILE:"), ("--start=FILE:\0", "without NUL characters"),
    ("--checkpoint=other.pt", "no checkpoint at"),
])
def test_refused(out, refused, argument, said):
    assert said in refused(sample, f"--out_dir={out}", argument)


def test_without_a_folder_the_newest_run_is_read(tmp_path, monkeypatch, capsys, refused):
    """`out` if it exists; else the newest run, which stderr names; a folder that is given is not replaced."""
    monkeypatch.chdir(tmp_path)
    more = ("--num_samples=1", "--max_new_tokens=2")
    assert "no checkpoint at out/ckpt.pt; train one first: python train.py --out_dir=out" in refused(sample, *more)
    for age, name in enumerate(("out-newest", "out-older", "out-oldest")):
        path = write_checkpoint(tmp_path / name, MARKED,
                                name="ckpt.pt" if age else "best.pt") / ("ckpt.pt" if age else "best.pt")
        os.utime(path, (10**9 - age, 10**9 - age))
    capsys.readouterr()
    assert not call(sample, *more)
    said = capsys.readouterr().err
    assert said.startswith("out does not exist: using the newest run, out-newest; choose another with --out_dir "
                           "(out-older, out-oldest)\n")
    assert "no checkpoint at out/ckpt.pt" in refused(sample, *more, "--out_dir=out")
    write_checkpoint(tmp_path / "out", MARKED)
    assert not call(sample, *more) and "does not exist" not in capsys.readouterr().err


def test_an_unknown_character(tmp_path, refused):
    out = write_checkpoint(tmp_path / "out", CHARS)
    assert "sample.py: the prompt: the character 'x' is not in the vocabulary of 3 chars" in \
        refused(sample, f"--out_dir={out}", "--start=abx")


def test_no_text_to_classify(judge, tmp_path, refused, monkeypatch):
    (tmp_path / "empty").write_text("\n \n")
    for start in ("", " ", f"FILE:{tmp_path / 'empty'}"):
        assert "expected a text to classify, got none" in refused(sample, f"--out_dir={judge}", f"--start={start}")


def test_a_prompt_that_is_not_utf8(out, tmp_path, refused):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "cannot read the prompt" in refused(sample, f"--out_dir={out}", f"--start=FILE:{tmp_path / 'latin'}")


def test_as_a_program(tmp_path):
    """From another folder, into a pipe that knows only ASCII; and what is wrong as one line, exit code 2."""
    out = write_checkpoint(tmp_path / "out", json.loads(json.dumps(MARKED)))
    command = [sys.executable, ROOT / "sample.py", f"--out_dir={out}", "--device=cpu", "--dtype=float32"]
    done = subprocess.run([*command, "--start=é", "--num_samples=1", "--max_new_tokens=5"], cwd=tmp_path,
                          capture_output=True, env={"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "PATH": ""})
    assert done.returncode == 0 and done.stdout.startswith(b"?") and b"5 tokens, " in done.stderr, done.stderr


def test_threads(tmp_path, shown, refused, monkeypatch):
    """Each token is drawn with one thread or with all, or with as many as are asked for; the text is the same."""
    out, seen, forward = write_checkpoint(tmp_path / "out", CHARS), [], sample.hardware.adapt_threads
    monkeypatch.setattr(sample.hardware, "THREADS", 2)
    monkeypatch.setattr(sample.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(sample.hardware, "adapt_threads", lambda *how: seen.append(how[1]) or forward(*how))
    before, common = torch.get_num_threads(), (f"--out_dir={out}", "--start=abc", "--max_new_tokens=30",
                                               "--dtype=float32")
    try:
        texts = [samples(shown(*common, *more)) for more in ((), ("--threads=1",), ("--threads=2",))]
    finally:
        torch.set_num_threads(before)
    assert texts[0] == texts[1] == texts[2] and seen == ["cpu"] * 3
    assert "threads must be at most" in refused(sample, *common, "--threads=100000")
    assert "threads must be at least 0, got -1" in refused(sample, *common, "--threads=-1")
