"""Rows of output gradients that are zero are left out, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisherkern import ops
from fisherkern.ops.active_rows import active_positions, active_rows
from fisherkern.ops.attention_backward import attention_backward, attention_backward_reference
from fisherkern.ops.layer_norm_backward import layer_norm_backward, layer_norm_backward_reference
from fisherkern.ops.products import rows_product
from fisherkern.ops.segment_outer_square import segment_outer_square_reference

R, N, T, D = 3, 4, 7, 6
# Places of each sequence whose gradient is not zero; the second probe alone has the last one.
PLACES = [[6], [2, 6], [0], []]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def sparse(*trailing: int) -> Tensor:
    """(R, N, T, ...), zero but for a few places."""
    delta, mask = drawn(R, N, T, *trailing), torch.zeros(R, N, T, dtype=torch.bool)
    for n, places in enumerate(PLACES):
        mask[:, n, places] = True
    mask[:, 1, 6] = torch.tensor([False, True, False])
    return delta * mask.view(R, N, T, *[1] * len(trailing))


def test_rows_and_positions() -> None:
    delta = sparse(D)
    assert active_rows(delta.flatten(1, 2)).tolist() == [6, 9, 13, 14]
    found = active_positions(delta)
    assert found.shape == (N, 2)
    for places, own in zip(PLACES, found.tolist(), strict=True):
        assert set(places) <= set(own)
    assert active_positions(drawn(R, N, T, D)) is None
    assert active_positions(torch.zeros(R, 0, T, D)) is None
    assert active_rows(torch.zeros(R, 5, D)).tolist() == []
    delta[1, 2, 3, 4] = torch.nan
    assert 17 in active_rows(delta.flatten(1, 2)).tolist()


@pytest.mark.parametrize("make", [sparse, lambda d: torch.zeros(R, N, T, d)])
def test_ops_of_few_rows_are_their_twins(make) -> None:
    delta, weight = make(D), drawn(5, D)
    torch.testing.assert_close(rows_product(delta, weight), delta @ weight.T)
    inputs = drawn(N, T, 5)
    fisher = torch.zeros(D, 5)
    ops.segment_outer_square_(fisher, delta, inputs)
    right = segment_outer_square_reference(delta, inputs).float()
    torch.testing.assert_close(fisher, right, rtol=1e-4, atol=1e-5)
    normed = drawn(N * T, D), drawn(D), drawn(N * T).abs() + 1
    found = layer_norm_backward(delta.flatten(1, 2), *normed)
    twin = layer_norm_backward_reference(delta.flatten(1, 2), *normed)
    torch.testing.assert_close(found.double(), twin, rtol=1e-4, atol=1e-5)


def test_attention_of_few_queries_is_its_twin() -> None:
    p = drawn(N, 2, T, T).softmax(dim=3)
    q, k, v = (drawn(N, T, 2, 3) + i for i in range(3))
    delta = sparse(2, 3)
    found = attention_backward(p, delta, q, k, v, 0.5)
    twins = attention_backward_reference(p, delta, q, k, v, 0.5)
    for own, twin in zip(found, twins, strict=True):
        torch.testing.assert_close(own.double(), twin, rtol=1e-4, atol=1e-4)
