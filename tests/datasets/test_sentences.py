"""data/sentences: its labels follow from its words, and the folder is what the other scripts read."""

import pytest

from core.config import UserError
from core.dataset import Dataset, batches
from data.sentences import prepare

NEGATIVE = prepare.ADJECTIVES[0], prepare.VERBS[0], "hate dislike regret despise"
POSITIVE = prepare.ADJECTIVES[1], prepare.VERBS[1], "love like enjoy adore"
POLARITY = {word: sign for sign, lists in ((-1, NEGATIVE), (1, POSITIVE)) for words in lists for word in words.split()}


def polarity(clause):
    """1 or -1: what the one word of opinion says, turned round by not or never."""
    words = [word.strip(".,!") for word in clause.split()]
    sign, = (POLARITY[word] for word in words if word in POLARITY)
    return -sign if {"not", "never"} & set(words) else sign


def test_labels_follow_from_the_words():
    rows = prepare.sentences()
    assert len(rows) == 6000 == len({text for text, _ in rows}) and sum(label for _, label in rows) == 3000
    for text, label in rows:
        *before, last = text.split(" but ")
        signs = [polarity(clause) for clause in last.split(" and ")]
        assert set(signs) == {2 * label - 1}, text
        assert [polarity(clause) for clause in before] == [1 - 2 * label] * len(before), text
    assert sum(" but " in text for text, _ in rows) > 1000 and sum(" not " in text for text, _ in rows) > 1000


def test_folder(tmp_path, capsys):
    prepare.main(["--out_dir", str(tmp_path / "sentences")])
    data = Dataset(tmp_path / "sentences")
    assert data.classes == ["negative", "positive"] and {"zorro", "vertigo"}.isdisjoint(data.meta["vocab"])
    texts = {split: data.texts(split) for split in ("train", "val", "test")}
    assert [len(labels) for _, _, labels in texts.values()] == [4800, 600, 600]
    for tokens, offsets, labels in texts.values():
        assert (tokens[offsets[:-1]] == 0).all() and (tokens == 0).sum() == len(labels) and labels.mean() == 0.5
        assert 0.02 < (tokens == 1).mean() < 0.06  # <unk>
    tokens, offsets, labels = texts["val"]
    text, label = prepare.sentences()[4800]
    assert data.tokenizer.encode(text) == list(tokens[1 : offsets[1]]) and labels[0] == label
    x, y, lengths = batches(data, "train", 8, 64).batch(0)
    assert x.shape == (8, 32) and lengths.max() <= 32 and set(y.tolist()) <= {0, 1}
    before = (tmp_path / "sentences" / "train.bin").stat().st_mtime_ns
    prepare.main(["--out_dir", str(tmp_path / "sentences")])
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "sentences" / "train.bin").stat().st_mtime_ns == before


def test_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="takes no --source"):
        prepare.main(["--source", str(tmp_path), "--out_dir", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
