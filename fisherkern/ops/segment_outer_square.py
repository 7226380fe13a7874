"""Square of each sequence's summed outer products, added over the sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.ops import _extension
from fisherkern.ops._dispatch import use_triton
from fisherkern.ops._library import no_outputs, register
from fisherkern.ops._products import add_outer_
from fisherkern.ops.launch_table import outer_split

# Elements of the per-sequence products held at once: 4 MB in fp32, which stays in cache.
_TILE_ELEMENTS = 2**20


def _segment_outer_square_(fisher: Tensor, delta: Tensor, inputs: Tensor) -> None:
    n, positions, rows = delta.shape
    columns = inputs.shape[2]
    if positions == 1:
        # (δ aᵀ)² = δ² (a²)ᵀ: one product over the sequences.
        d, a = delta[:, 0].to(fisher.dtype), inputs[:, 0].to(fisher.dtype)
        add_outer_(fisher, d.square(), a.square())
        return
    extension = _extension.serving(fisher, delta, inputs)
    if extension is not None and delta.dtype == inputs.dtype:
        d, a = delta.reshape(1, n * positions, rows), inputs.reshape(n * positions, columns)
        if not fisher.is_cuda:
            _extension.segment_outer_square_(extension, fisher, d, a, positions)
            return
        split = _extension.Split(*outer_split(fisher.device, delta.dtype, rows, columns, n))
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        _extension.segment_outer_square_(extension, fisher, d, a, positions, tf32=tf32, split=split)
        return
    if use_triton(fisher, delta, inputs):
        from fisherkern.ops import segment_outer_square_triton

        segment_outer_square_triton.segment_outer_square_(fisher, delta, inputs)
        return
    step = min(n, max(1, _TILE_ELEMENTS // (rows * columns)))
    products = fisher.new_empty(step, rows, columns)
    for first in range(0, n, step):
        d = delta[first : first + step].to(fisher.dtype)
        a = inputs[first : first + step].to(fisher.dtype)
        product = torch.bmm(d.transpose(1, 2), a, out=products[: len(d)])
        # As a product with ones: measured twice as fast on a CPU as a sum over dimension 0.
        ones = product.new_ones(1, len(d))
        fisher += (ones @ product.square_().view(len(d), -1)).view(rows, columns)


_op = register(
    "segment_outer_square_(Tensor(a!) fisher, Tensor delta, Tensor inputs) -> ()",
    _segment_outer_square_,
    no_outputs,
)


def segment_outer_square_(fisher: Tensor, delta: Tensor, inputs: Tensor) -> None:
    """fisher += Σ_n (Σ_t δ_nt a_ntᵀ)², the square taken after the sum over positions.

    fisher (O, I), delta (N, T, O): gradients at a Linear's output, inputs
    (N, T, I): what it was applied to; padded positions have δ = 0. Accumulates in
    fisher's dtype. Holds a tile of N of the O×I products, never all; in the extension
    partial sums of F alone, on a GPU its fp32 products exact unless PyTorch is told to use
    tf32. On one thread of an AVX-512 machine the extension takes half the time of PyTorch's
    products (benchmarks/bench_segment.py).
    Design section 1, token-wise layers.
    """
    _op(fisher, delta, inputs)


def segment_outer_square_reference(delta: Tensor, inputs: Tensor) -> Tensor:
    """The fp64 twin: Σ_n (Σ_t δ_nt a_ntᵀ)², shape (O, I), a loop over sequences and positions."""
    total = torch.zeros(delta.shape[2], inputs.shape[2], dtype=torch.float64)
    for d, a in zip(delta.double(), inputs.double(), strict=True):
        product = torch.zeros_like(total)
        for t in range(d.shape[0]):
            product += torch.outer(d[t], a[t])
        total += product.square()
    return total
