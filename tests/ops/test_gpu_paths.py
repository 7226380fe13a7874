"""The paths that a GPU takes in PyTorch, run on the CPU: right, in few launches, never waiting."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import brute
import pytest
import torch
from helpers.fisher import assert_equal
from models import HISTORIES, bert
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fisherkern as fk
from fisherkern import ops
from fisherkern.fisher.schedule import Schedule
from fisherkern.ops import counter_rng
from fisherkern.ops.backend import gpu_paths
from fisherkern.ops.library import IMPLEMENTATIONS
from fisherkern.ops.lookup_square import lookup_square_reference
from fisherkern.ops.products import add_rows_
from fisherkern.ops.sample_items import range_logits
from fisherkern.ops.segment_outer_square import segment_outer_square_reference
from fisherkern.ops.softmax_topk import _packed, _unpacked, softmax_topk_reference


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FISHERKERN_BACKEND", "torch")
    with gpu_paths():
        yield


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU would be waited for, inside our ops as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "fisherkern":
            with self:
                return IMPLEMENTATIONS[name](*args, **(kwargs or {}))
        assert name not in ("_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(t is None or t.dtype != torch.bool for t in args[1])
        return func(*args, **(kwargs or {}))


def inputs(n: int, v: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n * v + d)
    return tuple(torch.randn(s, generator=g) for s in ((n, d), (v, d), (v,)))  # type: ignore[return-value]


@pytest.mark.parametrize("sampler", ["exact", "topk", "model", "target", "random", "sketch"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_fisher_is_the_cpus(sampler: str, tied: bool) -> None:
    model = bert(tied)
    pairs = [{"history": HISTORIES, "target": torch.arange(1, len(HISTORIES) + 1)}]
    arguments: Any = {"sampler": sampler, "k": 4, "progress": False, "backend": "torch"}
    expected = dict(fk.diag_fisher(model, pairs, **arguments))
    with gpu_paths():
        found = fk.diag_fisher(model, pairs, **arguments)
    assert_equal(found, expected)
    if sampler == "exact":
        p, gradients = brute.all_gradients(model, HISTORIES)
        assert_equal(found, brute.fisher(gradients, p))


def test_no_op_waits(on_a_gpu: None) -> None:
    h, weight, bias = inputs(9, 700, 20)
    rows, k = torch.arange(9), 6
    ids = torch.randint(-1, 700, (9, 13))
    delta, beta, hidden = torch.randn(3, 9 * 13, 20), torch.randn(9 * 13, 3), torch.randn(9, 20)
    fisher = torch.zeros_like(weight)
    with NoWaiting():
        segments = ops.lookup_segments(ids)
        ops.lookup_square_(fisher, delta, segments, beta, hidden)
        ops.segment_outer_square_(
            torch.zeros(20, 7),
            delta.view(3, 9, 13, 20),
            hidden[:, :7, None].expand(9, 7, 13).transpose(1, 2),
        )
        lse, mean, ranges = ops.softmax_mean(h, weight, bias)
        p, chosen, _, _ = ops.softmax_topk(h, weight, bias, k)
        ops.head_sqgrad_(fisher, None, h, weight, bias, lse, chosen, p)
        ops.softmax_covariance(h, weight, bias, lse, mean)
        ops.sample_items(h, weight, bias, lse, ranges, rows, k, 3)
        ops.sample_distinct(h, weight, bias, lse, ranges, rows, k, 3)
        counter_rng.apply_random_signs_(torch.ones(9, 4), 3, rows, torch.arange(4))


@pytest.mark.parametrize("n, positions", [(1, 1), (3, 5), (4, 13)])
@pytest.mark.parametrize("rows", [1, 4, 97])
def test_lookups(n: int, positions: int, rows: int, on_a_gpu: None) -> None:
    g = torch.Generator().manual_seed(n * rows)
    ids = torch.randint(-1, rows, (n, positions), generator=g)
    delta = torch.randn(5, n * positions, 3, generator=g, dtype=torch.float64)
    hidden = torch.randn(n, 3, generator=g, dtype=torch.float64)
    segments = ops.lookup_segments(ids)
    assert len(segments.row) == ids.numel()  # whatever occurs
    beta = torch.randn(len(segments.row), 5, generator=g, dtype=torch.float64)
    pairs = {
        (int(i), int(v)): b.tolist()
        for i, v, b in zip(segments.sequence, segments.row, beta, strict=True)
        if v >= 0
    }
    for cross in (False, True):
        fisher = torch.zeros(rows, 3, dtype=torch.float64)
        ops.lookup_square_(fisher, delta, segments, *((beta, hidden) if cross else ()))
        given = (pairs, hidden) if cross else ()
        torch.testing.assert_close(fisher, lookup_square_reference((rows, 3), delta, ids, *given))


def test_lookups_of_nothing(on_a_gpu: None) -> None:
    fisher = torch.ones(3, 2)
    for ids in (torch.full((2, 3), -1), torch.zeros(2, 0, dtype=torch.int64)):
        segments = ops.lookup_segments(ids)
        assert (segments.row == -1).all()
        ops.lookup_square_(fisher, torch.randn(4, ids.numel(), 2), segments)
    assert torch.equal(fisher, torch.ones(3, 2))


def test_lookups_in_blocks_of_probes(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, delta = torch.tensor([[0, 2, 2], [1, 1, 0]]), torch.randn(7, 6, 4)
    segments = ops.lookup_segments(ids)
    whole, parts = torch.zeros(3, 4), torch.zeros(3, 4)
    ops.lookup_square_(whole, delta, segments)
    monkeypatch.setattr("fisherkern.ops.lookup_square._BLOCK_ELEMENTS", 2 * 24)
    ops.lookup_square_(parts, delta, segments)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("elements", [1, 2**27])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6, 7), (1, 1, 2, 1, 1), (2, 7, 40, 9, 3)])
def test_linear_layers(
    shape: tuple[int, ...], elements: int, on_a_gpu: None, monkeypatch: Any
) -> None:
    probes, n, positions, rows, columns = shape
    monkeypatch.setattr("fisherkern.ops.segment_outer_square._GPU_TILE_ELEMENTS", elements)
    delta = torch.randn(probes, n, positions, rows, dtype=torch.float64)
    given = torch.randn(n, positions, columns, dtype=torch.float64)
    fisher = torch.zeros(rows, columns, dtype=torch.float64)
    ops.segment_outer_square_(fisher, delta, given)
    torch.testing.assert_close(fisher, segment_outer_square_reference(delta, given))


def test_packed_logits_keep_the_order_of_floats_and_the_lower_item_of_equal_ones() -> None:
    z = torch.tensor([[-0.0, 0.0, 1.5, -1.5, torch.inf, -torch.inf, 1e-40, -1e-40, 1.5]])
    keys = _packed(z, 2**31 + 5)
    values, items = _unpacked(keys.sort(descending=True).values)
    assert values[0].tolist() == sorted(z[0].tolist(), reverse=True)
    assert (items[0] - 2**31 - 5).tolist() == [4, 2, 8, 6, 0, 1, 7, 3, 5]


@pytest.mark.parametrize("tile", [2**24, 1])
@pytest.mark.parametrize("n, v, k", [(1, 1, 1), (3, 300, 300), (5, 1031, 50)])
def test_topk(n: int, v: int, k: int, tile: int, on_a_gpu: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.modules["fisherkern.ops.softmax_lse"], "_GPU_TILE_ELEMENTS", tile)
    h, weight, bias = inputs(n, v, 8)
    h, weight, bias = h.round(), weight.round(), bias.round()  # many ties
    bias[1::7] = -torch.inf
    p, ids, lse, _ = ops.softmax_topk(h, weight, bias, k)
    exact_p, exact_ids, exact_lse = softmax_topk_reference(h, weight, bias, k)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(p.double(), exact_p, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("few", [1, 2**21])
def test_logits_of_ranges(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fisherkern.ops.sample_items"], "_ELEMENTS", few)
    h, weight, bias = inputs(4, 600, 8)
    parts = torch.tensor([[0, 2], [2, 2], [1, 0], [2, 1]])
    for own in (bias, None):
        expected = range_logits(h, weight, own, parts)
        with gpu_paths():
            torch.testing.assert_close(range_logits(h, weight, own, parts), expected)


def test_signs_are_the_same_on_both_paths() -> None:
    rows, columns = torch.tensor([0, 31, 32, 95, 3]), torch.arange(9)
    expected = counter_rng.apply_random_signs_(torch.ones(5, 9), 4, rows, columns)
    with gpu_paths():
        assert torch.equal(
            counter_rng.apply_random_signs_(torch.ones(5, 9), 4, rows, columns), expected
        )


def test_rows_are_added_with_repeated_indices(on_a_gpu: None) -> None:
    target, index = torch.ones(3, 2), torch.tensor([2, 0, 2])
    add_rows_(target, index, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert target.tolist() == [[4, 5], [1, 1], [7, 9]]


def test_a_gpus_schedule_goes_by_its_memory() -> None:
    assert Schedule.of_memory(78 << 30).positions == 3_120_000
    assert Schedule.of_memory(27 << 30).positions >= 2**20
    assert Schedule.of_memory(1).positions == 1
    small, large = (Schedule.of_memory(g << 30) for g in (8, 140))
    assert small.gradients < large.gradients and small.positions < large.positions
    # A long history's probes are cut into blocks before a pass has fewer than four sequences.
    assert small.sequences(2**15, 64) == 4 and large.sequences(200, 64) > 300


def test_autocast_is_for_the_model_alone() -> None:
    """Closed forms and squares under the caller's autocast are those without it."""
    model = bert(True).float()
    batch = [HISTORIES]
    plain = fk.diag_fisher(model, batch, sampler="exact", progress=False)

    class Fp32(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def encode(self, batch: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return model.encode(batch)

        def head(self) -> Any:
            return model.head()

        def forward(self, batch: Tensor) -> Tensor:
            return torch.nn.functional.linear(self.encode(batch), *self.head())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fk.diag_fisher(Fp32(), batch, sampler="exact", progress=False)
    for name, value in plain.items():
        torch.testing.assert_close(found[f"inner.{name}"], value, rtol=1e-5, atol=1e-9)


def test_the_model_runs_under_the_callers_autocast() -> None:
    model, seen = bert(True).float(), []
    model.transform[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fk.diag_fisher(model, [HISTORIES], sampler="topk", k=3, progress=False)
    assert set(seen) == {torch.bfloat16}
