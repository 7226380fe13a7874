"""Linear layers and dropout of a training step in fp32 on a CPU, faster than PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherkern.ops.products import Linear, rows_for_onednn, suits, suits_linear

# Values of a random 16-bit integer.
_VALUES = 1 << 16


class FastCPUKernels(TorchFunctionMode):
    """A mode in which F.linear multiplies by oneDNN and F.dropout draws 16 bits an element.

    It sees the calls of any module, ours or not. A BERT4Rec step takes two thirds of the time
    (ML-1M, T = 50, D = 64, batch 256, one thread of an AMD EPYC). Everything else, other types and
    devices, and linear layers whose number of rows is no multiple of 8, are PyTorch's as ever.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        ours: Any = {F.linear: fast_linear, F.dropout: dropout}.get(func, func)
        return ours(*args, **(kwargs or {}))


def backward(loss: Tensor) -> None:
    """Run loss.backward() inside `FastCPUKernels`.

    `Tensor.backward` disables every TorchFunctionMode; what is checkpointed needs this one when it
    is computed again, so the engine is called directly, as `torch.autograd.backward` does.
    """
    engine = torch.autograd.Variable._execution_engine
    with FastCPUKernels():
        engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True
        )


def fast_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; its gradients can be differentiated in turn."""
    if suits_linear(input, weight, bias) and rows_for_onednn(input.numel() // input.shape[-1]):
        output: Tensor = Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
        return output
    return F.linear(input, weight, bias)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout with p rounded to 1/65,536, and what is kept scaled by that p's 1/(1 − p).

    PyTorch draws 64 bits an element, a seventh of a training step; here four elements share them.
    """
    dropped = round(p * _VALUES)
    if not (training and suits(input) and not inplace and 0 < dropped < _VALUES):
        return F.dropout(input, p, training, inplace)
    size = input.numel()
    draws = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    bits = draws.view(torch.int16)[:size].view(input.shape)
    # Into floats at once: by way of a bool the comparison takes three times as long.
    kept = torch.ge(bits, dropped - _VALUES // 2, out=torch.empty(input.shape))
    return input * kept.mul_(_VALUES / (_VALUES - dropped))
