"""DuoRec: its positives against a brute-force search, its modes against their formulas."""

import numpy as np
import pytest
import torch
from objective_models import ENCODERS, V, check_gradient, encoder, generator, padded

import fisherkern as fk
from fisherkern.objectives.same_target import SameTarget

# Users of 7, 3, 2, 6, 0 and 8 items; the last two of each are held out.
USERS = [[1, 2, 3, 2, 5, 9, 9], [4, 2, 1], [3, 2], [1, 2, 3, 5, 2, 2], [], [6, 1, 2, 7, 2, 5, 3, 1]]


def dataset(users=USERS, items=V):
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])])
    flat = [item for user in users for item in user]
    names = [str(v) for v in range(1, items + 1)]
    return fk.SequenceDataset("t", flat, offsets, names, [str(u) for u in range(len(users))])


def samples(users, width):
    """Brute force: [(user, history, target)] of every training sample."""
    found = []
    for number, user in enumerate(users):
        train = user[:-2]
        for place in range(1, len(train)):
            found.append((number, padded([train[:place]], width)[0].tolist(), train[place]))
    return found


@pytest.mark.parametrize("width", [1, 3, 6])
def test_positives_are_the_other_samples_with_the_same_target(width):
    index, all_samples = SameTarget.of(dataset()), samples(USERS, width)
    for _, history, target in all_samples:
        others = [h for _, h, t in all_samples if t == target and h != history]
        draws = 400 * max(1, len(others))
        rows = torch.tensor([history] * draws)
        drawn = index.draw(rows, torch.full((draws,), target), generator())
        counts = {}
        for row in drawn.tolist():
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
        copies = [h for _, h, t in all_samples if t == target and h == history]
        if not others:
            assert counts == {tuple(history): draws}
            continue
        if len(copies) == 1:  # else a sample of equal content may stand for the row itself
            assert set(counts) == {tuple(h) for h in others}
            for outcome in set(counts):
                p = others.count(list(outcome)) / len(others)
                assert abs(counts[outcome] - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5 + 1e-9


def test_the_index_is_a_grouping_of_places_and_not_of_pairs():
    data = dataset()
    index = SameTarget.of(data)
    starts, places = index.starts.tolist(), index.places.tolist()
    expected = {}
    for number, user in enumerate(USERS):
        for place in range(1, len(user) - 2):
            expected.setdefault(user[place], []).append(int(data.offsets[number]) + place)
    for v in range(V + 1):
        assert places[starts[v] : starts[v + 1]] == expected.get(v, [])
    assert index.places.dtype == torch.int32


def test_targets_of_no_sample_give_the_row_itself():
    index = SameTarget.of(dataset())
    rows = padded([[1, 2], [3], [4, 4]], 3)
    # 11 occurs nowhere, 9 in the held-out part alone, 6 only as a user's first item.
    assert torch.equal(index.draw(rows, torch.tensor([11, 9, 6]), generator()), rows)
    empty = SameTarget.of(dataset([[1, 2, 3], [2]]))
    assert torch.equal(empty.draw(rows, torch.tensor([1, 2, 3]), generator()), rows)


def test_real_windows_never_get_themselves_where_another_exists():
    data = fk.synthetic(80, 30, seed=4)
    index = SameTarget.of(data)
    users = [data.sequence(u).tolist() for u in range(data.num_users)]
    everything = samples(users, 9)
    by_target = {}
    for _, history, target in everything:
        by_target.setdefault(target, []).append(history)
    for tokens in data.windows(batch_size=16, max_len=10, seed=0, epoch=0):
        history, target = tokens[:, :-1], tokens[:, -1]
        drawn = index.draw(history, target, generator())
        for own, got, item in zip(history.tolist(), drawn.tolist(), target.tolist(), strict=True):
            assert own in by_target[item]
            assert got in by_target[item]
            assert got != own or len(by_target[item]) == by_target[item].count(own)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("masked", [False, True])
def test_modes_equal_their_formulas(name, masked):
    model, loss, data = encoder(name), fk.NTXent(0.5, "cosine"), dataset()
    tokens = padded([[1, 2, 3, 2], [4], [1, 2], [3, 5], [], [2, 7, 2]], 5)
    objective = {
        mode: fk.DuoRec(mode, loss, mask_same_target=masked).bind(data, 5)
        for mode in ("unsupervised", "supervised", "both", "us_x")
    }
    got = {mode: o(model, tokens, generator(2)).item() for mode, o in objective.items()}
    kept = [0, 2, 3, 5]  # rows with a history
    history, target = tokens[kept, :-1], tokens[kept, -1]
    same = torch.tensor([[a == b for b in target] for a in target]) if masked else None
    h = torch.cat([model.encode(row[None]) for row in history])
    positive = SameTarget.of(data).draw(history, target, generator(2))
    h_sup = torch.cat([model.encode(row[None]) for row in positive])
    unsup, sup = loss(h, h, same).item(), loss(h, h_sup, same).item()
    expected = {"unsupervised": unsup, "supervised": sup, "both": unsup + sup, "us_x": sup}
    assert got == pytest.approx(expected, abs=1e-10)
    assert abs(unsup - sup) > 1e-3


def test_the_unsupervised_views_differ_by_dropout_alone():
    torch.manual_seed(0)
    model, tokens = fk.SASRec(V, max_len=4, dim=8, dropout=0.5), padded([[1, 2, 3, 4, 5]], 5)
    seen = []
    objective = fk.DuoRec("unsupervised", lambda first, second, same: (first - second).norm())
    seen.append(objective(model.train(), tokens, generator()).item())
    seen.append(objective(model.eval(), tokens, generator()).item())
    assert seen[0] > 0.1 and seen[1] == 0.0


@pytest.mark.parametrize("mode", ["unsupervised", "supervised", "both"])
@pytest.mark.parametrize("loss", [fk.NTXent(), fk.SymmetricNoiseTolerant()])
def test_gradients(mode, loss):
    objective = fk.DuoRec(mode, loss, mask_same_target=True).bind(dataset(), 5)
    tokens = padded([[1, 2, 3, 2], [1, 2], [3, 5]], 5)
    check_gradient(objective, encoder("SASRec"), tokens)


def test_draws_come_from_the_generator_alone():
    model, objective = encoder("SASRec"), fk.DuoRec().bind(dataset(), 5)
    tokens = padded([[4, 2], [1, 2], [3, 2]], 5)
    torch.manual_seed(1)
    losses = [objective(model, tokens, generator(seed)).item() for seed in (5, 5, 6, 7)]
    assert losses[0] == losses[1] and len(set(losses)) > 1


def test_windows_without_a_history_have_loss_zero():
    model, objective = encoder("SASRec"), fk.DuoRec().bind(dataset(), 5)
    for tokens in (padded([[4], []], 5), padded([[4], [2]], 1)):
        loss = objective(model, tokens, generator())
        loss.backward()
        assert loss.item() == 0.0


def test_wrong_use_is_named():
    with pytest.raises(fk.InputError, match="mode must be .* or .*, got 'us'"):
        fk.DuoRec("us")
    with pytest.raises(fk.InputError, match=r"DuoRec\('us_x'\) must be bound"):
        fk.DuoRec()(encoder("SASRec"), padded([[1, 2]], 5), generator())
    unbound = fk.DuoRec("unsupervised")
    assert unbound.bind(dataset(), 5) is unbound
