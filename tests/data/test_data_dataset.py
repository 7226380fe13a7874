"""The CSR dataset, its split and its batches, against plain loops over Python lists."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherkern.data import SequenceDataset
from fisherkern.errors import InputError

V = 7
HELD_OUT = {"train": 2, "validation": 1, "test": 0}
sequences = st.lists(st.lists(st.integers(1, V), max_size=11), min_size=1, max_size=6)


def make(rows: list[list[int]]) -> SequenceDataset:
    return SequenceDataset(
        "made",
        np.array([item for row in rows for item in row], dtype=np.int64),
        np.cumsum([0, *map(len, rows)]),
        [f"item{v}" for v in range(1, V + 1)],
        [f"user{u}" for u in range(len(rows))],
        {"item2": [5, 6]},
    )


def pad(items: list[int], max_len: int) -> list[int]:
    cut = items[-max_len:]
    return [0] * (max_len - len(cut)) + cut


def all_pairs(rows: list[list[int]], split: str, max_len: int) -> list[tuple[list[int], int, int]]:
    pairs = []
    for user, row in enumerate(rows):
        kept = row[: len(row) - HELD_OUT[split]]
        if len(row) > HELD_OUT[split] and len(kept) >= 2:
            pairs.append((pad(kept[:-1], max_len), kept[-1], user))
    return pairs


@settings(max_examples=60, deadline=None)
@given(sequences, st.sampled_from(sorted(HELD_OUT)), st.integers(1, 4), st.integers(1, 12))
def test_loader_yields_every_pair_of_the_split(rows, split, batch_size, max_len):
    expected = all_pairs(rows, split, max_len)
    if not expected:
        with pytest.raises(InputError, match=f"no user has .* in the {split} split"):
            make(rows).loader(split=split)
        return
    loader = make(rows).loader(split=split, batch_size=batch_size, max_len=max_len)
    for _ in range(2):  # it can be iterated again
        batches = list(loader)
        assert len(batches) == len(loader) == -(-len(expected) // batch_size)
        found: list[tuple[list[int], int, int]] = []
        for batch in batches:
            assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}
            assert batch["history"].shape == (len(batch["target"]), max_len)
            found += zip(*(batch[k].tolist() for k in ("history", "target", "user")), strict=True)
        assert found == expected


def test_loader_limit_is_spread_over_the_users_that_have_a_pair():
    data = make([[1], *([[1, 2, 3, 4]] * 9), [1, 2]])
    users = [batch["user"].tolist() for batch in data.loader(split="validation", limit=3)]
    assert users == [[1, 5, 9]]
    assert len(next(iter(data.loader(split="test", limit=99)))["user"]) == 10


@settings(max_examples=60, deadline=None)
@given(sequences, st.integers(1, 5), st.sampled_from(["random", "last", "all"]), st.integers(0, 3))
def test_windows_cover_the_training_part_and_nothing_else(rows, max_len, crop, seed):
    parts = [row[:-2] for row in rows if len(row) > 2]
    if not parts:
        with pytest.raises(InputError, match="no user has an item left"):
            make(rows).windows(batch_size=2, max_len=max_len, seed=seed, epoch=0, crop=crop)
        return
    batches = make(rows).windows(batch_size=2, max_len=max_len, seed=seed, epoch=0, crop=crop)
    found = sorted(row for batch in batches for row in batch.tolist())
    assert len(list(batches)) == len(batches)
    if crop == "last":
        assert found == sorted(pad(part, max_len) for part in parts)
    elif crop == "all":
        pieces = []
        for part in parts:
            for stop in range(len(part), 0, -max_len):
                pieces.append(pad(part[max(stop - max_len, 0) : stop], max_len))
        assert found == sorted(pieces)
    else:
        assert len(found) == len(parts)
        windows = [
            [pad(part[: stop + max_len], max_len) for stop in range(len(part) - max_len + 1)]
            or [pad(part, max_len)]
            for part in parts
        ]
        assert all(any(window in choices for choices in windows) for window in found)


def test_random_windows_are_uniform_and_differ_between_epochs():
    # 400 users with 8 training items each: 5 windows of length 4.
    data = SequenceDataset(
        "made",
        np.tile(np.arange(1, 11), 400),
        np.arange(401) * 10,
        [str(v) for v in range(1, 11)],
        [str(u) for u in range(400)],
    )
    firsts = [
        batch[:, 0].numpy()
        for epoch in range(5)
        for batch in data.windows(batch_size=400, max_len=4, seed=0, epoch=epoch)
    ]
    counts = np.bincount(np.concatenate(firsts), minlength=6)
    assert counts[0] == 0 and counts[6:].sum() == 0
    assert np.abs(counts[1:6] - 400).max() < 100  # more than five standard deviations of 17.9
    assert (firsts[0] != firsts[1]).any()


def test_windows_repeat_with_seed_and_epoch_and_shuffle_the_users():
    data = make([[u % V + 1] * 5 for u in range(6)])

    def rows(seed: int, epoch: int) -> list[list[int]]:
        batches = data.windows(batch_size=4, max_len=3, seed=seed, epoch=epoch, crop="last")
        return [row for batch in batches for row in batch.tolist()]

    assert rows(1, 2) == rows(1, 2)
    orders = {tuple(row[0] for row in rows(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_first_windows_are_those_of_epoch_after_epoch():
    data = make([[1, 2, 3, 4, 5], [6, 7, 1, 2], [3, 3, 4, 5, 6, 7]])
    how = {"batch_size": 2, "max_len": 2, "seed": 3}
    epochs = [batch for epoch in (1, 2, 3) for batch in data.windows(epoch=epoch, **how)]
    found = data.first_windows(5, **how)
    assert len(epochs) == 6 and len(found) == 5
    assert all(torch.equal(one, other) for one, other in zip(found, epochs, strict=False))
    with pytest.raises(InputError, match="count must be at least 1"):
        data.first_windows(0, **how)


@settings(max_examples=60, deadline=None)
@given(sequences, st.sampled_from(sorted(HELD_OUT)), st.sampled_from([None, 1, 3]))
def test_seen_and_popularity_count_what_a_loop_counts(rows, split, last):
    data = make(rows)
    users = [u for u, _, _ in reversed([(p[2], *p[:2]) for p in all_pairs(rows, split, 1)])]
    if users:
        loader = data.loader(split=split, users=users)
        assert loader.user.tolist() == users
        pair, items = loader.seen(slice(None), last)
        for place, user in enumerate(users):
            history = rows[user][: max(len(rows[user]) - 1 - HELD_OUT[split], 0)]
            history = history if last is None else history[-last:]
            assert items[pair == place].tolist() == sorted(set(history))
    train = [item for row in rows for item in row[: max(len(row) - 2, 0)]]
    assert data.popularity().tolist() == [train.count(v) for v in range(1, V + 1)]


def test_with_items_keeps_external_ids():
    data = make([[1, 2, 3], [7, 7, 5]])
    wide = ["new", *reversed(data.item_ids), "newer"]
    moved = data.with_items(wide)
    assert moved.num_items == 9
    for user in range(2):
        before = [data.item_ids[v - 1] for v in data.sequence(user)]
        assert [moved.item_ids[v - 1] for v in moved.sequence(user)] == before
    with pytest.raises(InputError, match="made: item 'item1' and 1 more are not in the other"):
        data.with_items(wide[:-3])


def test_subset_keeps_the_catalogue_and_the_order_asked_for():
    rows = [[1, 2, 3], [4], [5, 6, 7, 1]]
    part = make(rows).subset([2, 0])
    assert [part.sequence(u).tolist() for u in range(2)] == [rows[2], rows[0]]
    assert part.user_ids == ("user2", "user0") and part.num_items == V
    assert part.attributes == {"item2": [5, 6]}
    assert make(rows).subset([]).num_actions == 0


def test_fingerprint_follows_the_content_alone():
    rows = [[1, 2, 3], [4, 5, 6]]
    same = SequenceDataset("other", [1, 2, 3, 4, 5, 6], [0, 3, 6], make(rows).item_ids, ["x", "y"])
    assert make(rows).fingerprint() == same.fingerprint()
    others = [
        make([[1, 2], [3, 4, 5, 6]]),
        make([[1, 2, 3], [4, 5, 7]]),
        make([[1, 2, 3], [4, 6, 5]]),
        SequenceDataset("made", same.items, same.offsets, [*"abcdefg"], ["x", "y"]),
    ]
    assert len({data.fingerprint() for data in [same, *others]}) == 5


def test_a_dataset_cannot_be_changed():
    data = make([[1, 2, 3]])
    with pytest.raises(ValueError, match="read-only"):
        data.items[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        data.sequence(0)[0] = 5
    with pytest.raises(AttributeError, match="immutable"):
        data.items = np.array([2])
    source = np.array([1, 2, 3], dtype=np.int32)
    copied = SequenceDataset("made", source, [0, 3], ["a", "b", "c"], ["x"])
    source[0] = 3
    assert copied.items.tolist() == [1, 2, 3]


def test_a_dataset_can_be_copied():
    data = make([[1, 2, 3]])
    for twin in (copy.copy(data), copy.deepcopy(data)):
        assert twin.fingerprint() == data.fingerprint() and repr(twin) == repr(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": [1, 0, 2]}, "items must lie in 1..2, but go from 0 to 2"),
        ({"items": [1, 3, 2]}, "items must lie in 1..2, but go from 1 to 3"),
        ({"items": [1.5, 1, 2]}, "items must be one-dimensional integers"),
        ({"items": [1, 2**32 + 1, 2]}, "too large for int32"),
        ({"offsets": [0, 2]}, "end at 3 actions"),
        ({"offsets": [0, 1, 3]}, "one end for each of 1 users"),
        ({"offsets": [1, 3]}, "offsets must be 0"),
        ({"offsets": [0, 4, 3], "user_ids": ["x", "y"]}, "offsets must not fall"),
        ({"item_ids": ["a", "a"]}, "names an item twice"),
        ({"attributes": {"c": [1]}}, "attributes names item 'c'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    good: dict[str, Any] = {"items": [1, 1, 2], "offsets": [0, 3]}
    good |= {"item_ids": ["a", "b"], "user_ids": ["x"]}
    SequenceDataset("made", **good)
    with pytest.raises(InputError, match=message):
        SequenceDataset("made", **(good | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.loader(split="dev"), "split must be 'train' or 'validation' or 'test'"),
        (lambda d: d.loader(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda d: d.loader(max_len=2.0), "max_len must be an integer, got 2.0"),
        (lambda d: d.loader(split="test", limit=0), "limit must be"),
        (
            lambda d: d.windows(batch_size=1, max_len=1, seed=-1, epoch=0),
            "seed must not be negative, got -1",
        ),
        (lambda d: d.windows(batch_size=1, max_len=1, seed=0, epoch=0, crop="x"), "crop must be"),
        (lambda d: d.sequence(1), "user 1 is not in 0..0"),
        (lambda d: d.loader(split="test", users=[-1]), "user -1 is not in 0..0"),
        (lambda d: d.subset([0.0]), "users must be a list of integers"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(make([[1, 2, 3]]))
