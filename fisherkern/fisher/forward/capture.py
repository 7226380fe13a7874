"""Recording where a forward pass uses parameters.

A `TorchFunctionMode` sees every torch function the model calls, so `nn.Linear`, `F.linear` on a
bare parameter and a weight shared by two modules are one case; nothing in the model is wrapped or
changed. A handler (see layers/) turns a call it knows into uses of parameters; a rewrite computes
a call's result by calls that have handlers. `graph.params_outside` finds parameters that the result
also reaches by another way, which no handler describes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fisherkern.adapters.parameters import Parameters, ParamView
from fisherkern.fisher.forward import fast_ops
from fisherkern.fisher.forward.dependence import BatchDependence, counts_rows
from fisherkern.fisher.forward.graph import edge_of
from fisherkern.fisher.forward.plain_run import without_max_norm
from fisherkern.fisher.forward.shared_tensors import EntriesCache, SharedTensor


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
    output's. `described` are the nodes of the inputs that `uses` has for parameters, where they
    are computed, `other_inputs` those of the others that require a gradient.
    """

    output: GradientEdge
    shape: torch.Size
    dim: int
    uses: Sequence[ParamUse]
    described: list[Node]
    other_inputs: list[Node]

    def sequences_first(self, delta: Tensor) -> Tensor:
        """Return the R gradients that arrived at `output` as `ParamUse` takes them, (R, N, ...)."""
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
        """Return the parameter, or what is made of some, whose gradient the call's is part of.

        A view without gradient has none.
        """
        if not _differentiated(tensor):
            return None
        return self.capture.parameters.view_of(tensor) or self.capture.shared_view(tensor)

    def transpose_of(self, tensor: Tensor) -> ParamView | None:
        """Return the parameter of which a matrix is the transpose, and not one itself."""
        parameters = self.capture.parameters
        if not _differentiated(tensor) or parameters.view_of(tensor) is not None:
            return None
        return parameters.view_or_transpose(tensor)

    def first(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor laid out as the output, sequences moved to the front."""
        return tensor.detach().movedim(self.dim, 0)

    def positions(self, tensor: Tensor, trailing: int = 1) -> Tensor:
        """`first` with `trailing` last dimensions kept, those between flattened: (N, T, ...)."""
        values = self.first(tensor)
        return values.reshape(len(values), -1, *values.shape[values.dim() - trailing :])

    def copies(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Return the dimensions over which a tensor of `shape` is repeated to the output's shape.

        Counted with the sequences' in front and without it; None where the tensor has
        an extent of its own there, and so is no shared parameter.
        """
        aligned = [1] * (self.output.dim() - len(shape)) + list(shape)
        if len(aligned) > self.output.dim() or aligned.pop(self.dim) != 1:
            return None
        return tuple(i for i, extent in enumerate(aligned, start=1) if extent == 1)

    def broadcast(self, tensor: Tensor) -> Tensor | None:
        """`first` of a tensor that broadcasts to the output, None for any other."""
        aligned = zip(tensor.shape[::-1], self.output.shape[::-1], strict=False)
        if tensor.dim() > self.output.dim() or any(e not in (1, all) for e, all in aligned):
            return None
        return self.first(tensor.expand(self.output.shape))


# A handler gives each argument that it describes with its use, and nothing for a call it
# cannot describe. A rewrite gives NotImplemented for a call that it leaves alone.
LayerHandler = Callable[[OpCall], Sequence[tuple[Tensor, ParamUse]]]
# A function and its arguments -> its result, the call captured.
CapturedCall = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """What to compute in a function's stead; `function` takes a `CapturedCall` first."""

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

# By which a model has its own say in gradients: a hook may change them, of a tensor or of its node.
_HOOKING = {torch.Tensor.register_hook, torch.Tensor.grad_fn.__get__}  # type: ignore[union-attr]

# Replacements without parameter gradients, which the engine computes itself.
_FAST_OPS: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: fast_ops.linear,
    F.layer_norm: fast_ops.layer_norm,
    F.conv1d: fast_ops.pointwise_convolution,
}


class Capture(TorchFunctionMode):
    """Records, while active, the calls that `handlers` know and that use parameters: `ops`.

    `num_sequences` is N. A call is recorded once for each dimension of that extent; only the
    gradients tell whether one of them holds the sequences (`plan.per_sequence_ops`). `batch` is
    what the model is called with: what is computed without it, from parameters alone, is used as
    a parameter is. `entries` keeps what is known of such tensors for the next forward pass.
    """

    def __init__(
        self,
        parameters: Parameters,
        num_sequences: int,
        handlers: Mapping[Callable[..., Any], LayerHandler | Rewrite],
        batch: Any = None,
        entries: EntriesCache | None = None,
    ) -> None:
        super().__init__()
        self.parameters = parameters
        # The recorded ops, in the order of the calls.
        self.ops: list[CapturedOp] = []
        self._dependence = BatchDependence(batch, num_sequences)
        self._shared: dict[tuple[Node, int], SharedTensor] = {}
        self._entries: EntriesCache = {} if entries is None else entries
        # Tensors (N·T, ...) or (T·N, ...), by id: the tensor, and what its first dimension was.
        self._flattened: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        self._num_sequences = num_sequences
        self._handlers = handlers
        # Whether a number of rows came of values: another batch may have other rows then.
        self.counted = False
        # Nodes with hooks of the model, perhaps; another batch need not have them.
        self.hooked: set[Node | None] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = without_max_norm(args, kwargs or {})
        if counts_rows(func, args) and self._dependence.among(args, kwargs):
            self.counted = True
        if func in _HOOKING:
            self.hooked.add(args[0].grad_fn)
        # Inside the model's own `torch.vmap` none of ours may stand for a function.
        own = not torch._C._are_functorch_transforms_active()
        handler = self._handlers.get(func) if own else None
        if handler is None or isinstance(handler, Rewrite):
            output = self._unrecorded(handler, func, args, kwargs)
        else:
            output = self._recorded(handler, func, args, kwargs)
        self._dependence.follow(func, args, kwargs, output)
        return output

    def shared_view(self, tensor: Tensor) -> ParamView | None:
        """Return a tensor that all sequences share, of parameters, in a parameter's place."""
        if tensor.grad_fn is None or tensor in self._dependence:
            return None
        key = tensor.grad_fn, tensor.output_nr
        if key not in self._shared:
            name = f"shared tensor {len(self._shared)}"
            edge = get_gradient_edge(tensor)
            self._shared[key] = SharedTensor(name, edge, tensor, self.parameters, self._entries)
        view = self._shared[key].view
        return view if view.shape == tensor.shape else view.reshaped(*tensor.shape)

    def _unrecorded(
        self,
        rewrite: Rewrite | None,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        output: Any = NotImplemented
        if rewrite is not None:
            depends = self._dependence.among(args, kwargs)
            output = rewrite.function(functools.partial(self._called, depends), *args, **kwargs)
        if output is NotImplemented:
            output = func(*args, **kwargs)
        if func in _RESHAPES and args:
            self._note_flattened(args[0], output)
        elif func in _BY_ROW and (lead := self._lead(args, output)) is not None:
            self._flattened[id(output)] = (output, lead)
        return output

    def _recorded(
        self,
        handler: LayerHandler,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        # Before the call: one in place makes its own output of an input.
        nodes = [tensor.grad_fn for tensor in tensors]
        fast = _FAST_OPS.get(func)
        affine = tensors[1:] if args else [t for n, t in kwargs.items() if n in ("weight", "bias")]
        if (
            fast is not None
            and tensors
            and tensors[0] in self._dependence
            and all(t is None or self._is_parameter(t) for t in affine)
        ):
            output = fast(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        before = list(zip(tensors, nodes, strict=True))
        if func is torch.Tensor.__setitem__:
            # The index is of the rows as they are.
            self._record(handler, args, kwargs, args[0], before, None)
        elif isinstance(output, Tensor):
            self._record(handler, args, kwargs, output, before, self._lead(args, output))
        return output

    def _called(self, depends: bool, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function for a rewrite, which makes tensors of its arguments unseen."""
        if depends:
            self._dependence.note(args[:1], True)
        return self.__torch_function__(func, (), args, kwargs)

    def _is_parameter(self, tensor: Tensor) -> bool:
        return _differentiated(tensor) and self.parameters.view_of(tensor) is not None

    def _may_be_described(self, tensor: Tensor) -> bool:
        """Whether a handler may have a use for this argument."""
        if not _differentiated(tensor):
            return False
        shared = tensor.grad_fn is not None and tensor not in self._dependence
        return shared or self.parameters.view_or_transpose(tensor) is not None

    def _record(
        self,
        handler: LayerHandler,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
        tensors: list[tuple[Tensor, Node | None]],
        lead: tuple[int, ...] | None,
    ) -> None:
        if output.grad_fn is None:
            return
        call_args, shape = args, output.shape
        if lead is not None:
            self._flattened[id(output)] = (output, lead)
            call_args = tuple(
                self._unflattened(t, lead) if id(t) in self._flattened else t for t in args
            )
            shape = torch.Size((*lead, *output.shape[1:]))
        # Nothing to describe; most calls end here.
        if not any(self._may_be_described(tensor) for tensor, _ in tensors):
            return
        for dim, extent in enumerate(shape):
            if extent != self._num_sequences or (edge := edge_of(output)) is None:
                continue
            described = handler(
                OpCall(call_args, kwargs, output.detach().reshape(shape), dim, self)
            )
            known = [id(tensor) for tensor, _ in described]
            # An argument in two roles, one of them described, is left alone.
            if not described or any(
                sum(tensor is other for other, _ in tensors) != 1
                or not _describes(tensor, use, output)
                for tensor, use in described
            ):
                continue
            other_inputs = [
                get_gradient_edge(tensor).node if node is None else node
                for tensor, node in tensors
                if id(tensor) not in known and (node is not None or tensor.is_leaf)
                if tensor.requires_grad
            ]
            computed = [node for t, node in tensors if id(t) in known and node is not None]
            uses = [use for _, use in described]
            self.ops.append(CapturedOp(edge, shape, dim, uses, computed, other_inputs))
            if self._num_sequences == 1:
                # Everything belongs to the one sequence, however it is read.
                break

    def _note_flattened(self, input: Tensor, output: Tensor) -> None:
        """Remember rows (N·T, ...) or (T·N, ...) that sequences and positions were put into."""
        n = self._num_sequences
        if output.dim() == 0 or len(output) == n or input.dim() <= output.dim():
            return
        if input not in self._dependence:
            return
        for count in range(2, input.dim() + 1):
            lead = tuple(input.shape[:count])
            if math.prod(lead) == len(output) and n in lead:
                if self.parameters.view_of(output) is None:
                    self._flattened[id(output)] = (output, lead)
                return

    def _unflattened(self, tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
        unflattened = tensor.reshape(*lead, *tensor.shape[1:])
        self._dependence.note([unflattened], True)
        return unflattened

    def _lead(self, args: tuple[Any, ...], output: Tensor) -> tuple[int, ...] | None:
        """Return the first dimension of a call's output, if it works on remembered rows."""
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


def _describes(tensor: Tensor, use: ParamUse, output: Tensor) -> bool:
    """Whether a use's arithmetic is that of the call: complex numbers need conjugates."""
    if not output.is_complex():
        return not tensor.is_complex()
    return tensor.is_complex() and getattr(use, "takes_complex", False)
