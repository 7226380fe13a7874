"""Square of each sequence's summed outer products, added over the probes and sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.ops import _extension
from fisherkern.ops.active_rows import active_positions
from fisherkern.ops.backend import on_gpu, use_triton
from fisherkern.ops.launch_table import outer_split
from fisherkern.ops.library import register_op
from fisherkern.ops.products import add_outer_

# Elements of what a few sequences make, held at once: 4 MB in fp32, which stays in cache. A
# GPU wants few launches: 512 MB.
_TILE_ELEMENTS, _GPU_TILE_ELEMENTS = 2**20, 2**27

# The Gram form's products of small matrices take three times as long a multiply-add as the direct
# form's, measured on an AMD EPYC; nothing is made of G's symmetry here.
_GRAM_COST = 3


def _add_direct_(fisher: Tensor, delta: Tensor, inputs: Tensor) -> None:
    """Every product, squared."""
    products = fisher.new_empty(len(inputs), *fisher.shape)
    # As a product with ones: measured twice as fast on a CPU as a sum over dimension 0.
    ones = fisher.new_ones(1, len(inputs))
    for d in delta:
        torch.bmm(d.transpose(1, 2), inputs, out=products)
        fisher += (ones @ products.square_().flatten(1)).view(fisher.shape)


def _add_together_(fisher: Tensor, delta: Tensor, inputs: Tensor) -> None:
    """Every product, squared: all probes of a sequence in one matrix product, few launches."""
    probes, n, positions, rows = delta.shape
    stacked = delta.permute(1, 0, 3, 2).reshape(n, probes * rows, positions)
    squares = torch.bmm(stacked, inputs).square_()
    fisher += squares.view(n * probes, *fisher.shape).sum(dim=0)


def _add_gram_(fisher: Tensor, delta: Tensor, inputs: Tensor) -> None:
    """Σ_n Σ_ts G_nots a_nt a_ns with G_nots = Σ_r δ_rnto δ_rnso, made once for all columns.

    Where a square is about 0, rounding may leave a little less than 0.
    """
    probes, n, positions, rows = delta.shape
    d = delta.permute(3, 1, 2, 0).reshape(rows * n, positions, probes)
    gram = torch.bmm(d, d.transpose(1, 2)).view(rows, n * positions**2)
    fisher.addmm_(gram, (inputs[:, :, None] * inputs[:, None]).flatten(0, 2))


@register_op(mutates=("fisher",))
def segment_outer_square_(fisher: Tensor, delta: Tensor, inputs: Tensor) -> None:
    """Add the square of each sequence's sum of outer products, over probes and sequences.

        fisher += Σ_r Σ_n (Σ_t δ_rnt a_ntᵀ)²

    The square is taken after the sum over positions. Where T is short beside R and I (on the CPU;
    the choice depends on the shapes alone) it is computed as Σ_n Σ_ts G_nots a_nt a_ns with
    G_nots = Σ_r δ_rnto δ_rnso: the same up to rounding, but an entry that is about 0 may come out a
    little less. Holds a tile of N of the O×I products or of G, never all; in the extension partial
    sums of F and 8 MB for each thread. On a GPU fp32 products are exact unless PyTorch is told to
    use tf32.

    Args:
        fisher: (O, I), added to; sums are in its dtype.
        delta: (R, N, T, O), gradients of R probes at a linear layer's output; 0 at padding.
        inputs: (N, T, I), what the layer was applied to.

    Raises:
        InputError: Tensors that do not fit.
    """
    shape = (*delta.shape[1:3], *fisher.shape)
    if delta.dim() != 4 or shape != (*inputs.shape[:2], delta.shape[3], *inputs.shape[2:]):
        raise InputError(
            f"delta {tuple(delta.shape)} and inputs {tuple(inputs.shape)} are not (R, N, T, O)"
            f" and (N, T, I) of fisher, (O, I) {tuple(fisher.shape)}"
        )
    if (places := active_positions(delta)) is not None:
        number = torch.arange(len(inputs), device=inputs.device)[:, None]
        delta, inputs = delta[:, number, places], inputs[number, places]
    probes, n, positions, rows = delta.shape
    columns = inputs.shape[2]
    if positions == 1:
        # Σ_r (δ_r aᵀ)² = (Σ_r δ_r²) (a²)ᵀ: one product over the sequences.
        d, a = delta[:, :, 0].to(fisher.dtype), inputs[:, 0].to(fisher.dtype)
        add_outer_(fisher, d.square().sum(dim=0), a.square())
        return
    sizes = {"width": min(rows, columns), "size": delta.numel() * columns}
    extension = _extension.extension_for("segment_outer_square_", fisher, delta, inputs, **sizes)
    if extension is not None and delta.dtype == inputs.dtype:
        d = delta.reshape(probes, n * positions, rows)
        a = inputs.reshape(n * positions, columns)
        if not fisher.is_cuda:
            _extension.segment_outer_square_(extension, fisher, d, a, positions)
            return
        pairs = probes * n
        split = _extension.LaunchSplit(
            *outer_split(fisher.device, delta.dtype, rows, columns, pairs)
        )
        tf32 = _extension.takes_tf32(delta)
        _extension.segment_outer_square_(extension, fisher, d, a, positions, tf32=tf32, split=split)
        return
    if use_triton("segment_outer_square_", delta, inputs, fisher, **sizes):
        from fisherkern.ops import segment_outer_square_triton

        segment_outer_square_triton.segment_outer_square_(fisher, delta, inputs)
        return
    gram = _GRAM_COST * positions * (probes + columns) < probes * columns
    gpu = on_gpu(fisher)
    together = gpu and not gram
    held = rows * columns * (probes if together else 1)
    if gram:
        held = rows * positions * (probes + positions) + positions**2 * columns
    step = max(1, (_GPU_TILE_ELEMENTS if gpu else _TILE_ELEMENTS) // max(1, held))
    add_ = _add_gram_ if gram else _add_together_ if together else _add_direct_
    for first in range(0, n, step):
        d = delta[:, first : first + step].to(fisher.dtype)
        a = inputs[first : first + step].to(fisher.dtype)
        add_(fisher, d, a)


def segment_outer_square_reference(delta: Tensor, inputs: Tensor) -> Tensor:
    """Compute the fp64 twin: Σ_r Σ_n (Σ_t δ_rnt a_ntᵀ)², (O, I), by loops."""
    total = torch.zeros(delta.shape[3], inputs.shape[2], dtype=torch.float64)
    for probe in delta.double():
        for d, a in zip(probe, inputs.double(), strict=True):
            product = torch.zeros_like(total)
            for t in range(d.shape[0]):
                product += torch.outer(d[t], a[t])
            total += product.square()
    return total
