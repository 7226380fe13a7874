"""The split by a quantile of time, against loops over (time, item) pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherkern as fk
from fisherkern.data import Holdout
from fisherkern.errors import InputError
from fisherkern.objectives import NextItem
from fisherkern.objectives.same_target import SameTarget

V = 5
actions = st.lists(st.tuples(st.integers(0, 9), st.integers(1, V)), max_size=7)
users = st.lists(actions.map(sorted), min_size=1, max_size=5)


def make(rows) -> fk.SequenceDataset:
    return fk.SequenceDataset(
        "made",
        [item for row in rows for _, item in row],
        np.cumsum([0, *map(len, rows)]),
        [f"i{v}" for v in range(1, V + 1)],
        [f"u{u}" for u in range(len(rows))],
        times=np.array([time for row in rows for time, _ in row], np.int64),
    )


def expected(rows, quantile, targets, validation):
    """(Training items, validation pairs, test pairs) of each user: positions in the row."""
    every = sorted(time for row in rows for time, _ in row)
    cut = every[int(quantile * (len(every) - 1))]
    before = [time for time in every if time <= cut]
    early = before[int(quantile * (len(before) - 1))]
    for row in rows:
        places = range(len(row))
        later = [p for p in places if row[p][0] > cut]
        left = [p for p in places if row[p][0] <= cut]
        validate = (
            left[-1:] if validation == "last-item" else [p for p in left if row[p][0] > early]
        )
        train = [p for p in left if p not in validate]
        if targets == "last":
            later, validate = later[-1:], validate[-1:]
        yield train, [p for p in validate if p], [p for p in later if p]


@settings(max_examples=150, deadline=None)
@given(
    users,
    st.sampled_from([0.25, 0.5, 0.75]),
    st.sampled_from(["last", "successive"]),
    st.sampled_from(["time", "last-item"]),
)
def test_every_part_is_that_of_a_loop(rows, quantile, targets, validation):
    times = [time for row in rows for time, _ in row]
    data = make(rows)
    if not times or sorted(times)[int(quantile * (len(times) - 1))] == max(times):
        if times:
            with pytest.raises(InputError, match="no action is later than the quantile"):
                data.split_by_time(quantile, targets=targets, validation=validation)
        return
    data = data.split_by_time(quantile, targets=targets, validation=validation)
    parts = list(expected(rows, quantile, targets, validation))
    for number, split in ((1, "validation"), (2, "test")):
        pairs = [(u, p) for u, part in enumerate(parts) for p in part[number]]
        found = data.targets(split)
        assert list(zip(found[0], found[1] - data.offsets[found[0]], strict=True)) == pairs
        if pairs:
            loader = data.loader(split=split, batch_size=3, max_len=4)
            histories = [([0] * 4 + [item for _, item in rows[u][:p]])[-4:] for u, p in pairs]
            assert [row for batch in loader for row in batch["history"].tolist()] == histories
            assert [v for batch in loader for v in batch["target"].tolist()] == [
                rows[u][p][1] for u, p in pairs
            ]
    trained = [[rows[u][p][1] for p in part[0]] for u, part in enumerate(parts)]
    together = [item for row in trained for item in row]
    counts = [together.count(v) for v in range(1, V + 1)]
    assert data.popularity().tolist() == counts
    if together:
        windows = data.windows(batch_size=9, max_len=9, seed=0, epoch=0, crop="last")
        found = sorted([v for v in row if v] for batch in windows for row in batch.tolist())
        assert found == sorted(row for row in trained if row)
        bound = NextItem(loss="bce", negatives=2, sampling="popularity").bind(data, 4)
        assert bound.log_popularity.exp().numpy() == pytest.approx(np.array(counts) / sum(counts))
    samples = [data.offsets[u] + p for u, part in enumerate(parts) for p in part[0] if p]
    assert sorted(SameTarget.of(data).places.tolist()) == samples


def test_times_and_the_split_follow_users_and_catalogues():
    data = fk.synthetic(num_users=30, num_items=20, clusters=4, seed=1)
    split = data.split_by_time(0.8, targets="successive")
    chosen = [7, 3, 12]
    part = split.subset(chosen)
    for place, user in enumerate(chosen):
        own = slice(data.offsets[user], data.offsets[user + 1])
        there = slice(part.offsets[place], part.offsets[place + 1])
        assert part.times[there].tolist() == data.times[own].tolist()
        mine = split.targets("test")[1][split.targets("test")[0] == user] - own.start
        theirs = part.targets("test")[1][part.targets("test")[0] == place] - there.start
        assert mine.tolist() == theirs.tolist()
    loader = split.loader(split="test", users=chosen)
    assert loader.user.tolist() == [chosen[place] for place in part.targets("test")[0]]
    wide = split.with_items([*reversed(data.item_ids), "new"])
    assert wide.targets("test")[1].tolist() == split.targets("test")[1].tolist()
    assert (wide.times == data.times).all()


@pytest.mark.parametrize(
    ("train", "validated"), [([1], [2]), ([2, 0], [1, 0]), ([-1, 0], [0, 0]), ([1, 1], [1, 5])]
)
def test_a_holdout_of_other_sequences_is_refused(train, validated):
    data = ("made", [1, 1, 1, 1, 1], [0, 3, 5], ["a"], [*"xy"])
    good = fk.SequenceDataset(*data, holdout=Holdout("own", [1, 1], [2, 1], every=True))
    assert good.targets("test")[1].tolist() == [2, 4]
    with pytest.raises(InputError, match="holdout must have 0 <= train <= validated <= actions"):
        fk.SequenceDataset(*data, holdout=Holdout("own", train, validated))
    with pytest.raises(ValueError, match="read-only"):
        good.holdout.train[0] = 2


def test_the_fingerprint_is_of_the_split_and_not_of_the_times():
    data = fk.synthetic(num_users=30, num_items=20, clusters=4, seed=1)
    plain = fk.SequenceDataset("x", data.items, data.offsets, data.item_ids, data.user_ids)
    assert plain.fingerprint() == data.fingerprint()
    split = [
        data.split_by_time(0.8),
        data.split_by_time(0.9),
        data.split_by_time(0.8, targets="successive"),
        data.split_by_time(0.8, validation="last-item"),
    ]
    odd = Holdout("leave-one-out", data.holdout.train - 1, data.holdout.validated)
    split.append(
        fk.SequenceDataset("x", data.items, data.offsets, data.item_ids, data.user_ids, holdout=odd)
    )
    assert len({own.fingerprint() for own in [data, *split]}) == 6


def test_files_with_times_are_split_and_those_without_refused(tmp_path):
    path = tmp_path / "ratings.csv"
    rows = [f"{u},{v},{10 * u + v}" for u in range(4) for v in (3, 1, 2)]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    data = fk.load(path, time_split=0.5, time_targets="successive", time_validation="last-item")
    assert data.times.tolist() == [10 * u + v for u in range(4) for v in (1, 2, 3)]
    assert data.holdout.name == (
        "global time split at quantile 0.5, successive targets, validation by last item"
    )
    # The quantile is 13; users 2 and 3 have two and three later actions, one of them the first.
    assert data.targets("test")[0].tolist() == [2, 2, 3, 3]
    with pytest.raises(InputError, match="time_targets and time_validation are of a time_split"):
        fk.load(path, time_targets="successive")
    lines = tmp_path / "made.txt"
    lines.write_text("1 1\n1 2\n1 3\n")
    with pytest.raises(InputError, match=r"made\.txt: its actions have no times"):
        fk.load(lines, time_split=0.9)
    with pytest.raises(InputError, match="made: its actions have no times to split by"):
        fk.load(lines).split_by_time()
    columns = {"user_id": [1, 1, 1], "item_id": [5, 6, 7], "timestamp": [3, 1, 2]}
    frame = pytest.importorskip("pyarrow").table(columns)
    assert fk.from_frame(frame).times.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quantile": 1.0}, r"quantile must be in \(0, 1\)"),
        ({"quantile": 0}, r"quantile must be in \(0, 1\)"),
        ({"targets": "first"}, "targets must be 'last' or 'successive'"),
        ({"validation": "user"}, "validation must be 'time' or 'last-item'"),
    ],
)
def test_bad_arguments_are_named(how, message):
    with pytest.raises(InputError, match=message):
        fk.synthetic(num_users=9, num_items=20).split_by_time(**how)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1, 2], "times must be 3 numbers"),
        (["a", "b", "c"], "times must be 3 numbers"),
        ([1.0, float("nan"), 2.0], "not finite"),
        ([1, 3, 2], "times fall at action 2 of the same user"),
        (np.array([1, 2, 2**63], np.uint64), "too large for int64"),
    ],
)
def test_times_that_do_not_fit_are_refused(times, message):
    with pytest.raises(InputError, match=message):
        fk.SequenceDataset("made", [1, 1, 1], [0, 0, 3, 3], ["a"], [*"xyz"], times=times)
    fk.SequenceDataset("made", [1, 1, 1], [0, 1, 3], ["a"], [*"xy"], times=[9, 2, 2])
