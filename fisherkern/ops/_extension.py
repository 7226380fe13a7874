"""The compiled kernels `fisherkern._C` with tensors in place of addresses.

The module is optional: `build.load_extension()` is None where it was not built. What it computes
stands in csrc/fisher_segment.h; the functions here check the tensors and name them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.ops import build, proven
from fisherkern.ops.backend import architecture, backend

_PRECISIONS = {torch.float32: 0, torch.bfloat16: 2}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_TF32 = 1
_PRODUCTS_PER_THREAD = 2**25


class LaunchSplit(NamedTuple):
    """How a CUDA kernel is launched: into how many sums it is cut, and the tile of F it takes."""

    splits: int
    tile: int = 64


def extension_for(
    op: str, fisher: Tensor, delta: Tensor, *tensors: Tensor | None, width: int = 0, size: int = 0
) -> ModuleType | None:
    """Return the extension where this call of `op` may run in it, else None.

    fp32 sums, fp32 or bf16 inputs, all on the CPU or on one GPU that it was compiled for.
    On a GPU only where the backend is "cuda", or "auto" and proven.json has a row of the op for
    delta's dtype, `width` and `size`.
    """
    extension = build.load_extension()
    if extension is None or fisher.dtype != torch.float32:
        return None
    name = backend()
    if name not in ("auto", "cuda"):
        return None
    given = [tensor for tensor in (fisher, delta, *tensors) if tensor is not None]
    same = all(tensor.device == fisher.device for tensor in given)
    known = all(tensor.dtype in _PRECISIONS for tensor in given)
    if not (same and known and fisher.is_contiguous()):
        return None
    if not fisher.is_cuda:
        return extension if fisher.device.type == "cpu" else None
    arch = architecture(fisher.device)
    if name == "auto":
        dtype = "tf32" if op == proven.SEGMENTS and takes_tf32(delta) else _NAMES[delta.dtype]
        if not proven.beats_torch(op, "cuda", arch, dtype, width, size):
            return None
    return (
        extension
        if build.supports_arch(divmod(arch, 10), extension.cuda_archs, extension.cuda_ptx)
        else None
    )


def takes_tf32(delta: Tensor) -> bool:
    """Whether PyTorch allows tf32 in products of such matrices on a GPU."""
    return delta.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def segment_outer_square_(
    extension: Any,
    fisher: Tensor,
    delta: Tensor,
    inputs: Tensor,
    offsets: Tensor | int,
    *,
    tf32: bool = False,
    split: LaunchSplit | None = None,
) -> None:
    """fisher += Σ_r Σ_n (Σ_{t in n} δ_rt a_tᵀ)²: segments n of the positions t, probes r.

    fisher (O, I) fp32, contiguous; delta (R, M, O) and inputs (M, I), both fp32 or both
    bf16. `offsets` is (N + 1,) int32 or int64, segment n being the positions
    offsets[n] to offsets[n + 1] − 1, or the length T of segments that are all alike.
    fp32 products are exact, or of tf32 numbers with `tf32`; sums are fp32. With `split`
    the CUDA kernel runs on the current stream, else the CPU's, on PyTorch's number of
    threads. On the CPU segments short beside R and I take the Gram form, by which an entry
    about 0 may come out a little less. Allocates splits × O × I where splits > 1, on the
    CPU O × I, and 8 MB a thread for the Gram form.
    Raises InputError for tensors that do not fit.
    """
    (probes, positions, rows), columns = _shape("delta", delta, 3), fisher.shape[-1]
    _require(_shape("fisher", fisher, 2) == (rows, columns), "fisher", "(O, I)", fisher)
    _require(_shape("inputs", inputs, 2) == (positions, columns), "inputs", "(M, I)", inputs)
    _require_sum(fisher)
    if delta.dtype != inputs.dtype or delta.dtype not in _PRECISIONS:
        raise InputError(f"delta, inputs: {delta.dtype} and {inputs.dtype} are not fp32 or bf16")
    if isinstance(offsets, Tensor):
        segments = _shape("offsets", offsets, 1)[0] - 1
        if segments < 0 or offsets.dtype not in (torch.int32, torch.int64):
            raise InputError(f"offsets: (N + 1,) int32 or int64, got {_say(offsets)}")
        address, width, length = offsets.contiguous(), offsets.element_size(), 0
    else:
        segments = positions // max(offsets, 1)
        address, width, length = None, 0, offsets
    _require_device(fisher, delta, inputs, address)
    delta, inputs = delta.contiguous(), inputs.contiguous()
    arguments = {
        "fisher": fisher.data_ptr(),
        "delta": delta.data_ptr(),
        "inputs": inputs.data_ptr(),
        "offsets": _address(address),
        "offset_bytes": width,
        "length": length,
        "probes": probes,
        "positions": positions,
        "segments": segments,
        "rows": rows,
        "columns": columns,
        "precision": _TF32 if tf32 and delta.dtype == torch.float32 else _PRECISIONS[delta.dtype],
    }
    if split is None:
        gram = positions * (length + 1) // 2 * (probes + columns)
        direct = probes * positions * columns
        threads = _threads(rows * (min(gram, direct) if length else direct))
        extension.segment_outer_square_cpu(**arguments, threads=threads)
        return
    workspace = _workspace(fisher, split, rows, columns)
    launch = _launch(fisher, split, workspace)
    extension.segment_outer_square_cuda(**arguments, **launch)


def lookup_square_(
    extension: Any,
    fisher: Tensor,
    delta: Tensor,
    order: Tensor,
    segment_start: Tensor,
    row: Tensor,
    row_start: Tensor,
    beta: Tensor | None = None,
    hidden: Tensor | None = None,
    sequence: Tensor | None = None,
    *,
    split: LaunchSplit | None = None,
) -> None:
    """`fisherkern.ops.lookup_square_` in the extension: fp32 sums, delta fp32 or bf16.

    With `split` the CUDA kernel runs on the current stream, else the CPU's loops. Raises
    InputError for tensors that do not fit.
    """
    (probes, positions, width), segments = _shape("delta", delta, 3), len(row)
    _require(_shape("fisher", fisher, 2)[1] == width, "fisher", "(rows, D)", fisher)
    _require(segment_start.shape == (segments + 1,), "segment_start", "(U + 1,)", segment_start)
    _require(row_start.dim() == 1 and len(row_start) > 0, "row_start", "(G + 1,)", row_start)
    _require_sum(fisher)
    if delta.dtype not in _PRECISIONS:
        raise InputError(f"delta: {delta.dtype} is not fp32 or bf16")
    indices = [order, segment_start, row, row_start]
    if beta is not None:
        if hidden is None or sequence is None:
            raise InputError("beta: the cross term needs hidden and sequence as well")
        _require(beta.shape == (segments, probes), "beta", "(U, R)", beta)
        _require(_shape("hidden", hidden, 2)[1] == width, "hidden", "(N, D)", hidden)
        _require(sequence.shape == (segments,), "sequence", "(U,)", sequence)
        indices.append(sequence)
        beta, hidden = beta.float().contiguous(), hidden.float().contiguous()
    for index in indices:
        if index.dtype != torch.int64:
            raise InputError(f"indices must be int64, got {_say(index)}")
    _require_device(fisher, delta, beta, hidden, *indices)
    delta, indices = delta.contiguous(), [index.contiguous() for index in indices]
    arguments = {
        "fisher": fisher.data_ptr(),
        "delta": delta.data_ptr(),
        "order": indices[0].data_ptr(),
        "segment_start": indices[1].data_ptr(),
        "row": indices[2].data_ptr(),
        "row_start": indices[3].data_ptr(),
        "beta": _address(beta),
        "hidden": 0 if beta is None else _address(hidden),
        "sequence": 0 if beta is None else indices[4].data_ptr(),
        "probes": probes,
        "positions": positions,
        "segments": segments,
        "groups": len(row_start) - 1,
        "rows": fisher.shape[0],
        "width": width,
        "sequences": 0 if hidden is None else len(hidden),
        "delta_bf16": delta.dtype == torch.bfloat16,
    }
    if split is None:
        extension.lookup_square_cpu(**arguments)
        return
    workspace = _workspace(fisher, split, len(row_start) - 1, width)
    extension.lookup_square_cuda(**arguments, **_launch(fisher, split, workspace))


def attention_backward(
    extension: Any, p: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`fisherkern.ops.attention_backward` in the extension: all fp32, on the CPU.

    On PyTorch's number of threads, whose number does not change the result. Raises InputError
    for tensors that do not fit.
    """
    probes = _shape("delta", delta, 5)[0]
    sequences, heads, queries, keys = _shape("p", p, 4)
    width, value_width = _shape("q", q, 4)[3], _shape("v", v, 4)[3]
    shapes = {
        "delta": (delta, (probes, sequences, queries, heads, value_width), "(R, N, Q, H, e)"),
        "q": (q, (sequences, queries, heads, width), "(N, Q, H, d)"),
        "k": (k, (sequences, keys, heads, width), "(N, T, H, d)"),
        "v": (v, (sequences, keys, heads, value_width), "(N, T, H, e)"),
    }
    for name, (tensor, shape, meaning) in shapes.items():
        _require(tensor.shape == shape, name, meaning, tensor)
    given = [tensor.contiguous() for tensor in (p, delta, q, k, v)]
    if any(tensor.dtype != torch.float32 for tensor in given):
        raise InputError("p, delta, q, k, v: must be fp32")
    _require_device(*given)
    found = [tensor.new_empty(probes, *tensor.shape) for tensor in given[2:]]
    names = ("p", "delta", "q", "k", "v", "dq", "dk", "dv")
    extension.attention_backward_cpu(
        **{name: t.data_ptr() for name, t in zip(names, [*given, *found], strict=True)},
        probes=probes,
        sequences=sequences,
        heads=heads,
        queries=queries,
        keys=keys,
        width=width,
        value_width=value_width,
        scale=scale,
        threads=_threads(4 * probes * p.numel() * (width + value_width)),
    )
    return found[0], found[1], found[2]


def layer_norm_backward(
    extension: Any, delta: Tensor, normalised: Tensor, weight: Tensor | None, rstd: Tensor
) -> Tensor:
    """`fisherkern.ops.layer_norm_backward` in the extension: all fp32, on the CPU.

    On PyTorch's number of threads, whose number does not change the result. Raises InputError
    for tensors that do not fit.
    """
    probes, rows, width = _shape("delta", delta, 3)
    weight = normalised.new_ones(width) if weight is None else weight
    _require(normalised.shape == (rows, width), "normalised", "(P, D)", normalised)
    _require(weight.shape == (width,), "weight", "(D,)", weight)
    _require(rstd.shape == (rows,), "rstd", "(P,)", rstd)
    given = [tensor.contiguous() for tensor in (delta, normalised, weight, rstd)]
    if any(tensor.dtype != torch.float32 for tensor in given):
        raise InputError("delta, normalised, weight, rstd: must be fp32")
    _require_device(*given)
    found = torch.empty_like(given[0])
    names = ("delta", "normalised", "weight", "rstd", "result")
    extension.layer_norm_backward_cpu(
        **{name: t.data_ptr() for name, t in zip(names, [*given, found], strict=True)},
        probes=probes,
        rows=rows,
        width=width,
        # A number that is read and written takes as long as ten products from the cache.
        threads=_threads(10 * delta.numel()),
    )
    return found


def _threads(products: int) -> int:
    """Of PyTorch's number: one earns its start from half a millisecond of products on."""
    return min(torch.get_num_threads(), 1 + products // _PRODUCTS_PER_THREAD)


def _workspace(fisher: Tensor, split: LaunchSplit, rows: int, columns: int) -> Tensor | None:
    """Return the splits' sums, None where there is one split or nothing to sum."""
    if split.splits == 1 or rows * columns == 0:
        return None
    return fisher.new_empty(split.splits, rows, columns)


def _launch(fisher: Tensor, split: LaunchSplit, workspace: Tensor | None) -> dict[str, int]:
    # The emulated kernels of the tests take CPU tensors.
    device = fisher.device.index if fisher.is_cuda else 0
    stream = torch.cuda.current_stream(fisher.device).cuda_stream if fisher.is_cuda else 0
    return {
        "device": device,
        "stream": stream,
        "tile": split.tile,
        "splits": 1 if workspace is None else split.splits,
        "workspace": _address(workspace),
    }


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _say(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _shape(name: str, tensor: Tensor, dimensions: int) -> tuple[int, ...]:
    if tensor.dim() != dimensions:
        raise InputError(f"{name}: must have {dimensions} dimensions, got {tuple(tensor.shape)}")
    return tuple(tensor.shape)


def _require(holds: bool, name: str, shape: str, tensor: Tensor) -> None:
    if not holds:
        raise InputError(f"{name}: {tuple(tensor.shape)} is not {shape} of the other tensors")


def _require_sum(fisher: Tensor) -> None:
    if fisher.dtype != torch.float32 or not fisher.is_contiguous():
        raise InputError(f"fisher: must be fp32 and contiguous, got {_say(fisher)}")


def _require_device(*tensors: Tensor | None) -> None:
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise InputError(f"tensors on several devices: {', '.join(sorted(devices))}")
