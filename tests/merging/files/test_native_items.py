"""Item rows of native checkpoints: matched by the ids in them or beside them, or refused."""

import json

import pytest
import safetensors.torch
import torch
from adapters.native_checkpoints import KINDS, rectools, same, values

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.merging import merge_files


def with_ids(tmp_path, orders):
    """RecTools' checkpoints whose item rows follow the ids."""
    paths = []
    for seed, ids in enumerate(orders):
        path = tmp_path / f"m{seed}.ckpt"
        rectools(path, seed, list(ids))
        paths.append(path)
    return paths


SEVEN = ["PAD", "a", "b", "c", "d", "e", "f"]


def test_rows_of_another_order_are_aligned_by_id(tmp_path):
    shuffled = ["PAD", "c", "f", "a", "e", "b", "d"]
    paths = with_ids(tmp_path, [SEVEN, shuffled])
    report = merge_files(paths, tmp_path / "out.ckpt")
    merged = fk.load_tensors(tmp_path / "out.ckpt")
    one, two = values(0)["item_embedding.weight"], values(1)["item_embedding.weight"]
    matched = two[[shuffled.index(own) for own in SEVEN]]
    expected = ((one.double() + matched.double()) / 2).float()
    assert same(merged["torch_model.item_embedding.weight"], expected)
    assert same(merged["torch_model.output.weight"], expected)
    assert list(merged.item_ids) == SEVEN
    assert report["members"][0]["file"] == "m0.ckpt"


def test_what_cannot_be_aligned_is_refused(tmp_path, caplog):
    def fails(orders, message):
        paths = with_ids(tmp_path, orders)
        with pytest.raises(InputError, match=message):
            merge_files(paths, tmp_path / "out.ckpt")
        assert not (tmp_path / "out.ckpt").exists()

    numbers = ["PAD", *map(str, range(10, 16))]
    fails(
        [numbers, ["PAD", *(f"{own}.0" for own in numbers[1:])]], "first is '10.0', and there '10'"
    )
    fails([numbers, ["PAD", *range(10, 16)]], "first is 10, and there '10'")
    fails([SEVEN, [*SEVEN[:-1], "g"]], "lacks the item 'g', which another member has")
    fails([SEVEN, [*SEVEN[:-1], "a"]], "twice")
    # Four columns: the table's width is the number of items.
    fails([["a", "b", "c", "d"], ["b", "a", "c", "d"]], "item rows cannot be told from others")
    fails([list("abcdefghijkl"), list("bacdefghijkl")], "no tensor has a row for each of its 12")
    plain = tmp_path / "plain.ckpt"
    rectools(plain, 3, None)
    caplog.clear()
    one, two = tmp_path / "one.pth", tmp_path / "two.pth"
    for path in (one, two):
        torch.save(values(0), path)
    merge_files([one, two], tmp_path / "out.pth")
    assert [record.message for record in caplog.records] == [
        "no member has item ids: row i is taken to be the same item in all members"
    ]


def test_item_ids_beside_a_checkpoint(tmp_path):
    """A table with a row of zeros before the items, and a bias without."""
    ids = list("abcdef")
    orders = [ids, list("cfaebd")]
    rows = []
    for number, order in enumerate(orders):
        table = torch.cat([torch.zeros(1, 4), torch.randn(6, 4)])
        state = {"items": table, "bias": torch.randn(6), "dense": torch.randn(4, 4)}
        safetensors.torch.save_file(state, tmp_path / f"{number}.safetensors")
        (tmp_path / f"{number}.json").write_text(json.dumps({"item_ids": order}))
        rows.append(state)
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    merge_files(paths, tmp_path / "out.safetensors")
    merged = fk.load_tensors(tmp_path / "out.safetensors")
    index = [orders[1].index(own) for own in ids]
    bias = (rows[0]["bias"].double() + rows[1]["bias"][index].double()) / 2
    table = (rows[0]["items"][1:].double() + rows[1]["items"][1:][index].double()) / 2
    assert same(merged["bias"], bias.float())
    assert same(merged["items"], torch.cat([torch.zeros(1, 4), table.float()]))
    (tmp_path / "1.json").unlink()
    with pytest.raises(InputError, match="1.safetensors: has no item ids, so .*1.json"):
        merge_files(paths, tmp_path / "out.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
def test_other_catalogues_are_united(suffix, tmp_path):
    """A row of both is averaged, one of a single member kept; first a row of padding."""
    orders = [["a", "b", "c", "d", "e"], ["f", "c", "a", "g", "h", "i"]]
    states = []
    for number, ids in enumerate(orders):
        generator = torch.Generator().manual_seed(number)
        table = torch.randn(len(ids) + 1, 4, generator=generator)
        state = {"items": table, "head": table, "dense": torch.randn(4, 4, generator=generator)}
        path = tmp_path / f"{number}.{suffix}"
        if suffix == "safetensors":
            del state["head"]
            safetensors.torch.save_file(state, path, metadata={"format": "pt"})
        else:
            torch.save(state, path, _use_new_zipfile_serialization=suffix == "pth")
        about = {"item_ids": ids, "first_item": 1}
        path.with_suffix(".json").write_text(json.dumps(about))
        states.append(state)
    paths = [tmp_path / f"{number}.{suffix}" for number in range(2)]
    out = tmp_path / f"out.{suffix}"
    merge_files(paths, out, weights=[1, 3])
    union = ["a", "b", "c", "d", "e", "f", "g", "h", "i"]
    about = json.loads((tmp_path / "out.json").read_text())
    assert about == {"item_ids": union, "first_item": 1}
    merged = fk.load_tensors(out)
    assert list(merged) == list(fk.load_tensors(paths[0]))
    one, two = (state["items"].double() for state in states)
    expected = [0.25 * one[0] + 0.75 * two[0]]
    for own in union:
        rows = [
            t[1 + ids.index(own)] for t, ids in zip((one, two), orders, strict=True) if own in ids
        ]
        expected.append(0.25 * rows[0] + 0.75 * rows[1] if len(rows) == 2 else rows[0])
    assert torch.allclose(merged["items"].double(), torch.stack(expected), atol=1e-6)
    if suffix != "safetensors":
        assert merged["head"].data_ptr() == merged["items"].data_ptr()
    # What was written is a member of the next merge.
    merge_files([out, paths[0]], tmp_path / f"again.{suffix}")


def test_tokens_that_differ_are_refused(tmp_path):
    paths = [tmp_path / "one", tmp_path / "two"]
    for number, path in enumerate(paths):
        KINDS["hf"][1](path, number)
        (path / "vocab.json").write_text(json.dumps({"a": number}))
        (path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has other tokens than that of"):
        merge_files(paths, tmp_path / "out")
