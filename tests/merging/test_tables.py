"""Merges of a few numbers, checked by hand."""

import pytest
import torch
from helpers.merging import Open, Toy
from torch import nn

from fisherkern.merging import blocks, merge

T = torch.tensor


def test_uniform_is_the_mean():
    merged = merge([Toy(w=T([1.0, 2.0])), Toy(w=T([3.0, 8.0]))])
    assert merged.w.tolist() == [2.0, 5.0]
    assert merged.merge_report["method"] == "uniform"
    assert merged.merge_report["weights"] == [0.5, 0.5]


def test_weighted_divides_by_the_sum_of_the_weights():
    merged = merge([Toy(w=T([1.0, 2.0])), Toy(w=T([5.0, 10.0]))], weights=[3, 1])
    assert merged.w.tolist() == [2.0, 4.0]
    assert merged.merge_report["weights"] == [0.75, 0.25]


def test_fisher_with_relative_floor():
    # Means 1 and 10: normalised Fishers [0, 2] and [1, 1], floor 1 gives [1, 3] and [2, 2].
    models = [Toy(w=T([0.0, 0.0])), Toy(w=T([3.0, 5.0]))]
    fishers = [{"w": T([0.0, 2.0])}, {"w": T([10.0, 10.0])}]
    merged = merge(models, fishers=fishers, floor=1.0)
    torch.testing.assert_close(merged.w.data, T([2.0, 2.0]))
    assert merged.merge_report["coverage"] == {"w": [0.5, 0.0]}


def test_fisher_with_weights():
    # As above with lambda (1/4, 3/4): shares [1, 3] and [6, 6].
    models = [Toy(w=T([0.0, 0.0])), Toy(w=T([7.0, 9.0]))]
    fishers = [{"w": T([0.0, 2.0])}, {"w": T([10.0, 10.0])}]
    merged = merge(models, fishers=fishers, weights=[1, 3], floor=1.0)
    torch.testing.assert_close(merged.w.data, T([6.0, 6.0]))


def test_without_normalisation_the_larger_fisher_counts_more():
    # Common unit (1 + 3)/2 = 2: [.5, .5] and [1.5, 1.5]; floor .5 gives 1 and 2.
    models = [Toy(w=T([0.0, 0.0])), Toy(w=T([3.0, 6.0]))]
    fishers = [{"w": T([1.0, 1.0])}, {"w": T([3.0, 3.0])}]
    merged = merge(models, fishers=fishers, floor=0.5, normalize=None)
    torch.testing.assert_close(merged.w.data, T([2.0, 4.0]))
    merged = merge(models, fishers=fishers, floor=0.5)
    torch.testing.assert_close(merged.w.data, T([1.5, 3.0]))


def test_the_mean_is_over_all_tensors_of_a_member():
    # Entries 4, 0, 0, 0: mean 1, so u is worth 4 + 1 in member 0 and 1 + 1 in member 1.
    models = [Toy(u=T([0.0]), v=T([0.0] * 3)), Toy(u=T([7.0]), v=T([3.0] * 3))]
    fishers = [{"u": T([4.0]), "v": T([0.0] * 3)}, {"u": T([1.0]), "v": T([1.0] * 3)}]
    merged = merge(models, fishers=fishers, floor=1.0)
    torch.testing.assert_close(merged.u.data, T([2.0]))
    torch.testing.assert_close(merged.v.data, T([2.0] * 3))


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_zero_rows_in_all_members_are_averaged_by_lambda(floor):
    models = [Toy(w=T([[1.0, 1.0], [0.0, 0.0]])), Toy(w=T([[5.0, 9.0], [1.0, 1.0]]))]
    fishers = [{"w": T([[0.0, 0.0], [1.0, 1.0]])}, {"w": T([[0.0, 0.0], [2.0, 2.0]])}]
    merged = merge(models, fishers=fishers, weights=[0.25, 0.75], floor=floor)
    torch.testing.assert_close(merged.w.data[0], T([4.0, 7.0]))


def test_rounding_noise_of_a_key_bias_decides_nothing():
    models = [Toy(key=T([0.0, 0.0]), w=T([0.0])), Toy(key=T([4.0, 8.0]), w=T([1.0]))]
    fishers = [
        {"key": T([1e-16, 3e-15]), "w": T([1.0])},
        {"key": T([9e-15, 0.0]), "w": T([1.0])},
    ]
    merged = merge(models, fishers=fishers, floor=0.0)
    assert merged.key.tolist() == [2.0, 4.0]
    # Above the noise the same ratios decide.
    real = [{"key": f["key"] * 1e8, "w": f["w"]} for f in fishers]
    assert merge(models, fishers=real, floor=0.0).key.tolist()[1] == 0.0


def test_noise_in_one_member_only_is_zero_there():
    models = [Toy(key=T([0.0]), w=T([0.0])), Toy(key=T([4.0]), w=T([1.0]))]
    fishers = [{"key": T([1e-12]), "w": T([1.0])}, {"key": T([1e-9]), "w": T([1.0])}]
    assert merge(models, fishers=fishers, floor=0.0).key.tolist() == [4.0]


def test_a_frozen_tensor_without_fisher_is_averaged_by_lambda():
    models = [Toy(f=T([1.0]), w=T([0.0])), Toy(f=T([5.0]), w=T([4.0]))]
    for model in models:
        model.f.requires_grad_(False)
    # The second member's Fisher has it: not measured in the first is not zero there.
    fishers = [{"w": T([1.0])}, {"w": T([1.0]), "f": T([1.0])}]
    merged = merge(models, fishers=fishers, weights=[1, 3])
    assert merged.f.tolist() == [4.0]
    assert not merged.f.requires_grad and merged.w.requires_grad


def test_numbers_integers_and_buffers():
    def model(scale, mean):
        tables = {"mask": T([0.0, -torch.inf]), "count": T([3]), "mean": T([mean])}
        return Toy(buffers=tables, scale=T(scale), index=T([7, 8]), empty=torch.zeros(0, 3))

    fishers = [{"scale": T(3.0), "empty": torch.zeros(0, 3)}] * 2
    merged = merge([model(1.0, 10.0), model(2.0, 20.0)], fishers=fishers, weights=[1, 3])
    assert merged.scale.shape == () and merged.scale.item() == 1.75
    assert merged.index.tolist() == [7, 8] and merged.index.dtype == torch.int64
    assert merged.count.tolist() == [3] and merged.mask.tolist() == [0.0, -torch.inf]
    assert merged.mean.tolist() == [17.5]
    assert merged.empty.shape == (0, 3)
    assert merged.merge_report["averaged_buffers"] == ["mean"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_do_not_overflow_and_the_dtype_stays(dtype):
    members = [Toy(w=T([60000.0]).to(dtype)) for _ in range(3)]
    merged = merge(members)
    assert merged.w.dtype == dtype
    assert torch.equal(merged.w, members[0].w)


def test_a_large_tensor_is_merged_in_blocks(monkeypatch):
    torch.manual_seed(0)
    models = [Toy(w=torch.randn(13, 3)) for _ in range(2)]
    fishers = [{"w": torch.rand(13, 3)} for _ in range(2)]
    whole = merge(models, fishers=fishers)
    monkeypatch.setattr(blocks, "BLOCK", 12)
    assert torch.equal(merge(models, fishers=fishers).w, whole.w)


class TiedByParameter(Open):
    def __init__(self, value):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(value.clone(), freeze=False)
        self.head = nn.Linear(value.shape[1], value.shape[0], bias=False)
        self.head.weight = self.table.weight


class TiedByStorage(Open):
    """The head is a parameter of its own that shares the table's memory, pad row apart."""

    def __init__(self, value):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(value.clone(), freeze=False)
        self.head = nn.Linear(value.shape[1], value.shape[0] - 1, bias=False)
        self.head.weight = nn.Parameter(self.table.weight.data[1:])


@pytest.mark.parametrize("name", ["table.weight", "head.weight"])
def test_parameters_tied_by_name_stay_one(name):
    models = [TiedByParameter(T([[0.0], [0.0]])), TiedByParameter(T([[4.0], [8.0]]))]
    fishers = [{name: T([[1.0], [3.0]])}, {name: T([[3.0], [1.0]])}]
    merged = merge(models, fishers=fishers, floor=0.0)
    assert merged.table.weight.tolist() == [[3.0], [2.0]]
    assert merged.head.weight is merged.table.weight


@pytest.mark.parametrize("both", [False, True])
def test_parameters_tied_by_storage_are_merged_once_and_stay_tied(both):
    models = [TiedByStorage(T([[0.0], [0.0]])), TiedByStorage(T([[4.0], [8.0]]))]
    fishers = [{"table.weight": T([[1.0], [3.0]])}, {"table.weight": T([[3.0], [1.0]])}]
    if both:
        # A Fisher of the head of its own must not count a second time.
        for fisher in fishers:
            fisher["head.weight"] = T([[100.0]])
    merged = merge(models, fishers=fishers, floor=0.0)
    assert merged.table.weight.tolist() == [[3.0], [2.0]]
    assert merged.head.weight.tolist() == [[2.0]]
    merged.table.weight.data[1] = 9.0
    assert merged.head.weight.tolist() == [[9.0]]
    assert models[0].table.weight.tolist() == [[0.0], [0.0]]


def test_slices_of_one_storage_that_do_not_overlap_are_not_tied():
    def model(values):
        flat, module = T(values), Open()
        module.a, module.b = nn.Parameter(flat[:1]), nn.Parameter(flat[1:])
        return module

    merged = merge([model([0.0, 0.0]), model([4.0, 8.0])], weights=[1, 3])
    assert merged.a.tolist() == [3.0] and merged.b.tolist() == [6.0]


def test_a_transposed_tie_stays_transposed():
    def model(values):
        module = Open()
        module.a = nn.Parameter(T(values))
        module.b = nn.Parameter(module.a.data.t())
        return module

    merged = merge([model([[0.0, 2.0, 4.0]]), model([[2.0, 4.0, 6.0]])])
    assert merged.a.tolist() == [[1.0, 3.0, 5.0]]
    assert merged.b.tolist() == [[1.0], [3.0], [5.0]]


def test_the_members_stay_as_they_are():
    models = [Toy(w=T([1.0])), Toy(w=T([3.0]))]
    merged = merge(models)
    merged.w.data.fill_(7.0)
    assert models[0].w.tolist() == [1.0] and models[1].w.tolist() == [3.0]
    assert not hasattr(models[0], "merge_report")
