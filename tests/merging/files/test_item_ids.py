"""Item ids read and numbered a piece at a time: as a JSON parser and a dictionary find them."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers.merging_files import saved

from fisherkern.errors import InputError
from fisherkern.fingerprint import item_ids_sha256
from fisherkern.merging.files import item_ids
from fisherkern.merging.files.item_ids import ItemIdFile, ItemNumbers, MergedIds
from fisherkern.merging.files.streaming import merge_files
from fisherkern.training import load_model

ODD = ["a", "b,c", 'd", "e', "]", "\\", '\\", ', "é, 鱼", "\U0001f41f", "", " ", "x" * 50, ","]


@pytest.mark.parametrize("piece", [1, 2, 7, 40, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_any_strings_in_any_pieces_are_those_of_a_json_parser(
    piece, ascii_only, indent, tmp_path, monkeypatch
):
    monkeypatch.setattr(item_ids, "PIECE", piece)
    path = tmp_path / "m.json"
    for ids, extra in itertools.product(
        ([], ["a"], [""], ODD, ODD[::-1], ["\\"]), ({}, {"x": [1, {"item_ids": ["n"]}], "y": "],"})
    ):
        content = {"class": "A", "item_ids": ids, "metrics": {"m": 1.5}, "extra": extra}
        path.write_text(json.dumps(content, ensure_ascii=ascii_only, indent=indent))
        file = ItemIdFile(path)
        assert [own for part in file.pieces() for own in part] == ids
        assert file.count == len(ids) and file.sha256 == item_ids_sha256(ids)
        assert file.about == {key: content[key] for key in ("class", "metrics", "extra")}
        if ids:
            assert file.at(len(ids) - 1) == ids[-1]


def test_item_ids_behind_others_of_that_name_are_read(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"extra": {"item_ids": ["no"]}, "item_ids": ["yes"]}')
    file = ItemIdFile(path)
    assert list(file.pieces()) == [["yes"]] and file.about == {"extra": {"item_ids": ["no"]}}
    path.write_text('{"item_ids": null, "metrics": {}}')
    assert not list(file.pieces()) and file.about == {"metrics": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"item_ids": ["a", ]}', "m.json:1: not valid JSON"),
        ('{"item_ids": [, "a"]}', "m.json:1: not valid JSON"),
        ('{"item_ids": ["a",, "b"]}', "m.json:1: not valid JSON"),
        ('{"item_ids": ["a", "b"', "m.json:1: not valid JSON"),
        ('{"item_ids": ["a", "b', "m.json:1: not valid JSON"),
        ('{"item_ids": ["a"], "item_ids": ["b"]}', "stands twice"),
        ('{"item_ids": ["a"],\n "x": nan}', "m.json:2: not valid JSON"),
        ('{"item_ids": ["a", "\\ud800"]}', "half of a surrogate pair"),
        ('{"item_ids": ["a", 3]}', "not a list of strings"),
        ('{"item_ids": ["a", ["b"]]}', "not a list of strings"),
        ('{"item_ids": "a"}', "not a list of strings"),
        ('["item_ids"]', "not a JSON object"),
        ("", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_what_is_no_list_of_strings_is_refused(text, message, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(item_ids, "PIECE", piece)
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        list(ItemIdFile(path).pieces())
    assert "\n" not in str(error.value)


def numbered(tmp_path, lists):
    """(Union, each list's numbers) by `ItemNumbers`."""
    numbers, files, found, news = ItemNumbers(1000), [], [], []
    for place, ids in enumerate(lists):
        path = tmp_path / f"{place}.json"
        path.write_text(json.dumps({"item_ids": ids}))
        files.append(ItemIdFile(path))
        before = numbers.count
        found.append(numbers.add(files[-1], len(ids)))
        news.append((found[-1] >= before).nonzero()[:, 0])
    return [own for part in MergedIds(files, news[1:]).pieces() for own in part], found


@pytest.mark.parametrize("collide", ["never", "first halves", "many first halves"])
def test_numbers_are_those_of_a_dictionary(collide, tmp_path, monkeypatch):
    """Also where the halves of the hashes that are looked up are the same for many ids."""
    monkeypatch.setattr(item_ids, "PIECE", 64)
    if collide != "never":
        few = 3 if collide == "many first halves" else 60
        own = {}
        monkeypatch.setattr(
            item_ids,
            "hash",
            lambda text: (
                hash(text) if text.endswith("\n") else own.setdefault(text, len(own) % few)
            ),
            raising=False,
        )
    generator = np.random.default_rng(0)
    lists = [[str(v) for v in generator.permutation(200)[:n]] for n in (90, 120, 0, 150, 1)]
    place: dict[str, int] = {}
    expected = [[place.setdefault(item, len(place)) for item in ids] for ids in lists]
    union, found = numbered(tmp_path, lists)
    assert union == list(place)
    assert [own.tolist() for own in found] == expected


@pytest.mark.parametrize("lists", [["abca"], ["abc", "dada"], ["abc", "dbeb"]])
def test_an_id_listed_twice_is_named(lists, tmp_path):
    with pytest.raises(InputError, match=r"\.json has item id '[abd]' twice in its item_ids"):
        numbered(tmp_path, [list(ids) for ids in lists])


def test_a_merged_json_is_the_usual_one(tmp_path, monkeypatch):
    monkeypatch.setattr(item_ids, "PIECE", 16)
    lists = [["a\nb", "c", "é"], ["c", 'q"', "a\nb", "\\n"], ["z", "c"]]
    paths = [saved(tmp_path, n, "SASRec", ids=ids)[0] for n, ids in enumerate(lists)]
    out = tmp_path / "out.safetensors"
    merge_files(paths, out)
    text = out.with_suffix(".json").read_text()
    about = json.loads(text)
    assert about["item_ids"] == ["a\nb", "c", "é", 'q"', "\\n", "z"]
    assert text == json.dumps(about, indent=1) + "\n"
    assert load_model(out).item_ids == about["item_ids"]
    assert torch.isfinite(load_model(out).item_embedding.weight).all()
