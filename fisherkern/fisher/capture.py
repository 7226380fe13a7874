"""Recording where a forward pass uses parameters.

A `TorchFunctionMode` sees every torch function the model calls, so `nn.Linear`,
`F.linear` on a bare parameter and a weight shared by two modules are one case;
nothing in the model is wrapped or changed. A rule (see rules.py) turns a call it
knows into uses; `uncaptured` finds parameters that the result also reaches by
another way, which no rule then describes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies in a parameter: `shape` entries from flat index `start` of `name`."""

    name: str
    start: int
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The view of a flattened tensor of the parameter's size that this place covers."""
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)


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

    `delta` is the gradient of a per-sequence scalar at the call's output, (N, ...).
    """

    place: Place

    def add_square_(self, fisher: Tensor, delta: Tensor) -> None:
        """fisher += Σ_n g_n², g_n the gradient of sequence n, fisher of the place's shape."""

    def per_sequence(self, delta: Tensor, part: slice) -> Tensor:
        """g of the sequences in `part`, (n, *place.shape)."""


@dataclasses.dataclass
class Site:
    """A captured call: its output, the uses of parameters in it, its other tensor inputs."""

    output: Tensor
    uses: Sequence[Use]
    others: list[Tensor]
    version: int

    @property
    def structure(self) -> tuple[Any, ...]:
        """What is the same for the same call on other sequences, and differs between calls."""
        return self.output.dim(), *((type(use), use.place) for use in self.uses)


Rule = Callable[["Capture", tuple[Any, ...], Mapping[str, Any], Tensor], Sequence[Use]]


# padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse of a lookup without extras.
_PLAIN = (None, None, 2.0, False, False)


class _Gelu(torch.autograd.Function):
    """F.gelu with its derivative kept: every probe's backward pass is one product, not an erf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        one = torch.ones_like(x)
        ctx.save_for_backward(torch.ops.aten.gelu_backward(one, x, approximate=approximate))
        return F.gelu(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return deltas[0] * derivative, None


class Capture(TorchFunctionMode):
    """Records, while active, the calls that `rules` know as sites of parameter use.

    `num_sequences` is N, the leading extent that makes an output per-sequence.
    """

    def __init__(
        self, parameters: Parameters, num_sequences: int, rules: Mapping[Callable[..., Any], Rule]
    ) -> None:
        super().__init__()
        self.parameters = parameters
        # Outputs of lookups that all sequences share (positions), by id: tensor, place, ids.
        self.shared_lookups: dict[int, tuple[Tensor, Place, Tensor]] = {}
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
        if func is F.gelu and len(args) == 1:
            return _Gelu.apply(args[0], kwargs.get("approximate", "none"))
        output = func(*args, **kwargs)
        rule = self._rules.get(func)
        if rule is None or not isinstance(output, Tensor) or output.grad_fn is None:
            return output
        if output.dim() == 0 or output.shape[0] != self._num_sequences:
            if func is F.embedding:
                self._note_shared_lookup(args, output)
            return output
        uses = rule(self, args, kwargs, output)
        if uses:
            places = {use.place for use in uses}
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            others = [t for t in tensors if self._place_behind(t) not in places]
            self._recorded.append(Site(output, uses, others, output._version))
        return output

    def _note_shared_lookup(self, args: tuple[Any, ...], output: Tensor) -> None:
        """Remember (T, D) or (1, T, D) rows that are about to be added to every sequence."""
        place = self.parameters.place(args[1]) if len(args) == 2 or args[2:] == _PLAIN else None
        if place is not None and output.dim() in (2, 3) and output.shape[:-2] in ((), (1,)):
            self.shared_lookups[id(output)] = (output, place, args[0].reshape(-1))

    def _place_behind(self, tensor: Tensor) -> Place | None:
        if id(tensor) in self.shared_lookups:
            return self.shared_lookups[id(tensor)][1]
        return self.parameters.either_place(tensor)

    def sites(self) -> list[Site]:
        """The recorded sites whose output was not overwritten in place afterwards."""
        return [site for site in self._recorded if site.output._version == site.version]


def uncaptured(result: Tensor, sites: Iterable[Site], parameters: Parameters) -> set[str]:
    """Names of the parameters that `result` depends on by a way that avoids every site.

    Walks the autograd graph and steps over each site from its output to its other
    inputs; a parameter still reached has a use that no rule saw.
    """
    leaves = {id(parameter): name for name, parameter in parameters.named.items()}
    beyond = {site.output.grad_fn: site.others for site in sites}
    # A leaf has no node of its own until something uses it outside a site.
    found = {leaves[id(t)] for site in sites for t in site.others if id(t) in leaves}
    seen: set[Any] = set()
    stack = [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in beyond:
            stack.extend(tensor.grad_fn for tensor in beyond[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in leaves:
            found.add(leaves[id(leaf)])
        stack.extend(next_node for next_node, _ in node.next_functions)
    return found
