"""MemberSet trained on different catalogues."""

import copy
import weakref

import numpy as np
import pytest
import torch
from helpers.merging import Encoder, Toy, encoder, random_fisher

from fisherkern.errors import InputError
from fisherkern.members.catalogue import union_item_ids
from fisherkern.merging import merge


def filled(ids, row_values, pad, mask):
    """An Encoder of width 1 whose item rows, biases (10 times that) and special rows are given."""
    model = encoder(ids, 0, dim=1)
    table = torch.tensor([pad, *row_values, mask], dtype=torch.float32)
    model.item_embedding.weight.data.copy_(table[:, None])
    model.output_bias.data.copy_(10 * table[1:-1])
    model.dense.weight.data.fill_(sum(row_values))
    return model


def test_union_by_item_id():
    a = filled("xyz", [1, 2, 3], pad=0, mask=100)
    b = filled("wzxv", [40, 50, 60, 70], pad=2, mask=200)
    merged = merge([a, b], weights=[3, 1])
    assert type(merged) is Encoder
    assert merged.item_ids == ["x", "y", "z", "w", "v"]
    assert merged.num_items == merged.config["num_items"] == 5
    # pad .75*0+.25*2; x .75*1+.25*60; y: a alone; z .75*3+.25*50; w, v: b alone; mask.
    rows = [0.5, 15.75, 2.0, 14.75, 40.0, 70.0, 125.0]
    assert merged.item_embedding.weight.flatten().tolist() == rows
    assert merged.output_bias.tolist() == [10 * row for row in rows[1:-1]]
    assert merged.dense.weight.item() == 0.75 * 6 + 0.25 * 220
    assert merged.merge_report["items"] == {"1": 3, "2": 2}


def test_a_row_of_one_owner_keeps_its_value_under_fisher_and_at_lambda_0():
    a, b = encoder("abc", 1), encoder("cde", 2)
    fishers = [random_fisher(a, 3), random_fisher(b, 4)]
    for weights in (None, [1, 0], [0, 1]):
        merged = merge([a, b], fishers=fishers, weights=weights, floor=0.0)
        assert merged.item_ids == list("abcde")
        rows = merged.item_embedding.weight
        assert torch.equal(rows[1:3], a.item_embedding.weight[1:3])
        assert torch.equal(rows[4:6], b.item_embedding.weight[2:4])
        assert torch.equal(merged.output_bias[3:], b.output_bias[1:])
    # The last weights are a vertex: the shared row, the pad and the mask row are b's.
    assert torch.equal(rows[[0, 3, 6]], b.item_embedding.weight[[0, 1, 4]])


def test_fisher_rows_move_with_their_items():
    a, b = filled("xy", [0, 0], 0, 0), filled("yx", [4, 8], 4, 4)
    fishers = [random_fisher(a, 3), random_fisher(b, 4)]
    for fisher, rows in zip(fishers, ([1, 1, 3, 1], [1, 1, 3, 1]), strict=True):
        fisher["item_embedding.weight"] = torch.tensor(rows, dtype=torch.float32)[:, None]
        fisher["output_bias"].fill_(1.0)
        for name in ("dense.weight", "dense.bias"):
            fisher[name].fill_(1.0)
    merged = merge([a, b], fishers=fishers, floor=0.0)
    assert merged.item_ids == ["x", "y"]
    # x: Fisher 1 (a) and 3 (b), values 0 and 8; y: 3 and 1, values 0 and 4.
    torch.testing.assert_close(
        merged.item_embedding.weight.flatten().tolist(), [2.0, 6.0, 1.0, 2.0]
    )


def test_the_same_items_in_another_order_need_no_config():
    a, b = encoder("ab", 1), encoder("ba", 2)
    del a.config, b.config
    merged = merge([a, b], weights=[0, 1])
    assert merged.item_ids == ["a", "b"]
    assert torch.equal(merged.item_embedding.weight, b.item_embedding.weight[[0, 2, 1, 3]])


def test_the_new_model_keeps_mode_frozen_parameters_dtype_and_the_random_state():
    a, b = encoder("ab", 1).double().eval(), encoder("bc", 2).double()
    a.dense.bias.requires_grad_(False)
    before = torch.get_rng_state()
    merged = merge([a, b])
    assert torch.equal(torch.get_rng_state(), before)
    assert not merged.training and not merged.dense.bias.requires_grad
    assert merged.item_embedding.weight.requires_grad
    assert {p.dtype for p in merged.parameters()} == {torch.float64}


class Headed(Encoder):
    """An output layer whose weight is a view of the item rows, both slices of one flat tensor."""

    def __init__(self, **config):
        super().__init__(**config)
        flat = torch.zeros(1 + (self.num_items + 2) * 2)
        self.item_embedding.weight = torch.nn.Parameter(flat[1:].view(-1, 2))
        self.head = torch.nn.Parameter(self.item_embedding.weight.data[1:-1])


@pytest.mark.parametrize("weights", [[1, 1], "search"])
def test_a_table_tied_by_storage_is_united_and_stays_tied(weights):
    a, b = Headed(num_items=2), Headed(num_items=2)
    a.item_ids, b.item_ids = ["x", "y"], ["y", "z"]
    a.head.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    b.head.data.copy_(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    score = (lambda model: -abs(model.head[1, 0].item() - 4.0)) if weights == "search" else None
    merged = merge([a, b], weights=weights, score=score)
    assert merged.head.tolist() == [[1.0, 2.0], [4.0, 5.0], [7.0, 8.0]]
    assert torch.equal(merged.item_embedding.weight[1:-1], merged.head)
    merged.item_embedding.weight.data.fill_(9.0)
    assert merged.head.unique().tolist() == [9.0]


def test_a_catalogue_is_let_go_before_the_next_is_asked_for():
    """Lists of millions of ids would not fit beside one another."""

    class Ids(list):
        """A list that can be watched."""

    alive = []

    def catalogues():
        for ids in ("abc", "cad", "ef"):
            assert [reference() for reference in alive] == [None] * len(alive)
            own = Ids(ids)
            alive.append(weakref.ref(own))
            yield "a member", own
            del own

    union, positions = union_item_ids(catalogues())
    assert union == list("abcdef") and len(alive) == 3
    assert [own.tolist() for own in positions] == [
        [0, 1, 2, -1, -1, -1],
        [1, -1, 0, 2, -1, -1],
        [-1, -1, -1, -1, 0, 1],
    ]


def test_ids_can_be_given():
    a, b = encoder("ab", 1), encoder("cd", 2)
    a.item_ids = b.item_ids = None
    assert merge([a, b]).item_ids is None
    assert merge([a, b], item_ids=[["x", "y"], ["y", "z"]]).item_ids == ["x", "y", "z"]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_ids_stand_in_lists_and_arrays(kind):
    a, b = encoder("ab", 1), encoder("cd", 2)
    found = merge([a, b], item_ids=[kind([7, 8]), kind([8, 9])]).item_ids
    assert found == [7, 8, 9]
    assert all(type(own) is int for own in found)


@pytest.mark.parametrize(
    "kind", [dict.fromkeys, set, "".join, iter, lambda ids: [[i] for i in ids]]
)
def test_ids_without_an_order_are_refused(kind):
    a, b = encoder("ab", 1), encoder("cd", 2)
    with pytest.raises(InputError, match="^item_ids: "):
        merge([a, b], item_ids=[kind(["x", "y"]), kind(["y", "z"])])
    a.item_ids, b.item_ids = kind(["x", "y"]), kind(["y", "z"])
    with pytest.raises(InputError, match="^item_ids: "):
        merge([a, b])


def test_ids_may_be_tensors_that_agree():
    models = [Toy(w=torch.zeros(2)), Toy(w=torch.ones(2))]
    models[0].item_ids, models[1].item_ids = torch.tensor([1, 2]), torch.tensor([1, 2])
    assert merge(models).w.tolist() == [0.5, 0.5]
    models[1].item_ids = torch.tensor([2, 1])
    with pytest.raises(InputError, match="item_ids are tensors that differ"):
        merge(models)


def test_row_buffers_that_are_integers_are_united_too():
    class Counted(Encoder):
        def __init__(self, **config):
            super().__init__(**config)
            self.register_buffer("group", torch.zeros(self.num_items, dtype=torch.int64))

        def item_parameters(self):
            return {**super().item_parameters(), "group": 0}

    a, b = Counted(num_items=2), Counted(num_items=2)
    a.item_ids, b.item_ids = ["x", "y"], ["y", "z"]
    a.group.copy_(torch.tensor([5, 6]))
    b.group.copy_(torch.tensor([6, 7]))
    assert merge([a, b]).group.tolist() == [5, 6, 7]
    b.group[0] = 9
    with pytest.raises(InputError, match="'group' of member 1 differs"):
        merge([a, b])


def test_item_rows_that_are_not_told_are_refused():
    class Silent(Encoder):
        def item_parameters(self):
            return {"item_embedding.weight": 1}

    models = [Silent(num_items=2), Silent(num_items=2)]
    models[0].item_ids, models[1].item_ids = ["x", "y"], ["y", "z"]
    message = r"tensor 'output_bias' is to have shape \(2,\), which the Silent built"
    with pytest.raises(InputError, match=message):
        merge(models)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: setattr(b, "item_ids", None), "member 1 has no item_ids, so its item rows"),
        (lambda b: setattr(b, "item_ids", ["b", "c", "b"]), "member 1 has item id 'b' twice"),
        (lambda b: setattr(b, "item_ids", ["b"]), "member 1 has 3 items but 1 item_ids"),
        (lambda b: delattr(b, "config"), None),
    ],
)
def test_bad_catalogues(change, message):
    a, b = encoder("abc", 1), encoder("cde", 2)
    change(b)
    if message is None:
        del a.config
        message = "catalogues differ, and Encoder has no config with num_items"
    with pytest.raises(InputError, match=message):
        merge([a, b])


def test_models_that_do_not_tell_their_item_rows_are_refused():
    plain = [Toy(w=torch.zeros(2)), Toy(w=torch.zeros(2))]
    with pytest.raises(InputError, match="without an item_parameters.. method"):
        merge(plain, item_ids=[["x", "y"], ["y", "x"]])
    a, b = encoder("ab", 1), encoder("ba", 1)
    setattr(b, "item_parameters", lambda: {"item_embedding.weight": 0})  # noqa: B010
    with pytest.raises(InputError, match="member 1 has item_parameters .* where member 0 has"):
        merge([a, b])


def test_without_ids_catalogues_of_different_sizes_are_refused():
    a, b = encoder("abc", 1), encoder("ab", 2)
    a.item_ids = b.item_ids = None
    with pytest.raises(InputError, match="member 1 has no item_ids, so its item rows cannot be"):
        merge([a, b])


def test_other_numbers_of_special_rows_are_refused():
    a, b = encoder("abc", 1), encoder("cde", 2)
    b.item_embedding.weight = torch.nn.Parameter(torch.randn(6, 2))
    with pytest.raises(InputError, match=r"'item_embedding.weight' has \[1, 2\] rows after its"):
        merge([a, b])


def test_a_class_that_does_not_rebuild_its_tensors_is_refused():
    a, b = encoder("abc", 1), encoder("cde", 2)
    for model in (a, b):
        model.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match="does not build a model with the tensors"):
        merge([copy.deepcopy(a), b])
