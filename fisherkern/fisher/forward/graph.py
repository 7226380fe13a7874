"""The autograd graph of a captured forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fisherkern.adapters.parameters import Parameters
from fisherkern.errors import InputError

# The node that PyTorch gives a function whose derivative nobody wrote.
_WITHOUT_DERIVATIVE = "NotImplemented"


class RecordedOp(Protocol):
    """What is needed of a captured op; see `capture.CapturedOp`."""

    @property
    def output(self) -> GradientEdge: ...
    @property
    def other_inputs(self) -> list[Node]: ...


def edge_of(output: Tensor) -> GradientEdge | None:
    """Where the whole gradient of a call's output arrives, whatever happens to it afterwards.

    That is the base's edge for a view of all of it, as F.linear returns one: writing to
    a view in place leaves the view's own node behind. None for a view of a part, but for
    those to which nobody can write: of a parameter, or with repeated entries.
    """
    base = output._base
    if base is None or (base.is_leaf and base.requires_grad):
        return get_gradient_edge(output)
    if any(s == 0 and e > 1 for s, e in zip(output.stride(), output.shape, strict=True)):
        return get_gradient_edge(output)
    whole = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return get_gradient_edge(base) if whole and base.grad_fn is not None else None


def params_outside(result: Tensor, ops: Iterable[RecordedOp], parameters: Parameters) -> set[str]:
    """Names of the parameters that `result` depends on by a way that avoids every captured op.

    Walks the autograd graph and steps over each op from its output to its other inputs; a
    parameter still reached has a use that no handler saw.

    Raises:
        InputError: The result depends on a parameter through a function without a derivative.
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
        if node.name().endswith(_WITHOUT_DERIVATIVE):
            _refuse(node, leaves)
        if node in other_inputs:
            stack.extend(other_inputs[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in leaves:
            names.add(leaves[id(leaf)])
        stack.extend(next_node for next_node, _ in node.next_functions)
    return names


def nodes_below(*roots: Node) -> dict[Node, None]:
    """Return the graph that ends in some nodes, these included, in the order of a walk."""
    nodes: dict[Node, None] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in nodes:
            nodes[node] = None
            stack += [follower for follower, _ in node.next_functions if follower is not None]
    return nodes


def _refuse(node: Node, leaves: Mapping[int, str]) -> None:
    below = (leaves.get(id(getattr(n, "variable", None))) for n in nodes_below(node))
    if names := sorted(name for name in below if name is not None):
        raise InputError(
            f"model: no gradient comes back to {', '.join(names)} through a function without a"
            " derivative, as a quantised layer is"
        )
