"""The order in which training reads: how long its texts are does not tell when a batch comes."""

import numpy as np
import pytest

from core.dataset import Dataset, batches
from helpers import write_reviews

EPOCHS, PER_EPOCH = 20, 50
CHANCE = 4 / (EPOCHS * PER_EPOCH) ** 0.5  # four standard errors of the mean correlation of unrelated orders


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    """The mean length of each batch of each epoch, (EPOCHS, PER_EPOCH)."""
    rows = [("x" * (n * 37 % 400), n % 2) for n in range(8 * PER_EPOCH)]
    source = batches(Dataset(write_reviews(tmp_path_factory.mktemp("data") / "r", train=rows)), "train", 8, 1000,
                     seed=1)
    means = [source.batch(n)[2].double().mean().item() for n in range(EPOCHS * PER_EPOCH)]
    return np.array(means).reshape(EPOCHS, PER_EPOCH)


def mean_correlation(pairs):
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])


def test_short_reviews_do_not_come_first(lengths):
    """They are sorted into batches of like length, and these come in any order: else each epoch would end on the
    longest."""
    assert lengths.std(1).min() > 100  # sorted they are
    assert abs(mean_correlation((np.arange(PER_EPOCH), epoch) for epoch in lengths)) < CHANCE


def test_each_epoch_has_an_order_of_its_own(lengths):
    assert abs(mean_correlation(zip(lengths, lengths[1:]))) < CHANCE
