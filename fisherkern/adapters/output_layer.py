"""The output layer of any model, found by one watched forward pass.

The logits of a next-item model are the last linear map of its forward pass, up to a bias added
later, a scale and a selection of positions and columns. The hidden state is what the same forward
pass gives when it is stopped there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherkern.adapters.parameters import ParamView, view_among
from fisherkern.adapters.row_scaling import RowScaling, find_row_scaling

LogitsFunction = Callable[[Any], Tensor]


@dataclasses.dataclass(frozen=True)
class OutputLayerParts:
    """How the logits come from a hidden state: logits = scale · (h Wᵀ) + b.

    `call` counts the linear maps onto as many columns that come before it. `fixed_rows`: rows of W
    that get no gradient, (V,) bool, as those of padding in a table that is looked up whole.
    `row_scaling`: how W is made of the rows of the tensor `weight`, where it is not these rows.
    """

    call: int
    columns: int
    scale: float
    weight: ParamView
    bias: ParamView | None
    fixed_rows: Tensor | None
    position: int | None
    row_scaling: RowScaling | None = None

    def head(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """W (V, D) and b (V,) or None: views of the module's tensors, or W made of one."""
        scaling = self.row_scaling
        weight = _of(module, self.weight) if scaling is None else scaling.weight()
        return weight, None if self.bias is None else _of(module, self.bias)

    def encoder(self, logits: LogitsFunction) -> Callable[[Any], Tensor]:
        """Return the state before the output layer: (N, D), or (N, T, D) of every position."""

        def encode(batch: Any) -> Tensor:
            watch = _Watch(self.columns, stop=self.call)
            try:
                with watch:
                    logits(batch)
            except _StoppedError as stopped:
                h = stopped.hidden if self.scale == 1 else stopped.hidden * self.scale
                return h if self.position is None else h[:, self.position]
            raise RuntimeError("the model took another way than on the first batch")

        return encode


class _StoppedError(BaseException):
    """Leaves a forward pass with the input of the output layer."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclasses.dataclass
class _Derived:
    """A tensor that is a linear map's output, but for a scale, a bias and a view."""

    call: int
    hidden: Tensor
    weight: Tensor
    root: Tensor  # the output itself
    scale: float = 1.0
    bias: Tensor | None = None


class _Watch(TorchFunctionMode):
    """Counts the linear maps onto `columns` columns or more, and notes what becomes of them."""

    def __init__(self, columns: int, stop: int | None = None) -> None:
        super().__init__()
        self.columns, self.stop = columns, stop
        self.count = 0
        # By id; the tensors are kept, so that no id is used twice.
        self.derived: dict[int, tuple[Tensor, _Derived]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        linear = _linear(func, args, kwargs)
        if linear is not None and linear[1].dim() == 2 and len(linear[1]) >= self.columns:
            if self.count == self.stop:
                raise _StoppedError(linear[0])
            self.count += 1
        else:
            linear = None
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor):
            return output
        if linear is not None:
            hidden, weight, bias = linear
            self._note(output, _Derived(self.count - 1, hidden, weight, output, bias=bias))
        elif self.stop is None:
            self._follow(func, args, kwargs, output)
        return output

    def _note(self, output: Tensor, derived: _Derived) -> None:
        self.derived[id(output)] = output, derived

    def _follow(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Tensor,
    ) -> None:
        """Note an output that is a known one with a bias added, scaled, cast or viewed."""
        found = [self.derived.get(id(arg)) for arg in args if isinstance(arg, Tensor)]
        if not any(found):
            return
        source = next(entry for entry in found if entry is not None)[1]
        others = [arg for arg in args if id(arg) not in self.derived]
        other = others[0] if len(others) == 1 and len(args) == 2 else None
        bias, scale = _added(func, other, output, kwargs), _factor(func, other, args)
        if bias is not None and source.bias is None:
            self._note(output, dataclasses.replace(source, root=output, bias=bias))
        elif scale is not None and source.bias is None:
            scaled = dataclasses.replace(source, root=output, scale=source.scale * scale)
            self._note(output, scaled)
        elif func in _CASTS and output.shape == args[0].shape:
            self._note(output, dataclasses.replace(source, root=output))


_ADD = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__}
_ADD |= {torch.Tensor.__iadd__}
_MUL = {torch.mul, torch.Tensor.mul, torch.Tensor.mul_, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_MUL |= {torch.Tensor.__imul__}
_DIV = {torch.div, torch.Tensor.div, torch.Tensor.div_, torch.Tensor.__truediv__}
_DIV |= {torch.Tensor.__itruediv__}
_CASTS = {
    torch.Tensor.float,
    torch.Tensor.double,
    torch.Tensor.to,
    torch.Tensor.contiguous,
    torch.Tensor.clone,
    torch.clone,
    F.dropout,
}
_PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
}


def _linear(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(x, W (V, D), b) of a call that is x Wᵀ + b, or None."""
    if func is F.linear:
        parts = [*args, None, None, None]
        return (
            kwargs.get("input", parts[0]),
            kwargs.get("weight", parts[1]),
            kwargs.get("bias", parts[2]),
        )
    if func in _PRODUCTS and len(args) == 2 and args[1].dim() == 2:
        return args[0], args[1].t(), None
    if func in _PRODUCTS and len(args) == 2 and args[0].dim() == 2 and args[1].dim() == 1:
        return None
    if func in (torch.addmm,) and len(args) == 3 and not kwargs:
        return args[1], args[2].t(), args[0]
    return None


def _added(
    func: Callable[..., Any], other: Any, output: Tensor, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Return the bias that a call adds: one entry a column."""
    if func not in _ADD or not isinstance(other, Tensor) or kwargs:
        return None
    return other if other.numel() == output.shape[-1] == other.shape[-1] else None


def _factor(func: Callable[..., Any], other: Any, args: Sequence[Any]) -> float | None:
    """Return the number that a call multiplies by."""
    if not isinstance(other, (int, float)) or isinstance(other, bool):
        return None
    if func in _MUL:
        return float(other)
    return 1 / float(other) if func in _DIV and other is args[1] and other else None


def find_output_layer(
    logits: LogitsFunction, module: nn.Module, batch: Any
) -> OutputLayerParts | str:
    """Find the linear map that gives a model's logits.

    Args:
        logits: batch -> (N, V) or (N, T, V), run on `module`.
        module: The bare module, in eval mode.
        batch: A few sequences.

    Returns:
        The output layer, or in a few words why it has none that can be split off.
    """
    with torch.enable_grad():
        # The width of the logits is known after the pass: small maps are counted and left out.
        watch = _Watch(columns=2)
        with watch:
            z = logits(batch)
    candidates = list(watch.derived.values())
    for output, derived in reversed(candidates):
        selection = _selection(z, output)
        if selection is None:
            continue
        position, first = selection
        return _parts(module, derived, z.shape[-1], first, position, candidates)
    return "the logits are not the output of a linear map"


def _selection(z: Tensor, output: Tensor) -> tuple[int | None, int] | None:
    """(position from the right end or None, first column) by which z is taken from `output`."""
    if z is output:
        return None, 0
    if z._base is None or z._base is not (output if output._base is None else output._base):
        return None
    if z.stride(-1) != 1 or output.stride(-1) != 1 or output.dim() < z.dim():
        return None
    offset = int(z.storage_offset()) - int(output.storage_offset())
    if z.dim() == output.dim():
        # A leading shape that was flattened is none that is known here.
        if z.shape[:-1] != output.shape[:-1] or z.stride() != output.stride():
            return None
        return (None, offset) if offset + z.shape[-1] <= output.shape[-1] else None
    if output.dim() == 3 and z.dim() == 2 and z.stride(0) == output.stride(0):
        position, first = divmod(offset, output.stride(1))
        if position < output.shape[1] and first + z.shape[-1] <= output.shape[-1]:
            return position - output.shape[1], first
    return None


def _parts(
    module: nn.Module,
    derived: _Derived,
    width: int,
    first: int,
    position: int | None,
    candidates: Sequence[tuple[Tensor, _Derived]],
) -> OutputLayerParts | str:
    """Return a found map's output layer, weight and bias as parts of module tensors."""
    found = _weight_of(module, derived.weight)
    if isinstance(found, str):
        return found
    whole, fixed, scaling = found
    depth, columns = whole.shape[1], slice(first, first + width)
    weight = ParamView(whole.name, whole.start + first * depth, (width, depth))
    if scaling is not None:
        kept = scaling.factor[columns], scaling.bend[columns]
        scaling = RowScaling(_of(module, weight), *kept)
    bias = None
    if derived.bias is not None:
        part = part_of(module, derived.bias)
        if part is None:
            return "the bias of the logits is computed"
        bias = ParamView(part.name, part.start + first, (width,))
    calls = {d.call for _, d in candidates if len(d.weight) >= width and d.call < derived.call}
    rows = None if fixed is None else fixed[columns]
    return OutputLayerParts(len(calls), width, derived.scale, weight, bias, rows, position, scaling)


def part_of(module: nn.Module, tensor: Tensor) -> ParamView | None:
    """Return the parameter or buffer that a tensor is, or a contiguous part of."""
    return view_among({id(own): name for name, own in _tensors_of(module)}, tensor)


def _of(module: nn.Module, part: ParamView) -> Tensor:
    """Return the part of the module's tensor of this name, a view of it."""
    tensor = dict(_tensors_of(module))[part.name]
    return tensor if tensor.shape == part.shape else part.of(tensor.view(-1))


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


# The part of a parameter that a weight comes from, its rows without gradient, and how the weight's
# rows are made of the part's where they are not the same.
_Rows = tuple[ParamView, Tensor | None, RowScaling | None]


def _weight_of(module: nn.Module, weight: Tensor) -> _Rows | str:
    if (part := part_of(module, weight)) is not None:
        return part, None, None
    if not weight.requires_grad:
        return "the output weight is no tensor of the model"
    return gathered_rows(module, weight)


def gathered_rows(module: nn.Module, weight: Tensor) -> _Rows | str:
    """Return the rows of one parameter that a computed (V, D) tensor is, gradient and all.

    Where it is a table that was looked up whole, its rows are the parameter's, and a gradient on
    it is the parameter's gradient, but for rows of padding, which get none. Rows may be scaled
    by a function of their lengths.
    """
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    names = {named[id(leaf)] for leaf in _leaves(weight) if id(leaf) in named}
    reason = "the output weight is computed from parameters, not one of them"
    if len(names) != 1:
        return reason
    name = names.pop()
    table = dict(module.named_parameters())[name]
    if table.dim() != 2 or table.shape[1:] != weight.shape[1:] or len(table) < len(weight):
        return reason

    def pull(direction: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(weight, table, direction, retain_graph=True)
        return gradient.to_dense() if gradient.is_sparse else gradient

    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(weight.shape, generator=generator).to(weight)
    gradient = pull(direction)
    for first in range(len(table) - len(weight) + 1):
        rows = slice(first, first + len(weight))
        part = ParamView(name, first * table.shape[1], tuple(weight.shape))
        if torch.equal(weight.detach(), table.detach()[rows]):
            fixed = (gradient[rows] == 0).all(dim=1)
            if not torch.equal(gradient[rows][~fixed], direction[~fixed]):
                return reason
            return part, fixed if bool(fixed.any()) else None, None
        if bool(gradient[:first].any() | gradient[rows.stop :].any()):
            continue
        scaled = find_row_scaling(table[rows], weight, pull, rows)
        if scaled is not None:
            scaling, fixed = scaled
            return part, fixed if bool(fixed.any()) else None, scaling
    return reason


def _leaves(tensor: Tensor) -> list[Tensor]:
    """Return the leaves of the graph that a tensor comes from."""
    found, seen, stack = [], set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        stack.extend(following for following, _ in node.next_functions)
    return found
