"""Merging by the whole Fisher matrix, which is never formed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.members.ties import Tie
from fisherkern.merging.blocks import BlockIterator, as_table
from fisherkern.merging.member_set import MemberSet
from fisherkern.merging.rules import average

Product = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
Vector = NDArray[np.float64]


class _ConvergedError(Exception):
    """Ends conjugate gradients."""


def solve_full_fisher(
    members: MemberSet,
    products: Sequence[Product],
    weights: Sequence[float],
    floor: float,
    *,
    steps: int,
    tol: float,
) -> tuple[dict[str, Tensor], list[float]]:
    """Minimise sum_m lambda_m (theta - theta_m)^T F~_m (theta - theta_m) over theta.

    F~_m = F_m/u_m + floor I, with u_m the mean diagonal entry as in `merge`. Preconditioned
    conjugate gradients solve

        sum_m lambda_m F~_m d = sum_m lambda_m F~_m (theta_m - theta_0)

    for d = theta - theta_0, from theta_0, the lambda-average. The preconditioner is
    sum_m lambda_m diag(F~_m), from the members' diagonal Fishers. Directions in which every F~_m
    is 0 (floor 0) keep theta_0, and so do tensors the diagonal Fishers do not decide. An item's
    rows enter the products of its owners. A step takes one product of every member. Holds nine
    vectors of all parameters in float64.

    Args:
        members: The members, with their diagonal Fishers.
        products: M functions v -> F_m v, of tensors by name.
        weights: lambda, M numbers.
        floor: See above.
        steps: The most steps.
        tol: Relative residual |r|/|r_0| at which to stop.

    Returns:
        The tensors that changed, by name; and the relative residual before each step and after
        the last.

    Raises:
        InputError: A product lacks a tensor, or gives one that is not finite or of another shape.

    Source: Tam et al., MaTS, arXiv 2312.04339 (with block-diagonal K-FAC there).
    """
    from scipy.sparse.linalg import LinearOperator, cg

    space = _Space(members, weights, floor)
    operator = _Operator(space, products, weights, floor)
    right = operator.pull(space.start)
    first = float(np.linalg.norm(right))
    if first == 0:
        return {}, [0.0]
    history: list[float] = []
    change = np.zeros_like(right)

    def precondition(residual: Vector) -> Vector:
        # Every step begins here, so the residuals of all steps are seen.
        history.append(float(np.linalg.norm(residual)) / first)
        if len(history) > steps or history[-1] <= tol:
            raise _ConvergedError
        zeros = np.zeros_like(residual)
        scaled = np.divide(residual, space.diagonal, out=zeros, where=space.diagonal > 0)
        # The square of a residual that is all but 0 underflows.
        if residual @ scaled <= 0:
            raise _ConvergedError
        return scaled

    def multiply(direction: Vector) -> Vector:
        image = operator(direction)
        # Rounding alone is left once the curvature is not positive.
        if direction @ image <= 0:
            raise _ConvergedError
        return image

    def keep(solution: Vector) -> None:
        change[:] = solution

    shape = (len(right), len(right))
    matrix = LinearOperator(shape, matvec=multiply, dtype=right.dtype)
    inverse = LinearOperator(shape, matvec=precondition, dtype=right.dtype)
    with contextlib.suppress(_ConvergedError):
        cg(matrix, right, rtol=0.0, atol=0.0, maxiter=steps + 1, M=inverse, callback=keep)
    solved = space.tensors(space.start + change)
    first_member = members.tensors[0]
    return {name: solved[name].to(first_member[name].dtype) for name in space.decided}, history


class _Space:
    """The united parameters the Fishers decide or depend on, as one vector, by member and name.

    start, diagonal: theta_0 and sum_m lambda_m diag(F~_m), 0 where the Fishers do not decide.
    """

    def __init__(self, members: MemberSet, weights: Sequence[float], floor: float) -> None:
        assert members.fishers is not None
        self.members = members
        self.rows = {tie.name: members.rows(tie) for tie in members.merged}
        self.decided: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.device = next(iter(members.tensors[0].values())).device
        starts, diagonals = [], []
        for tie in members.merged:
            if not members.of(tie)[0].requires_grad:
                continue
            self._check_alias(tie)
            blocks = members.blocks(tie, floor, 0)
            start, diagonal = _start_and_diagonal(blocks, weights)
            self.shapes[tie.name] = blocks.shape
            starts.append(start.flatten())
            diagonals.append(diagonal.flatten())
            if blocks.fishers is not None:
                self.decided.append(tie.name)
        empty = [torch.zeros(0, dtype=torch.float64)]
        self.start: Vector = torch.cat(starts or empty).cpu().numpy()
        self.diagonal: Vector = torch.cat(diagonals or empty).cpu().numpy()

    def _check_alias(self, tie: Tie) -> None:
        first = self.members.tensors[0]
        for alias in tie.aliases:
            if first[alias].requires_grad and first[alias] is not first[tie.name]:
                raise InputError(
                    f"tensors {tie.name!r} and {alias!r} are two parameters that share memory, "
                    "which method 'full_fisher' does not handle; make them one"
                )

    def tensors(self, vector: Vector) -> dict[str, Tensor]:
        """Return the vector's tensors by name."""
        flat = torch.from_numpy(vector).to(self.device)
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), flat.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def take(self, vector: Vector, member: int) -> dict[str, Tensor]:
        """Return the member's part of a vector, by its own rows."""
        taken = {}
        for name, value in self.tensors(vector).items():
            rows = self.rows[name]
            if rows is not None:
                have = rows[member] >= 0
                own = torch.zeros_like(self.members.tensors[member][name], dtype=torch.float64)
                own[rows[member][have]] = value[have]
                value = own
            taken[name] = value
        return taken

    def add_(self, total: Tensor, member: int, name: str, value: Tensor) -> None:
        """Add the member's part, put into the united rows, to `total`."""
        rows = self.rows[name]
        if rows is None:
            total += value
        else:
            have = rows[member] >= 0
            total[have] += value[rows[member][have]]


def _start_and_diagonal(blocks: BlockIterator, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """theta_0 and sum_m lambda_m diag(F~_m) of one tensor, float64; zeros without a Fisher."""
    start = torch.zeros(blocks.shape, dtype=torch.float64, device=blocks.tensors[0].device)
    diagonal = torch.zeros_like(start)
    for rows, block in blocks.weighted(weights, None):
        as_table(start)[rows] = average(block)
        if block.fisher is not None:
            lam = block.lam[:, None, None] * block.owns
            as_table(diagonal)[rows] = (lam * (block.fisher + block.floor)).sum(0)
    return start, diagonal


class _Operator:
    """sum_m lambda_m P_m^T F~_m P_m, with F_m by its products."""

    def __init__(
        self, space: _Space, products: Sequence[Product], weights: Sequence[float], floor: float
    ) -> None:
        self.space, self.products = space, products
        self.weights, self.floor = weights, floor

    def __call__(self, vector: Vector) -> Vector:
        return self._sum([self.space.take(vector, m) for m in range(len(self.products))])

    def pull(self, start: Vector) -> Vector:
        """Return sum_m lambda_m P_m^T F~_m (theta_m - P_m start)."""
        parts = []
        for member, tensors in enumerate(self.space.members.tensors):
            here = self.space.take(start, member)
            parts.append({n: tensors[n].detach().double() - here[n] for n in here})
        return self._sum(parts)

    def _sum(self, parts: Sequence[dict[str, Tensor]]) -> Vector:
        space = self.space
        total = space.tensors(np.zeros_like(space.start))
        assert space.members.fishers is not None
        units = space.members.fishers.units
        for m, part in enumerate(parts):
            if self.weights[m] == 0 or not any(bool(value.any()) for value in part.values()):
                continue
            image = self.products[m](part)
            for name in space.decided:
                if name not in image:
                    raise InputError(f"the product of member {m} has no tensor {name!r}")
                value = image[name].to(part[name].device, torch.float64)
                if value.shape != part[name].shape or not torch.isfinite(value).all():
                    raise InputError(
                        f"the product of member {m} gives a tensor {name!r} that is not finite or "
                        "not of the parameter's shape"
                    )
                scaled = value / units[m] + self.floor * part[name]
                space.add_(total[name], m, name, self.weights[m] * scaled)
        return np.concatenate([part.flatten().cpu().numpy() for part in total.values()])
