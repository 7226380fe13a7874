"""Model Stock against its paper's formula, number by number in loops of floats."""

import math

import pytest
import torch
from helpers.merging import Toy, encoder

from fisherkern.errors import InputError
from fisherkern.merging import merge

SHAPES = {"a": (), "b": (3,), "c": (5, 2), "d": (2, 3, 2)}


def toys(number, near=0.0):
    """Members, and a base as the last; `near`: how much their task vectors have in common."""
    generator = torch.Generator().manual_seed(0)

    def drawn():
        return {n: torch.randn(s, generator=generator).double() for n, s in SHAPES.items()}

    common, base = drawn(), drawn()
    members = [drawn() for _ in range(number)]
    values = [{n: base[n] + near * common[n] + own[n] for n in SHAPES} for own in members]
    return [Toy(**own) for own in [*values, base]]


def flat(model, name):
    return model.get_parameter(name).detach().flatten().tolist()


def by_hand(models, base):
    merged = {}
    for name in SHAPES:
        start = flat(base, name)
        taus = [[x - y for x, y in zip(flat(m, name), start, strict=True)] for m in models]
        cosines = []
        for m in range(len(taus)):
            for l in range(m):  # noqa: E741
                product = sum(x * y for x, y in zip(taus[m], taus[l], strict=True))
                lengths = math.hypot(*taus[m]) * math.hypot(*taus[l])
                cosines.append(max(0.0, product / lengths) if lengths else 0.0)
        cos, count = sum(cosines) / len(cosines), len(taus)
        ratio = count * cos / (1 + (count - 1) * cos)
        merged[name] = [
            y + ratio * sum(tau[i] for tau in taus) / count for i, y in enumerate(start)
        ]
    return merged


@pytest.mark.parametrize("near", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_model_stock(number, near):
    *models, base = toys(number, near)
    merged = merge(models, method="model_stock", base=base)
    for name, values in by_hand(models, base).items():
        assert flat(merged, name) == pytest.approx(values, rel=1e-12, abs=1e-12)


def test_orthogonal_and_opposed_task_vectors_leave_the_base():
    base = Toy(w=torch.tensor([[1.0, 2.0]]).double())
    for other in ([[1.0, 5.0]], [[-1.0, 2.0]], [[1.0, 2.0]]):
        models = [Toy(w=torch.tensor([[3.0, 2.0]]).double()), Toy(w=torch.tensor(other).double())]
        merged = merge(models, method="model_stock", base=base)
        assert merged.w.tolist() == [[1.0, 2.0]]


def test_equal_task_vectors_of_any_length_keep_the_average():
    base = Toy(w=torch.ones(7, dtype=torch.float64))
    models = [Toy(w=torch.ones(7, dtype=torch.float64) + size) for size in (0.1, 0.3, 0.5)]
    merged = merge(models, method="model_stock", base=base)
    assert merged.w.tolist() == pytest.approx([1.3] * 7, rel=1e-14)


def test_members_that_did_not_move_are_the_base():
    base = Toy(w=torch.tensor([0.1, 0.7]), v=torch.tensor(3.0))
    models = [Toy(w=torch.tensor([0.1, 0.7]), v=torch.tensor(3.0 + m)) for m in (1, 2)]
    merged = merge(models, method="model_stock", base=base)
    assert torch.equal(merged.w, base.w) and float(merged.v) == pytest.approx(4.5)
    assert torch.equal(merge([base, base], method="model_stock", base=base).w, base.w)


def test_one_member_is_its_own_merge():
    model, base = toys(1)
    merged = merge([model], method="model_stock", base=base)
    assert all(torch.equal(merged.get_parameter(n), model.get_parameter(n)) for n in SHAPES)


def test_rows_that_not_all_own():
    models = [encoder("abce", 1).double(), encoder("bcde", 2).double()]
    base = encoder("zdcb", 3).double()
    merged = merge(models, method="model_stock", base=base)
    table, rows = merged.item_embedding.weight.detach(), {}
    members = [m.item_embedding.weight.detach() for m in models]
    start = base.item_embedding.weight.detach()
    # Padding, b, c, and the mask are everybody's.
    common = torch.stack([members[0][[0, 2, 3, -1]], members[1][[0, 1, 2, -1]]])
    tau = (common - start[[0, 4, 3, -1]]).flatten(1)
    cos = float((tau[0] @ tau[1]) / tau[0].norm() / tau[1].norm())
    ratio = max(0.0, 2 * cos / (1 + cos))
    rows["b"] = (1 - ratio) * start[4] + ratio * (members[0][2] + members[1][1]) / 2
    rows["c"] = (1 - ratio) * start[3] + ratio * (members[0][3] + members[1][2]) / 2
    rows["d"] = (1 - ratio) * start[2] + ratio * members[1][3]  # no row of member 0's
    rows["a"] = members[0][1]  # no row of the base's
    rows["e"] = (members[0][4] + members[1][4]) / 2  # nor this one, which has no angle then
    for place, item in enumerate(merged.item_ids):
        torch.testing.assert_close(table[place + 1], rows[item], rtol=1e-12, atol=1e-12)
    assert merged.merge_report["weights"] == [0.5, 0.5]


def test_a_row_of_one_member_counts_where_the_common_ones_did_not_move():
    models = [encoder("ab", 1).double(), encoder("bc", 2).double()]
    base = encoder("bc", 3).double()
    with torch.no_grad():
        for model, row in zip(models, (2, 1), strict=True):
            # Padding, b, and the mask.
            model.item_embedding.weight[[0, row, -1]] = base.item_embedding.weight[[0, 1, -1]]
    merged = merge(models, method="model_stock", base=base)
    table = dict(zip(merged.item_ids, merged.item_embedding.weight[1:].detach(), strict=False))
    assert torch.equal(table["b"], base.item_embedding.weight[1])
    assert torch.equal(table["c"], models[1].item_embedding.weight[2])


def test_integers_must_agree_and_buffers_are_averaged():
    class Counted(Toy):
        def __init__(self, count, mean, **tensors):
            super().__init__(**tensors)
            self.register_buffer("count", torch.tensor(count))
            self.register_buffer("mean", torch.tensor(mean))

    base = Counted([5, 5], 0.0, w=torch.zeros(2))
    models = [Counted([5, 5], mean, w=torch.tensor([1.0, mean])) for mean in (1.0, 3.0)]
    merged = merge(models, method="model_stock", base=base)
    assert merged.count.tolist() == [5, 5] and float(merged.mean) == 2.0
    models[1].count[0] = 6
    with pytest.raises(InputError, match="'count' of member 1 differs"):
        merge(models, method="model_stock", base=base)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "method 'model_stock' needs base"),
        ({"base": Toy(w=torch.zeros(1)), "weights": [1, 2]}, "takes no weights"),
        ({"base": Toy(w=torch.zeros(1)), "options": {"per": "row"}}, "has no option 'per'"),
    ],
)
def test_what_it_does_not_take_is_refused(given, message):
    models = [Toy(w=torch.ones(1)), Toy(w=torch.ones(1))]
    with pytest.raises(InputError, match=message):
        merge(models, method="model_stock", **given)
