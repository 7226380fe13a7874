"""Losses are means over targets: literal tables, any batch size, and data without a target."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fisherkern as fk
from fisherkern.data import SequenceDataset
from fisherkern.errors import InputError
from fisherkern.objectives import Attributes, Objective
from fisherkern.training import train

# One user has five actions to train on, the others one or two; two more are held out.
ROWS = [[1, 2, 3, 4, 1], [2], [3], [4, 4], [1], [2], [3], [1]]
SHARES = torch.tensor([0.5, 0.25, 0.125, 0.125])


def dataset(rows, attributes=None):
    rows = [[*row, 1, 2] for row in rows]
    offsets = np.append(0, np.cumsum([len(row) for row in rows]))
    users = [f"u{number}" for number in range(len(rows))]
    names = [f"i{v}" for v in range(1, 5)]
    return SequenceDataset(
        "made", np.concatenate(rows), offsets, names, users, attributes=attributes
    )


def still(kind="SASRec"):
    """An encoder that gives item v the probability SHARES[v - 1], whatever it sees."""
    torch.manual_seed(0)
    encoder = {"SASRec": fk.SASRec, "BERT4Rec": fk.BERT4Rec, "GRU4Rec": fk.GRU4Rec}[kind]
    more = {} if kind == "BERT4Rec" else {"bias": True}  # BERT4Rec has one
    model = encoder(4, max_len=6, dim=4, tied=False, dropout=0.0, **more)
    weight, bias = model.head()
    with torch.no_grad():
        weight.zero_()
        bias.copy_(SHARES.log())
    return model


def first_loss(objective, rows=ROWS, kind="SASRec", attributes=None, **settings):
    settings = {"epochs": 1, "lr": 1e-12, "progress": False, **settings}
    data = dataset(rows, attributes)
    return train(still(kind), data, objective=objective, **settings).losses[0]


def nats(items):
    return sum(-math.log(SHARES[item - 1]) for item in items) / len(items)


# The targets of each objective by hand: next items, last items, all items.
TABLE = {
    "next": (fk.NextItem(), "SASRec", [2, 3, 4, 1, 4]),
    "last": (fk.NextItem(last_only=True), "SASRec", [1, 4]),
    "last of BERT4Rec": (fk.NextItem(last_only=True), "BERT4Rec", [1, 4]),
    "masked": (fk.MaskedItems(1.0), "BERT4Rec", [item for row in ROWS for item in row]),
    "last masked": (fk.MaskedItems(1.0, last_ratio=1.0), "BERT4Rec", [row[-1] for row in ROWS]),
    "repeated": (fk.RepPad(fk.NextItem()), "SASRec", None),
}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[2]])
def test_an_epochs_loss_is_the_mean_over_its_targets(name, batch_size):
    objective, kind, targets = TABLE[name]
    found = first_loss(objective, kind=kind, batch_size=batch_size)
    assert found == pytest.approx(nats(targets), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_terms_of_a_sum_are_means_of_their_own(batch_size):
    objective = 0.5 * fk.NextItem(last_only=True) + 2.0 * fk.MaskedItems(1.0)
    found = first_loss(objective, kind="BERT4Rec", batch_size=batch_size)
    # `MaskedItems` in windows with a column more reads their last columns: all items.
    expected = 0.5 * nats([1, 4]) + 2.0 * nats([item for row in ROWS for item in row])
    assert found == pytest.approx(expected, rel=1e-6)


def test_losses_of_any_objective_do_not_depend_on_the_batch_size():
    for objective, kind in [
        (TABLE["repeated"][0], "SASRec"),
        (fk.NextItem(), "GRU4Rec"),
        (fk.NextItem() + fk.NextItem(last_only=True), "SASRec"),
    ]:
        losses = [first_loss(objective, kind=kind, batch_size=size) for size in (1, 3, 100)]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("positions", ["all", "masked"])
def test_attributes_count_the_items_that_have_one(positions, batch_size):
    objective = Attributes(dim=4, ratio=1.0, positions=positions, seed=3)
    attributes = {"i1": [0], "i4": [0, 1]}
    losses = [
        first_loss(objective, kind="BERT4Rec", attributes=attributes, batch_size=size)
        for size in (batch_size, 8)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class Nothing:
    """Counts the optimiser's steps by what changes of a model."""

    def __init__(self, model):
        self.model = model
        self.before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def holds(self):
        now = self.model.state_dict()
        return all(torch.equal(tensor, now[name]) for name, tensor in self.before.items())


SHORT = [[1], [2], [3], [4], [1]]
NEEDING = {
    "next": (fk.NextItem(), "SASRec"),
    "sampled": (fk.NextItem("bce", negatives=2), "SASRec"),
    "last": (fk.NextItem(last_only=True), "BERT4Rec"),
    "DuoRec": (fk.DuoRec(), "SASRec"),
    "next and CL4SRec": (fk.NextItem() + 0.1 * fk.CL4SRec(), "SASRec"),
    "next and DuoRec": (fk.NextItem() + 0.1 * fk.DuoRec(), "SASRec"),
    "repeated": (fk.RepPad(fk.NextItem()), "SASRec"),
    "masked for nothing": (fk.NextItem(last_only=True) + 0.0 * fk.MaskedItems(), "BERT4Rec"),
}


@pytest.mark.parametrize("name", NEEDING)
def test_data_without_a_next_item_is_refused_before_any_step(name, tmp_path):
    objective, kind = NEEDING[name]
    model = still(kind)
    unchanged, state = Nothing(model), tmp_path / "state.safetensors"
    with pytest.raises(InputError, match="^no user has a next item to train on$"):
        train(
            model,
            dataset(SHORT),
            objective=objective,
            epochs=50,
            weight_decay=0.1,
            state=state,
            progress=False,
        )
    assert unchanged.holds() and not state.exists()


def test_a_sum_goes_on_with_the_part_that_has_targets():
    objective = fk.NextItem(last_only=True) + fk.MaskedItems(1.0)
    found = first_loss(objective, SHORT, "BERT4Rec", batch_size=2)
    assert found == pytest.approx(nats([1, 2, 3, 4, 1]), rel=1e-6)


def test_items_without_attributes_are_nothing_to_learn_from():
    data = dataset([[1, 2], [2]], {"i4": [0]})
    with pytest.raises(InputError, match="^no user has an item with attributes to train on$"):
        train(still("BERT4Rec"), data, objective=Attributes(dim=4), epochs=1, progress=False)


@pytest.mark.parametrize("kind", ["SASRec", "GRU4Rec"])
def test_networks_that_see_no_item_before_the_first_are_refused(kind):
    networks = fk.ParallelEncoders.copies(still(kind), 2, 0.01, 0)
    objective = fk.EMKD(contrast_weight=0.0, attribute_weight=0.0, networks=2, dim=4)
    with pytest.raises(InputError, match="^no user has an item to train on$"):
        train(networks, dataset(SHORT), objective=objective, epochs=1, progress=False)


class Pull(Objective):
    """A loss of rows that end in item 1 alone, its gradient the weights themselves."""

    def __call__(self, model, tokens, generator):
        rows = tokens[tokens[:, -1] == 1]
        return len(rows) * model.head()[0].square().sum()

    def targets(self, model, tokens):
        return int((tokens[:, -1] == 1).sum())

    def settings(self):
        return {"name": "Pull"}


def test_steps_without_a_target_leave_weights_moments_and_average_alone():
    steps = []
    for rows in ([[1], [1]], [[1], [2], [2], [1], [2]]):
        model = still()
        nn.init.ones_(model.head()[0])
        data = dataset(rows)
        log = train(
            model,
            data,
            objective=Pull(),
            epochs=3,
            batch_size=1,
            lr=0.1,
            weight_decay=0.5,
            ema=0.5,
            progress=False,
        )
        steps.append((log.steps, model.state_dict(), log.losses))
    # Three epochs of two targets each: with other users between them, the same weights.
    assert [made for made, _, _ in steps] == [6, 15]
    for name, tensor in steps[0][1].items():
        assert torch.equal(tensor, steps[1][1][name]), name
    assert steps[0][2] == steps[1][2]
