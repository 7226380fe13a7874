"""MemberSet of different catalogues, merged in files: as in memory, and what cannot be matched."""

import json

import pytest
import safetensors.torch
import torch
from helpers.merging_files import saved, saved_fisher

from fisherkern.encoders import ParallelEncoders
from fisherkern.errors import InputError
from fisherkern.files import read_json, read_tensors, write_json
from fisherkern.merging.files import streaming, tensor_files
from fisherkern.merging.files.streaming import merge_files
from fisherkern.merging.merge import merge
from fisherkern.training import load_model, save_model


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks, and many reads in a block, from small tensors."""
    from fisherkern.merging import blocks, fishers
    from fisherkern.merging.files import fisher_files

    for module in (blocks, fisher_files, fishers):
        monkeypatch.setattr(module, "BLOCK", 13)
    monkeypatch.setattr(fisher_files, "READ", 31)
    monkeypatch.setattr(streaming, "READ", 29)
    monkeypatch.setattr(tensor_files, "PAGE", 30)
    monkeypatch.setattr(tensor_files, "SPAN", 100)


# Items in all members, in two, in one; in other orders; the base lacks some and has one more.
IDS = ("abcdefghijk", "kxacbfyed", "zyjihgfedcbaw", "jibgxazkq")

ARGUMENTS = {
    "uniform": {},
    "weighted": {"weights": [3, 0, 0.5]},
    "fisher": {"fishers": True},
    "fisher-weighted": {"fishers": True, "weights": [1, 2, 0], "floor": 1e-3, "normalize": None},
    "fisher-row": {"method": "fisher", "fishers": True, "options": {"group": "row"}, "floor": 0.0},
    "task_arithmetic": {"method": "task_arithmetic", "base": True, "options": {"scale": 0.7}},
    "dare": {"method": "dare", "base": True, "seed": 3},
}
KINDS = {
    "BERT4Rec-tied": ("BERT4Rec", {}, torch.float32),
    "BERT4Rec-untied": ("BERT4Rec", {"tied": False}, torch.bfloat16),
    "SASRec-untied": ("SASRec", {"tied": False, "bias": True}, torch.float32),
    "GRU4Rec-tied": ("GRU4Rec", {}, torch.float64),
    "Caser-untied": ("Caser", {}, torch.float32),
}


def assert_same(out, expected):
    merged = load_model(out)
    assert merged.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    assert merged.item_ids == expected.item_ids
    assert merged.config == expected.config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ARGUMENTS)
def test_the_union_is_that_in_memory_to_the_last_bit(case, kind, tmp_path):
    name, config, dtype = KINDS[kind]
    found = [saved(tmp_path, n, name, dtype, ids, **config) for n, ids in enumerate(IDS)]
    paths, models = [path for path, _ in found[:3]], [load_model(path) for path, _ in found]
    given, held = dict(ARGUMENTS[case]), dict(ARGUMENTS[case])
    if given.pop("fishers", None):
        fishers = [saved_fisher(tmp_path, n, models[n]) for n in range(3)]
        given["fishers"], held["fishers"] = zip(*fishers, strict=True)
    if given.pop("base", None):
        given["base"], held["base"] = found[3][0], models[3]
    out = tmp_path / "out" / "merged.safetensors"
    provenance = merge_files(paths, out, **given)
    expected = merge(models[:3], **held)
    assert_same(out, expected)
    assert provenance["catalogue"]["items"] == len(set("".join(IDS[:3])))
    assert provenance["catalogue"]["owners"] == expected.merge_report["items"]
    assert [own["items"] for own in provenance["members"]] == [11, 9, 13]


def test_rows_by_hand(tmp_path):
    """The mean of an item's owners, found one by one in the files."""
    found = [saved(tmp_path, n, ids=ids) for n, ids in enumerate(IDS[:2])]
    out = tmp_path / "out.safetensors"
    merge_files([path for path, _ in found], out, weights=[1, 3])
    merged = load_model(out)
    table = merged.item_embedding.weight.detach()
    assert merged.item_ids == list("abcdefghijkxy")
    for row, item in enumerate(merged.item_ids, start=1):
        own = [
            (lam, model.item_embedding.weight[ids.index(item) + 1].detach().double())
            for lam, ids, (_, model) in zip((1, 3), IDS, found, strict=False)
            if item in ids
        ]
        mean = sum(lam * value for lam, value in own) / sum(lam for lam, _ in own)
        assert torch.allclose(table[row].double(), mean, rtol=1e-6)
    for row in (0, -1):  # padding and mask
        pair = [model.item_embedding.weight[row].detach().double() for _, model in found]
        assert torch.allclose(table[row].double(), (pair[0] + 3 * pair[1]) / 4, rtol=1e-6)


@pytest.mark.parametrize("orders", [("abcd", "dbca"), ("abcd", "ab"), ("ab", "bcdef")])
def test_orders_subsets_and_strangers(orders, tmp_path):
    found = [saved(tmp_path, n, "SASRec", ids=ids) for n, ids in enumerate(orders)]
    out = tmp_path / "out.safetensors"
    merge_files([path for path, _ in found], out)
    assert_same(out, merge([load_model(path) for path, _ in found]))


def test_members_that_share_no_item_are_refused(tmp_path):
    paths = [saved(tmp_path, n, "SASRec", ids=ids)[0] for n, ids in enumerate(("ab", "cdef"))]
    with pytest.raises(InputError, match="m0.safetensors: shares no item with the others: .*'c'"):
        merge_files(paths, tmp_path / "out.safetensors")


def test_a_base_of_another_catalogue_alone(tmp_path):
    found = [saved(tmp_path, n, ids=ids) for n, ids in enumerate(("abcd", "abcd", "cxa"))]
    paths, out = [path for path, _ in found], tmp_path / "out.safetensors"
    provenance = merge_files(paths[:2], out, method="task_arithmetic", base=paths[2])
    models = [load_model(path) for path in paths]
    assert_same(out, merge(models[:2], method="task_arithmetic", base=models[2]))
    assert provenance["base"]["items"] == 3


@pytest.mark.parametrize("item", "xz")
def test_a_nan_in_any_row_of_the_base_is_refused_as_in_memory(item, tmp_path):
    """Item z is in no member, so that nothing else reads its row."""
    found = [saved(tmp_path, n, ids=ids) for n, ids in enumerate(("abcd", "abx", "cxzab"))]
    paths, out = [path for path, _ in found], tmp_path / "out.safetensors"
    base = load_model(paths[2])
    with torch.no_grad():
        base.item_embedding.weight["cxzab".index(item) + 1, 1] = torch.nan
    save_model(base, paths[2])
    with pytest.raises(InputError, match="2.safetensors: tensor 'item_embedding.weight' holds a"):
        merge_files(paths[:2], out, method="task_arithmetic", base=paths[2])
    assert not out.exists()
    with pytest.raises(InputError, match="'item_embedding.weight' of the base holds a NaN"):
        merge([load_model(path) for path in paths[:2]], method="task_arithmetic", base=base)


def test_what_came_out_merges_again_and_says_where_it_is_from(tmp_path):
    found = [saved(tmp_path, n, ids=ids) for n, ids in enumerate(IDS[:3])]
    paths = [path for path, _ in found]
    merge_files(paths[:2], tmp_path / "one.safetensors")
    out = tmp_path / "two.safetensors"
    merge_files([tmp_path / "one.safetensors", paths[2]], out)
    first = merge([load_model(path) for path in paths[:2]])
    assert_same(out, merge([first, load_model(paths[2])]))
    header = read_tensors(out)[1]
    assert header["config"]["num_items"] == 15
    assert header["merge"]["catalogue"]["owners"] == {"1": 4, "2": 11}
    card = out.with_suffix(".md").read_text()
    assert "15 items" in card and "| num_items | 15 |" in card


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(1,), (50,), (41, 3), (17, 2, 3), (30, 40), (5, 0)])
def test_rows_are_taken_in_any_order(shape, kind, tmp_path):
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-99, 99, shape, generator=generator).to(kind)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": table}, path)
    rows = shape[0]
    some = torch.randint(-1, rows, (23,), generator=generator)
    orders = [some, torch.arange(rows), torch.randperm(rows, generator=generator), some[:0]]
    orders += [torch.full((3,), -1), torch.arange(rows).flip(0), torch.arange(0, rows, 3)]
    with tensor_files.opened([path]) as ((file,),):
        for index in orders:
            expected = table[index.clamp(min=0)]
            expected[index < 0] = 0
            found = file.take("x", index)
            assert found.dtype == kind and torch.equal(found, expected)


def test_rows_that_follow_one_another_are_one_read_and_no_read_is_long(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.arange(4000.0).reshape(1000, 4)}, path)
    sizes = []
    read = tensor_files.read_into

    def counted(stream, view, start, path):
        sizes.append(len(view))
        read(stream, view, start, path)

    monkeypatch.setattr(tensor_files, "read_into", counted)
    monkeypatch.setattr(tensor_files, "SPAN", 1600)
    with tensor_files.opened([path]) as ((file,),):
        for index, expected in (
            (torch.arange(20, 120), [1600]),
            (torch.tensor([7, -1, 5, 6]), [48]),
            (torch.tensor([900, 3, 2]), [32, 16]),
            (torch.tensor([4, 6]), [16, 16]),  # the one between is more than PAGE bytes
        ):
            sizes.clear()
            file.take("x", index)
            assert sizes == expected
        monkeypatch.setattr(tensor_files, "PAGE", 32)
        sizes.clear()
        file.take("x", torch.tensor([6, 4]))
        assert sizes == [48]
        sizes.clear()
        file.take("x", torch.randperm(1000))
        assert sizes == [1600] * 10


def changed(path, change):
    """The JSON beside a model with `change` made to it."""
    content = read_json(path.with_suffix(".json"))
    change(content)
    write_json(path.with_suffix(".json"), content)


def test_catalogues_that_cannot_be_matched(tmp_path):
    (one, model), (two, other) = (saved(tmp_path, n, ids=IDS[n]) for n in range(2))
    out = tmp_path / "out.safetensors"

    def fails(message, paths=(one, two), **arguments):
        with pytest.raises(InputError, match=message) as error:
            merge_files(paths, out, **arguments)
        assert "\n" not in str(error.value)
        assert not out.exists() and not out.with_suffix(".json").exists()

    for ids, message in (
        (["a"] * 9, "m1.json has item id 'a' twice in its item_ids"),
        (list("abc"), "m1.json has 9 items but 3 item_ids"),
        ([1, 2], "m1.json: its item_ids are not a list of strings"),
        ("abcdefghi", "m1.json: its item_ids are not a list of strings"),
    ):
        other.item_ids = ids
        save_model(other, two)
        fails(message)
    other.item_ids = None
    save_model(other, two)
    fails("m1.safetensors: has no item ids, so its item rows cannot be .* those of .*m0")
    fails("m1.safetensors: has no item ids", (one, one), method="dare", base=two)
    other.item_ids = list(IDS[1])
    save_model(other, two)
    changed(two, lambda content: content["item_ids"].reverse())
    fails("m1.json: its item_ids are not those of m1.safetensors")
    two.with_suffix(".json").write_text("[]")
    fails("m1.json: not a JSON object")
    two.with_suffix(".json").unlink()
    fails("m1.json: no such file, which has the item ids of m1.safetensors")
    save_model(other, two)
    one.with_suffix(".json").unlink()
    fails("m0.json: no such file, which has the item ids", (one, one), method="dare", base=two)
    pair = [tmp_path / "p0.safetensors", tmp_path / "p1.safetensors"]
    for path, network in zip(pair, (model, other), strict=True):
        save_model(ParallelEncoders([network]), path)
    fails("p1.safetensors: has other item ids than .*p0.* of a ParallelEncoders it is not", pair)


def test_a_table_that_is_not_the_configurations_is_named(tmp_path):
    paths = [saved(tmp_path, n, ids=IDS[n])[0] for n in range(2)]
    tensors, header = read_tensors(paths[1])
    for change, message in (
        ({"output_bias": torch.zeros(8)}, r"m1.*: tensor 'output_bias' has shape \(8,\), not \(9,"),
        ({"output_bias": torch.zeros(9, dtype=torch.int64)}, "m1.*: tensor 'output_bias' is I64"),
    ):
        safetensors.torch.save_file(
            {**tensors, **change}, paths[1], metadata={"fisherkern": json.dumps(header)}
        )
        with pytest.raises(InputError, match=message):
            merge_files(paths, tmp_path / "out.safetensors")
