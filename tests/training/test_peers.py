"""PCRec: what peers do to each other's weights by loops, and the run that they are part of."""

import copy
import math

import numpy as np
import pytest
import torch
from models import bert
from training_runs import Cycles, assert_same_bits, bits
from training_runs import T as CYCLE
from training_runs import V as ITEMS

import fisherkern as fk
from fisherkern.errors import InputError
from fisherkern.files import read_tensors, save_tensors
from fisherkern.training import peers
from fisherkern.training.peers import Cooperation


def pair(dtype=torch.float64):
    a, b = bert().to(dtype), bert().to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in b.parameters():
            parameter += torch.randn(parameter.shape, generator=generator).to(dtype)
    return a, b


def slow_entropy(weights, bins):
    flat = weights.flatten().tolist()
    low, high = min(flat), max(flat)
    counts = [0] * bins
    for w in flat:
        place = int((w - low) / (high - low) * bins) if high > low else 0
        counts[min(place, bins - 1)] += 1
    return -math.fsum(n / len(flat) * math.log(n / len(flat)) for n in counts if n)


@pytest.mark.parametrize("bins", [1, 2, 10])
def test_entropy(bins):
    for weights in (torch.randn(7, 5), torch.full((3, 2), 4.0), torch.tensor([[1.0]])):
        assert peers.weight_entropy(weights, bins) == pytest.approx(
            slow_entropy(weights, bins), abs=1e-12
        )
    # Eight weights, evenly spread, the largest in the last bin.
    assert peers.weight_entropy(torch.arange(8.0).view(2, 4), 8) == pytest.approx(math.log(8))


@pytest.mark.parametrize("criterion", ["entropy", "l1"])
def test_layers_are_mixed_by_their_criterion(criterion):
    a, b = pair()
    before = [bits(a), bits(b)]
    Cooperation("layer", criterion, alpha=3.0, bins=4)(a, b)
    names = [name for name, _ in a.named_parameters()]
    share = None
    seen = set()
    # Vectors before the first matrix would go with it; BERT4Rec's output bias does.
    first = next(name for name in names if before[0][name].ndim >= 2)
    for name in [first, *names]:
        x, y = before[0][name], before[1][name]
        if x.ndim >= 2:
            if criterion == "entropy":
                h = slow_entropy(x, 4), slow_entropy(y, 4)
            else:
                total = float(x.abs().sum() + y.abs().sum())
                h = float(x.abs().sum()) / total, float(y.abs().sum()) / total
            share = 1 / (1 + math.exp(-3.0 * (h[0] - h[1])))
            seen.add(round(share, 3))
        for k, value in enumerate(x.flatten().tolist()):
            expected = share * value + (1 - share) * y.flatten()[k].item()
            for model in (a, b):
                got = dict(model.named_parameters())[name].flatten()[k].item()
                assert got == pytest.approx(expected, abs=1e-12), name
    assert len(seen) > 5, "layers have shares of their own"


@pytest.mark.parametrize("criterion", ["entropy", "l1"])
def test_the_mix_is_that_of_the_merge_rule(criterion):
    a, b = pair(torch.float32)
    options = {"criterion": criterion, "alpha": 30.0, "bins": 10}
    merged = fk.merge([a, b], method="pcrec", options=options)
    Cooperation("layer", criterion)(a, b)
    for model in (a, b):
        for name, own in model.named_parameters():
            assert torch.allclose(own, dict(merged.named_parameters())[name], atol=1e-6), name


@pytest.mark.parametrize("settings", [{"percent": 50}, {"percent": 13}, {"threshold": 0.4}])
def test_small_weights_are_taken_from_the_peer(settings):
    a, b = pair()
    before = [bits(a), bits(b)]
    Cooperation("parameter", **settings)(a, b)
    taken = 0
    for model, (mine, theirs) in zip((a, b), (before, before[::-1]), strict=True):
        for name, got in model.named_parameters():
            own, other = mine[name].flatten().tolist(), theirs[name].flatten().tolist()
            limit = settings.get("threshold")
            if limit is None:
                limit = np.percentile([abs(w) for w in own], settings["percent"])
            for k, value in enumerate(got.flatten().tolist()):
                small = got.ndim >= 2 and abs(own[k]) <= limit
                assert value == (other[k] if small else own[k]), name
                taken += small
    assert taken > 50


def test_the_ends_of_parameter_wise_cooperation():
    for settings, swapped in (({"threshold": 0}, False), ({"percent": 100}, True)):
        a, b = pair()
        before = [bits(a), bits(b)]
        Cooperation("parameter", **settings)(a, b)
        kept = before[1] if swapped else before[0]
        for name, own in a.named_parameters():
            if own.ndim >= 2:
                assert torch.equal(own, kept[name]), name


def new(seed):
    torch.manual_seed(seed)
    return fk.BERT4Rec(ITEMS, CYCLE, dim=8, layers=1)


SETTINGS = {"epochs": 3, "batch_size": 16, "lr": 4e-3, "seed": 5, "progress": False}


def run(state=None, models=None, data=None, **changes):
    models = (new(0), new(1)) if models is None else models
    log = fk.train_peers(
        *models, data or Cycles(users=32), state=state, **(SETTINGS | {"percent": 20} | changes)
    )
    return models, log


def test_peers_train_apart_between_cooperations():
    """The first epoch is `train`'s, with a learning rate and a seed of their own."""
    data = Cycles(users=32)
    (a, b), log = run(data=data, epochs=1)
    mine, theirs = new(0), new(1)
    one = {**SETTINGS, "epochs": 1}
    log_a = fk.train(mine, Cycles(users=32), **one)
    log_b = fk.train(theirs, Cycles(users=32), **{**one, "lr": 2e-3, "seed": 6})
    assert log.losses == (log_a.losses, log_b.losses)
    assert_same_bits(bits(a), bits(mine))  # no cooperation after the last epoch
    assert_same_bits(bits(b), bits(theirs))
    assert {asked[2] for asked in data.asked} == {5, 6}, "data orders differ"
    assert log.model is a and log.peer == "a" and log.best_epoch is None
    assert a.item_ids == Cycles.item_ids == b.item_ids and not a.training


@pytest.mark.parametrize("cooperation", ["layer", "parameter"])
def test_peers_cooperate_after_every_epoch_but_the_last(cooperation, monkeypatch):
    calls = []
    own = Cooperation.__call__

    def counted(self, a, b):
        before = bits(a), bits(b)
        own(self, a, b)
        calls.append((self, before, bits(a), bits(b)))

    monkeypatch.setattr(Cooperation, "__call__", counted)
    (a, b), log = run(cooperation=cooperation)
    assert len(calls) == 2 and calls[0][0].kind == cooperation
    _, before, after_a, after_b = calls[0]
    name = "item_embedding.weight"
    assert torch.equal(after_a[name], after_b[name]) == (cooperation == "layer")
    assert not torch.equal(after_a[name], before[0][name])
    assert not torch.equal(a.item_embedding.weight, b.item_embedding.weight)
    assert log.losses[0][2] < log.losses[0][0]


def test_the_better_peer_at_its_best_epoch_is_kept():
    scores = iter([1, 2, 5, 7, 3, 4])  # a, b, a, b, a, b
    given = {}

    def validate(model):
        score = next(scores)
        given[score] = bits(model)
        return score

    (a, b), log = run(validate=validate)
    assert log.peer == "b" and log.model is b and log.best_epoch == 2
    assert log.scores == ({1: 1, 2: 5, 3: 3}, {1: 2, 2: 7, 3: 4})
    assert_same_bits(bits(b), given[7])
    assert_same_bits(bits(a), given[5])
    assert run(validate=lambda model: 1.0)[1].peer == "a", "ties go to the first"


def test_patience_waits_for_both():
    scores = iter([1, 9, 2, 8, 3, 7, 4, 6, 5, 5, 6, 4])
    _, log = run(validate=lambda model: next(scores), epochs=6, patience=1)
    assert len(log.losses[0]) == 6
    scores = iter([9, 9, 8, 8, 7, 7])
    _, log = run(validate=lambda model: next(scores), epochs=6, patience=1)
    assert len(log.losses[0]) == 2 and log.best_epoch == 1


class Stop(Exception):
    pass


class Interrupted(Cycles):
    """Fails in the given peer's windows of an epoch."""

    def __init__(self, seed, epoch):
        super().__init__(users=32)
        self.stop = seed, epoch

    def windows(self, *, seed, epoch, **named):
        if (seed, epoch) == self.stop and self.asked.count((seed, epoch)):
            raise Stop
        self.asked.append((seed, epoch))
        return super().windows(seed=seed, epoch=epoch, **named)


@pytest.mark.parametrize("cooperation", ["layer", "parameter"])
@pytest.mark.parametrize("stop", [(5, 2), (6, 2), (6, 3)])
@pytest.mark.parametrize("name", ["state.safetensors", "state.dcp"])
def test_resume_gives_the_same_bits(cooperation, stop, name, tmp_path):
    changes = {"cooperation": cooperation, "validate": lambda m: m.output_bias.sum().item()}
    whole, log = run(**changes)
    path = tmp_path / name
    data = Interrupted(*stop)
    data.asked.append(stop)
    with pytest.raises(Stop):
        run(path, data=data, **changes)
    models, again = run(path, **changes)
    assert (again.losses, again.scores, again.peer) == (log.losses, log.scores, log.peer)
    for own, expected in zip(models, whole, strict=True):
        assert_same_bits(bits(own), bits(expected))
    file = path / "fisherkern.json" if path.is_dir() else path
    saved = file.read_bytes()
    done, _ = run(path, **changes)
    assert file.read_bytes() == saved
    assert_same_bits(bits(done[0]), bits(whole[0]))


def test_a_state_of_another_run_is_refused(tmp_path):
    path = tmp_path / "s"
    run(path, epochs=1)
    assert read_tensors(path)[1]["kind"] == "peers"
    with pytest.raises(InputError, match="a run with alpha = 30.0, not 2.0"):
        run(path, epochs=1, alpha=2.0)
    with pytest.raises(InputError, match="a run with b.lr = 0.002, not 0.1"):
        run(path, epochs=1, peer_lr=0.1)
    with pytest.raises(InputError, match="not a training state"):
        fk.train(new(0), Cycles(), state=path, **SETTINGS)
    fk.train(new(0), Cycles(), state=tmp_path / "t", **SETTINGS)
    with pytest.raises(InputError, match="not a state of two peers"):
        run(tmp_path / "t")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cooperation": "x"}, "^cooperation must be 'layer' or 'parameter', got 'x'"),
        ({"criterion": "x"}, "^criterion must be 'entropy' or 'l1'"),
        ({"alpha": -1}, "^alpha must be 0 or more and finite, got -1"),
        ({"bins": 0}, "^bins must be at least 1, got 0"),
        ({"percent": 101}, r"^percent must be in \[0, 100\], got 101"),
        ({"threshold": -0.1}, "^threshold must be 0 or more"),
        ({"peer_lr": 4e-3, "peer_seed": 5}, "one must differ"),
        ({"peer_lr": -1}, "^lr must be positive and finite, got -1"),
        ({"ema": 0.9}, "ema"),
        ({"patience": 1}, "^patience needs validate"),
        ({"epochs": 0}, "^epochs must be at least 1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_bad_pairs():
    with pytest.raises(InputError, match="model_b must be of model_a's class and config"):
        run(models=(new(0), fk.BERT4Rec(ITEMS, CYCLE, dim=16)))
    model = new(0)
    with pytest.raises(InputError, match="output_bias is a tensor of model_a's"):
        run(models=(model, model))
    run(models=(model, copy.deepcopy(model)), epochs=1)


@pytest.mark.parametrize("copies", [(3, 3), (1, 2), (0, 1)])
def test_a_state_of_other_epochs_than_the_run_s_is_refused(copies, tmp_path):
    """Peers that are past the last epoch would never come to it."""
    path = tmp_path / "state"
    run(state=path)
    tensors, header = read_tensors(path)
    for reached, times in zip(header["progress"], copies, strict=True):
        reached["losses"] *= times
    save_tensors(path, tensors, header)
    with pytest.raises(InputError, match=r"state: its peers made \d+ and \d+ epochs of \d+"):
        run(state=path)


def test_a_state_past_the_last_epoch_is_refused(tmp_path):
    path = tmp_path / "state"
    fk.train(new(0), Cycles(), state=path, **SETTINGS)
    tensors, header = read_tensors(path)
    header["progress"]["losses"] *= 2
    save_tensors(path, tensors, header)
    with pytest.raises(InputError, match=r"state: its run made \d+ of \d+ epochs"):
        fk.train(new(0), Cycles(), state=path, **SETTINGS)
