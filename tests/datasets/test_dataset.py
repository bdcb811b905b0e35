"""The reader of prepared folders: batches that are right, repeatable and complete; scores; damaged folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from core.config import UserError
from core.batches import spread
from core.dataset import DataChanged, Dataset, ReviewBatches, TextBatches, batches
from core.evaluation import scores
from core.meta import difference
from helpers import in_order, review, tokens_of, write_bytes, write_reviews


class Given:
    """Stands for a Dataset of these arrays of tokens."""

    kind, folder, vocab_size = "lm", "given", 10**4

    def __init__(self, *arrays):
        self.arrays = [np.array(array, np.uint16) for array in arrays]

    def token_arrays(self, split):
        return self.arrays

    def check_unchanged(self):
        pass


def same(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b))


# ---- running text ------------------------------------------------------------------------------


def test_windows_are_the_text_shifted_by_one():
    x, y, lengths = TextBatches(Given(range(100)), "train", 64, 8).batch(3)
    assert x.shape == y.shape == (64, 8) and x.dtype == y.dtype == torch.int64 and lengths is None
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(8))


def test_windows_come_from_everywhere_and_only_from_there():
    source = TextBatches(Given(range(20), range(100, 110)), "train", 100, 8)
    starts = torch.cat([source.batch(n)[0][:, 0] for n in range(20)])
    # 20 tokens hold 12 windows of 8 and the token that follows, 10 hold 2: each as likely as any other
    assert sorted(set(starts.tolist())) == [*range(12), 100, 101]
    assert 0.7 * 2000 / 14 < torch.bincount(starts)[[*range(12), 100, 101]].min()


def test_a_batch_depends_on_seed_and_number_alone(text):
    def make(seed):
        return batches(Dataset(text), "train", 4, 16, seed)

    one, other = make(1), make(1)
    forth, back = [one.batch(n) for n in range(5)], [other.batch(n) for n in reversed(range(5))][::-1]
    assert all(same(a, b) for a, b in zip(forth, back))
    assert not same(make(2).batch(0), forth[0]) and not same(forth[0], forth[1])
    np.random.seed(0), torch.manual_seed(0)
    assert same(make(1).batch(4), forth[4])


def test_text_shorter_than_a_block():
    x, y, _ = TextBatches(Given([5, 6, 7]), "train", 2, 8).batch(0)
    assert x.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0]] * 2 and y.tolist() == [[6, 7] + [-1] * 6] * 2


def test_several_short_texts_are_all_read():
    source = TextBatches(Given([1, 2, 3], [], [9], [7, 8]), "train", 64, 8)
    x, y, _ = source.batch(0)
    assert set(x[:, 0].tolist()) == {1, 7} and (y[:, 0] != -1).all() and source.count == 3


@pytest.mark.parametrize("block", [1, 3, 8, 40])
@pytest.mark.parametrize("lengths", [(2,), (30, 0, 17), (9, 1), (25, 25)])
def test_in_order_predicts_every_token_once(lengths, block):
    arrays = [np.arange(n) + 1000 * k for k, n in enumerate(lengths)]
    source = TextBatches(Given(*arrays), "val", 3, block)
    pairs = []
    for x, y, _ in in_order(source):
        assert x.shape == y.shape and x.size(0) <= 3 and (y != -1).any(1).all()
        pairs += [(a, b) for a, b in zip(x.flatten().tolist(), y.flatten().tolist()) if b != -1]
    assert pairs == [(a, a + 1) for array in arrays for a in array[:-1].tolist()]
    assert source.count == len(pairs)


def test_some_batches_in_order():
    source = TextBatches(Given(range(161)), "val", 2, 8)
    whole, some = list(in_order(source)), list(in_order(source, 3))
    assert len(whole) == 10 and [next(n for n, b in enumerate(whole) if same(a, b)) for a in some] == [1, 5, 8]
    assert len(list(in_order(source, 99))) == 10


def test_spread():
    assert spread([1, 2, 3]) == [1, 2, 3] == spread([1, 2, 3], 3) == spread([1, 2, 3], 7)
    assert spread(list(range(100)), 1) == [50] and spread(list(range(100)), 4) == [12, 37, 62, 87]
    for count in range(1, 30):
        assert len(set(spread(list(range(30)), count))) == count


def test_no_text():
    for arrays in ([[]], [[1]], [[1], [2]]):
        with pytest.raises(UserError, match="holds no two tokens"):
            TextBatches(Given(*arrays), "val", 2, 8)


def test_reviews_as_running_text(tmp_path):
    folder = write_reviews(tmp_path / "r", held_out=2, train=[("good", 1), ("bad", 0)], val=[("fine", 1), ("", 0)],
                           unsup=[("one", None), ("two", None), ("held", None), ("out", None)])
    data = Dataset(folder, "lm")
    assert data.kind == "lm" and data.classes == [] and len(data.token_arrays("val")) == 1
    assert [bytes(array) for array in data.token_arrays("train")] == [b"\0good\0bad", b"\0one\0two"]
    assert data.bytes_per_token("train") == 1
    seen = batches(data, "train", 64, 4).batch(0)[0]
    assert isinstance(seen, torch.Tensor) and not (seen == ord("h")).any()


# ---- reviews -----------------------------------------------------------------------------------


def texts_of(batch):
    """The texts and labels of a batch of bytes, its padding checked."""
    x, y, lengths = batch
    assert x.dtype == y.dtype == lengths.dtype == torch.int64
    for row, length in zip(x, lengths):
        assert row[0] == 0 and (row[length:] == 0).all()
    return [(bytes(row[1:length].tolist()).decode(), int(label)) for row, label, length in zip(x, y, lengths)]


@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_every_review_once_an_epoch(reviews, batch_size):
    source = batches(Dataset(reviews), "train", batch_size, 200)
    per_epoch = -(-23 // batch_size)
    epochs = [[texts_of(source.batch(n + e * per_epoch)) for n in range(per_epoch)] for e in range(3)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == sorted(review(n) for n in range(23))
    if per_epoch > 1:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_review_batches_depend_on_seed_and_number_alone(reviews):
    def make(seed):
        return batches(Dataset(reviews), "train", 4, 32, seed)

    one, other = make(1), make(1)
    order = [7, 0, 13, 6, 5, 12]  # across epochs
    forth = {n: one.batch(n) for n in sorted(order)}
    assert all(same(other.batch(n), forth[n]) for n in order)
    assert any(not same(make(2).batch(n), forth[n]) for n in order)


def test_batches_hold_reviews_of_like_length(tmp_path):
    rows = [("x" * (n * 37 % 400), n % 2) for n in range(1000)]
    source = batches(Dataset(write_reviews(tmp_path / "r", train=rows)), "train", 10, 1000)
    padded = sum(source.batch(n)[0].numel() for n in range(100))
    tokens = sum(int(source.batch(n)[2].sum()) for n in range(100))
    assert tokens == sum(len(text) + 1 for text, _ in rows) and padded < 1.15 * tokens  # unsorted: 1.9


def test_neighbours_change_between_epochs(tmp_path):
    rows = [("x" * (n % 40), 0) for n in range(600)]
    source = batches(Dataset(write_reviews(tmp_path / "r", train=rows)), "train", 5, 1000)  # 120 batches, 3 pools

    def groups():
        return {tuple(sorted(group.tolist())) for group in source.order}

    source.batch(0)
    first = groups()
    source.batch(120)
    assert len(first & groups()) < 12


@pytest.mark.parametrize("block", [1, 7, 32, 50])
def test_reviews_are_cut_to_the_block(reviews, block):
    source = batches(Dataset(reviews), "val", 4, block)
    for x, _, lengths in in_order(source):
        assert x.size(1) <= block and lengths.max() <= block and lengths.max() <= x.size(1)
    whole = sum((texts_of(batch) for batch in in_order(source)), [])
    assert sorted(whole) == sorted((review(n)[0][: block - 1], review(n)[1]) for n in range(30, 39))


def test_reviews_in_order_are_each_seen_once_shortest_first(reviews):
    source = batches(Dataset(reviews), "val", 4, 200)
    whole = [texts_of(batch) for batch in in_order(source)]
    flat = sum(whole, [])
    assert sorted(flat) == sorted(review(n) for n in range(30, 39)) and [len(batch) for batch in whole] == [4, 4, 1]
    assert [len(text) for text, _ in flat] == sorted(len(text) for text, _ in flat)
    assert [texts_of(batch) for batch in in_order(source, 1)] == [whole[1]]


# ---- folders -----------------------------------------------------------------------------------


def test_a_folder_by_path_and_by_name(toy, monkeypatch, tmp_path):
    for name in (toy, str(toy), f"{toy}/"):
        assert Dataset(name).vocab_size == 13
    monkeypatch.chdir(toy.parent)
    assert Dataset("toy").folder.samefile(toy)
    data = Dataset(toy)
    assert (data.kind, data.classes, data.tokenizer.kind) == ("lm", [], "words")
    assert data.bytes_per_token("val") == data.meta["splits"]["val"]["bytes"] / 28


def test_a_folder_from_any_working_directory(toy, monkeypatch, tmp_path):
    """data/NAME on the command line is found from elsewhere too; a folder of the working directory comes first."""
    for place, split in (("repository", "ab"), ("elsewhere", "abc")):
        write_bytes(tmp_path / place / "data" / "letters", train=split)
    monkeypatch.setattr("core.dataset.ROOT", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    for name in ("letters", "data/letters", "data/letters/"):
        assert len(Dataset(name).tokens("train")) == 2
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(Dataset("data/letters").tokens("train")) == 3 and len(Dataset("letters").tokens("train")) == 2


def test_a_lossy_tokenizer_has_no_bytes_per_token(text, tmp_path):
    folder = damaged(text, tmp_path, lambda meta: meta.update(lossless=False))
    assert Dataset(text).bytes_per_token("val") == 1 and Dataset(folder).bytes_per_token("val") is None


@pytest.mark.parametrize("name, message", [
    ("stdlb", "no dataset 'stdlb', neither as a folder nor in data/; did you mean stdlib?"),
    ("xyz", "no dataset 'xyz', neither as a folder nor in data/; there are enwik8, imdb, "),
    ("nowhere/toy", "nowhere/toy is not prepared; make it: python data/toy/prepare.py"),
    ("nowhere/imdb_xyz/", "is not prepared; make it: python data/imdb/prepare.py (with an option, see its --help)"),
    ("", "no dataset ''"), ("\0", "no dataset"),
])
def test_no_such_dataset(name, message):
    with pytest.raises(UserError) as error:
        Dataset(name)
    assert message in str(error.value)


def test_task(reviews, toy):
    with pytest.raises(UserError, match="holds lm data; task expects 'lm' or 'lm', got 'classify'"):
        Dataset(toy, "classify")
    with pytest.raises(UserError, match="task expects 'lm' or 'classify', got 'clasify'"):
        Dataset(reviews, "clasify")
    assert Dataset(reviews, "classify").classes == ["negative", "positive"] and Dataset(toy, "lm").kind == "lm"


def test_no_such_split(text):
    with pytest.raises(UserError, match="has no split 'tset'; it has train, val, test"):
        batches(Dataset(text), "tset", 2, 8)


def damaged(folder, tmp_path, change):
    """A copy of a prepared folder with its meta changed by `change`, or replaced by the text it gives."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    meta = json.loads((copy / "meta.json").read_text())
    new = change(meta)
    (copy / "meta.json").write_text(new if isinstance(new, str) else json.dumps(meta))
    return copy


@pytest.mark.parametrize("change", [
    lambda meta: "", lambda meta: "[1]", lambda meta: json.dumps(meta)[:-9], lambda meta: "\x00",
    lambda meta: meta.pop("splits") and None, lambda meta: meta.update(splits=["train"]),
    lambda meta: meta.update(dtype="uint9"), lambda meta: meta.pop("lossless") and None,
    lambda meta: meta.pop("vocab_size") and None, lambda meta: meta.update(vocab_size=255),
    lambda meta: meta.update(tokenizer="runes"), lambda meta: meta.pop("mark") and None,
    lambda meta: meta.update(classes=["one"]), lambda meta: meta.update(classes=["a", "b", "c"]),
    lambda meta: meta.pop("classes") and None, lambda meta: meta.pop("source") and None,
])
def test_a_damaged_meta(reviews, tmp_path, change):
    folder = damaged(reviews, tmp_path, change)
    with pytest.raises(UserError, match=r"meta.json is damaged \(.+\); run its prepare.py again"):
        Dataset(folder)


@pytest.mark.parametrize("value", [None, "many", -1, 2.5])
def test_a_damaged_count(reviews, tmp_path, value):
    folder = damaged(reviews, tmp_path, lambda meta: meta["splits"]["train"].update(tokens=value))
    with pytest.raises(UserError, match=r"is damaged \(expected a number as tokens of train, got"):
        batches(Dataset(folder), "train", 2, 8)


@pytest.mark.parametrize("name", ["train.bin", "train.offsets.bin", "train.labels.bin"])
@pytest.mark.parametrize("how", ["cut", "long", "missing"])
def test_a_file_of_another_size(reviews, tmp_path, name, how):
    shutil.copytree(reviews, tmp_path / "r")
    file = tmp_path / "r" / name
    whole = file.read_bytes()
    file.unlink() if how == "missing" else file.write_bytes(whole[:-1] if how == "cut" else whole + b"x")
    size = {"cut": len(whole) - 1, "long": len(whole) + 1, "missing": 0}[how]
    with pytest.raises(UserError) as error:
        batches(Dataset(tmp_path / "r"), "train", 2, 8)
    assert f"{name}: expected {len(whole):,} bytes, found {size:,}; run its prepare.py again" in str(error.value)


def test_damaged_offsets_and_labels(reviews, tmp_path):
    shutil.copytree(reviews, tmp_path / "r")
    offsets = np.fromfile(tmp_path / "r" / "train.offsets.bin", "<i8")
    for change in (offsets[::-1], offsets + 1, np.r_[offsets[:2], offsets[1], offsets[3:]]):
        np.ascontiguousarray(change).tofile(tmp_path / "r" / "train.offsets.bin")
        with pytest.raises(UserError, match="train.offsets.bin is damaged"):
            batches(Dataset(tmp_path / "r"), "train", 2, 8)
    np.full(9, 2, np.uint8).tofile(tmp_path / "r" / "val.labels.bin")
    with pytest.raises(UserError, match="expected labels below 2, found 2"):
        batches(Dataset(tmp_path / "r"), "val", 2, 8)


def test_tokens_are_as_wide_as_meta_says(tmp_path):
    folder = write_bytes(tmp_path / "t", train="abcabc")
    meta = json.loads((folder / "meta.json").read_text())
    tokens, _ = tokens_of(["abcabc"])
    tokens.astype("<u2").tofile(folder / "train.bin")
    meta["dtype"], meta["splits"]["train"]["tokens"] = "uint16", 7
    (folder / "meta.json").write_text(json.dumps(meta))
    assert Dataset(folder).tokens("train").tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", ["object", "bool", "float64", "S4", "U2", "complex128", "datetime64", None])
def test_a_forged_dtype(text, tmp_path, dtype):
    folder = damaged(text, tmp_path, lambda meta: meta.update(dtype=dtype))
    with pytest.raises(UserError, match="is damaged .expected uint8, uint16, uint32 as dtype, got"):
        Dataset(folder)


def flipped(folder, name):
    """One byte of a file is another, its size is the same."""
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["train.bin", "train.offsets.bin", "train.labels.bin"])
def test_every_file_has_a_digest(reviews, tmp_path, name):
    """At the start, and while it is in use."""
    shutil.copytree(reviews, tmp_path / "r")
    data = Dataset(tmp_path / "r")
    source = batches(data, "train", 2, 8)
    data.check_files()
    good = (tmp_path / "r" / name).read_bytes()
    (tmp_path / "r" / name).write_bytes(good)  # rewritten as it was
    source.batch(0)
    flipped(tmp_path / "r", name)
    with pytest.raises(DataChanged, match=f"{name}: expected sha256 [0-9a-f]+, as its meta.json says, found [0-9a-f]+"):
        source.batch(1)
    with pytest.raises(DataChanged, match=f"{name}: expected sha256"):
        data.check_files()


def test_folders_prepared_before_are_read(reviews, tmp_path):
    """Their meta.json tells the digest of the tokens alone."""

    def before(meta):
        for split in meta["splits"].values():
            split.pop("offsets_sha256"), split.pop("labels_sha256", None)

    folder = damaged(reviews, tmp_path, before)
    old, new = Dataset(folder), Dataset(reviews)
    for data in (old, new):
        batches(data, "train", 2, 8)
        data.check_files()
    assert not difference(old.meta, new.meta) and not difference(old.meta, old.meta)
    assert "offsets_sha256 of train: expected" in difference(new.meta, old.meta)  # it was taken away
    flipped(folder, "train.bin")
    with pytest.raises(DataChanged, match="train.bin: expected sha256"):
        old.check_files()


def test_other_labels_are_other_data(reviews, tmp_path):
    rows = [review(n) for n in range(23)]
    copy = write_reviews(tmp_path / "r", train=[(text, 1 - label) for text, label in rows],
                         val=[review(n) for n in range(30, 39)])
    assert "labels_sha256 of train: expected" in difference(Dataset(reviews).meta, Dataset(copy).meta)


@pytest.mark.parametrize("kind", ["text", "reviews"])
def test_tokens_beyond_the_vocabulary(kind, tmp_path, request):
    """At the start, in every file that is in use; and in each batch, whoever reads it."""
    few = {"tokenizer": "chars", "mark": None, "vocab_size": 99, "vocab": [chr(n) for n in range(99)]}
    folder = damaged(request.getfixturevalue(kind), tmp_path, lambda meta: meta.update(few))
    data = Dataset(folder)
    source = batches(data, "train", 50, 200)
    for read in (data.check_files, lambda: source.batch(0), lambda: next(iter(in_order(source)))):
        with pytest.raises(UserError, match=r"holds the token \d+, expected ids below 99, .* run its prepare.py again"):
            read()


# ---- scores ------------------------------------------------------------------------------------


def test_scores_by_hand():
    got = scores([0.9, 0.8, 0.4, 0.3, 0.6, 0.2], [1, 1, 1, 0, 0, 0])
    # predicted 1: the first, the second, the fifth; pairs in order: 3 + 3 + 2 of 9
    want = {"accuracy": 4 / 6, "f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3, "auc": 8 / 9}
    assert got == pytest.approx(want) and all(type(value) is float for value in got.values())
    assert scores([0.5], [0])["accuracy"] == 1  # as argmax: a tie is class 0


@given(strategies.lists(min_size=1, max_size=30, elements=strategies.tuples(
    strategies.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 1.0]), strategies.integers(0, 1))))
@settings(max_examples=150, deadline=None)
def test_scores_against_counting(rows):
    p, labels = map(list, zip(*rows))
    got = scores(torch.tensor(p), torch.tensor(labels))
    pairs = [(a > b) + (a == b) / 2 for a, i in rows if i for b, j in rows if not j]
    assert got["auc"] == pytest.approx(sum(pairs) / len(pairs) if pairs else 0.5)
    hits, predicted = sum(a > 0.5 and i for a, i in rows), sum(a > 0.5 for a in p)
    assert got["accuracy"] == pytest.approx(sum((a > 0.5) == i for a, i in rows) / len(rows))
    assert got["precision"] == pytest.approx(hits / predicted if predicted else 0)
    assert got["recall"] == pytest.approx(hits / sum(labels) if sum(labels) else 0)
    both = got["precision"] + got["recall"]
    assert got["f1"] == pytest.approx(2 * got["precision"] * got["recall"] / both if both else 0)


def test_a_review_set_without_texts(tmp_path):
    folder = write_reviews(tmp_path / "r", train=[], val=[("a", 1)])
    with pytest.raises(UserError, match="the train split of .* holds no text"):
        ReviewBatches(Dataset(folder), "train", 2, 8)
