"""Einsum and inner products of an input and a weight, as captured Linears."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.fisher.forward.capture import CapturedCall

_TWO_OPERANDS = re.compile(r"(\.{3})?([a-zA-Z]*),(\.{3})?([a-zA-Z]*)->(\.{3})?([a-zA-Z]*)")
# Stand for the dimensions of an ellipsis.
_ELLIPSIS = "αβγδεζηθ"


def einsum(call: CapturedCall, equation: Any, *operands: Any) -> Any:
    """torch.einsum of an input and a weight, one product.

    NotImplemented where the weight shares more with the input than what is summed.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if (letters := _letters(equation, operands)) is None:
        return NotImplemented
    first, second, result = letters
    pairs = [(first, operands[0], second, operands[1]), (second, operands[1], first, operands[0])]
    # The sequences usually come first in a result, and a weight is usually a parameter.
    pairs.sort(key=lambda pair: (not pair[3].is_leaf, result[:1] not in pair[0]))
    for pair in pairs:
        if (output := _product(call, *pair, result)) is not None:
            return output
    return NotImplemented


def _letters(equation: Any, operands: Any) -> tuple[str, str, str] | None:
    """Return the letters of both operands and of the result, each dimension by one."""
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    match = _TWO_OPERANDS.fullmatch(equation.replace(" ", ""))
    if match is None or not all(isinstance(operand, Tensor) for operand in operands):
        return None
    dots, letters = match.groups()[0::2], match.groups()[1::2]
    hidden = [o.dim() - len(given) for o, given in zip(operands, letters, strict=False)]
    if any(count and not dot for count, dot in zip(hidden, dots, strict=False)):
        return None
    if min(hidden) != 0 or max(hidden) > len(_ELLIPSIS) or bool(max(hidden)) != bool(dots[2]):
        return None
    first, second = (_ELLIPSIS[:n] + given for n, given in zip(hidden, letters, strict=False))
    return first, second, _ELLIPSIS[: max(hidden)] + letters[2]


def _product(
    call: CapturedCall, letters: str, input: Tensor, others: str, weight: Tensor, result: str
) -> Tensor | None:
    """input (..., c) times weight (o, c) over c; None where that is not what is asked for."""
    summed = [letter for letter in letters if letter not in result]
    kept = [letter for letter in letters if letter in result]
    made = [letter for letter in others if letter not in summed]
    if (
        any(len(set(word)) != len(word) for word in (letters, others, result))
        or sorted(others) != sorted(summed + made)
        or sorted(result) != sorted(kept + made)
        or not kept
    ):
        return None
    x = input.permute([letters.index(letter) for letter in kept + summed])
    x = x.reshape(*x.shape[: len(kept)], -1) if len(summed) != 1 else x
    sizes = [weight.shape[others.index(letter)] for letter in made]
    order = [letter for letter in others if letter in summed]
    if others == "".join(summed + made):
        matrix = weight if weight.dim() == 2 else weight.reshape(x.shape[-1], math.prod(sizes))
        y = call(torch.matmul, x, matrix)
    else:
        if others != "".join(made + summed) or order != summed:
            weight = weight.permute([others.index(letter) for letter in made + summed])
        matrix = weight if weight.dim() == 2 else weight.reshape(math.prod(sizes), x.shape[-1])
        y = call(F.linear, x, matrix)
    y = y.reshape(*y.shape[:-1], *sizes)
    found = kept + made
    output: Tensor = y.permute([found.index(letter) for letter in result])
    return output


def inner(call: CapturedCall, input: Tensor, other: Tensor) -> Any:
    """torch.inner with a matrix is a Linear."""
    if other.dim() != 2 or input.dim() == 0:
        return NotImplemented
    return call(F.linear, input, other)
