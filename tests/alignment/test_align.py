"""Alignment: functions kept, planted symmetries undone, distances never larger."""

import itertools
import json

import pytest
import torch
from helpers.alignment import BLOCKS, CASES, build, fixing_ones, logits, random_transforms
from models import NUM_ITEMS
from torch import nn

from fisherkern.alignment.align import align
from fisherkern.encoders import AxisSpec, Symmetries, SymmetryGroup, whole
from fisherkern.errors import InputError
from fisherkern.members.symmetries import fold_norms, symmetries_of, transform_model

ROTATED = {
    "BERT4Rec-constant",
    "SASRec-constant",
    "SASRec-pre-untied-bias",
    "SASRec-pre-untied-plain",
    "SASRec-one-of-each",
}


def largest_difference(one, other, idle=frozenset()):
    """The largest difference of two models' weights."""
    mine, others = one.state_dict(), other.state_dict()
    return max(float((mine[name] - others[name]).abs().max()) for name in mine.keys() - idle)


@pytest.mark.parametrize("case", CASES)
def test_every_group_keeps_the_function(case):
    model = CASES[case](0)
    symmetries = symmetries_of(model)
    start = fold_norms(model, symmetries)
    expected = logits(model)
    assert torch.allclose(logits(start), expected, rtol=0, atol=1e-12)
    everything = random_transforms(symmetries, 1)
    for name in symmetries.groups:
        own = {label: everything[label] for label in symmetries.labels(name)}
        moved = transform_model(start, symmetries, own)
        assert torch.allclose(logits(moved), expected, rtol=0, atol=1e-12), name
        if symmetries.groups[name].size > 1:
            assert largest_difference(moved, start) > 1e-2, name
    moved = transform_model(start, symmetries, everything)
    assert torch.allclose(logits(moved), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_stream_rotates_where_no_gain_is_in_the_way(case):
    kinds = {group.kind for group in symmetries_of(CASES[case](0)).groups.values()}
    assert ("rotation" in kinds) == (case in ROTATED)


@pytest.mark.parametrize(
    "case", ["BERT4Rec-post-tied", "BERT4Rec-pre-untied", "SASRec-pre-tied-bias"]
)
def test_a_rotation_would_change_the_function_where_it_is_not_admitted(case):
    model = CASES[case](0)
    symmetries = symmetries_of(model)
    start = fold_norms(model, symmetries)
    turn = {"residual": fixing_ones(6, torch.Generator().manual_seed(3))}
    moved = transform_model(start, symmetries, turn)
    assert (logits(moved) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_planted_symmetry_is_undone(case, seed):
    model = CASES[case](seed)
    symmetries = symmetries_of(model)
    rotates = any(group.kind == "rotation" for group in symmetries.groups.values())
    start = fold_norms(model, symmetries) if rotates else model
    planted = transform_model(start, symmetries, random_transforms(symmetries, 7 + seed))
    reference, found = align([model, planted])
    assert largest_difference(found, reference, symmetries.idle) < 1e-6
    assert torch.allclose(logits(found), logits(model), rtol=0, atol=1e-12)
    assert found.align_report["distance_after"] < 1e-6
    if rotates:
        assert torch.allclose(logits(reference), logits(model), rtol=0, atol=1e-12)
    else:
        assert largest_difference(reference, model) == 0


@pytest.mark.parametrize(
    ("case", "rotate"),
    [(case, True) for case in CASES]
    + [(case, False) for case in (*sorted(ROTATED), "GRU4Rec-tied", "Caser-untied")],
)
def test_independent_members_come_no_farther_apart(case, rotate):
    members = [CASES[case](seed) for seed in range(2)]
    before = [logits(model) for model in members]
    values = [[p.clone() for p in model.parameters()] for model in members]
    aligned = align(members, reference=1, rotate=rotate)
    for model, new, expected, kept in zip(members, aligned, before, values, strict=True):
        report = new.align_report
        assert torch.allclose(logits(new), expected, rtol=0, atol=1e-12)
        assert report["distance_after"] <= report["distance_before"]
        assert json.loads(json.dumps(report)) == report
        assert report["reference"] == 1
        assert all(map(torch.equal, model.parameters(), kept))
        assert type(new) is type(model) and new is not model
        kinds = set(report["groups"].values())
        assert ("rotation" in kinds) == (rotate and case in ROTATED)
        turns = case.startswith(("GRU4Rec", "Caser", "FISM", "YouTubeDNN-untied"))
        assert ("orthogonal" in kinds) == (rotate and turns)
    moved = [new.align_report for new in aligned]
    assert moved[1]["distance_before"] == moved[1]["distance_after"] == 0
    assert moved[0]["distance_after"] < moved[0]["distance_before"] or "one" in case


@pytest.mark.parametrize("case", ["BERT4Rec-post-tied", "SASRec-pre-untied-bias", "GRU4Rec-tied"])
def test_single_precision_agrees_to_rounding(case):
    members = [CASES[case](seed).float() for seed in range(2)]
    for model, new in zip(members, align(members), strict=True):
        assert next(new.parameters()).dtype == torch.float32
        scale = logits(model).abs().max()
        assert (logits(new) - logits(model)).abs().max() <= 1e-5 * scale


def test_permutations_move_values_bit_for_bit():
    members = [CASES["BERT4Rec-post-tied"](seed).float() for seed in range(2)]
    _, new = align(members)
    for name in (
        "item_embedding.weight",
        "embedding_norm.weight",
        "blocks.0.feed_forward_norm.bias",
    ):
        mine, own = new.get_parameter(name), members[1].get_parameter(name)
        assert torch.equal(mine.sort(-1).values, own.sort(-1).values)


class OneLayer(nn.Module):
    """Numbers with given symmetries, and no function."""

    def __init__(self, symmetries, **parameters):
        super().__init__()
        self._symmetries = symmetries
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def symmetries(self):
        return self._symmetries


def random_layer(symmetries, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return OneLayer(symmetries, **tensors)


def squared(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return sum(float((a - b).square().sum()) for a, b in pairs)


@pytest.mark.parametrize("seed", range(3))
def test_units_are_assigned_as_trying_all_orders_does(seed):
    spec = Symmetries(
        {"units": SymmetryGroup(5)},
        {"inner": whole("units", None), "bias": whole("units"), "outer": whole(None, "units")},
    )
    shapes = {"inner": (5, 3), "bias": (5,), "outer": (3, 5)}
    one, other = (random_layer(spec, shapes, seed + 10 * m) for m in range(2))
    best = min(
        squared(one, transform_model(other, spec, {"units": torch.tensor(order)}))
        for order in itertools.permutations(range(5))
    )
    _, found = align([one, other])
    assert squared(one, found) == pytest.approx(best, rel=1e-12)
    assert found.align_report["distance_after"] == pytest.approx(best**0.5, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_signed_units_are_assigned_as_trying_all_orders_and_signs_does(seed):
    spec = Symmetries(
        {"units": SymmetryGroup(4, "signed", ("units", "gates"))},
        {"state": whole("units", None), "gate": whole("gates", None), "out": whole(None, "units")},
    )
    shapes = {"state": (4, 2), "gate": (4, 2), "out": (2, 4)}
    one, other = (random_layer(spec, shapes, seed + 10 * m) for m in range(2))
    best = torch.inf
    for order in itertools.permutations(range(4)):
        for signs in itertools.product((-1.0, 1.0), repeat=4):
            index = torch.tensor(order)
            turn = torch.diag(torch.tensor(signs).double()) @ torch.eye(4).double()[index]
            best = min(
                best, squared(one, transform_model(other, spec, {"units": turn, "gates": index}))
            )
    _, found = align([one, other])
    assert squared(one, found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_heads_of_width_one_are_assigned_as_trying_all_orders_and_signs_does(seed):
    spec = Symmetries(
        {"heads": SymmetryGroup(3, "heads", ("qk", "vo"), 3)},
        {"q": whole("qk", None), "k": whole("qk", None), "v": whole("vo", None)},
    )
    shapes = dict.fromkeys("qkv", (3, 4))
    one, other = (random_layer(spec, shapes, seed + 10 * m) for m in range(2))
    best = torch.inf
    signs = [torch.tensor(s).double() for s in itertools.product((-1.0, 1.0), repeat=3)]
    for order in itertools.permutations(range(3)):
        moved = torch.eye(3).double()[list(order)]
        for qk, vo in itertools.product(signs, repeat=2):
            turn = {"qk": torch.diag(qk) @ moved, "vo": torch.diag(vo) @ moved}
            best = min(best, squared(one, transform_model(other, spec, turn)))
    _, found = align([one, other])
    assert squared(one, found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("kind", "size"), [("orthogonal", 3), ("rotation", 4), ("heads", 3)])
def test_no_rotation_is_better_than_procrustes(kind, size):
    labels = ("axis",)
    spec = Symmetries({"group": SymmetryGroup(size, kind, labels)}, {"table": whole(None, "axis")})
    one, other = (random_layer(spec, {"table": (9, size)}, seed) for seed in range(2))
    _, found = align([one, other])
    best = squared(one, found)
    for seed in range(300):
        tried = transform_model(other, spec, random_transforms(spec, seed))
        assert squared(one, tried) >= best
    # A maximum: the derivative along every admissible direction is zero.
    table, mine = one.table.detach(), found.table.detach()
    slope = table.t() @ mine
    if kind == "rotation":
        centre = torch.eye(size).double() - 1 / size
        slope = centre @ slope @ centre
    assert (slope - slope.t()).abs().max() < 1e-12
    assert torch.linalg.eigvalsh(slope).min() > -1e-12


def test_items_are_matched_by_id():
    model = CASES["GRU4Rec-tied"](0)
    symmetries = symmetries_of(model)
    planted = transform_model(model, symmetries, random_transforms(symmetries, 4))
    model.item_ids = [f"i{v}" for v in range(NUM_ITEMS)]
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        planted.item_embedding.weight[1:] = planted.item_embedding.weight[1:][order]
    ids = [f"i{v}" for v in order]
    ids[3], lost = "new", int(order[3])  # one item of each that the other lacks
    with torch.no_grad():
        planted.item_embedding.weight[4] = 100.0
    planted.item_ids = ids
    _, found = align([model, planted])
    back = found.item_embedding.weight[1:][order.argsort()]
    kept = [v for v in range(NUM_ITEMS) if v != lost]
    assert (back - model.item_embedding.weight[1:])[kept].abs().max() < 1e-6
    assert found.item_ids == ids


def test_one_member_and_equal_members_stay():
    model = CASES["SASRec-post-tied-plain"](0)
    for new in [*align([model]), *align([model, model], reference=1)]:
        assert largest_difference(new, model) == 0


def test_tied_weights_stay_tied_and_frozen_ones_frozen():
    members = [CASES["BERT4Rec-post-tied"](seed) for seed in range(2)]
    members[1].position_embedding.weight.requires_grad_(False)
    _, new = align(members)
    weight, _ = new.head()
    assert weight.untyped_storage().data_ptr() == new.item_embedding.weight.data_ptr()
    assert not new.position_embedding.weight.requires_grad
    assert new.item_embedding.weight.requires_grad


def test_one_member_that_admits_no_rotation_keeps_all_from_it():
    members = [CASES["SASRec-constant"](0), CASES["SASRec-pre-tied-bias"](1)]
    for models in (members, members[::-1]):
        for model, new in zip(models, align(models), strict=True):
            assert new.align_report["groups"]["residual"] == "permutation"
            assert torch.allclose(logits(new), logits(model), rtol=0, atol=1e-12)


def without(spec, name):
    return Symmetries(spec.groups, {k: v for k, v in spec.axes.items() if k != name})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": 2}, "reference is 2 where 0..1 was expected"),
        ({"reference": -1}, "reference is -1"),
        ({"sweeps": 0}, "sweeps is 0"),
        (
            {"symmetries": lambda m: without(symmetries_of(m), "dense.bias")},
            "the symmetries of GRU4Rec lack tensor 'dense.bias'",
        ),
        (
            {
                "symmetries": lambda m: Symmetries(
                    {"items": SymmetryGroup(5)},
                    {**symmetries_of(m).axes, "dense.bias": whole("items")},
                )
            },
            "which the labels",
        ),
        (
            {
                "symmetries": lambda m: Symmetries(
                    symmetries_of(m).groups,
                    {
                        **symmetries_of(m).axes,
                        "dense.bias": (
                            AxisSpec((None,), None, 0, 0, 2),
                            AxisSpec((None,), None, 0, 1, 5),
                        ),
                    },
                )
            },
            "the parts of tensor 'dense.bias' do not cover it once",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    members = [CASES["GRU4Rec-tied"](seed) for seed in range(2)]
    with pytest.raises(InputError, match=message):
        align(members, **arguments)


def test_members_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="no symmetries are known for Linear"):
        align([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(InputError, match="there is no model"):
        align([])
    other = build("BERT4Rec", 1, **{**BLOCKS, "heads": 3})
    with pytest.raises(InputError, match="member 1 was built with heads=3"):
        align([build("BERT4Rec", 0, **BLOCKS), other])
    broken = CASES["SASRec-post-tied-plain"](1)
    with torch.no_grad():
        broken.item_embedding.weight[2, 1] = torch.nan
    with pytest.raises(InputError, match="'item_embedding.weight' of member 1 holds a NaN"):
        align([CASES["SASRec-post-tied-plain"](0), broken])
