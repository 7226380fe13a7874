"""What every encoder promises: to objectives, Fisher, merging and files."""

from __future__ import annotations

import json
from pathlib import Path

import brute
import pytest
import torch
import torch.nn.functional as F
from helpers.fisher import assert_equal, loader, omega_of
from models import HISTORIES, NUM_ITEMS, shaken
from torch import Tensor

import fisherkern as fk
from fisherkern.adapters.parameters import Parameters
from fisherkern.encoders import (
    ENCODERS,
    FISM,
    BERT4Rec,
    Caser,
    GRU4Rec,
    SASRec,
    SequenceEncoder,
    YouTubeDNN,
)
from fisherkern.fisher.forward.capture import Capture
from fisherkern.fisher.layers import HANDLERS

MAX_LEN, D = 5, 6

# Class and arguments of small encoders whose states are causal.
CAUSAL = {
    "sasrec": (SASRec, {}),
    "sasrec, untied, post": (
        SASRec,
        {"tied": False, "bias": True, "norm": "post", "activation": "gelu", "scaled": False}
        | {"heads": 2, "inner_dim": 7, "layers": 1},
    ),
    "gru4rec": (GRU4Rec, {"hidden_dim": 4}),
    "gru4rec, untied": (GRU4Rec, {"tied": False, "bias": True, "layers": 2, "hidden_dim": 5}),
    "caser": (Caser, {"window": 3, "horizontal": 4, "vertical": 2}),
    "caser, tied": (Caser, {"tied": True, "bias": False, "horizontal": 2, "vertical": 1}),
    "fism": (FISM, {"alpha": 0.5}),
    "fism, tied": (FISM, {"tied": True, "bias": False}),
    "youtube": (YouTubeDNN, {"hidden_dim": 7}),
    "youtube, tied": (YouTubeDNN, {"tied": True, "bias": False, "layers": 3, "hidden_dim": 12}),
}
ALL = {"bert4rec": (BERT4Rec, {"heads": 2}), **CAUSAL}

# As HISTORIES, with a row of padding alone and one with padding inside.
ROWS = torch.cat([HISTORIES, torch.tensor([[0, 0, 0, 0, 0], [4, 0, 0, 8, 1]])])


def make(case: str, **changes: object) -> SequenceEncoder:
    """A float64 encoder in eval mode over 11 items whose parameters are large enough to matter."""
    cls, arguments = ALL[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"num_items": NUM_ITEMS, "max_len": MAX_LEN, "dim": D, **arguments, **changes}
        model = shaken(cls(**settings))
    with torch.no_grad():
        model.item_embedding.weight[0] = 0  # as every encoder keeps it
    return model


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) < 1e-12


def test_all_are_registered() -> None:
    assert list(ENCODERS) == ["BERT4Rec", "SASRec", "GRU4Rec", "Caser", "FISM", "YouTubeDNN"]
    assert all(ENCODERS[name].__name__ == name for name in ENCODERS)
    assert {cls for cls, _ in ALL.values()} == set(ENCODERS.values())
    assert [cls.causal for cls in ENCODERS.values()] == [False, True, True, True, True, True]


@pytest.mark.parametrize("case", CAUSAL)
@pytest.mark.parametrize("width", [1, 3, MAX_LEN, 3 * MAX_LEN])
def test_encode_is_the_last_of_all_states(case: str, width: int) -> None:
    model = make(case)
    history = ROWS.repeat(1, 3)[:, -width:]
    states = model.states(history[:, -MAX_LEN:])
    assert states.shape == (len(ROWS), min(width, MAX_LEN), D)
    assert close(model.encode(history), model.transform(states)[:, -1])
    weight, bias = model.head()
    logits = model.encode(history) @ weight.T + (0 if bias is None else bias)
    assert close(model(history), logits)


@pytest.mark.parametrize("case", [case for case in CAUSAL if not case.startswith("sasrec")])
def test_a_state_is_that_of_the_history_that_ends_there(case: str) -> None:
    """SASRec's positions are counted from the end, so a prefix alone has other ones."""
    model = make(case)
    states = model.transform(model.states(ROWS))
    for row, tokens in enumerate(ROWS):
        for t in range(MAX_LEN):
            if tokens[t]:
                assert close(model.encode(tokens[None, : t + 1])[0], states[row, t])


@pytest.mark.parametrize("case", ALL)
def test_states_at_positions_are_those_of_all_positions(case: str) -> None:
    model = make(case)
    positions = torch.tensor([[4, 0, 3], [2, 2, 1]]).repeat(4, 1)[: len(ROWS)]
    every = model.states(ROWS)
    expected = torch.stack([row[places] for row, places in zip(every, positions, strict=True)])
    assert close(model.states(ROWS, positions), expected)


@pytest.mark.parametrize("case", CAUSAL)
def test_later_items_change_nothing_before_them(case: str) -> None:
    model = make(case)
    before = model.states(ROWS)
    for t in range(1, MAX_LEN):
        changed = ROWS.clone()
        changed[:, t:] = changed[:, t:] % NUM_ITEMS + 1
        after = model.states(changed)
        assert close(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t], before[:, t]).all(dim=1).any()


@pytest.mark.parametrize("case", ALL)
def test_gradients_of_a_state_reach_the_items_it_may_see(case: str) -> None:
    model = make(case)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    for t in range(MAX_LEN):
        model.zero_grad()
        model.states(tokens)[0, t].square().sum().backward()
        reached = model.item_embedding.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
        first = max(0, t - model.window + 1) if isinstance(model, Caser) else 0
        last = t if model.causal else MAX_LEN - 1
        assert reached == list(range(first + 1, last + 2))


@pytest.mark.parametrize("case", ALL)
def test_padding_and_the_rest_of_the_batch_change_nothing(case: str) -> None:
    model = make(case, max_len=9)
    together = model.encode(ROWS)
    states = model.states(ROWS)
    for row, tokens in enumerate(ROWS):
        first = int((tokens != 0).int().argmax()) if tokens.any() else MAX_LEN - 1
        for padding in (0, 1, 4):
            alone = F.pad(tokens[None, first:], (padding, 0))
            assert close(model.encode(alone)[0], together[row])
            if tokens.any():
                assert close(model.states(alone)[0, padding:], states[row, first:])


@pytest.mark.parametrize("case", CAUSAL)
def test_only_the_last_max_len_items_count(case: str) -> None:
    model = make(case)
    long = torch.arange(1, NUM_ITEMS + 1)[None]
    assert torch.equal(model(long), model(long[:, -MAX_LEN:]))
    changed = long.clone()
    changed[0, -MAX_LEN] = 1
    assert close(model(changed), model(long)) == (case == "caser")  # a window of 3


@pytest.mark.parametrize("case", ALL)
def test_batches_of_other_kinds_and_sizes(case: str) -> None:
    model = make(case)
    expected = model(ROWS)
    assert expected.shape == (len(ROWS), NUM_ITEMS) and expected.isfinite().all()
    assert torch.equal(model(ROWS.int()), expected)
    assert torch.equal(model({"history": ROWS, "target": None}), expected)
    assert model(ROWS[:0]).shape == (0, NUM_ITEMS)
    assert model.states(ROWS[:0]).shape == (0, MAX_LEN, D)
    one = make(case, max_len=1)
    assert one(ROWS).shape == (len(ROWS), NUM_ITEMS)
    assert close(one(ROWS), one(ROWS[:, -1:]))
    assert make(case).float()(ROWS).dtype == torch.float32


@pytest.mark.parametrize("case", ALL)
def test_item_parameters_lists_every_parameter_with_a_row_per_item(case: str) -> None:
    small, large = make(case), make(case, num_items=NUM_ITEMS + 3)
    sizes = {name: p.shape for name, p in large.named_parameters()}
    grown = {name for name, p in small.named_parameters() if p.shape != sizes[name]}
    assert set(small.item_parameters()) == grown
    history = torch.tensor([[4]])
    for name, first in small.item_parameters().items():
        model = make(case)
        with torch.no_grad():
            model.get_parameter(name)[first + 4] += 1.0  # item 5
        changed = (model(history) - small(history)).abs()[0] > 1e-9
        scores = model.head()[0] is model.output_embedding and name == "item_embedding.weight"
        assert changed.nonzero().flatten().tolist() == ([] if scores else [4])


@pytest.mark.parametrize("case", ALL)
def test_every_parameter_but_the_padding_row_is_trained(case: str) -> None:
    model = make(case)
    model(ROWS).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 1e-9, name
    assert not model.item_embedding.weight.grad[0].any()


@pytest.mark.parametrize("case", ALL)
def test_two_calls_in_training_are_two_views(case: str) -> None:
    model = make(case, dropout=0.5)
    assert torch.equal(model.encode(ROWS), model.encode(ROWS))
    model.train()
    torch.manual_seed(1)
    one, other = model.encode(ROWS), model.encode(ROWS)
    assert not torch.isclose(one[:5], other[:5]).all(dim=1).any()
    torch.manual_seed(1)
    assert torch.equal(model.encode(ROWS), one)
    assert not torch.isclose(*(model.states(ROWS)[:5, -1] for _ in range(2))).all(dim=1).any()
    (one + other).square().sum().backward()
    assert model.item_embedding.weight.grad.abs().sum(dim=1).gt(0)[HISTORIES.unique()[1:]].all()
    assert torch.equal(*(make(case, dropout=0.0).train().encode(ROWS) for _ in range(2)))


@pytest.mark.parametrize("case", CAUSAL)
def test_there_is_no_mask_token(case: str) -> None:
    with pytest.raises(fk.InputError, match=f"{ALL[case][0].__name__} has no mask token"):
        fk.MaskedItems(0.5)(make(case), HISTORIES, torch.Generator())


@pytest.mark.parametrize("case", ALL)
def test_too_many_tokens_are_named(case: str) -> None:
    with pytest.raises(fk.InputError, match="6 columns, more than max_len = 5"):
        make(case).states(torch.ones(1, 6, dtype=torch.int64))


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_items": 0}, "num_items must be at least 1, got 0"),
        ({"max_len": 0}, "max_len must be at least 1"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout must be in"),
    ],
)
def test_wrong_arguments_are_named(case: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(fk.InputError, match=f"^{ALL[case][0].__name__}: {message}"):
        make(case, **changes)


@pytest.mark.parametrize("case", ALL)
def test_a_model_file_gives_the_model_back(case: str, tmp_path: Path) -> None:
    model = make(case)
    model.item_ids = [f"item {v}" for v in range(1, NUM_ITEMS + 1)]
    fk.save_model(model, tmp_path / "a.safetensors")
    again = fk.load_model(tmp_path / "a.safetensors")
    assert type(again) is type(model) and not again.training
    assert again.config == model.config == json.loads(json.dumps(model.config))
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert close(again(ROWS), model(ROWS))  # memory aligned otherwise rounds otherwise
    assert again.item_ids == model.item_ids
    again.train()(ROWS).sum().backward()


SAMPLERS = [("exact", 1), ("topk", 3), ("topk", 9), ("model", 4), ("random", 9), ("target", 1)]


@pytest.mark.parametrize("case", CAUSAL)
@pytest.mark.parametrize("sampler, k", SAMPLERS)
def test_the_fisher_equals_brute_force(case: str, sampler: str, k: int) -> None:
    model = make(case)
    p, gradients = brute.all_gradients(model, HISTORIES)
    expected = brute.fisher(gradients, omega_of(sampler, k, p))
    fisher = fk.diag_fisher(model, loader(5), sampler=sampler, k=k, seed=7, progress=False)
    assert_equal(fisher, expected)


@pytest.mark.parametrize("case", CAUSAL)
@pytest.mark.parametrize("width", [1, MAX_LEN])
def test_the_fisher_of_short_and_empty_histories(case: str, width: int) -> None:
    model = make(case)
    rows = ROWS[:, -width:]
    p, gradients = brute.all_gradients(model, rows)
    arguments = {"sampler": "sketch", "probes": D, "progress": False}  # D directions are all
    fisher = fk.diag_fisher(model, [rows[:3], rows[3:]], **arguments)
    # With one item at most, no weight of attention can move the prediction.
    silent = {name for name in fisher if width == 1 and ("query" in name or "key" in name)}
    kept = {name: value for name, value in fisher.items() if name not in silent}
    every = brute.fisher(gradients, p)
    assert_equal(kept, {name: value for name, value in every.items() if name not in silent})
    assert all(float(fisher[name].max()) < 1e-20 for name in silent)


@pytest.mark.parametrize("case", ALL)
def test_the_calls_of_one_batch_are_those_of_every_batch(case: str) -> None:
    """Numbers of rows that come of values have every bucket examined, at a tenth of the time."""
    model = make(case)
    with Capture(Parameters(model), len(HISTORIES), HANDLERS, HISTORIES) as capture:
        model.encode(HISTORIES)
    assert capture.ops and not capture.counted


@pytest.mark.parametrize("case", ALL)
def test_a_merge_with_oneself_under_other_item_numbers_is_oneself(case: str) -> None:
    model, other = make(case), make(case)
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(0))
    model.item_ids = [f"item {v}" for v in range(NUM_ITEMS)]
    other.item_ids = [f"item {v}" for v in order.tolist()]
    for name, first in other.item_parameters().items():
        rows = other.get_parameter(name).data
        rows[first : first + NUM_ITEMS] = rows[first : first + NUM_ITEMS][order].clone()
    renumbered = torch.cat([torch.tensor([0]), order.argsort() + 1])
    assert close(other(renumbered[ROWS])[:, order.argsort()], model(ROWS))
    fishers = [
        fk.diag_fisher(model, [ROWS], k=3, progress=False),
        fk.diag_fisher(other, [renumbered[ROWS]], sampler="exact", progress=False),
    ]
    for merged in (fk.merge([model, other]), fk.merge([model, other], fishers=fishers)):
        assert merged.item_ids == model.item_ids
        assert close(merged(ROWS), model(ROWS))


@pytest.mark.parametrize("case", ALL)
def test_a_merge_unites_the_catalogues(case: str) -> None:
    a, b = make(case, num_items=3), make(case, num_items=4)
    a.item_ids, b.item_ids = list("xyz"), list("wzxv")
    merged = fk.merge([a, b], weights=[3, 1])
    assert type(merged) is type(a) and merged.item_ids == list("xyzwv")
    assert merged.config == {**a.config, "num_items": 5} and merged(ROWS % 6).shape == (7, 5)
    for name, value in merged.named_parameters():
        own, others = a.get_parameter(name), b.get_parameter(name)
        first = a.item_parameters().get(name)
        if first is None:
            assert close(value, 0.75 * own + 0.25 * others)
            continue
        mine, theirs = own[first : first + 3], others[first : first + 4]
        both = [0.75 * mine[0] + 0.25 * theirs[2], 0.75 * mine[2] + 0.25 * theirs[1]]
        rows = [both[0], mine[1], both[1], theirs[0], theirs[3]]
        assert close(value[first : first + 5], torch.stack(rows))
    assert not merged.item_embedding.weight[0].any()


ORDERED = [case for case in CAUSAL if not case.startswith(("fism", "youtube"))]


@pytest.mark.parametrize("case", ORDERED)
def test_each_learns_what_comes_next(case: str) -> None:
    """Items in a fixed cycle: trained on all positions, asked at the last."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls, arguments = CAUSAL[case]
        model = cls(NUM_ITEMS, MAX_LEN, 16, **arguments)
        cycle = torch.arange(NUM_ITEMS)[:, None] + torch.arange(MAX_LEN + 1)
        cycle = cycle % NUM_ITEMS + 1
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            weight, bias = model.head()
            logits = F.linear(model.transform(model.states(cycle[:, :-1])), weight, bias)
            loss = F.cross_entropy(logits.flatten(0, 1), cycle[:, 1:].flatten() - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    predicted = model.eval()(cycle[:, :-1]).argmax(dim=1) + model.first_item
    assert torch.equal(predicted, cycle[:, -1])
