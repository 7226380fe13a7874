"""Attribute prediction against its equation as loops."""

import math

import pytest
import torch
from models import bert
from objective_models import NAMES, T, V, check_gradient, encoder, generator, padded

import fisherkern as fk

# Item 4 has none, item 5 is not mentioned, item 3 names one twice.
ATTRIBUTES = {f"i{v}": [10 * v, 7] for v in range(6, V + 1)} | {
    "i1": [30],
    "i2": [7, 30, 900],
    "i3": [7, 7],
    "i4": [],
}
ROWS = [[1, 2, 3, 6, 2], [4], [], [5, 5, 1], [2, 9]]


def dataset(attributes=ATTRIBUTES):
    return fk.SequenceDataset("t", [1, 2, 3], [0, 3], NAMES, ["a"], attributes)


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_the_loss_is_the_mean_of_binary_cross_entropies(positions):
    model, tokens = bert(), padded(ROWS, T)
    objective = fk.Attributes(6, 0.4, positions, seed=3).bind(dataset(), T)
    head = objective.modules()["attributes"].double()
    loss = objective(model, tokens, generator(8))
    places, chosen = fk.MaskedItems(0.4).draw(tokens, generator(8))
    masked = model.mask_items(tokens, places, chosen)
    states = model.states(masked)
    numbers = sorted({number for own in ATTRIBUTES.values() for number in own})
    terms = []
    for n in range(len(ROWS)):
        for t in range(T):
            own = ATTRIBUTES.get(f"i{int(tokens[n, t])}", [])
            if own and (positions == "all" or masked[n, t] == model.mask_token):
                z = head(model.transform(states[n, t])).tolist()
                for column, number in enumerate(numbers):
                    p = 1 / (1 + math.exp(-z[column]))
                    terms.append(-math.log(p if number in own else 1 - p))
    assert len(head.bias) == len(numbers)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-10)


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_gradients(positions):
    objective = fk.Attributes(6, 0.4, positions).bind(dataset(), T)
    head = objective.modules()["attributes"].double()
    check_gradient(objective, bert(), padded(ROWS, T))
    objective(bert(), padded(ROWS, T), generator()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_the_head_depends_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = fk.Attributes(6, seed=3).bind(dataset(), T).modules()["attributes"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = fk.Attributes(6, seed=3).bind(dataset(), T).modules()["attributes"]
    other = fk.Attributes(6, seed=4).bind(dataset(), T).modules()["attributes"]
    assert torch.equal(one.weight, again.weight) and not torch.equal(one.weight, other.weight)
    assert not one.bias.any()


def test_items_without_attributes_have_loss_zero():
    objective = fk.Attributes(6).bind(dataset(), T)
    loss = objective(bert(), padded([[4, 5], [5]], T), generator())
    loss.backward()
    assert loss.item() == 0.0


def test_settings_do_not_grow_when_bound():
    objective = fk.Attributes(6, 0.3, "masked", 5)
    expected = {"name": "Attributes", "dim": 6, "ratio": 0.3, "positions": "masked", "seed": 5}
    assert objective.settings() == objective.bind(dataset(), T).settings() == expected
    assert objective.modules() == {}


def test_training_learns_the_attributes():
    data = fk.synthetic(60, 30, seed=1)
    torch.manual_seed(0)
    model = fk.BERT4Rec(30, max_len=8, dim=16)
    objective = fk.MaskedItems() + 0.5 * fk.Attributes(16).bind(data, 8)
    (name, head), *rest = objective.modules().items()
    before = head.weight.detach().clone()
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for epoch in range(6):
        for tokens in data.windows(batch_size=32, max_len=8, seed=0, epoch=epoch):
            optimizer.zero_grad()
            loss = objective(model, tokens, generator(epoch))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert name == "part1_attributes" and not rest
    assert losses[-1] < losses[0] and not torch.equal(head.weight, before)


def test_wrong_use_is_named():
    for arguments, message in (
        ({"dim": 0}, "dim must be at least 1"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\]"),
        ({"ratio": math.nan}, r"ratio must be in \(0, 1\]"),
        ({"positions": "last"}, "positions must be 'all' or 'masked', got 'last'"),
    ):
        with pytest.raises(fk.InputError, match=message):
            fk.Attributes(**arguments)
    for attributes in (None, {}):
        with pytest.raises(fk.InputError, match="the data set has no attributes"):
            fk.Attributes().bind(dataset(attributes), T)
    with pytest.raises(fk.InputError, match="no item of the data set has an attribute"):
        fk.Attributes().bind(dataset({"i1": []}), T)

    class Other:
        item_ids, num_items, attributes = NAMES, V, {"i1": [1], "elsewhere": [2]}

    with pytest.raises(fk.InputError, match="item 'elsewhere' is not in"):
        fk.Attributes().bind(Other(), T)
    tokens = padded([[1, 2]], T)
    with pytest.raises(fk.InputError, match="must be bound"):
        fk.Attributes(6)(bert(), tokens, generator())
    with pytest.raises(fk.InputError, match="dim = 64, but the model's is 6"):
        fk.Attributes().bind(dataset(), T)(bert(), tokens, generator())
    with pytest.raises(fk.InputError, match="SASRec has no mask token"):
        fk.Attributes(6).bind(dataset(), T)(encoder("SASRec"), tokens, generator())
