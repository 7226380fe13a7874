"""diag_fisher against one float64 backward pass per (sequence, item)."""

from __future__ import annotations

import brute
import pytest
import torch
from helpers.fisher import TARGETS, assert_equal, histories, loader, omega_of
from models import HISTORIES, NUM_ITEMS, Foreign, bert, shaken
from torch import Tensor

import fisherkern as fk
from fisherkern.ops import counter_rng
from fisherkern.ops.sample_distinct import sample_distinct_reference

CASES = [(tied, norm, t) for tied in (True, False) for norm in ("post", "pre") for t in (1, 5)]


# K = 3 < D = 6 probes as drawn; K = 9 > D compressed to D.
@pytest.mark.parametrize("tied, norm, length", CASES)
@pytest.mark.parametrize(
    "sampler, k",
    [("exact", 1), ("topk", 3), ("topk", 9), ("model", 3), ("model", 9), ("random", 3)]
    + [("random", 9), ("target", 1)],
)
def test_equals_brute_force(sampler: str, k: int, tied: bool, norm: str, length: int) -> None:
    model = bert(tied, norm, max_len=length)
    p, gradients = brute.all_gradients(model, histories(length))
    expected = brute.fisher(gradients, omega_of(sampler, k, p))
    fisher = fk.diag_fisher(model, loader(length), sampler=sampler, k=k, seed=7, progress=False)
    assert_equal(fisher, expected)


@pytest.mark.parametrize("tied, norm, length", CASES)
def test_sketch_with_all_directions_is_exact(tied: bool, norm: str, length: int) -> None:
    model = bert(tied, norm, max_len=length)
    p, gradients = brute.all_gradients(model, histories(length))
    fisher = fk.diag_fisher(model, loader(length), sampler="sketch", probes=6, progress=False)
    assert_equal(fisher, brute.fisher(gradients, p))


@pytest.mark.parametrize("tied, norm, length", CASES)
def test_streamed_sketch_with_a_probe_for_every_item_is_exact(
    tied: bool, norm: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fisherkern.fisher.factors.samplers._COVARIANCE_LIMIT", 0)
    model = bert(tied, norm, max_len=length)
    p, gradients = brute.all_gradients(model, histories(length))
    arguments = {"sampler": "sketch", "probes": NUM_ITEMS, "progress": False}
    fisher = fk.diag_fisher(model, loader(length), **arguments)
    assert_equal(fisher, brute.fisher(gradients, p))


def distinct_omega(k: int, p: Tensor) -> Tensor:
    """ω of k draws without replacement: the twin's, by noise on every item and a sort."""
    v = p.shape[1]
    inputs = p.log(), torch.eye(v).double(), None
    ids, weights = sample_distinct_reference(*inputs, torch.arange(len(p)), k, 7)
    return brute.counts(ids, weights, v)


@pytest.mark.parametrize("tied, norm, length", CASES)
@pytest.mark.parametrize("k", [3, 8, 1000])
def test_without_replacement(k: int, tied: bool, norm: str, length: int) -> None:
    model = bert(tied, norm, max_len=length)
    p, gradients = brute.all_gradients(model, histories(length))
    omega = p if k > p.shape[1] else distinct_omega(k, p)
    arguments = {"sampler": "model", "replacement": False, "k": k, "seed": 7, "progress": False}
    fisher = fk.diag_fisher(model, loader(length), **arguments)
    assert_equal(fisher, brute.fisher(gradients, omega))
    assert fisher.meta["replacement"] is False


def test_empirical_fisher() -> None:
    model = bert()
    _, gradients = brute.all_gradients(model, HISTORIES)
    omega = torch.nn.functional.one_hot(TARGETS - 1, NUM_ITEMS).double()
    fisher = fk.diag_fisher(model, loader(5), sampler="target", weight="one", progress=False)
    assert_equal(fisher, brute.fisher(gradients, omega))


def test_rescale_divides_each_sequence_by_its_captured_mass() -> None:
    model = bert()
    p, gradients = brute.all_gradients(model, HISTORIES)
    omega = omega_of("topk", 3, p)
    fisher = fk.diag_fisher(model, loader(5), sampler="topk", k=3, rescale=True, progress=False)
    assert_equal(fisher, brute.fisher(gradients, omega / omega.sum(dim=1, keepdim=True)))
    assert fisher.meta["captured_mass"] == pytest.approx(float(omega.sum(1).mean()), rel=1e-12)


@pytest.mark.parametrize("sampler", ["exact", "topk", "model", "random", "sketch"])
def test_chunk_and_batch_change_nothing(sampler: str) -> None:
    model = bert()
    one = [{"history": HISTORIES, "target": TARGETS}]
    arguments = {"sampler": sampler, "k": 4, "probes": 3, "seed": 3, "progress": False}
    whole = fk.diag_fisher(model, one, **arguments)
    parts = fk.diag_fisher(model, loader(5), chunk=1, **arguments)
    assert_equal(parts, dict(whole), tolerance=1e-12)


def test_energy_tolerance_keeps_the_fewest_directions() -> None:
    model = bert(tied=False)
    exact = fk.diag_fisher(model, loader(5), sampler="exact", progress=False)
    cut = fk.diag_fisher(model, loader(5), sampler="exact", tol=0.05, progress=False)
    assert cut.meta["probes"] < exact.meta["probes"]
    assert 0.95 <= cut.meta["kept_energy"] < 1
    name = "blocks.0.attention.value.weight"
    assert (cut[name] <= exact[name] * (1 + 1e-12)).all()
    assert float(cut[name].sum() / exact[name].sum()) > 0.8


@pytest.mark.parametrize("sampler, k", [("topk", 3), ("model", 4), ("random", 4), ("target", 1)])
def test_batchwise_is_the_papers_equation_6(sampler: str, k: int) -> None:
    model = bert()
    p, _ = brute.all_gradients(model, HISTORIES)
    fisher = fk.diag_fisher(
        model, loader(5), sampler=sampler, k=k, seed=7, reduction="batchwise", progress=False
    )
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for first, last in ((0, 2), (2, 5)):
        ids, weights = batchwise_items(sampler, k, p, first, last)
        for j in range(ids.shape[1]):
            model.zero_grad()
            total = 0.0
            for row, i in enumerate(range(first, last)):
                log_p = torch.log_softmax(model(HISTORIES[i : i + 1]), dim=1)[0]
                total = total + log_p[ids[row, j]]
            total.backward()
            for name, parameter in model.named_parameters():
                expected[name] += weights[:, j].sum() * parameter.grad.square() / len(HISTORIES)
    assert_equal(fisher, {name: value.detach() for name, value in expected.items()})


def batchwise_items(
    sampler: str, k: int, p: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Ids and weights (n, K), in the order of the ranks or draws, of sequences first..last-1."""
    part, number = p[first:last], torch.arange(first, last)
    if sampler == "topk":
        top = part.topk(k, dim=1)
        return top.indices, top.values
    if sampler == "target":
        ids = TARGETS[first:last, None] - 1
        return ids, part.gather(1, ids)
    u = counter_rng.uniform(7, number, torch.arange(k))
    if sampler == "model":
        ids = torch.searchsorted(part.cumsum(1), u, right=True)
        return ids, torch.full(ids.shape, 1 / k, dtype=torch.float64)
    ids = (u * NUM_ITEMS).long()
    return ids, part.gather(1, ids) * NUM_ITEMS / k


def test_batchwise_differs_from_the_fisher() -> None:
    model = bert()
    a = fk.diag_fisher(model, [HISTORIES], k=3, progress=False)
    b = fk.diag_fisher(model, [HISTORIES], k=3, reduction="batchwise", progress=False)
    name = "blocks.0.feed_forward.inner.weight"
    scale = (a[name] * b[name]).sum() / b[name].square().sum()
    assert float((scale * b[name] - a[name]).norm() / a[name].norm()) > 0.01


@pytest.mark.parametrize("tie", ["matmul", "module", "alias", "none"])
@pytest.mark.parametrize(
    "sampler, k", [("exact", 1), ("topk", 4), ("distinct", 4), ("distinct", 50)]
)
def test_foreign_model_by_logits_alone(tie: str, sampler: str, k: int) -> None:
    model = shaken(Foreign(tie))
    p, gradients = brute.all_gradients(model, HISTORIES)
    omega = p
    if sampler == "topk":
        top = p.topk(k, dim=1)
        omega = brute.counts(top.indices, top.values, NUM_ITEMS + 1)
    elif sampler == "distinct" and k < p.shape[1]:
        omega = distinct_omega(k, p)
    arguments = {"sampler": sampler, "k": k, "seed": 7, "progress": False}
    if sampler == "distinct":
        arguments |= {"sampler": "model", "replacement": False}
    fisher = fk.diag_fisher(model, [HISTORIES], **arguments)
    assert_equal(fisher, brute.fisher(gradients, omega))


@pytest.mark.parametrize("tie", ["matmul", "module", "alias"])
def test_adapted_foreign_model_takes_the_factored_path(tie: str) -> None:
    model = shaken(Foreign(tie))
    if tie == "module":
        model.decoder.bias = None
    p, gradients = brute.all_gradients(model, HISTORIES)
    adapted = fk.adapt(
        model,
        encode=lambda model, batch: model.hidden(batch),
        head=lambda model: (model.items.weight, None),
    )
    fisher = fk.diag_fisher(adapted, [HISTORIES], sampler="exact", progress=False)
    assert fisher.meta["probes"] == 6
    assert_equal(fisher, brute.fisher(gradients, p))


def test_float32_is_close_to_float64() -> None:
    model = bert(dim=8)
    exact = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    single = fk.diag_fisher(model.float(), [HISTORIES], sampler="exact", progress=False)
    for name, value in exact.items():
        if not name.endswith("key.bias"):
            assert single[name].dtype == torch.float32
            assert float((single[name] - value).norm() / value.norm()) < 1e-4, name
