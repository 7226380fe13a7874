"""The backward pass of layers from which the result takes a slice of positions alone.

A model that predicts at its last position may compute its last block at all of them. Gradients are
zero there but at that position, down to the attention that spreads them. From the result on, this
keeps that slice of them, and the parameters' uses see the slice of their inputs; the rest of the
graph goes back as ever.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fisherkern.fisher.forward.capture import CapturedOp, ParamUse
from fisherkern.fisher.forward.graph import nodes_below
from fisherkern.fisher.forward.slices import Slice, SliceRule, has_one_output, shape_of, slice_rule
from fisherkern.fisher.forward.vjp import check_alike, single_vector_jacobians
from fisherkern.fisher.layers.grads import Sliceable
from fisherkern.fisher.plan import Plan

log = logging.getLogger("fisherkern")

# An output of a node, and the slice of it of which a gradient is.
_Place = tuple[Node, int, Slice]


@dataclasses.dataclass(frozen=True)
class _Step:
    """A node with its rule; where its gradient comes from, and where those of its inputs go."""

    node: Node
    given: Slice | None
    rule: SliceRule
    places: Sequence[_Place | None]


@dataclasses.dataclass(frozen=True)
class SlicedBackward:
    """The steps from the result on, each node after all that its gradient comes from."""

    steps: Sequence[_Step]
    ops: Mapping[Node, Sequence[int]]

    def gradients(
        self, given: Tensor
    ) -> tuple[dict[int, Tensor], list[GradientEdge], list[Tensor]]:
        """R gradients of the result, (R, ...), sent back as far as the steps go.

        Gives those of the sliced ops' outputs by op, the edges at which the rest of the graph
        begins, and the gradients there.
        """
        found: dict[int, Tensor] = {}
        arrived: dict[tuple[Node, int, Slice | None], Tensor] = {}
        arrived[self.steps[0].node, 0, None] = given
        with torch.no_grad():
            for step in self.steps:
                delta = arrived.pop((step.node, 0, step.given))
                found.update(dict.fromkeys(self.ops.get(step.node, ()), delta))
                for place, gradient in zip(step.places, step.rule.function(delta), strict=False):
                    if place is not None and gradient is not None:
                        _add(arrived, place, gradient)
            rest: dict[tuple[Node, int], Tensor] = {}
            for (node, output, part), delta in arrived.items():
                assert part is not None
                _add(rest, (node, output), part.whole(delta, shape_of(node, output)))
        return found, [GradientEdge(*place) for place in rest], list(rest.values())


def _add(sums: dict[Any, Tensor], key: Any, gradient: Tensor) -> None:
    # Not in place: a rule may give the same tensor to two inputs.
    sums[key] = sums[key] + gradient if key in sums else gradient


def sliced(
    result: Tensor, ops: Sequence[CapturedOp], plan: Plan
) -> tuple[Sequence[CapturedOp], Plan, SlicedBackward | None]:
    """Ops and plan of a captured pass with slices where the gradient is one, and that part.

    As they are, and None, where the result does not begin with a slice of the positions.
    """
    start = result.grad_fn
    if start is None or slice_rule(start, None) is None:
        return ops, plan, None
    walk = _Walk(start, ops, plan)
    if len(walk.steps) < 2:
        return ops, plan, None
    narrow = [
        dataclasses.replace(op, shape=walk.shapes.get(i, op.shape)) for i, op in enumerate(ops)
    ]
    grads = []
    for grad in plan.grads:
        uses = [walk.uses.get(id(use), use) for use in grad.uses]
        grads.append(dataclasses.replace(grad, uses=uses, _joined={}))
    return narrow, Plan(grads, plan.fallback), SlicedBackward(walk.steps, walk.by_node)


def takes_slices(result: Tensor, ops: Sequence[CapturedOp], plan: Plan) -> bool:
    """Whether `sliced` gives gradients, and those of the whole graph: a hook may change them."""
    _, _, part = sliced(result, ops, plan)
    if part is None:
        return False
    generator = torch.Generator().manual_seed(0)
    given = torch.randn((1, *result.shape), generator=generator).to(result)
    found, edges, vectors = part.gradients(given)
    needed = sorted({i for grad in plan.grads for i in grad.ops})
    rest = [i for i in needed if i not in found]
    outputs = [ops[i].output for i in needed]
    expected = single_vector_jacobians([get_gradient_edge(result)], outputs, [given])
    below = single_vector_jacobians(edges, [ops[i].output for i in rest], vectors) if rest else []
    whole: dict[int, Tensor | None] = dict(zip(rest, below, strict=True))
    for step in part.steps:
        for i in part.ops.get(step.node, ()):
            assert step.given is not None
            whole[i] = step.given.whole(found[i], ops[i].shape)
    try:
        check_alike([whole[i] for i in needed], expected)
    except RuntimeError as reason:
        log.debug("gradients of slices: %s", reason)
        return False
    return True


class _Walk:
    """Goes down the graph from the result as far as rules go."""

    def __init__(self, start: Node, ops: Sequence[CapturedOp], plan: Plan) -> None:
        self.steps: list[_Step] = []
        self.by_node: dict[Node, list[int]] = defaultdict(list)
        # What the sliced ops' uses and shapes become, by the use's id and by op.
        self.uses: dict[int, ParamUse] = {}
        self.shapes: dict[int, torch.Size] = {}
        self._ops = ops
        self._uses_of: dict[int, list[ParamUse]] = defaultdict(list)
        for grad in plan.grads:
            for i, use in zip(grad.ops, grad.uses, strict=True):
                self._uses_of[i].append(use)
        for i in self._uses_of:
            self.by_node[ops[i].output.node].append(i)
        edges = _edges_to(start, self.by_node)
        arrived: dict[Node, list[_Place]] = defaultdict(list)
        ready: list[tuple[Node, Slice | None]] = [(start, None)]
        while ready:
            node, given = ready.pop()
            if (step := self._step(node, given, edges)) is None:
                continue
            self.steps.append(step)
            for place in step.places:
                if place is None:
                    continue
                follower, output, part = place
                arrived[follower].append(place)
                alike = len(set(arrived[follower])) == 1 and output == 0
                if alike and len(arrived[follower]) == edges[follower]:
                    ready.append((follower, part))

    def _step(self, node: Node, given: Slice | None, edges: Mapping[Node, int]) -> _Step | None:
        """Return the step of a node whose whole gradient arrives in one slice, or None."""
        if not has_one_output(node) or (given is None and node in self.by_node):
            return None
        uses: dict[int, ParamUse] = {}
        shapes: dict[int, torch.Size] = {}
        if given is not None:
            shape = shape_of(node)
            if 2 * given.length >= shape[given.dim]:
                return None
            for i in self.by_node.get(node, ()):
                op = self._ops[i]
                if op.shape != shape or op.dim == given.dim:
                    return None
                # The dimension where the uses have it, the sequences' moved to the front.
                dim = given.dim if given.dim > op.dim else given.dim + 1
                for use in self._uses_of[i]:
                    narrow = (
                        use.sliced_to(given._replace(dim=dim), shape[given.dim])
                        if isinstance(use, Sliceable)
                        else None
                    )
                    if narrow is None:
                        return None
                    uses[id(use)] = narrow
                shapes[i] = torch.Size((*shape[: given.dim], given.length, *shape[given.dim + 1 :]))
        if (rule := slice_rule(node, given)) is None:
            return None
        places: list[_Place | None] = []
        inputs = itertools.zip_longest(node.next_functions, rule.slices)
        for (follower, output), part in inputs:
            if follower is None or follower not in edges:
                places.append(None)
            elif part is None:
                return None
            else:
                places.append((follower, output, part))
        self.uses |= uses
        self.shapes |= shapes
        return _Step(node, given, rule, places)


def _edges_to(start: Node, needed: Iterable[Node]) -> dict[Node, int]:
    """Return the nodes by which gradients go from `start` to those needed, and edges to each."""
    above: dict[Node, list[Node]] = defaultdict(list)
    for node in nodes_below(start):
        for follower, _ in node.next_functions:
            if follower is not None:
                above[follower].append(node)
    edges: dict[Node, int] = {}
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node not in edges:
            edges[node] = len(above[node])
            stack += above[node]
    return edges
