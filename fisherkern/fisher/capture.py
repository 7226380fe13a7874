"""Recording where a forward pass uses parameters.

A `TorchFunctionMode` sees every torch function the model calls, so `nn.Linear`,
`F.linear` on a bare parameter and a weight shared by two modules are one case;
nothing in the model is wrapped or changed. A rule (see rules/) turns a call it
knows into uses; a replacement computes a call's result by calls that have rules;
`uncaptured` finds parameters that the result also reaches by another way, which no
rule then describes.
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

from fisherkern.fisher.layer_norm_backward import layer_norm
from fisherkern.fisher.linear_backward import linear


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies in a parameter: `shape` entries from flat index `start` of `name`."""

    name: str
    start: int
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The view of a flattened tensor of the parameter's size that this place covers."""
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)

    def viewed(self, *shape: int) -> Place:
        """The same entries in another shape."""
        return Place(self.name, self.start, shape)


class Parameters:
    """The trainable parameters of a module, found again from themselves or their views."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._names = {id(parameter): name for name, parameter in self.named.items()}

    def place(self, tensor: Any) -> Place | None:
        """The place of a parameter or of a contiguous view of one, None for anything else."""
        if not isinstance(tensor, Tensor):
            return None
        base = tensor if tensor._base is None else tensor._base
        name = self._names.get(id(base))
        if name is None or not (base.is_contiguous() and tensor.is_contiguous()):
            return None
        start = int(tensor.storage_offset()) - int(base.storage_offset())
        return Place(name, start, tuple(tensor.shape))

    def either_place(self, tensor: Any) -> Place | None:
        """The place of `tensor`, or, for a matrix that has none, of its transpose."""
        place = self.place(tensor)
        if place is None and isinstance(tensor, Tensor) and tensor.dim() == 2:
            place = self.place(tensor.t())
        return place


class Use(Protocol):
    """One use of a place by one call: how the call's output gradient becomes the place's.

    `delta` is the gradient of R per-sequence scalars, the probes, at the call's output, its
    dimensions those of the output with the sequences' moved to the front: (R, N, ...).
    """

    place: Place

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        """fisher += Σ_r Σ_n g_rn², g_rn the gradient of sequence n, of the place's shape."""

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        """g of the sequences in `part` for one probe's `delta` (N, ...): (n, *place.shape)."""


@dataclasses.dataclass
class Site:
    """A captured call, read with the sequences in dimension `dim` of its output.

    `output` is the edge of the autograd graph at which the call's output gradient
    arrives, also when the output is overwritten in place afterwards; `shape` is the
    output's. `beyond` are the nodes of the other inputs that require a gradient.
    """

    output: GradientEdge
    shape: torch.Size
    dim: int
    uses: Sequence[Use]
    beyond: list[Node]

    @property
    def structure(self) -> tuple[Any, ...]:
        """What is the same for the same call on other sequences, and differs between calls."""
        return len(self.shape), self.dim, *((type(use), use.place) for use in self.uses)

    def sequences_first(self, delta: Tensor) -> Tensor:
        """The R gradients that arrived at `output` as `Use` takes them, (R, N, ...)."""
        return delta.reshape(len(delta), *self.shape).movedim(1 + self.dim, 1)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call as its rule sees it, read with the sequences in dimension `dim` of the output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    dim: int
    capture: Capture

    @property
    def num_sequences(self) -> int:
        return self.output.shape[self.dim]

    def place(self, tensor: Any) -> Place | None:
        """The place whose gradient the call's is part of; a view without gradient has none."""
        return self.capture.parameters.place(tensor) if _differentiated(tensor) else None

    def either_place(self, tensor: Any) -> Place | None:
        return self.capture.parameters.either_place(tensor) if _differentiated(tensor) else None

    def first(self, tensor: Tensor) -> Tensor:
        """The values of a tensor that is laid out as the output, sequences moved to the front."""
        return tensor.detach().movedim(self.dim, 0)

    def copies(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The dimensions over which a tensor of `shape` is repeated to the output's shape.

        Counted with the sequences' in front and without it; None where the tensor has
        an extent of its own there, and so is no shared parameter.
        """
        aligned = [1] * (self.output.dim() - len(shape)) + list(shape)
        if len(aligned) > self.output.dim() or aligned.pop(self.dim) != 1:
            return None
        return tuple(i for i, extent in enumerate(aligned, start=1) if extent == 1)


# A rule gives each argument that it describes with its use, and nothing for a call it
# cannot describe. A replacement gives NotImplemented for a call that it leaves alone.
Rule = Callable[[Call], Sequence[tuple[Tensor, Use]]]
Linear = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What to compute in a function's stead; `function` takes a captured F.linear first."""

    function: Callable[..., Any]


Rules = dict[Callable[..., Any], Rule | Replacement]


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

# Ours in place of these: the backward pass gives their parameters nothing, as nobody asks for it.
_OURS: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: linear,
    F.layer_norm: layer_norm,
}

# What F.embedding hands on of a lookup without extras; it names all but the first two.
_PLAIN = {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False}


class Capture(TorchFunctionMode):
    """Records, while active, the calls that `rules` know as sites of parameter use.

    `num_sequences` is N. A call is recorded once for each dimension of that extent; which
    of them holds the sequences, if any, only the gradients tell (`plan.usable_sites`).
    """

    def __init__(
        self,
        parameters: Parameters,
        num_sequences: int,
        rules: Mapping[Callable[..., Any], Rule | Replacement],
    ) -> None:
        super().__init__()
        self.parameters = parameters
        # Outputs of lookups that all sequences share (positions), by id: tensor, place, ids.
        self.shared_lookups: dict[int, tuple[Tensor, Place, Tensor]] = {}
        # Tensors (N·T, ...) or (T·N, ...), by id: the tensor, and what its first dimension was.
        self._flattened: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        self._num_sequences = num_sequences
        self._rules = rules
        self._recorded: list[Site] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rule = self._rules.get(func)
        if rule is None or isinstance(rule, Replacement):
            output: Any = NotImplemented
            if rule is not None:
                output = rule.function(self._linear, *args, **kwargs)
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
        if (ours := _OURS.get(func)) is not None:
            output = ours(self._is_parameter, *args, **kwargs)
        else:
            output = func(*args, **kwargs)
        if isinstance(output, Tensor) and output.grad_fn is not None:
            if func is not F.embedding or not self._note_shared_lookup(args, kwargs, output):
                self._record(rule, args, kwargs, output, list(zip(tensors, nodes, strict=True)))
        return output

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.__torch_function__(F.linear, (), (input, weight, bias))

    def _is_parameter(self, tensor: Tensor) -> bool:
        return _differentiated(tensor) and self.parameters.place(tensor) is not None

    def _record(
        self,
        rule: Rule,
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
        for dim, extent in enumerate(shape):
            if extent != self._num_sequences or (edge := _edge(output)) is None:
                continue
            described = rule(Call(call_args, kwargs, output.detach().reshape(shape), dim, self))
            known = [id(tensor) for tensor, _ in described]
            # An argument in two roles, of which the rule has described one, is left alone.
            if not described or any(
                sum(tensor is other for other, _ in tensors) != 1 for tensor, _ in described
            ):
                continue
            beyond = [
                get_gradient_edge(tensor).node if node is None else node
                for tensor, node in tensors
                if id(tensor) not in known and (node is not None or tensor.is_leaf)
                if tensor.requires_grad
            ]
            uses = [use for _, use in described]
            self._recorded.append(Site(edge, shape, dim, uses, beyond))
            if self._num_sequences == 1:
                # Everything belongs to the one sequence, however it is read.
                break

    def _note_shared_lookup(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> bool:
        """Remember (T, D) or (1, T, D) rows that are about to be added to every sequence."""
        # One sequence's own rows have its dimension; those without it are everybody's.
        own = 1 if output.dim() == 3 else len(output)
        if self._num_sequences == own:
            return False
        plain = len(args) == 2 and all(
            kwargs.get(key, _PLAIN[key]) == _PLAIN[key] for key in _PLAIN
        )
        place = self.parameters.place(args[1]) if plain else None
        shared = place is not None and output.dim() in (2, 3) and output.shape[:-2] in ((), (1,))
        if shared:
            assert place is not None
            self.shared_lookups[id(output)] = (output, place, args[0].reshape(-1))
        return shared

    def _note_flattened(self, input: Tensor, output: Tensor) -> None:
        """Remember rows (N·T, ...) or (T·N, ...) that sequences and positions were put into."""
        n = self._num_sequences
        if output.dim() == 0 or len(output) == n or input.dim() <= output.dim():
            return
        for count in range(2, input.dim()):
            lead = tuple(input.shape[:count])
            if math.prod(lead) == len(output) and n in lead:
                if self.parameters.place(output) is None:
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

    def sites(self) -> list[Site]:
        """The recorded sites, in the order of the calls."""
        return self._recorded


def _differentiated(tensor: Any) -> bool:
    """Whether what is done with `tensor` has a gradient to pass to the parameter it views.

    A view made without gradients still says that it requires one, and keeps it to itself.
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


def uncaptured(result: Tensor, sites: Iterable[Site], parameters: Parameters) -> set[str]:
    """Names of the parameters that `result` depends on by a way that avoids every site.

    Walks the autograd graph and steps over each site from its output to its other
    inputs; a parameter still reached has a use that no rule saw.
    """
    leaves = {id(parameter): name for name, parameter in parameters.named.items()}
    beyond = {site.output.node: site.beyond for site in sites}
    found: set[str] = set()
    seen: set[Node] = set()
    stack: list[Node | None] = [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in beyond:
            stack.extend(beyond[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in leaves:
            found.add(leaves[id(leaf)])
        stack.extend(next_node for next_node, _ in node.next_functions)
    return found
