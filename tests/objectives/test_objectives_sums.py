"""Sums of objectives, their settings, and repeated padding."""

import dataclasses
import json
import math

import pytest
import torch
from models import bert
from objective_models import T, check_gradient, encoder, generator, padded

import fisherkern as fk
from fisherkern.objectives import Objective, WeightedSum, from_settings

ROWS = [[3, 5, 3, 8, 1, 2], [7], [], [2, 9, 4, 4], [1, 2]]


@dataclasses.dataclass(frozen=True)
class Drawn(Objective):
    """The first number that it draws, times `scale`; remembers the columns it was given."""

    scale: float = 1.0
    lookahead: int = 0
    seen: list = dataclasses.field(default_factory=list, repr=False)

    def __call__(self, model, tokens, generator):
        self.seen.append(tokens)
        return self.scale * torch.rand((), generator=generator, dtype=torch.float64)


def test_sums_add_and_weights_multiply():
    draws = torch.rand(3, generator=generator(), dtype=torch.float64).tolist()
    a, b, c = Drawn(1.0), Drawn(10.0), Drawn(100.0)
    values = [scale * draw for scale, draw in zip((1.0, 10.0, 100.0), draws, strict=True)]
    for objective, weights in (
        (a + b + c, (1, 1, 1)),
        (a + (b + c), (1, 1, 1)),
        (a + 0.1 * b, (1, 0.1)),
        (2 * (a + 0.1 * b) * 0.5 + 3 * c, (1, 0.1, 3)),
        (0 * a, (0,)),
    ):
        assert objective.weights == pytest.approx(weights)
        assert all(isinstance(part, Drawn) for part in objective.parts)
        expected = sum(w * v for w, v in zip(weights, values, strict=False))
        assert objective(None, padded(ROWS, T), generator()).item() == pytest.approx(expected)


def test_a_sum_is_the_sum_of_its_parts():
    model, tokens = bert(), padded(ROWS, T)
    objective = fk.MaskedItems(0.4) + 0.3 * fk.CL4SRec() + 0.2 * fk.DuoRec("unsupervised")
    one = generator(4)
    parts = [part(model, tokens, one).item() for part in objective.parts]
    expected = parts[0] + 0.3 * parts[1] + 0.2 * parts[2]
    assert objective(model, tokens, generator(4)).item() == pytest.approx(expected, abs=1e-12)
    check_gradient(objective, model, tokens)


def test_a_part_at_the_end_changes_no_draw_before_it():
    first, alone = Drawn(), Drawn()
    (first + 0 * Drawn())(None, padded(ROWS, T), generator(3))
    value = (first + 0 * Drawn())(None, padded(ROWS, T), generator(3))
    assert value.item() == alone(None, padded(ROWS, T), generator(3)).item()


def test_each_part_gets_the_columns_it_asked_for():
    wide, narrow = Drawn(lookahead=1), Drawn()
    objective = wide + narrow
    assert objective.lookahead == 1 and (narrow + Drawn()).lookahead == 0
    tokens = padded(ROWS, T + 1)
    objective(None, tokens, generator())
    assert torch.equal(wide.seen[0], tokens) and torch.equal(narrow.seen[0], tokens[:, 1:])


def test_contrast_beside_next_item_does_not_see_the_target():
    tokens = padded(ROWS, T + 1)
    seen = {}

    @dataclasses.dataclass(frozen=True)
    class Contrast(fk.CL4SRec):
        def __call__(self, model, tokens, generator):
            seen["CL4SRec"] = tokens
            return super().__call__(model, tokens, generator)

    objective = fk.NextItem() + 0.1 * Contrast()
    assert objective.lookahead == 1
    objective(encoder("SASRec"), tokens, generator())
    assert torch.equal(seen["CL4SRec"], tokens[:, :-1])
    # DuoRec's target is the last item of its window, the very one that NextItem predicts last.
    assert torch.equal(fk.DuoRec().columns(tokens, 1), tokens[:, 1:])


def test_parts_are_bound_and_their_modules_named():
    data = fk.synthetic(20, 30, seed=1)
    objective = fk.MaskedItems() + fk.RepPad(fk.Attributes(6)) + 0.5 * fk.Attributes(6, seed=1)
    assert objective.modules() == {}
    bound = objective.bind(data, T)
    assert list(bound.modules()) == ["part1_attributes", "part2_attributes"]
    assert bound.settings() == objective.settings() and bound.weights == objective.weights
    torch.nn.ModuleDict(bound.modules())


OBJECTIVES = [
    fk.MaskedItems(0.3, 0.1),
    fk.NextItem("gbce", 7, t=0.5, negatives_per="position"),
    fk.CL4SRec(0.5, 0.2, 0.1, fk.SymmetricNoiseTolerant(0.2)),
    fk.DuoRec("both", fk.NTXent(0.2, "cosine"), True),
    fk.Attributes(8, 0.1, "masked", 3),
    fk.RepPad(fk.MaskedItems(0.4), "random"),
    fk.VREx(fk.MaskedItems(0.4), 0.5, "sequence", 2),
    fk.NextItem() + 0.1 * fk.CL4SRec() + 2 * fk.DuoRec("supervised"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_settings_go_through_json_and_back(objective):
    settings = objective.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert from_settings(settings) == objective
    data = fk.synthetic(20, 30, seed=1)
    assert objective.bind(data, T).settings() == settings
    assert len(json.dumps(settings)) < 1000


def test_settings_say_all():
    assert (fk.MaskedItems() + 0.1 * fk.CL4SRec(mask=0.5)).settings() == {
        "name": "WeightedSum",
        "weights": [1.0, 0.1],
        "parts": [
            {"name": "MaskedItems", "ratio": 0.2, "last_ratio": 0.0},
            {
                "name": "CL4SRec",
                "crop": 0.6,
                "mask": 0.5,
                "reorder": 0.6,
                "loss": {"name": "NTXent", "temperature": 1.0, "similarity": "dot"},
            },
        ],
    }


def slow_repeat(row, width, copies):
    """`copies` more copies of the row to its left with a 0 between, cut on the left."""
    whole = row
    for _ in range(copies):
        whole = row + [0] + whole if row else whole
    return ([0] * width + whole)[-width:]


def test_padding_is_filled_with_the_sequence():
    table = [
        ([1, 2, 3], [2, 3, 0, 1, 2, 3, 0, 1, 2, 3]),
        ([7], [0, 7, 0, 7, 0, 7, 0, 7, 0, 7]),
        ([], [0] * 10),
        (list(range(1, 10)), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (list(range(1, 11)), list(range(1, 11))),
        ([4, 4, 5, 5, 6], [4, 5, 5, 6, 0, 4, 4, 5, 5, 6]),
    ]
    tokens = padded([row for row, _ in table], 10)
    before = tokens.clone()
    made = fk.RepPad(fk.MaskedItems()).repeat(tokens, generator())
    assert made.tolist() == [expected for _, expected in table]
    assert torch.equal(tokens, before)


@pytest.mark.parametrize("length", range(12))
def test_random_repeats_are_uniform(length):
    row = list(range(1, length + 1))
    made = fk.RepPad(fk.MaskedItems(), "random").repeat(
        padded([row], 11).repeat(2000, 1), generator()
    )
    most = max(1, 11 // max(1, length))
    outcomes = [tuple(slow_repeat(row, 11, copies)) for copies in range(1, most + 1)]
    counts = {}
    for got in made.tolist():
        counts[tuple(got)] = counts.get(tuple(got), 0) + 1
    assert set(counts) == set(outcomes)
    for outcome, count in counts.items():
        p = outcomes.count(outcome) / most
        assert abs(count - 2000 * p) < 5 * math.sqrt(2000 * p * (1 - p)) + 1e-9


@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec", "BERT4Rec"])
def test_the_delimiter_is_neither_predicted_nor_predicted_from(name):
    model = encoder(name, max_len=8)
    inner = fk.MaskedItems(1.0) if name == "BERT4Rec" else fk.NextItem()
    tokens = padded([[1, 2, 3]], 8 + inner.lookahead)
    loss = fk.RepPad(inner)(model, tokens, generator())
    repeated = torch.tensor([[3, 0, 1, 2, 3, 0, 1, 2, 3][-tokens.shape[1] :]])
    weight, bias = model.head()
    if name == "BERT4Rec":
        hidden = model.transform(model.states(torch.where(repeated == 0, 0, model.mask_token)))
        pairs = [(t, int(v)) for t, v in enumerate(repeated[0]) if v]
    else:
        hidden = model.transform(model.states(repeated[:, :-1]))
        # Input columns 0..7 are 3 0 1 2 3 0 1 2: 3 -> 0 and 0 -> 1 do not count.
        pairs = [(2, 2), (3, 3), (6, 2), (7, 3)]
    losses = [-(weight @ hidden[0, t] + bias).log_softmax(0)[item - 1] for t, item in pairs]
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-10)


def test_wrong_use_is_named():
    for weight in (-0.1, math.inf, math.nan):
        with pytest.raises(fk.InputError, match="weight of an objective must be 0 or more"):
            weight * fk.MaskedItems()
    with pytest.raises(fk.InputError, match="1 weights do not fit 0 parts"):
        WeightedSum((1.0,), ())
    with pytest.raises(TypeError):
        fk.MaskedItems() + 1
    with pytest.raises(TypeError):
        "2" * fk.MaskedItems()
    with pytest.raises(fk.InputError, match="unknown objective 'Other'; known: Attributes"):
        from_settings({"name": "Other"})
    with pytest.raises(fk.InputError, match="arguments of MaskedItems do not fit.*share"):
        from_settings({"name": "MaskedItems", "share": 1})
    with pytest.raises(fk.InputError, match="ratio must be in .*, got .much"):
        from_settings({"name": "MaskedItems", "ratio": "much"})
    for settings in ({"name": "NTXent"}, [], "MaskedItems", None):
        with pytest.raises(fk.InputError, match="settings of an objective are a mapping"):
            from_settings(settings)
    with pytest.raises(fk.InputError, match=r"unknown objective \('NTXent',\)"):
        from_settings({"name": "CL4SRec", "loss": {"name": ["NTXent"]}})
    for kind in (fk.CL4SRec, fk.DuoRec):
        with pytest.raises(fk.InputError, match="loss must be a contrastive loss .* got 'NTXent'"):
            from_settings({"name": kind.__name__, "loss": "NTXent"})
    with pytest.raises(fk.InputError, match="'MaskedItems' is not an objective"):
        from_settings({"name": "WeightedSum", "weights": [1.0], "parts": ["MaskedItems"]})
    with pytest.raises(fk.InputError, match="repeats must be 'fill' or 'random', got 'all'"):
        fk.RepPad(fk.MaskedItems(), "all")
    for inner in (fk.CL4SRec(), fk.DuoRec(), fk.MaskedItems() + fk.CL4SRec(), None):
        with pytest.raises(fk.InputError, match="cannot read repeated sequences"):
            fk.RepPad(inner)
