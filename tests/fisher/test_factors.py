"""Factors of the items' covariances: C = L Lᵀ and L β_v = m_v, whatever is singular."""

from __future__ import annotations

from typing import Any

import brute
import pytest
import torch
from helpers.fisher import assert_equal
from models import HISTORIES, bert, shaken
from torch import Tensor

import fisherkern as fk
from fisherkern.fisher.factors.factor import cholesky, eigen, project, solve_lower
from fisherkern.fisher.factors.item_table import ItemTable
from fisherkern.fisher.factors.samplers import SoftmaxStats, factor_covariance
from fisherkern.fisher.settings import Settings
from fisherkern.ops.softmax_moments import softmax_moments_reference

N, D = 5, 8
EXACT: dict[str, Any] = {"k": 1, "probes": None, "seed": 0, "tol": None, "rescale": False}
# Catalogues whose covariances have fewer directions than D, or next to none.
CASES = {
    "plenty": {"items": 40},
    "as many items as dimensions": {"items": D},
    "one item more": {"items": D + 1},
    "three items": {"items": 3},
    "one item": {"items": 1},
    "equal rows": {"items": 40, "distinct": 3},
    "a hyperplane": {"items": 40, "width": D - 2},
    "one-hot softmaxes": {"items": 40, "sharpness": 300.0},
    "one-hot softmaxes of few items": {"items": 5, "sharpness": 300.0},
    "sharp softmaxes": {"items": 40, "sharpness": 8.0},
    "sharper softmaxes": {"items": 200, "sharpness": 20.0},
    "flat softmaxes": {"items": 40, "sharpness": 0.0},
    "an impossible item": {"items": 40, "impossible": 3},
    "impossible items, few left": {"items": 6, "impossible": 4},
}


def softmax_inputs(
    dtype: torch.dtype,
    items: int,
    distinct: int | None = None,
    width: int = D,
    sharpness: float = 1.0,
    impossible: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(items)
    h, weight = (torch.randn(s, D, generator=g, dtype=torch.float64) for s in (N, items))
    bias = torch.randn(items, generator=g, dtype=torch.float64)
    if distinct is not None:
        weight = weight[torch.arange(items) % distinct]
    weight[:, width:] = 0.5
    bias[:impossible] = -torch.inf
    return (
        (sharpness * h).to(dtype),
        weight.to(dtype),
        (sharpness * bias if sharpness else bias * 0).to(dtype),
    )


def rows_of(inputs: tuple[Tensor, Tensor, Tensor]) -> SoftmaxStats:
    settings = Settings("exact", **EXACT, weight="probability")
    h, weight, bias = inputs
    return SoftmaxStats.of(h, ItemTable(weight, bias), torch.arange(N), None, settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_the_exact_factor(case: str, dtype: torch.dtype) -> None:
    inputs = softmax_inputs(dtype, **CASES[case])
    rows = rows_of(inputs)
    factor = factor_covariance(rows, Settings("exact", **EXACT, weight="probability"))
    assert factor.probes == max(1, min(D, len(inputs[1]) - 1))
    sequence = torch.arange(N)
    columns = factor.probe_vectors(sequence, slice(None)).permute(1, 2, 0).double()  # (N, D, R)
    weight, eps = inputs[1].double(), torch.finfo(dtype).eps
    mean, covariance = softmax_moments_reference(*inputs)
    # The covariance of all sequences is computed about one centre: that is what rounds.
    size = (weight - weight.mean(dim=0)).square().sum(dim=1).max()
    assert (columns @ columns.transpose(1, 2) - covariance).abs().max() <= 20 * eps * size

    z = inputs[0].double() @ weight.T + inputs[2].double()
    p = z.softmax(dim=1)
    moments = p[:, :, None] * (weight - mean[:, None])
    every = torch.arange(len(weight)).expand(N, -1)
    beta = factor.tied_cross_term(sequence, every).double()
    error = (beta @ columns.transpose(1, 2) - moments).abs()
    # A logit's rounding is a share of p.
    logits = 1 + z[z.isfinite()].abs().max()
    assert (error <= 20 * eps * logits * size.sqrt() * p.sqrt()[:, :, None]).all()
    if "sharp" not in case and "one-hot" not in case:  # a covariance below its own rounding
        assert (beta.square().sum(dim=2) <= p * (1 + 1e-3) + eps).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_the_exact_factor_is_that_of_all_eigenvectors(case: str, dtype: torch.dtype) -> None:
    rows = rows_of(softmax_inputs(dtype, **CASES[case]))
    sequence = torch.arange(N)
    products = []
    for probes in (None, D):
        settings = Settings("exact", **{**EXACT, "probes": probes}, weight="probability")
        columns = factor_covariance(rows, settings).probe_vectors(sequence, slice(None)).double()
        products.append(torch.einsum("rnd,rne->nde", columns, columns))
    size = (rows.table.weight - rows.table.weight.mean(dim=0)).square().sum(dim=1).max()
    allowed = 20 * torch.finfo(dtype).eps * float(size)
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=allowed + 1e-40)


def test_a_cholesky_factor_gives_what_eigenvectors_give() -> None:
    g = torch.Generator().manual_seed(3)
    wide = torch.randn(6, D, D + 3, generator=g, dtype=torch.float64)
    wide[1, :, 4:] = 0  # rank 4
    wide[2] = 0
    matrix = wide @ wide.transpose(1, 2)
    moments = (wide @ torch.randn(6, D + 3, 5, generator=g, dtype=torch.float64)).transpose(1, 2)
    lower = cholesky(matrix, torch.float64)
    basis, values, _ = eigen(matrix, torch.float64, D)
    scaled = basis * values.sqrt()[:, None]
    torch.testing.assert_close(lower @ lower.transpose(1, 2), scaled @ scaled.transpose(1, 2))
    for L, beta in (
        (lower, solve_lower(lower, moments)),
        (scaled, project(basis, values, moments)),
    ):
        torch.testing.assert_close(beta @ L.transpose(1, 2), moments, rtol=1e-7, atol=1e-7)


def test_a_matrix_below_zero_by_rounding_has_a_triangular_factor() -> None:
    g = torch.Generator().manual_seed(4)
    wide = torch.randn(3, D, 2, generator=g, dtype=torch.float64)
    matrix = wide @ wide.transpose(1, 2) - 1e-5 * torch.eye(D)
    lower = cholesky(matrix, torch.float32)
    assert (lower.triu(1) == 0).all() and lower.isfinite().all()
    assert (lower @ lower.transpose(1, 2) - matrix).abs().max() < 2e-5


@pytest.mark.parametrize("items, dim", [(11, 6), (11, 12), (11, 16)])
@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_the_exact_fisher(items: int, dim: int, scale: float, tied: bool) -> None:
    """Wider than the catalogue, and with softmaxes that are nearly certain."""
    model = shaken(bert(tied, dim=dim, inner_dim=5), seed=1, scale=scale)
    p, gradients = brute.all_gradients(model, HISTORIES)
    found = fk.diag_fisher(model, [HISTORIES], sampler="exact", progress=False)
    assert found.meta["probes"] == min(dim, items - 1)
    assert_equal(found, brute.fisher(gradients, p))
    directions = fk.diag_fisher(model, [HISTORIES], sampler="exact", probes=dim, progress=False)
    assert_equal(found, dict(directions))


@pytest.mark.parametrize("k", [7, 11])
@pytest.mark.parametrize("sampler", ["topk", "model"])
def test_more_columns_than_dimensions(sampler: str, k: int) -> None:
    model = bert(True)
    found = fk.diag_fisher(model, [HISTORIES], sampler=sampler, k=k, progress=False)
    assert found.meta["probes"] == 6
    wide = bert(True, dim=12)
    by_columns = fk.diag_fisher(wide, [HISTORIES], sampler=sampler, k=k, progress=False)
    assert by_columns.meta["probes"] == k
