"""Every file format, and the one sentence with file and line that bad input gets."""

import json
import re

import numpy as np
import pytest

import fisherkern.data.integers as integers
from fisherkern.data import SequenceDataset, load, write_seqrec
from fisherkern.errors import InputError


def rows(data: SequenceDataset) -> dict[str, list[str]]:
    """User -> items, both by their external ids."""
    return {
        user: [data.item_ids[item - 1] for item in data.sequence(number)]
        for number, user in enumerate(data.user_ids)
    }


def put(folder, name: str, text: str | bytes):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# User 9 comes first, item 30 too; user 2's rows are out of time order, with a tie (7 before 30).
EVENTS = [(9, 30, 5), (2, 7, 4), (9, 7, 6), (2, 30, 4), (2, 100, 1), (9, 100, 7)]
BY_TIME = {"9": ["30", "7", "100"], "2": ["100", "7", "30"]}


def check_events(data: SequenceDataset) -> None:
    assert rows(data) == BY_TIME
    assert data.user_ids == ("9", "2") and data.item_ids == ("30", "7", "100")
    assert data.items.dtype == np.int32 and data.offsets.dtype == np.int64


def test_seqrec_numbers_ids_in_numerical_order(tmp_path):
    text = "10 5\n2 40\n10 7\n\n2\t5\r\n10  40\n2 007"
    data = load(put(tmp_path, "a.txt", text))
    assert data.user_ids == ("2", "10") and data.item_ids == ("5", "7", "40")
    assert rows(data) == {"2": ["40", "5", "7"], "10": ["5", "7", "40"]}
    assert data.name == "a" and data.attributes is None


def test_movielens_sorts_by_time_with_ties_in_file_order(tmp_path):
    text = "".join(f"{u}::{i}::3.5::{t}\r\n" for u, i, t in EVENTS)
    check_events(load(put(tmp_path, "ratings.dat", text)))
    check_events(load(put(tmp_path, "ratings", text), name="renamed"))


def test_csv_takes_named_columns_quotes_and_dates(tmp_path):
    text = "timestamp,item_id,note,user_id\n" + "".join(f"{t},{i},,{u}\n" for u, i, t in EVENTS)
    check_events(load(put(tmp_path, "a.csv", text)))
    text = '\ufeffwho,"what, then",day\n' + "".join(
        f'"{u}","{i}",2024-01-{t:02}T00:00:00\n' for u, i, t in EVENTS
    )
    path = put(tmp_path, "b.csv", text)
    check_events(load(path, user="who", item="what, then", time="day"))


def test_csv_in_time_order_needs_no_time(tmp_path):
    text = "user_id,item_id\n" + "x,a b\ny,c\nx,d\nx,c\ny,d\ny,a b\n"
    data = load(put(tmp_path, "a.csv", text), time=None)
    assert rows(data) == {"x": ["a b", "d", "c"], "y": ["c", "d", "a b"]}


def test_recbole_inter_strips_types_and_takes_any_token(tmp_path):
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    text += "".join(f"{u}\t{i}\t1\t{t}.5\n" for u, i, t in EVENTS)
    check_events(load(put(tmp_path, "a.inter", text)))
    check_events(load(put(tmp_path, "a", text)))
    text = 'user_id:token\titem_id:token\n"u\tB00\n"u\té"\n"u\tB00\n'
    assert rows(load(put(tmp_path, "b.inter", text), time=None)) == {'"u': ["B00", 'é"', "B00"]}


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    users, items, times = (list(column) for column in zip(*EVENTS, strict=True))
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"user_id": users, "item_id": items, "timestamp": times}), path)
    check_events(load(path))
    dated = arrow.array(times, arrow.timestamp("s"))
    texts = arrow.array([str(item) for item in items]).dictionary_encode()
    parquet.write_table(arrow.table({"u": users, "i": texts, "t": dated}), path)
    check_events(load(path, user="u", item="i", time="t"))
    with pytest.raises(InputError, match=r"a\.parquet: no column 'user_id' among u, i, t"):
        load(path)
    holed = arrow.table({"user_id": users, "item_id": [30, None, 1, 1, 1, 1], "timestamp": times})
    parquet.write_table(holed, path)
    with pytest.raises(InputError, match=r"a\.parquet: row 2: item_id is empty"):
        load(path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"a\.parquet: could not be read as Parquet"):
        load(path)
    parquet.write_table(arrow.table({"user_id": [1, 1, 1, 2], "item_id": [1, 2, 3, 4]}), path)
    with pytest.raises(InputError, match=r"a\.parquet: row 4: user 2 has only 1 action"):
        load(path, time=None)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"a\.parquet: Parquet needs pyarrow: pip install pyarrow"):
        load(put(tmp_path, "a.parquet", b"PAR1"))


def test_blocks_of_any_size_give_the_same_rows(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    text = "".join(f"{u} {i}\n" for u, i in random.integers(0, 10**5, (40, 2)).tolist())
    path = put(tmp_path, "a.txt", text + "\n" + "7 1\n" * 3 + "7 x\n")
    expected = [tuple(map(int, line.split())) for line in text.splitlines()] + [(7, 1)] * 3
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(integers, "_BLOCK_BYTES", size)
        with pytest.raises(InputError, match=r"a\.txt:45: item 'x'"):
            load(path)
    good = put(tmp_path, "b.txt", path.read_text().removesuffix("7 x\n"))
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(integers, "_BLOCK_BYTES", size)
        values, lines = integers.read_integers(good, integers._SEQREC)
        assert list(zip(*(value.tolist() for value in values), strict=True)) == expected
        assert lines.tolist() == [*range(1, 41), 42, 43, 44]


FINE = "1 1\n1 2\n1 3\n"
HEAD = "user_id,item_id,timestamp\nu,a,1\nu,b,2\nu,c,3\n"
INTER = "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", ":1: the file holds no interactions"),
        ("a.txt", "\n \n", ":1: the file holds no interactions"),
        ("a.dat", "", ":1: the file holds no interactions"),
        ("a.csv", "", ":1: the file holds no interactions"),
        ("a.csv", "user_id,item_id,timestamp\n", ":1: the file holds no interactions"),
        ("a.inter", "", ":1: the file holds no interactions"),
        ("a.txt", FINE + "1 B00\n", ":4: item 'B00' is not an integer"),
        ("a.txt", "user item\n" + FINE, ":1: user 'user' is not an integer"),
        ("a.txt", FINE + "-1 2\n", ":4: user '-1' is not an integer"),
        ("a.txt", FINE + "1 1234567890123456789\n", ":4: item '1234567890123456789' is not"),
        ("a.txt", FINE + "1\n", ":4: '1' is not of the form 'user item'"),
        ("a.txt", FINE + "\n1 2 3\n" + FINE, ":5: '1 2 3' is not of the form 'user item'"),
        ("a.txt", FINE + "1\n2 3 4\n", ":4: '1' is not of the form"),
        ("a.txt", FINE + "x" * 300, ":4: '" + "x" * 76 + "... is not of the form"),
        ("a.txt", FINE + "8 1\n1 4\n", ":4: user 8 has only 1 action and 3 are needed; drop_short"),
        ("a.txt", FINE + "8 1\n9 4\n8 2\n", ":4: user 8 has only 2 actions .* the 2 such users"),
        ("a.dat", "1::2::3::4\n1::2::3\n", ":2: '1::2::3' is not of the form 'user::item::rating"),
        ("a.dat", "1::2::3::4\n1:2:::3::4\n", ":2: '1:2:::3::4' is not of the form"),
        ("a.dat", "1::2::3::4\n1::2::::4\n", ":2: '1::2::::4' is not of the form"),
        ("a.dat", "1::2::3::4\n1::2::3::4::\n", ":2: '1::2::3::4::' is not of the form"),
        ("a.dat", "1::2::3::4\n1::x::3::4\n", ":2: item 'x' is not an integer"),
        ("a.dat", "1::2::3::4\n1::2::3::4.5\n", ":2: timestamp '4.5' is not an integer"),
        ("a.dat", "1::2::3::4\n1::2 ::3::4\n", ":2: item '2 ' is not an integer"),
        ("a.csv", HEAD + "u,a\n", ":5: 2 columns, but the header names 3"),
        ("a.csv", HEAD + '\n"u\n",a\n', ":6: 2 columns .*, but the header names 3"),
        ("a.csv", HEAD + "u,a,1,2\n", ":5: 4 columns, but the header names 3"),
        ("a.csv", HEAD + ",a,1\n", ":5: user_id is empty"),
        ("a.csv", HEAD + "u,,1\n", ":5: item_id is empty"),
        ("a.csv", HEAD + "u,a,soon\n", ":5: timestamp 'soon' is neither a number nor an ISO"),
        ("a.csv", HEAD + "u,a,nan\n", ":5: the time is not a finite number"),
        ("a.csv", HEAD + "v,a,1\n", ":5: user v has only 1 action "),
        ("a.csv", HEAD.encode() + b"u,\xff,1\n", ":5: not UTF-8 text"),
        (
            "a.csv",
            "user,item_id,timestamp\n",
            ":1: no column 'user_id' among .* with --user or user=",
        ),
        ("a.csv", "user_id,item_id\nu,a\n", ":1: no column 'timestamp' among .* time=, or None"),
        ("a.inter", INTER + "u\tb\n", ":3: 2 columns, but the header names 3"),
        ("a.inter", "user_id\titem_id:token\n", ":1: header cell 'user_id' has no type"),
        ("a.inter", "user_id:token\n", ":1: no column 'item_id' among user_id"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, text, message):
    path = put(tmp_path, name, text)
    with pytest.raises(InputError) as caught:
        load(path)
    assert re.match(re.escape(str(path)) + message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_and_formats_that_do_not_exist(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        load(tmp_path / "none.txt")
    with pytest.raises(InputError, match="not a regular file"):
        load(tmp_path)
    path = put(tmp_path, "a.txt", FINE)
    with pytest.raises(
        InputError, match="format must be 'auto' or 'seqrec' or 'movielens' or 'csv'"
    ):
        load(path, format="tsv")
    with pytest.raises(InputError, match=r"a\.txt:1: .* 'user::item::rating::timestamp'"):
        load(path, format="movielens")
    with pytest.raises(InputError, match="min_actions must be"):
        load(path, min_actions=0)


def test_drop_short_leaves_out_users_and_their_own_items(tmp_path):
    path = put(tmp_path, "a.txt", "5 9\n1 7\n5 8\n2 7\n5 7\n2 6\n")
    data = load(path, drop_short=True)
    assert rows(data) == {"5": ["9", "8", "7"]} and data.item_ids == ("7", "8", "9")
    assert rows(load(path, drop_short=True, min_actions=2)) == {
        "2": ["7", "6"],
        "5": ["9", "8", "7"],
    }
    assert load(path, min_actions=1).num_users == 3
    with pytest.raises(InputError, match=r"a\.txt: no user has 4 actions or more"):
        load(path, drop_short=True, min_actions=4)


def test_attributes_are_read_and_unknown_items_ignored(tmp_path):
    path = put(tmp_path, "a.b.txt", FINE)
    put(tmp_path, "a.b.attributes.json", json.dumps({"1": [3, 4], "3": [], "99": [1]}))
    assert load(path).attributes == {"1": [3, 4], "3": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", ":1: must be an object"),
        ('{"1": [1],\n "99": [1.5]}', ":2: the attributes of item '99' must be a list of integers"),
        ('{"1": 4}', ":1: the attributes of item '1' must be a list"),
        ('{"1": [true]}', ":1: the attributes of item '1' must be a list"),
        ('{"1": [1],\n]', ":2: not valid JSON"),
    ],
)
def test_bad_attributes_are_named(tmp_path, text, message):
    path = put(tmp_path, "a.txt", FINE)
    attributes = put(tmp_path, "a.attributes.json", text)
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{attributes}{message}")


def test_write_seqrec_gives_back_what_was_read(tmp_path):
    path = put(tmp_path, "a.txt", "10 5\n2 40\n10 7\n2 5\n10 40\n2 7\n")
    put(tmp_path, "a.attributes.json", '{"5": [1, 2]}')
    data = load(path)
    write_seqrec(data, tmp_path / "new" / "b.txt")
    again = load(tmp_path / "new" / "b.txt")
    assert again.fingerprint() == data.fingerprint()
    assert again.user_ids == data.user_ids and again.attributes == {"5": [1, 2]}


def test_write_seqrec_refuses_ids_that_the_format_cannot_hold(tmp_path):
    data = SequenceDataset("made", [1, 2, 1], [0, 3], ["1", "B00"], ["1"])
    with pytest.raises(InputError, match=r"b\.txt: item id 'B00' is not an integer from 0 up"):
        write_seqrec(data, tmp_path / "b.txt")
    assert not list(tmp_path.iterdir())
