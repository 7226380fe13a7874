"""The common data sets in the shapes that their publishers ship, and text files with faults.

Each file is made here, with the header, the separators, the quotes and the oddities of the real
one. Read from Python and by the command line, to the same sequences.
"""

from __future__ import annotations

import gzip

import pytest

from fisherkern.cli import main
from fisherkern.data import from_frame, load
from fisherkern.errors import InputError
from fisherkern.files import read_json

# (user, item, seconds): users out of order, times out of order, one tie in file order.
EVENTS = [(9, 30, 50), (2, 7, 40), (9, 7, 60), (2, 30, 40), (2, 100, 10), (9, 100, 70)]
SEQUENCES = {"9": ["30", "7", "100"], "2": ["100", "7", "30"]}
DAY = 86_400


def lines(form, header="", ending="\n"):
    """`form` filled with u, i, t, a date d, and the row's number n."""
    rows = [
        form.format(u=u, i=i, t=t, n=n, d=f"2014-04-07T10:51:{t % 60:02d}.{n:03d}Z", s=t % 60)
        for n, (u, i, t) in enumerate(EVENTS)
    ]
    return (f"{header}{ending}" if header else "") + ending.join(rows) + ending


# The events above span a minute, and so do the ISO times of this list: their own order.
DATED = {"9": ["7", "100", "30"], "2": ["100", "7", "30"]}

PUBLISHED = {
    "MovieLens 20M and 32M": (
        "ratings.csv",
        lines("{u},{i},3.5,{t}", "userId,movieId,rating,timestamp"),
        {"user": "userId", "item": "movieId"},
        SEQUENCES,
    ),
    "MovieLens 32M from Windows": (
        "ratings.csv",
        lines("{u},{i},3.5,{t}", "userId,movieId,rating,timestamp", "\r\n"),
        {"user": "userId", "item": "movieId"},
        SEQUENCES,
    ),
    "MovieLens 10M": ("ratings.dat", lines("{u}::{i}::3.5::{t}"), {}, SEQUENCES),
    "MovieLens 100K": (
        "u.data",
        lines("{u}\t{i}\t3\t{t}"),
        {"user": 0, "item": 1, "time": 3},
        SEQUENCES,
    ),
    "Yoochoose": (
        "yoochoose-clicks.dat",
        lines("{u},{d},{i},0"),
        {"user": 0, "item": 2, "time": 1},
        DATED,
    ),
    "Diginetica": (
        "train-item-views.csv",
        lines("{u};NA;{i};{t};2016-05-09", "sessionId;userId;itemId;timeframe;eventdate"),
        {"user": "sessionId", "item": "itemId", "time": "timeframe"},
        SEQUENCES,
    ),
    "RetailRocket": (
        "events.csv",
        lines("14332{t},{u},view,{i},", "timestamp,visitorid,event,itemid,transactionid"),
        {"user": "visitorid", "item": "itemid"},
        SEQUENCES,
    ),
    "Steam reviews": (
        "steam_reviews.json.gz",
        lines(
            "{{u'username': u'{u}', u'hours': 0.1, u'product_id': u'{i}', u'page': 1, "
            "u'date': u'2017-12-{s}', u'text': u'it\\'s \"great\" \\u2764', u'early': False}}"
        ),
        {"user": "username", "item": "product_id", "time": None},
        {"9": ["30", "7", "100"], "2": ["7", "30", "100"]},
    ),
    "Steam 200k": (
        "steam-200k.csv",
        lines('{u},"{i}",play,1.0,0'),
        {"user": 0, "item": 1, "time": None},
        {"9": ["30", "7", "100"], "2": ["7", "30", "100"]},
    ),
    "Amazon ratings 2014": (
        "ratings_Beauty.csv",
        lines("{u},{i},5.0,{t}"),
        {"user": 0, "item": 1, "time": 3},
        SEQUENCES,
    ),
    "Amazon ratings 2018": (
        "All_Beauty.csv",
        lines("{i},{u},5.0,{t}"),
        {"user": 1, "item": 0, "time": 3},
        SEQUENCES,
    ),
    "Amazon ratings 2023": (
        "All_Beauty.csv.gz",
        lines("{u},{i},5.0,{t}", "user_id,parent_asin,rating,timestamp"),
        {"item": "parent_asin"},
        SEQUENCES,
    ),
    "Amazon reviews 2018": (
        "Beauty_5.json.gz",
        lines(
            '{{"overall": 5.0, "verified": true, "reviewerID": "{u}", "asin": "{i}", '
            '"style": {{"Size:": " 1"}}, "reviewText": "a\\nb \\"c\\"", "unixReviewTime": {t}}}'
        ),
        {"user": "reviewerID", "item": "asin", "time": "unixReviewTime"},
        SEQUENCES,
    ),
    "Amazon reviews 2023": (
        "All_Beauty.jsonl",
        lines('{{"images": [], "parent_asin": "{i}", "user_id": "{u}", "timestamp": {t}}}'),
        {"item": "parent_asin"},
        SEQUENCES,
    ),
    "Last.fm 1K": (
        "userid-timestamp-artid-artname-traid-traname.tsv",
        # Names with stray quotes, and identifiers that are missing in the columns beside.
        lines('{u}\t{d}\t{i}\t"Weird Al\t\tDon\'t "Stop'),
        {"user": 0, "item": 2, "time": 1},
        DATED,
    ),
    "Last.fm HetRec": (
        "user_taggedartists-timestamps.dat",
        lines("{u}\t{i}\t1\t{t}", "userID\tartistID\ttagID\ttimestamp"),
        {"user": "userID", "item": "artistID"},
        SEQUENCES,
    ),
    "a table with header, columns by number": (
        "a.csv",
        lines("{t};{i};{u}", "time of day;what;who"),
        {"user": 2, "item": 1, "time": 0, "header": True},
        SEQUENCES,
    ),
    "semicolons and no suffix": (
        "a.txt",
        lines("{u};{i};{t}", "user_id;item_id;timestamp"),
        {},
        SEQUENCES,
    ),
}  # fmt: skip


def sequences(data):
    return {
        user: [data.item_ids[item - 1] for item in data.sequence(number)]
        for number, user in enumerate(data.user_ids)
    }


def write(path, text):
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def flags(arguments):
    words = []
    for name, value in arguments.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", "none" if value is None else str(value)]
    return words


@pytest.mark.parametrize("name", PUBLISHED)
def test_read_as_published(name, tmp_path, capsys):
    file, text, arguments, expected = PUBLISHED[name]
    path = write(tmp_path / file, text)
    data = load(path, **arguments)
    assert sequences(data) == expected
    words = ["data", "--data", str(path), "--out", str(tmp_path / "out"), *flags(arguments)]
    assert main(words) == 0, capsys.readouterr().err
    assert read_json(tmp_path / "out" / "result.json")["fingerprint"] == data.fingerprint()
    # What was stored is read again.
    assert main(["data", "--config", str(tmp_path / "out" / "result.json")]) == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_byte_order_mark_and_gzip_change_nothing(name, tmp_path):
    file, text, arguments, expected = PUBLISHED[name]
    marked = write(tmp_path / file, "\ufeff" + text)
    assert sequences(load(marked, **arguments)) == expected
    packed = write(tmp_path / f"packed-{file.removesuffix('.gz')}.gz", text)
    assert sequences(load(packed, **arguments)) == expected


def test_user_item_lines_with_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeff2 7\n2 30\n2 100\n")
    assert sequences(load(path)) == {"2": ["7", "30", "100"]}
    path = write(tmp_path / "a.txt", "2\t7\n2\t30\n2\t100\n")
    assert sequences(load(path)) == {"2": ["7", "30", "100"]}


HEAD = "user_id,item_id,title,timestamp\n"
FINE = "".join(f"1,{n},t,{n}\n" for n in range(4))
FAULTS = {
    "stray opening quote": (HEAD + FINE + '1,8,"t,9\n' + FINE * 500, {}, ":6: a quote opens a"),
    "and another one later": (HEAD + FINE + '1,8,"t,9\n' + FINE + '1,9,"u,5\n', {}, ":6: "),
    "text after a quote": (HEAD + FINE + '1,8,"t"x,9\n' + FINE, {}, ":6: "),
    "a quoted cell of lines too short": (HEAD + FINE + '1,"8\n9\n0"\n', {}, ":6: 2 columns"),
    "a short row after quotes of lines": (HEAD + '1,8,"a\nb\nc",9\n1,2\n', {}, ":5: 2 columns"),
    "no header": (FINE, {}, ":1: no column 'user_id' among 1, 0, t, 0.*by its number from 0"),
    "tabs without header": ("1\t2\t3\n" * 4, {}, ":1: no column 'user_id' among 1, 2, 3.*--user"),
    "a header of numbers wanted": (FINE, {"header": False}, "numbers from 0 in a file without"),
    "two columns of a name": ("user_id,user_id,item_id,timestamp\n1,1,2,3\n", {}, ":1: two"),
    "a column too far": (FINE, {"user": 0, "item": 1, "time": 7}, ":1: no column 7, only 0 to 3"),
    "a header read as a row": (HEAD + FINE, {"user": 0, "item": 1, "time": 3}, ":1: 3 'time"),
    "short users": (HEAD + "1,2,t,3\n", {}, r"drop_short=True \(--drop-short\) leaves out the 1"),
    "semicolons": ("a;b;c\n1;2;3\n", {}, "no column 'user_id' among a, b, c"),
    "empty ids": (HEAD + "1,,t,3\n", {}, ":2: item_id is empty"),
    "long line": (HEAD.strip() + "x" * (1 << 20), {}, ":1: longer than 1,048,576"),
    "dates of no calendar": (HEAD + "1,2,t,2024-13-41\n", {}, ":2: timestamp '2024-13-41' is"),
    "times of 400 digits": (HEAD + f"1,2,t,{'9' * 400}\n" * 3, {}, "not a finite number"),
    "zero bytes": (HEAD + "1,2\0,t,4\n" * 3 + "1\n", {}, ":"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named_with_the_right_line(case, tmp_path):
    text, arguments, message = FAULTS[case]
    for name in ("a.csv", "a.csv.gz"):
        path = write(tmp_path / name, text)
        with pytest.raises(InputError, match=message) as error:
            load(path, **arguments)
        assert (
            str(error.value).startswith((str(path), "user, item")) and len(str(error.value)) < 500
        )


RECORDS = {
    "a call": ("__import__('os').system('echo')\n", "not valid JSON"),
    "a list": ("[1, 2]\n", "no record, but [1, 2]"),
    "deep": ("{'a':" * 5000 + "\n", "nested too deep|not valid JSON"),
    "deep literal": ("{'a':" + "(" * 500 + ")" * 500 + "}\n", "not valid JSON"),
    "digits": ('{"user_id": ' + "9" * 5000 + "}\n", "a number of 5000 digits"),
    "no such column": ('{"user_id": 1, "item": 2}\n', "the record has no 'item_id', only"),
    "null": ('{"user_id": 1, "item_id": null, "timestamp": 3}\n', "item_id is None"),
    "a list as an id": ('{"user_id": 1, "item_id": [2], "timestamp": 3}\n', r"item_id is \[2\]"),
    "true as an id": ('{"user_id": true, "item_id": 2, "timestamp": 3}\n', "user_id is True"),
    "an empty id": ('{"user_id": "", "item_id": 2, "timestamp": 3}\n', "user_id is ''"),
    "a time that is none": ('{"user_id": 1, "item_id": 2, "timestamp": "x"}\n', "timestamp 'x' is"),
    "a sum": ("{'user_id': 1 + 1, 'item_id': 2, 'timestamp': 3}\n", "not valid JSON"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records_are_data_and_nothing_else(case, tmp_path):
    text, message = RECORDS[case]
    fine = '{"user_id": 1, "item_id": 2, "timestamp": 3}\n'
    path = write(tmp_path / "a.jsonl", fine + "\n" + text)
    with pytest.raises(
        InputError, match=f":3:.*({message})" if "[1" not in message else ":3:"
    ) as e:
        load(path)
    assert len(str(e.value)) < 400
    with pytest.raises(InputError, match="columns of records have names"):
        load(path, user=0, item=1, time=2)


@pytest.mark.parametrize("separator", ["tab", "\\t", "\t"])
def test_a_tab_can_be_named(separator, tmp_path, capsys):
    path = write(tmp_path / "a.txt", lines("{u}\t{i}, x\t{t}", "user_id\titem_id\ttimestamp"))
    assert load(path, separator=separator).num_items == 3
    words = ["data", "--data", str(path), "--separator", separator, "--out", str(tmp_path / "out")]
    assert main(words) == 0


def test_quotes_among_tabs_are_text_unless_asked_for(tmp_path):
    path = write(tmp_path / "a.tsv", lines('{u}\t"{i}"\t{t}', "user_id\titem_id\ttimestamp"))
    assert set(load(path).item_ids) == {'"30"', '"7"', '"100"'}
    assert set(load(path, quotes=True).item_ids) == {"30", "7", "100"}
    path = write(tmp_path / "a.csv", lines('{u},"{i}",{t}', "user_id,item_id,timestamp"))
    assert set(load(path, quotes=False).item_ids) == {'"30"', '"7"', '"100"'}


def parquet(tmp_path, **columns):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    base = {"user_id": [1] * 3, "item_id": [7, 30, 100], "timestamp": [2, 1, 3]}
    pyarrow.parquet.write_table(arrow.table(base | columns), path)
    return path


def typed(values, make):
    arrow = pytest.importorskip("pyarrow")
    return arrow.array(values, make(arrow))


LATE = 1_700_000_000_000_000_000
READ = {
    "nanoseconds beyond microseconds": ("timestamp", [LATE + 2, LATE + 1, LATE + 3], "ns"),
    "microseconds": ("timestamp", [LATE // 1000 + 2, LATE // 1000 + 1, LATE // 1000 + 3], "us"),
    "milliseconds": ("timestamp", [2, 1, 3], "ms"),
    "seconds": ("timestamp", [2, 1, 3], "s"),
    "seconds before 1970": ("timestamp", [-2, -3, -1], "s"),
}


@pytest.mark.parametrize("case", READ)
def test_timestamps_of_every_unit_keep_their_order(case, tmp_path):
    name, values, unit = READ[case]
    for zone in (None, "UTC", "Europe/Berlin"):
        path = parquet(
            tmp_path, **{name: typed(values, lambda pa, zone=zone: pa.timestamp(unit, zone))}
        )
        assert sequences(load(path)) == {"1": ["30", "7", "100"]}


ODD = {
    "structs": lambda pa: pa.array([{"a": 1}] * 3),
    "lists": lambda pa: pa.array([[1]] * 3),
    "bytes": lambda pa: pa.array([b"1"] * 3),
    "bytes of a size": lambda pa: pa.array([b"1"] * 3, pa.binary(1)),
    "times of day": lambda pa: pa.array([1] * 3, pa.time64("ns")),
    "times of day in ms": lambda pa: pa.array([1] * 3, pa.time32("ms")),
    "durations": lambda pa: pa.array([1] * 3, pa.duration("us")),
    "truths": lambda pa: pa.array([True] * 3),
    "maps": lambda pa: pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    "nothing": lambda pa: pa.nulls(3),
    "lists of a size": lambda pa: pa.array([[1]] * 3, pa.list_(pa.int64(), 1)),
}


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
@pytest.mark.parametrize("case", ODD)
def test_columns_of_other_types_are_refused_in_one_line(case, column, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    path = parquet(tmp_path, **{column: ODD[case](arrow)})
    with pytest.raises(InputError, match=f"a.parquet: .*{column}") as error:
        load(path)
    assert len(str(error.value)) < 400


def test_odd_values_of_usual_types_are_read_or_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    whole = arrow.array([7, 30, 100], arrow.decimal128(20, 0))
    assert sequences(load(parquet(tmp_path, item_id=whole)))["1"] == ["30", "7", "100"]
    coded = arrow.array(["7", "30", "100"]).dictionary_encode()
    assert sequences(load(parquet(tmp_path, item_id=coded)))["1"] == ["30", "7", "100"]
    large = arrow.array([2**64 - 1, 2**63, 5], arrow.uint64())
    assert set(load(parquet(tmp_path, item_id=large)).item_ids) == {str(2**64 - 1), str(2**63), "5"}
    far = arrow.array([2**62, 1, 3], arrow.timestamp("s"))
    frame = arrow.table({"user_id": [1] * 3, "item_id": [7, 30, 100], "timestamp": far})
    assert sequences(from_frame(frame))["1"] == ["30", "100", "7"]
    with pytest.raises(InputError, match="finite"):
        load(parquet(tmp_path, timestamp=arrow.array([1.0, float("nan"), 2.0])))
    path = tmp_path / "b.parquet"
    path.write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    with pytest.raises(InputError, match="could not be read as Parquet"):
        load(path)
