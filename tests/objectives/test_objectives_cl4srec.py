"""CL4SRec: its three operations by table and by enumeration, its loss, what it leaves alone."""

import hashlib
import itertools
import math

import pytest
import torch
from objective_models import ENCODERS, V, check_gradient, encoder, generator, items_of, padded

import fisherkern as fk
from fisherkern.objectives import augment
from fisherkern.objectives.views import encode_views

MASK = 99


def many(row, width, count=3000):
    return padded([row], width).repeat(count, 1)


def distinct(tokens):
    """{row: how often}, checking that rows are padded on the left alone."""
    counts = {}
    for row in tokens.tolist():
        items = [item for item in row if item]
        assert row == [0] * (len(row) - len(items)) + items
        counts[tuple(items)] = counts.get(tuple(items), 0) + 1
    return counts


def assert_uniform(counts, expected):
    """Exactly the outcomes `expected`, each about equally often (five standard deviations)."""
    assert set(counts) == set(expected)
    total, p = sum(counts.values()), 1 / len(set(expected))
    for count in counts.values():
        assert abs(count - total * p) < 5 * math.sqrt(total * p * (1 - p)) + 1e-9


@pytest.mark.parametrize(
    "length, ratio, kept",
    [(1, 0.6, 1), (2, 0.6, 1), (3, 0.6, 1), (5, 0.6, 3), (7, 0.6, 4), (7, 1.0, 7), (4, 0.1, 1)],
)
@pytest.mark.parametrize("padding", [0, 2])
def test_crop_keeps_consecutive_items(length, ratio, kept, padding):
    row = list(range(1, length + 1))
    made = augment.crop(many(row, length + padding), ratio, generator())
    assert_uniform(distinct(made), [tuple(row[i : i + kept]) for i in range(length - kept + 1)])


@pytest.mark.parametrize(
    "length, ratio, hidden", [(1, 1.0, 0), (2, 0.3, 0), (3, 0.3, 0), (4, 0.3, 1), (7, 0.3, 2)]
)
@pytest.mark.parametrize("padding", [0, 3])
def test_mask_hides_any_items(length, ratio, hidden, padding):
    row = list(range(1, length + 1))
    made = augment.mask(many(row, length + padding), ratio, generator(), MASK)
    choices = itertools.combinations(range(length), hidden)
    expected = [tuple(MASK if i in c else v for i, v in enumerate(row)) for c in choices]
    assert_uniform(distinct(made), expected)


@pytest.mark.parametrize("length, ratio", [(1, 1.0), (2, 0.3), (2, 1.0), (4, 0.3), (6, 0.5)])
def test_without_a_mask_token_items_vanish_but_the_newest(length, ratio):
    row = list(range(1, length + 1))
    made = augment.mask(many(row, length + 2), ratio, generator(), None)
    hidden = min(math.floor(ratio * length), length - 1)
    counts = {}
    for got in made.tolist():
        counts[tuple(got[2:])] = counts.get(tuple(got[2:]), 0) + 1
        assert got[:2] == [0, 0]
    choices = itertools.combinations(range(length - 1), hidden)
    assert_uniform(counts, [tuple(0 if i in c else v for i, v in enumerate(row)) for c in choices])


@pytest.mark.parametrize("length, ratio", [(1, 0.6), (2, 0.6), (4, 0.6), (5, 0.6), (4, 1.0)])
@pytest.mark.parametrize("padding", [0, 2])
def test_reorder_shuffles_a_stretch(length, ratio, padding):
    row, size = list(range(1, length + 1)), math.floor(ratio * length)
    made = distinct(augment.reorder(many(row, length + padding, 6000), ratio, generator()))
    expected = {}
    for start in range(length - size + 1):
        for order in itertools.permutations(row[start : start + size]):
            outcome = tuple(row[:start]) + order + tuple(row[start + size :])
            weight = 1 / (length - size + 1) / math.factorial(size)
            expected[outcome] = expected.get(outcome, 0) + weight
    assert set(made) == set(expected)
    for outcome, p in expected.items():
        assert abs(made[outcome] - 6000 * p) < 5 * math.sqrt(6000 * p * (1 - p)) + 1e-9


def test_floors_are_those_of_python():
    lengths = torch.arange(0, 201)
    for ratio in (0.1, 0.2, 0.3, 0.6, 0.7, 0.9, 1.0):
        expected = [math.floor(ratio * n) for n in range(201)]
        assert augment._share(lengths, ratio).tolist() == expected


def test_the_two_operations_differ_and_all_pairs_are_equally_likely():
    row = list(range(1, 11))
    views = augment.two_views(many(row, 12, 6000), 0.6, 0.3, 0.6, generator(), MASK)
    counts = {}
    for a, b in zip(*(items_of(view) for view in views), strict=True):
        kinds = tuple("crop" if len(v) == 6 else "mask" if MASK in v else "reorder" for v in (a, b))
        counts[kinds] = counts.get(kinds, 0) + 1
    assert_uniform(counts, list(itertools.permutations(["crop", "mask", "reorder"], 2)))


def test_the_two_views_differ():
    rows = torch.randint(1, 500, (400, 20), generator=generator())
    one, other = augment.two_views(rows, 0.6, 0.3, 0.6, generator(), MASK)
    # Reordering 12 items may leave them alone once in 12! times; cropping and masking cannot.
    assert (one != other).any(dim=1).all()
    assert (one != rows).any(dim=1).all()


def test_rows_of_one_item_or_none_stay_as_they_are():
    rows = padded([[7], []], 4)
    for token in (MASK, None):
        for view in augment.two_views(rows, 0.6, 1.0, 1.0, generator(), token):
            assert torch.equal(view, rows)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_loss_is_that_of_the_two_views(name):
    model, objective = encoder(name), fk.CL4SRec(0.7, 0.5, 1.0, fk.NTXent(0.5, "cosine"))
    rows = [[3, 5, 3, 8, 1], [], [7], [2, 9, 4, 4], [1, 2]]
    loss = objective(model, padded(rows, 5), generator(3))
    tokens = padded([row for row in rows if row], 5)
    token = model.mask_token if name == "BERT4Rec" else None
    views = augment.two_views(tokens, 0.7, 0.5, 1.0, generator(3), token)
    hidden = []
    for view in views:
        states = []
        for row in view:  # one at a time, with the padding it came with
            row = row[None]
            if token is not None:
                row = torch.cat([row[:, 1:], torch.tensor([[token]])], dim=1)
            states.append(model.transform(model.states(row)[:, -1])[0])
        hidden.append(torch.stack(states))
    assert loss.item() == pytest.approx(fk.NTXent(0.5, "cosine")(*hidden).item(), abs=1e-10)


@pytest.mark.parametrize("name", ENCODERS)
def test_views_are_encoded_as_the_encoder_does(name):
    model = encoder(name, max_len=8)
    tokens = padded([[1, 2, 3, 4, 5, 6, 7, 8], [9], [3, 4], [], [5] * 7, [2, 1, 2, 1]], 8)
    assert torch.allclose(encode_views(model, tokens), model.encode(tokens), atol=1e-12)
    few = tokens[:1]
    assert torch.allclose(encode_views(model, few), model.encode(few), atol=1e-12)


@pytest.mark.parametrize("name", ["BERT4Rec", "SASRec"])
@pytest.mark.parametrize("loss", [fk.NTXent(), fk.SymmetricNoiseTolerant()])
def test_gradients(name, loss):
    tokens = padded([[3, 5, 3, 8, 1], [7], [2, 9, 4, 4]], 5)
    check_gradient(fk.CL4SRec(loss=loss), encoder(name), tokens)


def test_draws_come_from_the_generator_alone():
    model, tokens = encoder("SASRec"), torch.randint(1, V + 1, (8, 5), generator=generator())
    torch.manual_seed(1)
    first = fk.CL4SRec()(model, tokens, generator(5))
    torch.manual_seed(2)
    assert fk.CL4SRec()(model, tokens, generator(5)).item() == first.item()
    assert fk.CL4SRec()(model, tokens, generator(6)).item() != first.item()


def test_padding_alone_has_loss_zero():
    model = encoder("SASRec")
    loss = fk.CL4SRec()(model, padded([[], []], 5), generator())
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize(
    "objective", [fk.CL4SRec(), fk.DuoRec("both"), fk.RepPad(fk.MaskedItems())]
)
def test_an_epoch_leaves_the_stored_sequences_alone(objective):
    data = fk.synthetic(150, 40, seed=2)
    before = hashlib.sha256(data.items.tobytes() + data.offsets.tobytes()).hexdigest()
    batches = list(data.windows(batch_size=64, max_len=10, seed=0, epoch=0))
    torch.manual_seed(0)
    model = fk.BERT4Rec(40, max_len=10, dim=8)
    bound = objective.bind(data, 10)
    for tokens in batches:
        given = tokens.clone()
        bound(model, tokens, generator())
        assert torch.equal(tokens, given)
    assert hashlib.sha256(data.items.tobytes() + data.offsets.tobytes()).hexdigest() == before
    if isinstance(objective, fk.DuoRec):
        assert torch.equal(bound.same_target.items, torch.from_numpy(data.items.copy()))


def test_wrong_arguments_are_named():
    for wrong in (0.0, 1.2, math.nan):
        with pytest.raises(fk.InputError, match=r"crop must be in \(0, 1\]"):
            fk.CL4SRec(crop=wrong)
    for name in ("mask", "reorder"):
        for wrong in (-0.1, 1.2, math.nan):
            with pytest.raises(fk.InputError, match=rf"{name} must be in \[0, 1\]"):
                fk.CL4SRec(**{name: wrong})
