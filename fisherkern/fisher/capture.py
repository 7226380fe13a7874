"""Recording where a forward pass uses parameters.

A `TorchFunctionMode` sees every torch function the model calls, so `nn.Linear`,
`F.linear` on a bare parameter and a weight shared by two modules are one case;
nothing in the model is wrapped or changed. A handler (see layers/) turns a call it
knows into uses of parameters; a rewrite computes a call's result by calls that have
handlers; `params_outside` finds parameters that the result also reaches by another
way, which no handler describes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fisherkern.adapters.parameters import Parameters, ParamView
from fisherkern.fisher import fast_ops


class ParamUse(Protocol):
    """One use of a parameter by one call: how the output gradient becomes the parameter's.

    `delta` is the gradient of R per-sequence scalars, the probes, at the call's output, its
    dimensions those of the output with the sequences' moved to the front: (R, N, ...).
    """

    param: ParamView

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        """fisher += Σ_r Σ_n g_rn², g_rn the gradient of sequence n, of the parameter's shape."""

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        """g of the sequences in `part` for one probe's `delta` (N, ...): (n, *param.shape)."""


@dataclasses.dataclass
class CapturedOp:
    """A captured call, read with the sequences in dimension `dim` of its output.

    `output` is the edge of the autograd graph at which the call's output gradient
    arrives, also when the output is overwritten in place afterwards; `shape` is the
    output's. `other_inputs` are the nodes of the inputs that are no parameters here and
    require a gradient.
    """

    output: GradientEdge
    shape: torch.Size
    dim: int
    uses: Sequence[ParamUse]
    other_inputs: list[Node]

    def sequences_first(self, delta: Tensor) -> Tensor:
        """The R gradients that arrived at `output` as `ParamUse` takes them, (R, N, ...)."""
        return delta.reshape(len(delta), *self.shape).movedim(1 + self.dim, 1)


def structure_of(ops: Sequence[CapturedOp]) -> tuple[Any, ...]:
    """Equal for the same calls on other sequences, different for other calls."""
    return tuple(
        (len(op.shape), op.dim, *[(type(use), use.param) for use in op.uses]) for op in ops
    )


@dataclasses.dataclass(frozen=True)
class OpCall:
    """A call as its handler sees it, with the sequences in dimension `dim` of the output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    dim: int
    capture: Capture

    def view_of(self, tensor: Any) -> ParamView | None:
        """The parameter whose gradient the call's is part of; a view without gradient has none."""
        return self.capture.parameters.view_of(tensor) if _differentiated(tensor) else None

    def view_or_transpose(self, tensor: Any) -> ParamView | None:
        """The same, for a transposed matrix too."""
        return (
            self.capture.parameters.view_or_transpose(tensor) if _differentiated(tensor) else None
        )

    def first(self, tensor: Tensor) -> Tensor:
        """The values of a tensor that is laid out as the output, sequences moved to the front."""
        return tensor.detach().movedim(self.dim, 0)

    def positions(self, tensor: Tensor, trailing: int = 1) -> Tensor:
        """`first` with `trailing` last dimensions kept, those between flattened: (N, T, ...)."""
        values = self.first(tensor)
        return values.reshape(len(values), -1, *values.shape[values.dim() - trailing :])

    def copies(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The dimensions over which a tensor of `shape` is repeated to the output's shape.

        Counted with the sequences' in front and without it; None where the tensor has
        an extent of its own there, and so is no shared parameter.
        """
        aligned = [1] * (self.output.dim() - len(shape)) + list(shape)
        if len(aligned) > self.output.dim() or aligned.pop(self.dim) != 1:
            return None
        return tuple(i for i, extent in enumerate(aligned, start=1) if extent == 1)


# A handler gives each argument that it describes with its use, and nothing for a call it
# cannot describe. A rewrite gives NotImplemented for a call that it leaves alone.
LayerHandler = Callable[[OpCall], Sequence[tuple[Tensor, ParamUse]]]
LinearFunction = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """What to compute in a function's stead; `function` takes a captured F.linear first."""

    function: Callable[..., Any]


Handlers = dict[Callable[..., Any], LayerHandler | Rewrite]

# What puts leading dimensions into one, and what then works row by row.
_RESHAPES = {
    torch.reshape,
    torch.flatten,
    torch.Tensor.reshape,
    torch.Tensor.view,
    torch.Tensor.flatten,
}
_BY_ROW = {
    F.relu,
    F.relu_,
    F.gelu,
    F.silu,
    F.leaky_relu,
    F.dropout,
    torch.relu,
    torch.tanh,
    torch.sigmoid,
}

# Replacements without parameter gradients, which the engine computes itself.
_FAST_OPS: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: fast_ops.linear,
    F.layer_norm: fast_ops.layer_norm,
}

# The extras of F.embedding that a plain lookup does without; it names all but the first two.
_PLAIN = {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False}


class Capture(TorchFunctionMode):
    """Records, while active, the calls that `handlers` know and that use parameters: `ops`.

    `num_sequences` is N. A call is recorded once for each dimension of that extent; only the
    gradients tell whether one of them holds the sequences (`plan.per_sequence_ops`).
    """

    def __init__(
        self,
        parameters: Parameters,
        num_sequences: int,
        handlers: Mapping[Callable[..., Any], LayerHandler | Rewrite],
    ) -> None:
        super().__init__()
        self.parameters = parameters
        # The recorded ops, in the order of the calls.
        self.ops: list[CapturedOp] = []
        # Outputs of lookups that all sequences share (positions), by id: tensor, table, ids.
        self.shared_lookups: dict[int, tuple[Tensor, ParamView, Tensor]] = {}
        # Tensors (N·T, ...) or (T·N, ...), by id: the tensor, and what its first dimension was.
        self._flattened: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        self._num_sequences = num_sequences
        self._handlers = handlers

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = self._handlers.get(func)
        if handler is None or isinstance(handler, Rewrite):
            output: Any = NotImplemented
            if handler is not None:
                output = handler.function(self._linear, *args, **kwargs)
            if output is NotImplemented:
                output = func(*args, **kwargs)
            if func in _RESHAPES and args:
                self._note_flattened(args[0], output)
            elif func in _BY_ROW and (lead := self._lead(args, output)) is not None:
                self._flattened[id(output)] = (output, lead)
            return output
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        # Before the call: one in place makes its own output of an input.
        nodes = [tensor.grad_fn for tensor in tensors]
        fast = _FAST_OPS.get(func)
        affine = tensors[1:] if args else [t for n, t in kwargs.items() if n in ("weight", "bias")]
        if fast is not None and all(t is None or self._is_parameter(t) for t in affine):
            output = fast(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        if isinstance(output, Tensor) and output.grad_fn is not None:
            if func is not F.embedding or not self._note_shared_lookup(args, kwargs, output):
                self._record(handler, args, kwargs, output, list(zip(tensors, nodes, strict=True)))
        return output

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = self.__torch_function__(F.linear, (), (input, weight, bias))
        return output

    def _is_parameter(self, tensor: Tensor) -> bool:
        return _differentiated(tensor) and self.parameters.view_of(tensor) is not None

    def _may_be_described(self, tensor: Tensor) -> bool:
        """Whether a handler may have a use for this argument."""
        if id(tensor) in self.shared_lookups:
            return True
        return _differentiated(tensor) and self.parameters.view_or_transpose(tensor) is not None

    def _record(
        self,
        handler: LayerHandler,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
        tensors: list[tuple[Tensor, Node | None]],
    ) -> None:
        call_args, shape = args, output.shape
        if (lead := self._lead(args, output)) is not None:
            self._flattened[id(output)] = (output, lead)
            call_args = tuple(
                t.reshape(*lead, *t.shape[1:]) if id(t) in self._flattened else t for t in args
            )
            shape = torch.Size((*lead, *output.shape[1:]))
        # Nothing to describe; most calls end here.
        if not any(self._may_be_described(tensor) for tensor, _ in tensors):
            return
        for dim, extent in enumerate(shape):
            if extent != self._num_sequences or (edge := _edge(output)) is None:
                continue
            described = handler(
                OpCall(call_args, kwargs, output.detach().reshape(shape), dim, self)
            )
            known = [id(tensor) for tensor, _ in described]
            # An argument in two roles, one of them described, is left alone.
            if not described or any(
                sum(tensor is other for other, _ in tensors) != 1 for tensor, _ in described
            ):
                continue
            other_inputs = [
                get_gradient_edge(tensor).node if node is None else node
                for tensor, node in tensors
                if id(tensor) not in known and (node is not None or tensor.is_leaf)
                if tensor.requires_grad
            ]
            uses = [use for _, use in described]
            self.ops.append(CapturedOp(edge, shape, dim, uses, other_inputs))
            if self._num_sequences == 1:
                # Everything belongs to the one sequence, however it is read.
                break

    def _note_shared_lookup(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> bool:
        """Remember (T, D) or (1, T, D) rows that are about to be added to every sequence."""
        # Rows of single sequences have their dimension; those without it are shared by all.
        extent = 1 if output.dim() == 3 else len(output)
        if self._num_sequences == extent:
            return False
        plain = len(args) == 2 and all(
            kwargs.get(key, _PLAIN[key]) == _PLAIN[key] for key in _PLAIN
        )
        table = self.parameters.view_of(args[1]) if plain else None
        shared = table is not None and output.dim() in (2, 3) and output.shape[:-2] in ((), (1,))
        if shared:
            assert table is not None
            self.shared_lookups[id(output)] = (output, table, args[0].reshape(-1))
        return shared

    def _note_flattened(self, input: Tensor, output: Tensor) -> None:
        """Remember rows (N·T, ...) or (T·N, ...) that sequences and positions were put into."""
        n = self._num_sequences
        if output.dim() == 0 or len(output) == n or input.dim() <= output.dim():
            return
        for count in range(2, input.dim()):
            lead = tuple(input.shape[:count])
            if math.prod(lead) == len(output) and n in lead:
                if self.parameters.view_of(output) is None:
                    self._flattened[id(output)] = (output, lead)
                return

    def _lead(self, args: tuple[Any, ...], output: Tensor) -> tuple[int, ...] | None:
        """What the first dimension of a call's output was, if it works on remembered rows."""
        for tensor in args:
            if id(tensor) in self._flattened and output.dim() > 0:
                lead = self._flattened[id(tensor)][1]
                if len(output) == math.prod(lead):
                    return lead
        return None


def _differentiated(tensor: Any) -> bool:
    """Whether the gradient of `tensor` reaches the parameter that it is or views.

    A view made without gradients still says that it requires one, but passes none on.
    """
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return False
    return tensor._base is None or tensor.grad_fn is not None


def _edge(output: Tensor) -> GradientEdge | None:
    """Where the whole gradient of a call's output arrives, whatever happens to it afterwards.

    That is the base's edge for a view of all of it, as F.linear returns one: writing to
    a view in place leaves the view's own node behind. None for a view of a part.
    """
    base = output._base
    if base is None:
        return get_gradient_edge(output)
    whole = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return get_gradient_edge(base) if whole and base.grad_fn is not None else None


def params_outside(result: Tensor, ops: Iterable[CapturedOp], parameters: Parameters) -> set[str]:
    """Names of the parameters that `result` depends on by a way that avoids every captured op.

    Walks the autograd graph and steps over each op from its output to its other inputs; a
    parameter still reached has a use that no handler saw.
    """
    leaves = {id(parameter): name for name, parameter in parameters.named.items()}
    other_inputs = {op.output.node: op.other_inputs for op in ops}
    names: set[str] = set()
    seen: set[Node] = set()
    stack: list[Node | None] = [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in other_inputs:
            stack.extend(other_inputs[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in leaves:
            names.add(leaves[id(leaf)])
        stack.extend(next_node for next_node, _ in node.next_functions)
    return names
