"""Data frames of several libraries become the same sequences as the file they were read from."""

import datetime
import importlib

import numpy as np
import pytest

from fisherkern.data import from_frame, load
from fisherkern.data.actions import number_ids
from fisherkern.errors import InputError

# User 9 comes first, item 30 too; user 2's rows are out of time order, with a tie (7 before 30).
EVENTS = [(9, 30, 5), (2, 7, 4), (9, 7, 6), (2, 30, 4), (2, 100, 1), (9, 100, 7)]
SEQUENCES = {"9": ["30", "7", "100"], "2": ["100", "7", "30"]}


@pytest.fixture(params=["pyarrow", "polars", "pandas"])
def make(request):
    """make(columns) -> a frame of one library."""
    module = pytest.importorskip(request.param)
    if request.param == "pyarrow":
        return module.table
    return module.DataFrame


def columns(**changes):
    users, items, times = (list(column) for column in zip(*EVENTS, strict=True))
    return {"rating": [1] * 6, "timestamp": times, "item_id": items, "user_id": users} | changes


def rows(data):
    return {
        user: [data.item_ids[item - 1] for item in data.sequence(number)]
        for number, user in enumerate(data.user_ids)
    }


def test_a_frame_gives_what_its_file_gives(make, tmp_path):
    data = from_frame(make(columns()))
    assert rows(data) == SEQUENCES and data.name == "frame"
    path = tmp_path / "a.csv"
    text = "".join(f"{user},{item},{time}\n" for user, item, time in EVENTS)
    path.write_text("user_id,item_id,timestamp\n" + text)
    assert load(path).fingerprint() == data.fingerprint()
    assert load(path).user_ids == data.user_ids


def test_text_ids_and_dates(make):
    days = [datetime.datetime(2024, 1, time) for _, _, time in EVENTS]
    ids = [f"user {user}" for user, _, _ in EVENTS]
    frame = make({"who": ids, "what": columns()["item_id"], "when": days})
    data = from_frame(frame, user="who", item="what", time="when", name="days")
    assert rows(data) == {f"user {user}": items for user, items in SEQUENCES.items()}
    assert data.name == "days"


def test_no_time_means_the_frames_order(make):
    data = from_frame(make(columns()), time=None)
    assert rows(data) == {"9": ["30", "7", "100"], "2": ["7", "30", "100"]}


def test_whole_floats_are_ids_and_others_are_not(make):
    whole = [float(item) for item in columns()["item_id"]]
    assert rows(from_frame(make(columns(item_id=whole)))) == SEQUENCES
    whole[3] = 30.5
    with pytest.raises(InputError, match=r"frame: row 4: item_id is 30\.5, neither integer nor te"):
        from_frame(make(columns(item_id=whole)))


def test_integer_times_are_not_rounded(make):
    """Two nanosecond times that are one number in float64, later one first."""
    late = 1_700_000_000_000_000_001
    frame = make(
        {"user_id": [1, 1, 1], "item_id": [5, 6, 7], "timestamp": [late, late - 1, late + 1]}
    )
    assert rows(from_frame(frame)) == {"1": ["6", "5", "7"]}


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"user_id": [1, None, 1, 1, 1, 1]}, {}, "frame: row 2: user_id is empty"),
        ({"item_id": ["a", "b", None, "c", "d", "e"]}, {}, "frame: row 3: item_id is empty"),
        ({"timestamp": [1, 2, 3, 4, 5, None]}, {}, "frame: row 6: timestamp is empty"),
        ({"timestamp": list("abcdef")}, {}, "frame: column 'timestamp' holds String, neither"),
        ({}, {"item": "movie"}, "frame: no column 'movie' among rating, timestamp, item_id, user"),
        ({}, {"user": 0}, "user, item and time must all be names, or all be indices"),
        ({}, {"min_actions": 4}, "frame: row 1: user 9 has only 3 actions and 4 are needed"),
        ({}, {"min_actions": 0}, "min_actions must be at least 1, got 0"),
    ],
)
def test_bad_frames_are_named_with_the_row(make, changes, arguments, said):
    with pytest.raises(InputError) as caught:
        from_frame(make(columns(**changes)), **arguments)
    assert str(caught.value).startswith(said), caught.value


def test_a_lazy_frame_is_read(tmp_path):
    polars = pytest.importorskip("polars")
    assert rows(from_frame(polars.LazyFrame(columns()))) == SEQUENCES


def test_what_is_no_frame_is_refused():
    for wrong in ([1, 2], np.zeros((3, 3)), None):
        with pytest.raises(InputError, match="from_frame takes a data frame, got"):
            from_frame(wrong)


def test_text_in_blocks_gives_the_same_codes(monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    frames = importlib.import_module("fisherkern.data.frames")
    ids = [f"u{user}" for user, _, _ in EVENTS]
    whole = from_frame(arrow.table(columns(user_id=ids)))
    monkeypatch.setattr(frames, "_BLOCK_ROWS", 2)
    assert from_frame(arrow.table(columns(user_id=ids))).fingerprint() == whole.fingerprint()
    assert whole.user_ids == ("u9", "u2")


@pytest.mark.parametrize("by_appearance", [False, True])
@pytest.mark.parametrize("ids", [[], [0], [3, 1, 3, 0, 1], [10**17, 5, 10**17, 0], [-2, 7, -2]])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint64])
def test_ids_are_numbered_the_same_by_tables_and_by_sorting(ids, dtype, by_appearance):
    if dtype != np.int64 and ids and (min(ids) < 0 or max(ids) > 2**31):
        pytest.skip("the type does not hold them")
    distinct = list(dict.fromkeys(ids)) if by_appearance else sorted(set(ids))
    codes, names = number_ids(np.array(ids, dtype), by_appearance=by_appearance)
    assert codes.dtype == np.int32 and codes.tolist() == [distinct.index(i) for i in ids]
    assert names == [str(i) for i in distinct]


def test_what_a_frame_s_library_refuses_is_one_line():
    """Two columns of a name, which pyarrow allows; a lazy frame that fails when it is collected."""
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(columns())
    twice = table.append_column("item_id", table["item_id"])
    with pytest.raises(InputError, match=r"^frame: could not be read: .*item_id.*$"):
        from_frame(twice)
    polars = pytest.importorskip("polars")
    broken = polars.LazyFrame(columns()).with_columns(polars.col("user_id").str.head(1))
    with pytest.raises(InputError, match=r"^frame: could not be read: .*$"):
        from_frame(broken)
