"""The cloze loss against a loop over its masked places, and what it masks."""

import pytest
import torch

from fisherkern.encoders import BERT4Rec
from fisherkern.encoders.base import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.objectives import MaskedItems

V, T = 30, 12


def tokens(lengths):
    rows = torch.randint(1, V + 1, (len(lengths), T), generator=torch.Generator().manual_seed(3))
    for row, length in enumerate(lengths):
        rows[row, : T - length] = 0
    return rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def masked_places(objective, batch, seed=0):
    """(N, T) bool, by way of the model's own masking."""
    model = BERT4Rec(V, T, dim=4)
    positions, chosen = objective.draw(batch, generator(seed))
    masked = model.mask_items(batch, positions, chosen)
    places = masked != batch
    assert (masked[places] == model.mask_token).all()
    return places


@pytest.mark.parametrize("last_ratio", [0.0, 0.5])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_mean_over_masked_places(last_ratio, tied):
    torch.manual_seed(0)
    model = BERT4Rec(V, T, dim=8, tied=tied, init_std=0.3).double().eval()
    objective = MaskedItems(0.3, last_ratio)
    batch = tokens([12, 7, 1, 0, 12, 3])
    loss = objective(model, batch, generator())
    places = masked_places(objective, batch)
    states = model.states(batch.masked_fill(places, model.mask_token))
    weight, bias = model.head()
    losses = []
    for n, t in places.nonzero().tolist():
        log_p = torch.log_softmax(model.transform(states[n, t]) @ weight.T + bias, dim=0)
        losses.append(-log_p[batch[n, t] - 1])
    assert loss.ndim == 0
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-12)


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.6, 1.0])
def test_how_many_items_are_masked(ratio):
    lengths = [12, 11, 7, 3, 2, 1, 0]
    places = masked_places(MaskedItems(ratio), tokens(lengths))
    expected = [min(n, max(1, round(ratio * n))) for n in lengths]
    assert places.sum(dim=1).tolist() == expected


def test_every_item_is_masked_equally_often_and_padding_never():
    batch = tokens([10] * 4000)
    share = masked_places(MaskedItems(0.2), batch).double().mean(dim=0)
    assert not share[:2].any()
    # Four standard deviations of a share of 0.2 among 4,000 rows.
    assert (share[2:] - 0.2).abs().max() < 4 * (0.2 * 0.8 / 4000) ** 0.5


def test_last_ratio_masks_the_last_item_alone():
    batch = tokens([12, 7, 1, 0])
    places = masked_places(MaskedItems(0.5, last_ratio=1.0), batch)
    assert places.nonzero().tolist() == [[0, T - 1], [1, T - 1], [2, T - 1]]
    batch = tokens([10] * 4000)
    places = masked_places(MaskedItems(0.5, last_ratio=0.3), batch)
    alone = places.sum(dim=1) == 1
    assert places[alone, -1].all()
    assert (places.sum(dim=1)[~alone] == 5).all()
    assert alone.double().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5)


def test_draws_come_from_the_generator_alone():
    objective, batch = MaskedItems(0.4, 0.2), tokens([12] * 20)
    torch.manual_seed(1)
    first = masked_places(objective, batch, seed=5)
    torch.manual_seed(2)
    assert torch.equal(masked_places(objective, batch, seed=5), first)
    assert not torch.equal(masked_places(objective, batch, seed=6), first)


def test_the_batch_is_left_as_it_was():
    batch = tokens([12, 4])
    before = batch.clone()
    MaskedItems(0.5)(BERT4Rec(V, T, dim=4), batch, generator())
    assert torch.equal(batch, before)


def test_settings_tell_objectives_apart():
    assert MaskedItems(0.3).settings() == {"name": "MaskedItems", "ratio": 0.3, "last_ratio": 0.0}


def test_wrong_input_is_named():
    for wrong in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"ratio must be in \(0, 1\]"):
            MaskedItems(wrong)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"last_ratio must be in \[0, 1\]"):
            MaskedItems(0.2, wrong)
    model = BERT4Rec(V, T, dim=4)
    for batch in (tokens([0, 0]), tokens([])):
        with pytest.raises(InputError, match="no item to mask"):
            MaskedItems()(model, batch.reshape(-1, T), generator())

    class Causal(SequenceEncoder):
        pass

    with pytest.raises(InputError, match="Causal has no mask token"):
        MaskedItems()(Causal(V, T, 4), tokens([5]), generator())
