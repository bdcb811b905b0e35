"""data/text: a folder, a file, an archive, JSONL; splits without common texts; every tokenizer; what is refused."""

import importlib
import json
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tiktoken
from edited import edited_copy, execute
from sources import load, pack, prepare, wrap
from training_runs import fit

from core.config import UserError
from core.dataset import Dataset, batches
from core.tokenizer import Tokenizer
from core.vocabulary import PATTERN
from helpers import ROOT, in_order

text = importlib.import_module("data.text.prepare")

# 40 documents of different sizes, with characters of 1 to 4 bytes.
NOTES = {f"{'deep/er/' * (n % 2)}note {n}.md": f"Note {n}. Café, “{'word ' * (n % 9)}” 𝄞\nend of {n}\n"
         for n in range(40)}


def encoded(texts):
    return {name: text.encode() for name, text in texts.items()}


def rows(count=40):
    """Rows of JSONL with labels: a third of them ham."""
    return [{"text": f"Message {n}: {'win ' * (n % 5)}", "label": "ham" if n % 3 == 1 else "spam"}
            for n in range(count)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(source, out, *options, code=0):
    """Prepare `source` into `out`; gives the finished process."""
    options = [f"--source={source}", "--name=mine", f"--out_dir={out}", *options]
    return prepare("text", *options, cwd=source.parent, code=code)


def documents(folder):
    """({split: [text of each document]}, meta) of a finished folder with marks."""
    meta, arrays = load(folder)
    splits = {}
    for name in meta["splits"]:
        tokens = arrays[name]
        starts = np.flatnonzero(tokens == meta["mark"])
        assert starts[0] == 0 and len(starts) == meta["splits"][name]["documents"]
        if meta["kind"] == "classify":
            assert starts.tolist() == arrays[f"{name}.offsets"][:-1].tolist()
        splits[name] = [Tokenizer(meta).decode(part[1:]) for part in np.split(tokens, starts[1:])]
        size = sum(len(part.encode()) + 1 for part in splits[name])
        assert not meta["lossless"] or meta["splits"][name]["bytes"] == size
    return splits, meta


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """The folder of NOTES."""
    return pack(encoded(NOTES), tmp_path_factory.mktemp("source") / "notes")


# ---- folders, files, archives ------------------------------------------------------------------


def test_folder(notes, tmp_path):
    done = make(notes, tmp_path / "out")
    splits, meta = documents(tmp_path / "out")
    assert sorted(sum(splits.values(), [])) == sorted(NOTES.values())  # whole documents, each once
    sizes = {name: sum(len(part.encode()) for part in parts) for name, parts in splits.items()}
    total = sum(sizes.values())
    assert 0.05 < sizes["val"] / total <= 0.1 and 0.05 < sizes["test"] / total <= 0.1
    assert (meta["name"], meta["kind"], meta["tokenizer"], meta["partial"]) == ("mine", "lm", "bytes", False)
    assert meta["mark"] == 0 and meta["lossless"] and meta["source"]["documents"] == 40
    assert meta["options"] == {"tokenizer": "bytes", "seed": 1, "shares": {"val": 0.1, "test": 0.1}}
    assert "skipped" not in done.stderr and "val" in done.stdout
    assert "nothing to do" in make(notes, tmp_path / "out").stdout
    for changed in ("--seed=2", "--tokenizer=chars", "--val_share=0.2"):
        assert "nothing to do" not in make(notes, tmp_path / "out", changed).stdout


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tar.xz", "other"])
def test_the_same_texts_give_the_same_bytes(notes, tmp_path, name):
    """Whatever holds them, in whatever order."""
    make(notes, tmp_path / "want")
    backwards = {f"top/{key}": NOTES[key].encode() for key in reversed(NOTES)}
    make(pack(backwards, tmp_path / name), tmp_path / "out")
    for split in ("train", "val", "test"):
        assert (tmp_path / "out" / f"{split}.bin").read_bytes() == (tmp_path / "want" / f"{split}.bin").read_bytes()


def test_seeds_and_shares(notes, tmp_path):
    def val(*options):
        make(notes, tmp_path / "out", *options)
        return set(documents(tmp_path / "out")[0]["val"])

    assert val("--seed=1") == val() != val("--seed=2")
    assert len(val("--val_share=0.5", "--test_share=0.3")) > 15 and len(documents(tmp_path / "out")[0]["test"]) > 8
    val("--test_share=0")
    assert set(documents(tmp_path / "out")[0]) == {"train", "val"}


def test_val_keeps_its_documents_when_others_are_added(notes, tmp_path):
    make(notes, tmp_path / "out")
    before = set(documents(tmp_path / "out")[0]["val"])
    make(pack(encoded(NOTES | {f"new {n}": f"new {n}\n" for n in range(4)}), tmp_path / "more"), tmp_path / "out")
    after = set(documents(tmp_path / "out")[0]["val"])
    assert len(before & after) >= len(before) - 1


@pytest.mark.parametrize("name", ["folder", "a.zip", "a.tar.gz"])
def test_files_that_are_no_text(tmp_path, name):
    files = encoded(NOTES) | {"photo.png": b"\x89PNG\r\n\x1a\n\0\0", "old.txt": b"caf\xe9", "utf16.txt": b"h\0e\0y\0",
                              "late.txt": b"a" * 3_000_000 + b"\xff", ".hidden/config": b"secret",
                              "a/.DS_Store": b"store",
                              "empty.txt": b"", "blank.txt": b" \n\t\n", "bom.txt": b"\xef\xbb\xbfbom\r\nnext\rlast"}
    done = make(pack(files, tmp_path / name), tmp_path / "out")
    splits, meta = documents(tmp_path / "out")
    assert sorted(sum(splits.values(), [])) == sorted([*NOTES.values(), "bom\nnext\nlast"])
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped, not UTF-8 text: ")]
    assert sorted(line.split(": ")[1] for line in skipped) == ["'late.txt'", "'old.txt'", "'photo.png'", "'utf16.txt'"]
    assert (meta["source"]["skipped_files"], meta["source"]["blank_documents"]) == (4, 2)


def test_many_skipped_files_are_counted(tmp_path):
    files = encoded(NOTES) | {f"{n:02}.jpg": b"\xff" for n in range(25)}
    done = make(pack(files, tmp_path / "folder"), tmp_path / "out")
    assert done.stderr.count("skipped") == 10 and "... and 15 other files" in done.stderr


def test_duplicates(tmp_path):
    """A text of val or test is there once and in no other split; train keeps its copies."""
    files = {f"{n}": f"text {n % 30}\n" for n in range(120)}  # four copies of each
    done = make(pack(encoded(files), tmp_path / "folder"), tmp_path / "out")
    splits, meta = documents(tmp_path / "out")
    train, val, test = (set(splits[name]) for name in ("train", "val", "test"))
    assert not train & val and not train & test and not val & test and len(train | val | test) == 30
    assert len(val) == len(splits["val"]) > 0 and len(test) == len(splits["test"]) > 0
    assert len(splits["train"]) == 4 * len(train) and splits["train"] != sorted(splits["train"])
    dropped = meta["source"]["dropped_duplicates"]
    assert dropped == 3 * len(val | test) and f"dropped {dropped} duplicates" in done.stderr


def test_duplicates_of_few_documents(tmp_path):
    make(pack({"a": b"text " * 20, "b": b"text " * 20, "c": b"text " * 20}, tmp_path / "folder"), tmp_path / "out")
    meta, arrays = load(tmp_path / "out")
    assert [len(arrays[name]) for name in ("train", "val", "test")] == [80, 10, 10] and meta["mark"] is None
    assert meta["source"]["dropped_duplicates"] == 2


# ---- one document, and few ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz", "book.xz", "book.zip", "book"])
@pytest.mark.parametrize("kind", ["bytes", "chars"])
def test_a_single_file_is_cut_by_its_place(tmp_path, name, kind):
    book = "".join(NOTES.values())
    make(wrap(book.encode(), tmp_path / name), tmp_path / "out", f"--tokenizer={kind}")
    meta, arrays = load(tmp_path / "out")
    assert meta["mark"] is None and meta["split_rule"].startswith("each document is cut")
    parts = [Tokenizer(meta).decode(arrays[split]) for split in ("train", "val", "test")]
    assert "".join(parts) == book or kind == "chars" and not meta["lossless"]
    sizes = [meta["splits"][split]["bytes"] for split in ("train", "val", "test")]
    assert sum(sizes) == len(book.encode()) and all(abs(size / sum(sizes) - share) < 0.01
                                                    for size, share in zip(sizes, (0.8, 0.1, 0.1)))


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_a_single_file_of_a_tokenizer_with_a_mark(tmp_path, kind):
    make(wrap("".join(NOTES.values()).encode(), tmp_path / "book.txt"), tmp_path / "out", f"--tokenizer={kind}")
    splits, meta = documents(tmp_path / "out")
    assert [len(parts) for parts in splits.values()] == [1, 1, 1] and meta["mark"] is not None


def test_two_files_are_both_cut(tmp_path):
    files = {"a": "a" * 100, "b": "b" * 50}
    make(pack(encoded(files), tmp_path / "folder"), tmp_path / "out")
    splits, meta = documents(tmp_path / "out")
    assert {name: sorted(parts) for name, parts in splits.items()} == {
        "train": ["a" * 80, "b" * 40], "val": ["a" * 10, "b" * 5], "test": ["a" * 10, "b" * 5]}
    assert meta["mark"] == 0


def test_three_files_are_not_cut(tmp_path):
    files = {"a": "a" * 1000, "b": "b" * 100, "c": "c" * 20}
    make(pack(encoded(files), tmp_path / "folder"), tmp_path / "out")
    splits, _ = documents(tmp_path / "out")
    assert splits["train"] == ["a" * 1000] and sorted(splits["val"] + splits["test"]) == ["b" * 100, "c" * 20]


# ---- JSONL -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "chars"])
def test_jsonl_without_labels(tmp_path, kind):
    texts = [f"line {n} of 0123456789\r\nof é\u2028text\0 \ud800<br />" for n in range(30)]
    source = jsonl(tmp_path / "a.jsonl", [{"text": text, "other": 1, "label": None} for text in texts])
    source.write_text("\n  \n" + source.read_text().rstrip("\n"))
    make(source, tmp_path / "out", f"--tokenizer={kind}")
    splits, meta = documents(tmp_path / "out")
    assert meta["lossless"]
    want = [text.replace("\r\n", "\n").replace("\0", " ").replace("\ud800", "?") for text in texts]
    assert sorted(sum(splits.values(), [])) == sorted(want) and meta["kind"] == "lm" and "classes" not in meta


def test_jsonl_and_files_in_one_folder(tmp_path):
    pack(encoded(NOTES), tmp_path / "folder")
    jsonl(tmp_path / "folder" / "more.NDJSON", [{"text": f"line {n}"} for n in range(9)])
    make(tmp_path / "folder", tmp_path / "out")
    splits, _ = documents(tmp_path / "out")
    assert sorted(sum(splits.values(), [])) == sorted([*NOTES.values(), *(f"line {n}" for n in range(9))])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.zip"])
def test_jsonl_with_labels(tmp_path, name):
    content = jsonl(tmp_path / "plain", rows()).read_bytes()
    make(wrap(content, tmp_path / name, "a.jsonl"), tmp_path / "out")
    splits, meta = documents(tmp_path / "out")
    assert meta["kind"] == "classify" and meta["classes"] == ["ham", "spam"] and "sorted" in meta["class_order"]
    arrays, truth = load(tmp_path / "out")[1], {row["text"]: row["label"] for row in rows()}
    assert sorted(sum(splits.values(), [])) == sorted(truth)
    for split, count in (("train", 32), ("val", 4), ("test", 4)):
        names = [meta["classes"][label] for label in arrays[f"{split}.labels"]]
        assert names == [truth[text] for text in splits[split]] and len(names) >= count - 2
        assert set(names) == {"ham", "spam"} and meta["splits"][split]["positive"] == names.count("spam")
    labels = arrays["train.labels"].tolist()
    assert labels != sorted(labels) and labels != sorted(labels, reverse=True)  # mixed
    data = Dataset(tmp_path / "out")
    data.check_files()
    assert next(iter(in_order(batches(data, "val", 2, 16))))[0].shape[1] <= 16
    running = Dataset(tmp_path / "out", "lm")
    assert running.kind == "lm" and batches(running, "train", 2, 16).count == meta["splits"]["train"]["tokens"] - 1


def test_labels_may_be_numbers_and_breaks_are_newlines(tmp_path):
    made = [{"text": f"{n}<br />b<BR>c", "label": n % 2} for n in range(12)]
    make(jsonl(tmp_path / "a.jsonl", made), tmp_path / "out")
    splits, meta = documents(tmp_path / "out")
    assert meta["classes"] == ["0", "1"] and all(text.endswith("\nb\nc") for text in splits["train"])
    for text, label in zip(splits["train"], load(tmp_path / "out")[1]["train.labels"]):
        assert int(text.split("\n")[0]) % 2 == label


def test_names_that_are_not_utf8(tmp_path):
    """Of a file, and of a class."""
    made = [{"text": f"{n}", "label": ("a\ud800", "b")[n % 2]} for n in range(12)]
    source = jsonl(tmp_path / "old\udce9.jsonl", made)
    make(source, tmp_path / "out")
    assert load(tmp_path / "out")[0]["classes"] == ["a?", "b"]
    assert "nothing to do" in make(source, tmp_path / "out").stdout


def test_small_classes_are_in_every_split(tmp_path):
    made = [{"text": f"{n}", "label": "rare" if n < 3 else "usual"} for n in range(60)]
    make(jsonl(tmp_path / "a.jsonl", made), tmp_path / "out")
    assert [count["documents"] - count["positive"]
            for count in load(tmp_path / "out")[0]["splits"].values()] == [1, 1, 1]


# ---- tokenizers --------------------------------------------------------------------------------


@pytest.fixture
def own_gpt2(monkeypatch):
    """tiktoken's gpt2, which needs a network, replaced by one of single bytes."""
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks={bytes([b]): b for b in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


@pytest.mark.parametrize("kind", ["bytes", "chars", "words", "bpe", "gpt2"])
def test_tokenizers(notes, tmp_path, kind, own_gpt2):
    size = {"words": ["--vocab_size=50"], "bpe": ["--vocab_size=300"]}.get(kind, [])
    make(notes, tmp_path / "bytes")
    make(notes, tmp_path / "out", f"--tokenizer={kind}", *size)
    want, (meta, arrays) = documents(tmp_path / "bytes")[0], load(tmp_path / "out")
    tokenizer = Tokenizer(meta)
    for split, parts in want.items():
        expected = [token for part in parts for token in (tokenizer.mark, *tokenizer.encode(part))]
        assert arrays[split].tolist() == expected
    if kind in ("bytes", "bpe", "gpt2"):
        assert documents(tmp_path / "out")[0] == want and meta["lossless"]
    if kind in ("chars", "words"):
        unknown = meta["vocab"].index("<unk>")
        assert meta["splits"]["val"]["unknown"] == np.count_nonzero(arrays["val"] == unknown)
    if kind == "chars":
        assert meta["vocab"] == ["\0", "<unk>", *sorted(set("".join(want["train"])))]
    assert meta["mark"] == {"bpe": meta["vocab_size"] - 1, "gpt2": 256}.get(kind, 0)


def test_characters_that_train_lacks(tmp_path):
    source = wrap(("a b\n" * 100 + "ß" * 20).encode(), tmp_path / "a.txt")
    make(source, tmp_path / "out", "--tokenizer=chars")
    meta, arrays = load(tmp_path / "out")
    assert meta["vocab"] == ["<unk>", "\n", " ", "a", "b"] and not meta["lossless"] and meta["vocab_size"] == 5
    assert meta["splits"]["test"]["unknown"] == 20 and not meta["splits"]["train"]["unknown"]


@pytest.mark.parametrize("kind", ["bytes", "chars", "words", "bpe"])
@pytest.mark.parametrize("step", [1, 7, 19])
def test_long_documents_in_pieces_equal_those_at_once(tmp_path, monkeypatch, kind, step):
    book = "It's  the café's 12345 end...\n\n\n\n\n\n  \t𝄞𝄞𝄞𝄞 no-break\u00a0space and_so on " * 9
    size = ["--vocab_size=280"] if kind == "bpe" else []
    source = wrap(book.encode(), tmp_path / "a.txt")
    make(source, tmp_path / "want", f"--tokenizer={kind}", *size)
    want, _ = load(tmp_path / "want")
    monkeypatch.setattr(text, "STEP", step if kind in ("bytes", "chars") else step + 40)  # more than a word
    make(source, tmp_path / "out", f"--tokenizer={kind}", *size)
    got, _ = load(tmp_path / "out")
    assert got == want


@pytest.mark.parametrize("kind", ["bytes", "chars"])
def test_memory(tmp_path, kind):
    """The text, 15 MB, is never in memory as a whole."""
    source = wrap(b"a line of text\n" * 1_000_000, tmp_path / "a.txt")
    tracemalloc.start()
    try:
        text.main([f"--source={source}", "--name=mine", f"--out_dir={tmp_path / 'out'}", f"--tokenizer={kind}"])
        assert tracemalloc.get_traced_memory()[1] < 11_000_000
    finally:
        tracemalloc.stop()


# ---- where it goes -----------------------------------------------------------------------------


def test_the_commands_of_the_readme(notes, tmp_path):
    """From another folder, with ~: the set goes to the repository's data/notes, and train.py finds it there."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "notes").symlink_to(notes)
    scripts = edited_copy(tmp_path / "scripts")
    line = (scripts / "data" / "text" / "prepare.py", "--source=~/notes", "--name=notes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path / "home"))
        done = execute(scripts, *line, cwd=tmp_path)
    assert done.returncode == 0 and (scripts / "data" / "notes" / "meta.json").exists(), done.stderr
    small = ("--max_iters=2", "--eval_iters=1", "--batch_size=2", "--n_layer=1", "--n_embd=16", "--n_head=2",
             "--block_size=16", "--device=cpu", "--dtype=float32")
    done = execute(scripts, scripts / "train.py", "--dataset=notes", *small, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out" / "best.pt").exists(), done.stderr


@pytest.mark.parametrize("task", ["", "lm"])
def test_a_run_on_labelled_lines(tmp_path, quick, task):
    make(jsonl(tmp_path / "a.jsonl", rows()), tmp_path / "set", "--tokenizer=words")
    fit(tmp_path / "out", tmp_path / "set", "--max_iters=3", f"--task={task}")
    line = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert any(("f1" in record) == (task == "") and record.get("split") == "val" for record in line)


def test_what_it_writes_is_no_text(tmp_path):
    """A source around its own out_dir: nothing of an earlier set, nor of the one that is being written, is read."""
    folder = pack(encoded(NOTES), tmp_path / "folder")
    for out in (folder / "sets" / "mine", folder / "mine"):
        make(folder, out, "--tokenizer=words")
        assert load(out)[0]["source"]["documents"] == 40 and load(out)[0]["source"]["skipped_files"] == 0
        assert "nothing to do" in make(folder, out, "--tokenizer=words").stdout
        for file in out.iterdir():
            file.unlink()


def test_a_text_inside_its_set(tmp_path, monkeypatch):
    """data/mine/input.txt, as in nanoGPT."""
    monkeypatch.setattr("core.prepare.ROOT", tmp_path)
    folder = wrap("".join(NOTES.values()).encode(), tmp_path / "data" / "mine")
    for said in (False, True):
        assert ("nothing to do" in make(folder, folder).stdout) == said
    assert {path.name for path in folder.iterdir()} == {"input.txt", "train.bin", "val.bin", "test.bin", "meta.json"}
    assert json.loads((folder / "meta.json").read_text())["source"]["documents"] == 1


# ---- interrupted -------------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from core import prepare as shared
from data.text import prepare
def interrupted(*arguments):
    {how}
prepare.{function} = interrupted
sys.argv[1:] = ["--source", {source!r}, "--name=mine", "--out_dir", {out!r}]
shared.run_script(prepare.main)
"""


@pytest.mark.parametrize("function", ["shuffled", "learn", "encode"])
@pytest.mark.parametrize("how, code", [
    ("os.kill(os.getpid(), signal.SIGTERM)", 143), ("os.kill(os.getpid(), signal.SIGINT)", 130),
    ("raise OSError(28, 'No space left on device')", 2),
], ids=["term", "ctrl-c", "disk-full"])
def test_interrupted(notes, tmp_path, function, how, code):
    """The earlier set is intact, and nothing else is left."""
    out = tmp_path / "out"
    make(wrap(b"an earlier set " * 9, tmp_path / "old.txt"), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    script = DRIVER.format(root=str(ROOT), how=how, function=function, source=str(notes), out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "old.txt"}


def test_a_full_disk(notes, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match="could not write .*out: File too large; when that is mended"):
            text.main([f"--source={notes}", "--name=mine", f"--out_dir={tmp_path / 'out'}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
