"""Tables of any separator, header and column order, packed or not, and the lines of their rows."""

import gzip
import itertools
import re

import pytest

import fisherkern.data.tables as tables
from fisherkern.data import SequenceDataset, load
from fisherkern.errors import InputError

# User 9 comes first, item 30 too; user 2's rows are out of time order, with a tie (7 before 30).
EVENTS = [(9, 30, 5), (2, 7, 4), (9, 7, 6), (2, 30, 4), (2, 100, 1), (9, 100, 7)]
SEQUENCES = {"9": ["30", "7", "100"], "2": ["100", "7", "30"]}


def sequences(data: SequenceDataset) -> dict[str, list[str]]:
    return {
        user: [data.item_ids[item - 1] for item in data.sequence(number)]
        for number, user in enumerate(data.user_ids)
    }


def table(separator: str, order=("user_id", "item_id", "timestamp"), header=True) -> str:
    names = ("user_id", "item_id", "timestamp")
    lines = [separator.join(order)] if header else []
    for event in EVENTS:
        cells = dict(zip(names, map(str, event), strict=True))
        lines.append(separator.join(cells[name] for name in order))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("order", list(itertools.permutations(("user_id", "item_id", "timestamp"))))
def test_any_separator_and_order(tmp_path, separator, order):
    path = tmp_path / ("a.tsv" if separator == "\t" else "a.csv")
    path.write_text(table(separator, order))
    assert sequences(load(path)) == SEQUENCES
    path.write_text(table(separator, order, header=False))
    places = {name.removesuffix("_id"): order.index(name) for name in order}
    data = load(path, user=places["user"], item=places["item"], time=places["timestamp"])
    assert sequences(data) == SEQUENCES


def test_a_separator_may_be_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(table(" "))
    assert sequences(load(path, separator=" ")) == SEQUENCES
    path.write_text('user_id;item_id;"a, b, c"\n' + "".join(f"1;{i};x\n" for i in range(3)))
    with pytest.raises(InputError, match="no column 'user_id' among user_id;item_id;"):
        load(path, time=None)
    assert load(path, time=None, separator=";").num_items == 3
    for wrong in ("", "::", '"', "\n"):
        with pytest.raises(InputError, match="separator must be one character, got"):
            load(path, separator=wrong)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv.gz", table(",")),
        ("a.tsv.gz", table("\t")),
        ("a.dat.gz", "".join(f"{user}::{item}::1::{time}\n" for user, item, time in EVENTS)),
        ("a.csv", table(",")),  # known by its bytes, not by its name
    ],
)
def test_packed_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.attributes.json").write_text('{"7": [1]}')
    data = load(path)
    assert sequences(data) == SEQUENCES
    assert data.name == "a" and data.attributes == {"7": [1]}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\..*: could not be read: "):
        load(path)


def test_packed_seqrec(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"1 5\n1 6\n1 7\n"))
    assert sequences(load(path)) == {"1": ["5", "6", "7"]}


def test_integer_times_are_not_rounded(tmp_path):
    """Two nanosecond times that are one number in float64, later one first."""
    path, late = tmp_path / "a.csv", 1_700_000_000_000_000_001
    path.write_text(f"user_id,item_id,timestamp\n1,5,{late}\n1,6,{late - 1}\n1,7,{late + 1}\n")
    assert sequences(load(path)) == {"1": ["6", "5", "7"]}


def test_numbers_and_dates_may_be_mixed_over_blocks(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("user_id,item_id,timestamp\n1,5,3\n1,6,2.5\n1,7,1970-01-01T00:00:02\n1,8,1\n")
    for size in (1, 2, 3, 500):
        monkeypatch.setattr(tables, "_BLOCK_ROWS", size)
        assert sequences(load(path)) == {"1": ["8", "7", "6", "5"]}


@pytest.mark.parametrize("size", [1, 2, 3, 500])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["1,5,1", "", "1,6"], ":4: 2 columns, but the header names 3"),
        (['"1\n",5,1', '1,"6\r\n\n7",2', "1,,3"], ":7: item_id is empty"),
        (["1,5,1", "", '"\n",6,2', "", "1,7,soon"], ":7: timestamp 'soon' is neither"),
        (["1,5,1", "1,6,soon", "1,,3"], ":3: timestamp 'soon' is neither"),
        (["1,5,1", "1,,2", "1"], ":3: item_id is empty"),
        (["1,5,nan"], ":2: the time is not a finite number"),
        (["1,5,1", '"2\n\n",6,1'], ":2: user 1 has only 1 action "),
    ],
)
def test_lines_are_counted_in_blocks_of_any_size(tmp_path, monkeypatch, size, rows, said):
    monkeypatch.setattr(tables, "_BLOCK_ROWS", size)
    path = tmp_path / "a.csv"
    path.write_bytes("\n".join(["user_id,item_id,timestamp", *rows, ""]).encode())
    with pytest.raises(InputError) as caught:
        load(path)
    assert re.match(re.escape(str(path)) + said, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("1,5\n", {"user": 0, "item": 2}, ":1: no column 2, only 0 to 1"),
        ("\n1,5\n", {"user": -1, "item": 1}, ":2: no column -1, only 0 to 1"),
        ("1,5\n1,6,7\n", {"user": 0, "item": 1}, ":2: 3 columns, but the first row has 2"),
        ("1,5\n,6\n", {"user": 0, "item": 1}, ":2: 0 is empty"),
        ("\n", {"user": 0, "item": 1}, ":1: the file holds no interactions"),
    ],
)
def test_bad_tables_without_a_header_are_named(tmp_path, text, arguments, said):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(path, time=None, **arguments)
    assert str(caught.value) == f"{path}{said}"


def test_names_and_indices_do_not_mix(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("1,5\n")
    with pytest.raises(InputError, match="must all be names, or all be indices"):
        load(path, user=0, item=1)
    with pytest.raises(InputError, match="user must be a column's name or index, got True"):
        load(path, user=True)
