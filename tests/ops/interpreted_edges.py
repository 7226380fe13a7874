"""The Triton kernels where something is odd: widths, addresses, impossible items, NaN.

Run as interpreted_ops.py is, whose fixture and layers it uses.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisherkern import InputError, ops
from fisherkern.ops.head_sqgrad import head_sqgrad_reference
from fisherkern.ops.softmax_lse import softmax_lse_reference
from fisherkern.ops.softmax_moments import range_lse_reference, softmax_moments_reference
from fisherkern.ops.softmax_sketch import softmax_sketch_reference
from fisherkern.ops.softmax_topk import softmax_topk_reference
from fisherkern.ops.tiles_triton import kernel_input, padded
from ops.interpreted_ops import assert_close, kernels, layer  # noqa: F401

WIDTHS = [50, 64, 100, 200]


def test_padded_columns_are_zeros_and_rows_begin_at_16_bytes() -> None:
    memory = torch.randn(7 * 50 + 1)
    matrix = memory[1:].view(7, 50)
    found = padded(matrix)
    assert found.shape == (7, 64) and found.is_contiguous() and found.data_ptr() % 16 == 0
    assert torch.equal(found[:, :50], matrix) and not found[:, 50:].any()
    assert padded(found) is not None and padded(found).data_ptr() == found.data_ptr()
    # The width needs no padding, the address does.
    matrix = memory[1 : 1 + 7 * 16].view(7, 16)
    assert matrix.data_ptr() % 16 and kernel_input(matrix).data_ptr() % 16 == 0
    assert torch.equal(padded(matrix), matrix)


def test_more_items_than_int32_counts_are_refused() -> None:
    weight = torch.zeros(1, 16).expand(2**31, 16)
    with pytest.raises(InputError, match="2147418112 items at most: 2147483648"):
        ops.softmax_lse(torch.zeros(1, 16), weight, None)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("sampled", [False, True])
def test_head_sqgrad_of_rows_of_a_larger_table(width: int, sampled: bool) -> None:
    """Neither the rows before and after nor the places past a row's end are touched."""
    h, weight, bias = layer(3, 65, width)
    lse = softmax_lse_reference(h, weight, bias).float()
    ids = torch.tensor([[64, 0, 64]]).expand(3, 3) if sampled else None
    omega = torch.tensor([[0.5, 2.0, 1.0]]).expand(3, 3) if sampled else None
    table, biases = torch.full((69, width), 7.0), torch.full((69,), 7.0)
    ops.head_sqgrad_(table[1:66], biases[1:66], h, weight, bias, lse, ids, omega)
    exact_w, exact_b = head_sqgrad_reference(h, weight, bias, ids, omega)
    assert_close(table[1:66], 7 + exact_w)
    assert_close(biases[1:66], 7 + exact_b)
    for guarded in (table, biases):
        assert (guarded[:1] == 7).all() and (guarded[66:] == 7).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_impossible_items_have_no_part_in_anything(width: int) -> None:
    """A bias of −inf on a whole tile and on every other item after it."""
    h, weight, bias = layer(3, 257, width)
    bias[:130] = bias[130::2] = -torch.inf
    possible = bias > -torch.inf
    lse, mean, ranges = ops.softmax_mean(h, weight, bias)
    exact_mean, exact_covariance = softmax_moments_reference(h, weight, bias)
    assert_close(lse, softmax_lse_reference(h, weight, bias))
    assert_close(mean, exact_mean)
    exact_ranges = range_lse_reference(h, weight, bias)
    # The last range is one item, and impossible.
    assert (ranges[:, 1:] == -torch.inf).all()
    assert_close(ranges[:, :1].float(), exact_ranges[:, :1])
    covariance = ops.softmax_covariance(h, weight, bias, lse, mean)
    error = (covariance.double() - exact_covariance).abs().max()
    assert error <= 1e-5 * weight.double().square().sum(1).max()
    fisher, sums = torch.zeros_like(weight), torch.zeros(257)
    ops.head_sqgrad_(fisher, sums, h, weight, bias, lse)
    exact_w, exact_b = head_sqgrad_reference(h, weight, bias, None, None)
    assert_close(fisher, exact_w)
    assert_close(sums, exact_b)
    assert (fisher[~possible] == 0).all() and (sums[~possible] == 0).all()
    rows = torch.arange(3)
    u, totals = ops.softmax_sketch(h, weight, bias, lse, mean, rows, 4, 1)
    exact_u, exact_totals = softmax_sketch_reference(h, weight, bias, rows, 4, 1)
    assert_close(totals, exact_totals, 3)
    assert_close(u, exact_u, 10)
    ids = ops.sample_items(h, weight, bias, lse, ranges, rows, 5, 1)
    distinct, _ = ops.sample_distinct(h, weight, bias, lse, ranges, rows, 5, 1)
    assert possible[ids].all() and possible[distinct].all()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_of_nan_spoils_no_other(width: int) -> None:
    h, weight, bias = layer(3, 131, width)
    whole = h.clone()
    h[1, width - 1] = torch.nan
    kept = torch.tensor([0, 2])
    rows = torch.arange(3)

    def results(h: Tensor) -> list[Tensor]:
        lse, mean, ranges = ops.softmax_mean(h, weight, bias)
        p, ids, lse_of_topk, mean_of_topk = ops.softmax_topk(h, weight, bias, 4)
        found = [lse, mean, ranges, p, lse_of_topk, mean_of_topk]
        assert ((0 <= ids) & (ids < 131)).all()
        covariance = ops.softmax_covariance(h, weight, bias, lse, mean)
        sketch, totals = ops.softmax_sketch(h, weight, bias, lse, torch.zeros_like(h), rows, 2, 0)
        return [*found, covariance, totals]

    for found, expected in zip(results(h), results(whole), strict=True):
        assert torch.equal(found[kept], expected[kept])
        assert found[1].isnan().all()
    fisher = torch.zeros_like(weight)
    ops.head_sqgrad_(fisher, None, h, weight, bias, ops.softmax_lse(h, weight, bias))
    assert fisher.isnan().all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_accuracy_beside_pytorchs(width: int, scale: float) -> None:
    """At most three times the error of the same fp32 expression; logits of hundreds, too."""
    h, weight, bias = layer(5, 129, width)
    h *= scale
    z = h @ weight.T + bias
    p = (z - z.logsumexp(dim=1, keepdim=True)).exp()
    lse, mean, _ = ops.softmax_mean(h, weight, bias)
    top, ids, _, _ = ops.softmax_topk(h, weight, bias, 9)
    fisher, sums = torch.zeros_like(weight), torch.zeros(129)
    ops.head_sqgrad_(fisher, sums, h, weight, bias, lse)
    exact_p, exact_ids, exact_lse = softmax_topk_reference(h, weight, bias, 9)
    exact_w, exact_b = head_sqgrad_reference(h, weight, bias, None, None)
    coefficient = p * (1 - p)
    assert torch.equal(ids, exact_ids)
    for found, plain, exact in (
        (lse, z.logsumexp(dim=1), exact_lse),
        (mean, p @ weight, softmax_moments_reference(h, weight, bias)[0]),
        (top, p.gather(1, ids), exact_p),
        (fisher, coefficient.T @ h.square(), exact_w),
        (sums, coefficient.sum(dim=0), exact_b),
    ):
        error, allowed = (float((x - exact).abs().max()) for x in (found.double(), plain.double()))
        assert error <= 3 * allowed + 1e-5 * float(exact.abs().max())
