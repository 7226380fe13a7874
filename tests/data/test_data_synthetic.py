"""The generator: reproducible, skewed, and with a signal that only two items together carry."""

import numpy as np
import pytest

from fisherkern.data import SequenceDataset, load, synthetic
from fisherkern.errors import InputError


def cluster_triples(data: SequenceDataset) -> np.ndarray:
    """(n, 3) clusters from 0 of three items in a row, oldest first."""
    assert data.attributes is not None
    cluster = np.array([data.attributes[item][0] - 1 for item in data.item_ids])
    runs = [cluster[data.sequence(user) - 1] for user in range(data.num_users)]
    return np.concatenate([np.stack([run[:-2], run[1:-1], run[2:]], axis=1) for run in runs])


def test_the_same_seed_gives_the_same_data_and_another_seed_others():
    small = {"num_users": 30, "num_items": 60, "clusters": 6}
    assert synthetic(**small).fingerprint() == synthetic(**small).fingerprint()
    assert synthetic(**small, seed=1).fingerprint() != synthetic(**small).fingerprint()
    assert load("synthetic").fingerprint() == synthetic(2000, 500, 0).fingerprint()


def test_sizes_ids_and_attributes_are_as_asked():
    data = synthetic(1100, 50, clusters=4, tastes=2, min_length=5, max_length=9)
    lengths = np.diff(data.offsets)
    assert data.num_users == 1100 and set(lengths.tolist()) == {5, 6, 7, 8, 9}
    assert data.item_ids == tuple(str(v) for v in range(1, 51))
    assert data.attributes is not None
    groups = [data.attributes[item] for item in data.item_ids]
    assert np.bincount(np.ravel(groups)).tolist() == [0, 13, 13, 12, 12]


def test_two_of_a_cluster_and_then_the_next():
    data = synthetic(300, 400, clusters=8, tastes=2, order=1.0)
    before, last, coming = cluster_triples(data).T
    assert (coming == np.where(before == last, (last + 1) % 8, last)).all()


def test_the_last_two_items_tell_what_the_last_one_does_not():
    triples = cluster_triples(synthetic())
    clusters = triples.max() + 1
    counts = np.zeros((clusters, clusters, clusters))
    np.add.at(counts, tuple(triples.T), 1)
    right_by_two = counts.max(axis=2).sum() / counts.sum()
    right_by_one = counts.sum(axis=0).max(axis=1).sum() / counts.sum()
    right_by_none = counts.sum(axis=(0, 1)).max() / counts.sum()
    # Order 0.8: at most 0.8 + 0.2 * (a favourite happens to fit) by two, near half by one.
    assert right_by_two > 0.75
    assert right_by_one < 0.65
    assert right_by_none < 0.2


def test_popularity_is_skewed_and_users_do_not_repeat_items():
    data = synthetic()
    popularity = np.sort(data.popularity())[::-1]
    assert popularity[:50].sum() > 0.3 * popularity.sum()  # a tenth of the items; 0.1 if even
    flat = np.sort(synthetic(skew=0.0).popularity())[::-1]
    assert flat[:50].sum() < 0.2 * flat.sum()
    assert all(len(set(run)) == len(run) for run in map(data.sequence, range(200)))


def test_clusters_smaller_than_the_sequences_make_items_repeat():
    data = synthetic(20, 4, clusters=2, tastes=1, min_length=30, max_length=30, skew=0.0)
    counts = np.bincount(data.items)[1:]
    assert counts.sum() == 600 and counts.min() > 100  # 150 each if even


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_users": 0}, "num_users must be at least 1"),
        ({"num_items": 15}, "num_items must be at least 16"),
        ({"clusters": 2}, "clusters must be at least 3"),
        ({"min_length": 2}, "min_length must be at least 3"),
        ({"max_length": 10}, "max_length must be at least 20"),
        ({"order": 1.2}, r"order must be in \[0, 1\], got 1.2"),
        ({"skew": float("nan")}, "skew must be 0 or more and finite, got nan"),
    ],
)
def test_impossible_sizes_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        synthetic(**arguments)
