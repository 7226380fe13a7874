"""Merging by the whole Fisher matrix, which is never formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.merging.blocks import BlockIterator, as_table
from fisherkern.merging.member_set import MemberSet
from fisherkern.merging.rules import average

Vector = dict[str, Tensor]
Product = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def solve_full_fisher(
    members: MemberSet,
    products: Sequence[Product],
    weights: Sequence[float],
    floor: float,
    *,
    steps: int,
    tol: float,
) -> tuple[Vector, list[float]]:
    """theta minimising sum_m lambda_m (theta - theta_m)^T F~_m (theta - theta_m), per name,

    F~_m = F_m/u_m + floor I, u_m the mean diagonal entry as in `merge`; and the relative
    residual |r|/|r_0| before each step and after the last.

    Preconditioned conjugate gradients on sum_m lambda_m F~_m d = sum_m lambda_m F~_m (theta_m -
    theta_0) from theta_0, the lambda-average, with sum_m lambda_m diag(F~_m), from the members'
    diagonal Fishers, as the preconditioner; at most `steps` steps, fewer where the residual
    falls below `tol`. Directions in which every F~_m is 0 (floor 0) keep theta_0, and so do
    tensors the diagonal Fishers do not decide. An item's rows enter the products of its owners.
    Each step takes one product of every member. Five copies of the parameters in float64.
    Source: Tam et al., MaTS, arXiv 2312.04339 (with block-diagonal K-FAC there).
    """
    space = _Space(members, weights, floor)
    operator = _Operator(space, products, weights, floor)
    start = space.start
    residual = operator.pull(start)
    change = {name: torch.zeros_like(value) for name, value in start.items()}
    first = _dot(residual, residual) ** 0.5
    history = [1.0 if first > 0 else 0.0]
    direction: Vector | None = None
    previous = 0.0
    for _ in range(steps):
        if history[-1] <= tol:
            break
        scaled = space.precondition(residual)
        energy = _dot(residual, scaled)
        if direction is None:
            direction = scaled
        else:
            direction = {n: scaled[n] + energy / previous * direction[n] for n in scaled}
        image = operator(direction)
        curvature = _dot(direction, image)
        # Rounding alone is left once the curvature is not positive.
        if curvature <= 0:
            break
        for name in change:
            change[name] += energy / curvature * direction[name]
            residual[name] -= energy / curvature * image[name]
        previous = energy
        history.append(_dot(residual, residual) ** 0.5 / first)
    own = members.tensors[0]
    found = {
        tie.name: (start[tie.name] + change[tie.name]).to(own[tie.name].dtype)
        for tie in members.merged
        if tie.name in space.decided and first > 0
    }
    return found, history


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in a)


class _Space:
    """The united parameters the Fishers decide or depend on, and each member's part of them."""

    def __init__(self, members: MemberSet, weights: Sequence[float], floor: float) -> None:
        assert members.fishers is not None
        self.members = members
        self.rows = {tie.name: members.rows(tie) for tie in members.merged}
        self.decided: set[str] = set()
        self.names: list[str] = []
        # The lambda-average; a row whose owners all have lambda 0 is theirs, and nothing moves it.
        self.start: Vector = {}
        self._diagonal: Vector = {}
        for tie in members.merged:
            own = members.of(tie)
            if not own[0].requires_grad:
                continue
            for alias in tie.aliases:
                first = members.tensors[0]
                if first[alias].requires_grad and first[alias] is not first[tie.name]:
                    raise InputError(
                        f"tensors {tie.name!r} and {alias!r} are two parameters that share memory, "
                        "which method 'full_fisher' does not handle; make them one"
                    )
            self.names.append(tie.name)
            blocks = members.blocks(tie, floor, 0)
            self.start[tie.name], diagonal = _start_and_diagonal(blocks, weights)
            if blocks.fishers is not None:
                self.decided.add(tie.name)
                self._diagonal[tie.name] = diagonal

    def precondition(self, vector: Vector) -> Vector:
        """vector / diagonal, 0 where the diagonal is."""
        return {
            name: torch.where(self._diagonal[name] > 0, value / self._diagonal[name], 0.0)
            if name in self.decided
            else torch.zeros_like(value)
            for name, value in vector.items()
        }

    def take(self, vector: Vector, member: int) -> Vector:
        """The member's part of a vector, by its own rows."""
        found = {}
        for name in self.names:
            rows = self.rows[name]
            value = vector[name]
            if rows is not None:
                have = rows[member] >= 0
                own = torch.zeros_like(self.members.tensors[member][name], dtype=torch.float64)
                own[rows[member][have]] = value[have]
                value = own
            found[name] = value
        return found

    def add_(self, total: Tensor, member: int, name: str, value: Tensor) -> None:
        """total += the member's part put into the united rows."""
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
    for place, x in blocks.weighted(weights, None):
        as_table(start)[place] = average(x)
        if x.fisher is not None:
            lam = x.lam[:, None, None] * x.owns
            as_table(diagonal)[place] = (lam * (x.fisher + x.floor)).sum(0)
    return start, diagonal


class _Operator:
    """sum_m lambda_m P_m^T F~_m P_m, with F_m by its products."""

    def __init__(
        self, space: _Space, products: Sequence[Product], weights: Sequence[float], floor: float
    ) -> None:
        self.space, self.products = space, products
        self.weights, self.floor = weights, floor

    def __call__(self, vector: Vector) -> Vector:
        parts = [self.space.take(vector, m) for m in range(len(self.products))]
        return self._sum(parts)

    def pull(self, start: Vector) -> Vector:
        """sum_m lambda_m P_m^T F~_m (theta_m - P_m start)."""
        parts = []
        for member, tensors in enumerate(self.space.members.tensors):
            here = self.space.take(start, member)
            parts.append({n: tensors[n].detach().double() - here[n] for n in here})
        return self._sum(parts)

    def _sum(self, parts: Sequence[Vector]) -> Vector:
        space = self.space
        total = {name: torch.zeros_like(value) for name, value in space.start.items()}
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
        return total
