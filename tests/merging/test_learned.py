"""Soups and lambdas chosen on validation data."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.merging import Open, Toy, encoder, random_fisher, validation_of
from torch import nn

from fisherkern.errors import InputError
from fisherkern.merging import merge

T = torch.tensor


def test_greedy_soup_by_hand():
    # Alone 0.9, 0.2 and 0.8 away from 1: order 1, 2, 0; {1, 2} is closer, {1, 2, 0} is not.
    models = [Toy(w=T([1.9])), Toy(w=T([0.8])), Toy(w=T([1.8])), Toy(w=T([9.0]))]
    models[2].w.data.fill_(1.3)
    merged = merge(models, method="greedy_soup", score=lambda m: -abs(m.w.item() - 1.0))
    report = merged.merge_report
    assert report["weights"] == [0.0, 0.5, 0.5, 0.0]
    assert merged.w.item() == pytest.approx(1.05)
    tried = [candidate["weights"] for candidate in report["candidates"]]
    third = pytest.approx(1 / 3)
    assert tried == [
        [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1],
        [0, 0.5, 0.5, 0], [third, third, third, 0], [0, third, third, third],
    ]  # fmt: skip


def test_greedy_soup_keeps_equals_and_never_falls_below_the_best():
    models = [encoder("abc", 1), encoder("bcd", 2)]
    merged = merge(models, method="greedy_soup", score=lambda m: 1.0)
    assert merged.merge_report["weights"] == [0.5, 0.5]
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    best = models[1].dense.weight.detach()

    def score(model):
        return -float((model.dense.weight.detach() - best).square().sum())

    merged = merge(models, method="greedy_soup", score=score, fishers=fishers)
    assert merged.merge_report["weights"] == [0.0, 1.0]
    assert torch.equal(merged.dense.weight, models[1].dense.weight)
    with pytest.raises(InputError, match="method 'greedy_soup' needs score"):
        merge(models, method="greedy_soup")
    with pytest.raises(InputError, match="the score at weights .* is nan"):
        merge(models, method="greedy_soup", score=lambda m: float("nan"))


class Scorer(Open):
    """Logits a x + b of three items, x the history's number: two layers of one number each."""

    def __init__(self, a, b):
        super().__init__()
        self.first, self.second = nn.Linear(1, 3, bias=False), nn.Linear(1, 3, bias=False)
        self.first.weight.data = T(a)[:, None].double()
        self.second.weight.data = T(b)[:, None].double()

    def forward(self, history):
        x = history.double()
        return self.first(x) + self.second(torch.ones_like(x))


def scorers():
    return [Scorer([2.0, 0.0, 0.0], [0.0, 3.0, 0.0]), Scorer([0.0, 2.0, 0.0], [0.0, 0.0, 3.0])]


def loss_of(models, lam, batch, fishers):
    """Cross-entropy of the mix, computed from the layers' numbers."""
    weights = []
    for name, own in zip(("first.weight", "second.weight"), lam, strict=True):
        shares = [x * fisher[name] for x, fisher in zip(own, fishers, strict=True)]
        values = [model.get_parameter(name).detach() for model in models]
        mixed = sum(share * value for share, value in zip(shares, values, strict=True))
        weights.append(mixed / sum(shares))
    history, target = batch
    x = history.double()
    return F.cross_entropy(x @ weights[0].T + torch.ones_like(x) @ weights[1].T, target)


@pytest.mark.parametrize("with_fishers", [False, True])
@pytest.mark.parametrize("method", ["learned_soup", "layer_wise"])
def test_the_learned_lambdas_are_where_adam_leads(method, with_fishers):
    """The same descent with finite differences, written out."""
    models = scorers()
    shares = [{n: torch.ones_like(p) for n, p in m.named_parameters()} for m in models]
    given = {}
    if with_fishers:
        # Of mean 1 each; the floor 0.2 is added.
        entries = [[0.1, 2.9, 0.6, 1.4, 0.2, 0.8], [1.0, 0.3, 1.7, 0.5, 2.0, 0.5]]
        fishers = [
            {"first.weight": T(e[:3])[:, None], "second.weight": T(e[3:])[:, None]} for e in entries
        ]
        given = {"fishers": fishers, "floor": 0.2}
        shares = [{n: v.double() + 0.2 for n, v in fisher.items()} for fisher in fishers]
    batches = [(T([[1.0], [-1.0]]), T([0, 2])), (T([[0.5], [2.0]]), T([1, 0]))]
    layers = 2 if method == "layer_wise" else 1
    a = torch.zeros(layers, 2).double()
    m, v = torch.zeros_like(a), torch.zeros_like(a)

    def at(point, batch):
        lam = point.softmax(1)
        return float(loss_of(models, [lam[0], lam[-1]], batch, shares))

    for step in range(7):
        grad = torch.zeros_like(a)
        for i in range(layers):
            for j in range(2):
                shift = torch.zeros_like(a)
                shift[i, j] = 1e-6
                batch = batches[step % 2]
                grad[i, j] = (at(a + shift, batch) - at(a - shift, batch)) / 2e-6
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        rate = 0.2 * (m / (1 - 0.9 ** (step + 1)))
        a = a - rate / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    options = {"lr": 0.2, "temperature": "fixed"}
    merged = merge(models, method=method, validation=batches, steps=7, options=options, **given)
    learned = merged.merge_report["candidates"][-1]["weights"]
    rows = list(learned.values()) if layers == 2 else [learned]
    torch.testing.assert_close(T(rows).double(), a.softmax(1), rtol=1e-4, atol=1e-5)
    for candidate in merged.merge_report["candidates"]:
        lam = candidate["weights"]
        rows = list(lam.values()) if isinstance(lam, dict) else [lam, lam]
        expected = sum(float(loss_of(models, rows, batch, shares)) for batch in batches) / 2
        assert candidate["score"] == pytest.approx(-expected, rel=1e-6)


def test_layers_learn_apart():
    # The data want the first layer of member 0 and the second of member 1.
    models = scorers()
    batches = [(T([[4.0], [4.0], [0.0], [0.0]]), T([0, 0, 2, 2]))]
    soup = merge(models, method="learned_soup", validation=batches, steps=150)
    layered = merge(models, method="layer_wise", validation=batches, steps=150)
    weights = layered.merge_report["weights"]
    assert weights["first.weight"][0] > 0.8 and weights["second.weight"][1] > 0.8
    best = [max(c["score"] for c in m.merge_report["candidates"]) for m in (soup, layered)]
    assert best[1] > best[0]


def test_a_member_alone_is_returned_bit_for_bit_where_it_is_best():
    models = [encoder("abcd", 1), encoder("abcd", 2)]
    history = torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0]])
    target = models[1](history).argmax(1)
    models[1].dense.weight.data *= 1e3
    for method in ("learned_soup", "layer_wise"):
        options = {"temperature": "fixed"}
        merged = merge(
            models, method=method, validation=[(history, target)], steps=0, options=options
        )
        scores = [c["score"] for c in merged.merge_report["candidates"]]
        if scores[2] == max(scores):
            for name, parameter in models[1].named_parameters():
                assert torch.equal(merged.get_parameter(name), parameter)
        assert max(scores) >= max(scores[1:3])


def test_other_catalogues_fishers_and_the_models_own_mode():
    models = [encoder("abc", 1), encoder("bcd", 2)]
    fishers = [random_fisher(model, seed) for seed, model in enumerate(models)]
    before = copy.deepcopy(models)
    merged = merge(models, method="layer_wise", fishers=fishers, validation=validation_of, steps=10)
    assert merged.item_ids == ["a", "b", "c", "d"] and merged.training
    weights = merged.merge_report["weights"]
    assert set(weights) == {n for n, _ in merged.named_parameters()}
    assert weights["dense.weight"] == weights["dense.bias"]
    again = merge(models, method="fisher", fishers=fishers, weights=weights["dense.weight"])
    assert torch.equal(merged.dense.weight, again.dense.weight)
    for old, new in zip(before, models, strict=True):
        assert all(
            torch.equal(p, q) for p, q in zip(old.parameters(), new.parameters(), strict=True)
        )


class Tied(Open):
    """A table looked up, and its rows past the first as the output's memory under another name."""

    def __init__(self, value, way):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(value.clone(), freeze=False)
        self.head = nn.Linear(value.shape[1], len(value) - 1, bias=False)
        if way == "parameter":
            self.head = nn.Linear(value.shape[1], len(value), bias=False)
            self.head.weight = self.table.weight
        elif way == "storage":
            self.head.weight = nn.Parameter(self.table.weight.data[1:])

    def forward(self, history):
        return self.head(self.table(history).sum(1))


@pytest.mark.parametrize("way", ["parameter", "storage"])
def test_tied_tensors_learn_as_one(way):
    torch.manual_seed(0)
    values = [torch.randn(5, 2).double() for _ in range(2)]
    models = [Tied(value, way) for value in values]
    batch = (torch.tensor([[0, 1], [3, 4], [2, 2]]), torch.tensor([1, 0, 3]))
    skip = 0 if way == "parameter" else 1

    def loss(a):
        lam = a.softmax(0)
        table = lam[0] * values[0] + lam[1] * values[1]
        return F.cross_entropy(table[batch[0]].sum(1) @ table[skip:].T, batch[1])

    a = torch.zeros(2).double().requires_grad_()
    optimizer = torch.optim.Adam([a], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss(a).backward()
        optimizer.step()
    options = {"lr": 0.1, "temperature": "fixed"}
    merged = merge(models, method="learned_soup", validation=[batch], steps=5, options=options)
    learned = merged.merge_report["candidates"][-1]
    torch.testing.assert_close(T(learned["weights"]).double(), a.detach().softmax(0))
    assert learned["score"] == pytest.approx(-float(loss(a.detach())))


def test_the_temperature_takes_confidence_out_of_the_choice():
    # Member 1 ranks right but shouts; at its own temperature it is the better.
    quiet, loud = Scorer([0.1, 0.0, 0.0], [0.0] * 3), Scorer([9.0, 0.0, 0.0], [0.0] * 3)
    loud.second.weight.data[1] = 1.0
    batches = [(T([[1.0]] * 3 + [[-1.0]]), T([0, 0, 0, 0]))]
    scores = {}
    for temperature in ("fixed", "learned"):
        merged = merge(
            [quiet, loud], method="learned_soup", validation=batches, steps=0,
            options={"temperature": temperature},
        )  # fmt: skip
        scores[temperature] = [c["score"] for c in merged.merge_report["candidates"]]
    assert all(a <= b + 1e-9 for a, b in zip(scores["fixed"], scores["learned"], strict=True))
    for member, scorer in ((1, quiet), (2, loud)):
        z = scorer(batches[0][0]).detach()
        grid = torch.linspace(-3, 3, 2001).double().exp()
        best = min(float(F.cross_entropy(z * scale, batches[0][1])) for scale in grid)
        assert scores["learned"][member] == pytest.approx(-best, abs=1e-5)


def test_bad_validation_data():
    models = [encoder("abc", 1), encoder("abc", 2)]
    history = torch.tensor([[0, 1]])
    for validation, message in [
        ([], "validation: it gave no batches"),
        ([history], "validation: a batch holds no next items"),
        ([{"history": history}], "validation: a batch holds no next items"),
        ([(history, torch.tensor([9]))], "validation: a batch's next items are outside"),
        ([(history, torch.tensor([-1]))], "validation: a batch's next items are outside"),
    ]:
        with pytest.raises(InputError, match=message):
            merge(models, method="learned_soup", validation=validation)
        with pytest.raises(InputError, match=message):
            merge(models, method="learned_soup", validation=validation, steps=0)
    with pytest.raises(InputError, match="method 'layer_wise' needs validation"):
        merge(models, method="layer_wise")
    with pytest.raises(InputError, match="method 'layer_wise' takes no weights"):
        merge(models, method="layer_wise", validation=[(history, T([0]))], weights=[1, 1])
