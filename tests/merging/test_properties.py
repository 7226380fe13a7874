"""What must hold for any members, Fishers and weights."""

import pytest
import torch
from helpers.merging import arguments_for, encoder, random_fisher
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherkern.merging import METHODS, merge

seeds = st.integers(0, 10**6)
floors = st.sampled_from([0.0, 1e-3, 0.1, 10.0])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
few = settings(max_examples=6, deadline=None)
GROUPS = [("fisher", {"group": group}) for group in ("entry", "row", "neuron", "tensor")]
CASES = [
    *((name, {}) for name in METHODS if name != "fisher"),
    *GROUPS,
    ("pcrec", {"criterion": "l1"}),
    ("ties", {"per": "tensor"}),
]
# Iterated: equal sums in another order part further.
LOOSE = {"full_fisher": 1e-6, "learned_soup": 1e-9, "layer_wise": 1e-9}


@st.composite
def catalogues(draw, members=None):
    number = members or draw(st.integers(1, 4))
    letters = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6, unique=True)
    # Members that share no item are refused.
    return ["".join(dict.fromkeys([*draw(letters), "a"])) for _ in range(number)]


@st.composite
def weights_for(draw, number):
    # Small integers make zeros likely.
    values = draw(st.lists(st.integers(0, 3), min_size=number, max_size=number))
    return [float(value) for value in values] if sum(values) else [1.0] * number


def members_of(ids, seed, dtype=torch.float32):
    models = [encoder(own, seed + number).to(dtype) for number, own in enumerate(ids)]
    return models, [random_fisher(model, seed + 50 + m) for m, model in enumerate(models)]


def by_item(model):
    """The model's values, item rows by id."""
    rows = {}
    table, bias = model.item_embedding.weight.detach(), model.output_bias.detach()
    for row, item in enumerate(model.item_ids):
        rows[item] = torch.cat([table[row + 1], bias[row : row + 1]])
    rest = [table[0], table[-1], *(p.detach().flatten() for p in model.dense.parameters())]
    return rows, torch.cat(rest)


def run(case, models, fishers, weights, floor, numbers=None):
    method, options = case
    arguments = arguments_for(method, models, fishers, weights, numbers)
    arguments["options"] = {**arguments["options"], **options}
    return merge(models, floor=floor, **arguments)


def name_of(case):
    return "-".join([case[0], *case[1].values()])


@pytest.mark.parametrize("case", CASES, ids=name_of)
@few
@given(st.data(), seeds, floors, dtypes)
def test_merging_a_model_with_itself_is_the_identity(case, data, seed, floor, dtype):
    number = data.draw(st.integers(1, 4))
    model = encoder("abcd", seed).to(dtype)
    fishers = [random_fisher(model, seed + m) for m in range(number)]
    weights = data.draw(weights_for(number))
    merged = run(case, [model] * number, fishers, weights, floor)
    for name, parameter in model.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter), name


@pytest.mark.parametrize("case", [c for c in CASES if METHODS[c[0]].takes_weights], ids=name_of)
@few
@given(st.data(), seeds, floors, dtypes)
def test_weights_at_a_vertex_give_that_member_exactly(case, data, seed, floor, dtype):
    ids = data.draw(catalogues())
    chosen = data.draw(st.integers(0, len(ids) - 1))
    models, fishers = members_of(ids, seed, dtype)
    weights = [0.3 if m == chosen else 0.0 for m in range(len(ids))]
    merged = run(case, models, fishers, weights, floor)
    rows, rest = by_item(merged)
    own_rows, own_rest = by_item(models[chosen])
    assert torch.equal(rest, own_rest)
    assert all(torch.equal(rows[item], own_rows[item]) for item in own_rows)
    assert set(rows) == set("".join(ids))


@pytest.mark.parametrize("case", CASES, ids=name_of)
@few
@given(st.data(), seeds, floors)
def test_the_order_of_the_members_does_not_matter(case, data, seed, floor):
    ids = data.draw(catalogues())
    models, fishers = members_of(ids, seed, torch.float64)
    weights = data.draw(weights_for(len(ids)))
    order = data.draw(st.permutations(range(len(ids))))
    one = run(case, models, fishers, weights, floor)
    reordered = ([values[m] for m in order] for values in (models, fishers, weights))
    other = run(case, *reordered, floor, list(order))
    rows, rest = by_item(one)
    other_rows, other_rest = by_item(other)
    tol = LOOSE.get(case[0], 1e-12)
    torch.testing.assert_close(other_rest, rest, rtol=tol, atol=tol)
    assert set(rows) == set(other_rows)
    for item in rows:
        torch.testing.assert_close(other_rows[item], rows[item], rtol=tol, atol=tol)


@few
@given(st.data(), seeds, floors)
def test_a_fisher_times_a_constant_changes_nothing(data, seed, floor):
    ids = data.draw(catalogues())
    models, fishers = members_of(ids, seed, torch.float64)
    scales = data.draw(st.lists(st.floats(1e-12, 1e12), min_size=len(ids), max_size=len(ids)))
    fishers = [{name: value.double() for name, value in fisher.items()} for fisher in fishers]
    scaled = [
        {name: scale * value for name, value in fisher.items()}
        for scale, fisher in zip(scales, fishers, strict=True)
    ]
    one = merge(models, fishers=fishers, floor=floor)
    other = merge(models, fishers=scaled, floor=floor)
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(
            other.get_parameter(name), parameter, rtol=1e-12, atol=1e-12, msg=name
        )


@few
@given(st.data(), seeds, floors)
def test_against_the_formula(data, seed, floor):
    models, fishers = members_of(["abc"] * data.draw(st.integers(1, 4)), seed, torch.float64)
    weights = data.draw(weights_for(len(models)))
    merged = merge(models, fishers=fishers, weights=weights, floor=floor)
    means = [
        sum(v.double().sum() for v in f.values()) / sum(v.numel() for v in f.values())
        for f in fishers
    ]
    for name, parameter in merged.named_parameters():
        shares = [
            w * (f[name].double() / mean + floor)
            for w, f, mean in zip(weights, fishers, means, strict=True)
        ]
        total = sum(
            share * model.get_parameter(name).detach()
            for share, model in zip(shares, models, strict=True)
        )
        torch.testing.assert_close(parameter.detach(), total / sum(shares), rtol=1e-12, atol=1e-12)
