"""Low-rank updates (LoRA) merged as what they add to a weight, not factor by factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters import ModelAdapter
from fisherkern.adapters.lora import LowRankPair, check_no_factors, find_low_rank
from fisherkern.errors import InputError, shown
from fisherkern.members.ties import named_tensors
from fisherkern.merging.member_set import MemberSet

# Methods that are linear in the weights with shares that no entry decides.
LINEAR = ("uniform", "weighted")


@dataclass(frozen=True)
class LowRankOptions:
    """How low-rank updates are merged.

    Args:
        rank: Of the merged update. Default: the first member's.
        full: Whether the result is the update as a whole weight.
        factors: Whether factors are merged one by one, like other tensors.
    """

    rank: int | None = None
    full: bool = False
    factors: bool = False

    @staticmethod
    def split(
        options: Mapping[str, Any] | None,
    ) -> tuple[LowRankOptions, Mapping[str, Any] | None]:
        """Return (these options, those of the method)."""
        if not isinstance(options, Mapping):
            return LowRankOptions(), options
        own = {key: options[key] for key in ("rank", "full", "factors") if key in options}
        rest = {key: value for key, value in options.items() if key not in own}
        for key in ("full", "factors"):
            if not isinstance(own.get(key, False), bool):
                raise InputError(
                    f"option {shown(key)} is {shown(own[key])} where true or false was expected"
                )
        rank = own.get("rank")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise InputError(
                f"option 'rank' is {shown(rank)} where an integer of at least 1 was expected"
            )
        if sum(own.get(key) not in (None, False) for key in ("rank", "full", "factors")) > 1:
            raise InputError("options 'rank', 'full' and 'factors' exclude one another")
        return LowRankOptions(**own), rest or None


def check_linear(method: str | None, inputs: Mapping[str, Any]) -> None:
    """Raise InputError for a method that weighs single entries, or looks for weights."""
    given = [name for name, value in inputs.items() if value is not None and name != "weights"]
    if method not in (None, *LINEAR) or given or isinstance(inputs.get("weights"), str):
        what = f"takes no {given[0]}" if given else f"is {' or '.join(LINEAR)} with given weights"
        raise InputError(
            f"low-rank updates (LoRA) are merged as products, whose merge {what}; entries of the "
            "factors mean nothing alone (options={'factors': True} merges them all the same)"
        )


def merge_low_rank(
    tensors: Sequence[Mapping[str, Tensor]],
    pairs: Sequence[LowRankPair],
    scalings: Sequence[Mapping[str, float]],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    result_scalings: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Merge low-rank updates in the space of the weights.

        s* B* A* = the nearest matrix of rank r to  sum_m lambda_m s_m B_m A_m

    by the singular values, computed from the factors without the product (QR of the factors side by
    side), in float64. Members whose factors are equal come back as they are.

    Args:
        tensors: M mappings with the factors.
        pairs: The factors' names, the same in all members.
        scalings: M mappings from the name of A to s_m.
        weights: lambda, M numbers of sum 1.
        rank: r. Default: the first member's.
        result_scalings: s* by the name of A. Default: the first member's.

    Returns:
        The merged factors (biases, scaled alike, and alphas) by name, in the first member's types;
        and a report: rank and share of the energy (squared singular values) kept, of every pair and
        of all.

    Raises:
        InputError: Factors that do not fit one another, or a value that is not finite.
    """
    merged: dict[str, Tensor] = {}
    report: dict[str, Any] = {"energy_kept": 1.0, "pairs": {}}
    kept = total = 0.0
    used = [m for m, share in enumerate(weights) if share > 0]
    for pair in pairs:
        scale = [own[pair.a] for own in scalings]
        target = scale[0] if result_scalings is None else result_scalings[pair.a]
        if not target:
            raise InputError(f"tensor {shown(pair.a)}: its update is scaled by 0")
        factors = [_factors(own, pair) for own in tensors]
        shapes = {(len(b), a.shape[1]) for a, b in factors}
        if len(shapes) > 1:
            raise InputError(f"tensor {shown(pair.a)}: the members' updates differ in shape")
        size = len(factors[0][0]) if rank is None else rank
        shares = [weights[m] * scale[m] / target for m in used]
        a, b, energy, whole = _nearest([factors[m] for m in used], shares, size)
        report["pairs"][pair.module] = {"rank": size, "energy_kept": energy / whole if whole else 1}
        # In units of the weights.
        kept, total = kept + energy * target**2, total + whole * target**2
        merged |= _as_stored(tensors[0], pair, a, b)
        if pair.bias is not None:
            found = [tensors[m][pair.bias].double() for m in used]
            bias = torch.stack([s * own for s, own in zip(shares, found, strict=True)]).sum(0)
            merged[pair.bias] = bias.to(tensors[0][pair.bias].dtype)
        if pair.alpha is not None:
            merged[pair.alpha] = tensors[0][pair.alpha].detach()
    report["energy_kept"] = kept / total if total else 1.0
    return merged, report


def _transposed(tensors: Mapping[str, Tensor], pair: LowRankPair) -> bool:
    """Whether the update is A B, of A (in, r) and B (r, out), rather than B A."""
    a, b = tensors[pair.a], tensors[pair.b]
    plain = b.flatten(1).shape[1] == len(a)
    other = a.dim() == b.dim() == 2 and a.shape[1] == len(b)
    if not (plain or other) or a.dim() < 2 or b.dim() < 2:
        raise InputError(
            f"tensors {shown(pair.a)} {tuple(a.shape)} and {shown(pair.b)} "
            f"{tuple(b.shape)} are no factors "
            "of one weight"
        )
    if plain and pair.a.endswith(".weight"):  # of a linear layer or convolution, whatever its rank
        return False
    if plain and other and len(a) == a.shape[1] == len(b):
        raise InputError(
            f"tensors {shown(pair.a)} and {shown(pair.b)} are square, so which is first is open"
        )
    return other and (not plain or a.shape[1] < len(a))


def _factors(tensors: Mapping[str, Tensor], pair: LowRankPair) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) in float64."""
    a, b = tensors[pair.a].detach().double(), tensors[pair.b].detach().double()
    for name, own in ((pair.a, a), (pair.b, b)):
        if not own.isfinite().all():
            raise InputError(f"tensor {name!r} holds a value that is not finite")
    if _transposed(tensors, pair):
        return a.T, b.T
    return a.flatten(1), b.flatten(1)


def _nearest(
    factors: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float], rank: int
) -> tuple[Tensor, Tensor, float, float]:
    """Return A and B of the nearest product of a rank, its energy, and that of the sum."""
    first_a, first_b = factors[0]
    a = torch.cat([own for own, _ in factors])
    b = torch.cat([share * own for share, (_, own) in zip(shares, factors, strict=True)], 1)
    qa, ra = torch.linalg.qr(a.T)
    qb, rb = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    square = s.square()
    energy, whole = float(square[:rank].sum()), float(square.sum())
    same = all(torch.equal(x, first_a) and torch.equal(y, first_b) for x, y in factors)
    if same and len(first_a) == rank:
        share = sum(shares)
        return first_a, first_b if abs(share - 1) < 1e-12 else share * first_b, whole, whole
    # The sign of a singular vector is free.
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    root = s[:rank].sqrt()
    new_a = a.new_zeros(rank, a.shape[1])
    new_b = b.new_zeros(len(b), rank)
    new_a[: len(root)] = (root * sign[0, : len(root)])[:, None] * (vh[:rank] @ qa.T)
    new_b[:, : len(root)] = (qb @ u[:, :rank]) * (root * sign[0, : len(root)])
    return new_a, new_b, energy, whole


def _as_stored(
    first: Mapping[str, Tensor], pair: LowRankPair, a: Tensor, b: Tensor
) -> dict[str, Tensor]:
    """Return the factors in the shapes and types of the first member's, but for the rank."""
    old_a, old_b = first[pair.a], first[pair.b]
    if _transposed(first, pair):
        a, b = a.T, b.T
    else:
        a = a.reshape(len(a), *old_a.shape[1:])
        b = b.reshape(len(b), -1, *old_b.shape[2:])
    return {
        pair.a: a.to(old_a.dtype).contiguous(),
        pair.b: b.to(old_b.dtype).contiguous(),
    }


def update_matrix(tensors: Mapping[str, Tensor], pair: LowRankPair) -> Tensor:
    """B A (out, in) in float64."""
    a, b = _factors(tensors, pair)
    return b @ a


def scalings_in(model: nn.Module, pairs: Sequence[LowRankPair], owner: str) -> dict[str, float]:
    """Name of A -> what the module multiplies the product by; 1 where nothing says it.

    Raises:
        InputError: The update is part of the weight already, or is no plain product.
    """
    modules, tensors = dict(model.named_modules()), named_tensors(model)
    found = {}
    for pair in pairs:
        module: Any = modules.get(pair.module)
        scaling = pair.alpha_over_rank(tensors)
        if scaling is None:
            scaling = getattr(module, "scaling", 1.0)
        if isinstance(scaling, Mapping):
            scaling = scaling.get(pair.adapter, 1.0)
        if getattr(module, "merged", False) is True or getattr(module, "parameter_name", None):
            raise InputError(
                f"{owner}: the update of {shown(pair.module)} is merged into its weight, "
                "or one of a "
                "part of it: unmerge the adapter before"
            )
        found[pair.a] = float(scaling)
    return found


def pairs_of(names: Sequence[str], options: LowRankOptions) -> list[LowRankPair]:
    """Return the pairs that are merged as products; none where factors are asked for.

    Raises:
        InputError: Other factors of weights; or `rank` or `full` without a pair.
    """
    if options.factors:
        return []
    check_no_factors(names)
    pairs = find_low_rank(names)
    if not pairs and (options.rank is not None or options.full):
        raise InputError("options 'rank' and 'full' are of low-rank updates, and there is none")
    return pairs


class LowRankMembers:
    """The low-rank updates of members in memory."""

    def __init__(self, members: MemberSet, pairs: Sequence[LowRankPair], base: Any = None) -> None:
        """Take products of the members, off those of the `base` they were trained from."""
        self.pairs, self.tensors = pairs, members.tensors
        self.scalings = [
            scalings_in(model, pairs, f"member {number}")
            for number, model in enumerate(members.models)
        ]
        self._base = None
        if base is not None:
            bare = ModelAdapter.of(base).module
            self._base = named_tensors(bare), scalings_in(bare, pairs, "the base")

    @staticmethod
    def of(
        members: MemberSet, options: LowRankOptions, method: str, inputs: Mapping[str, Any]
    ) -> LowRankMembers | None:
        """Return the updates that are merged as products; None where there are none.

        Raises:
            InputError: The method weighs entries, or an option needs files.
        """
        pairs = pairs_of(list(members.tensors[0]), options)
        if not pairs:
            return None
        check_linear(method, inputs)
        if options.rank is not None or options.full:
            raise InputError("options 'rank' and 'full' change shapes: merge files (merge_files)")
        if members.catalogue.positions is not None and any(pair.embedding for pair in pairs):
            raise InputError("low-rank updates of item tables merge for equal catalogues only")
        return LowRankMembers(members, pairs)

    @property
    def names(self) -> set[str]:
        """Of the factors."""
        return {name for pair in self.pairs for name in pair.names - {pair.bias}}

    def merged(self, weights: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `merge_low_rank`."""
        return merge_low_rank(self.tensors, self.pairs, self.scalings, weights)

    def inner_products(self, *, from_base: bool = False) -> Tensor:
        """<D_m, D_l> (M, M) float64 of the members' updates D = s B A, or of D less the base's."""
        total = torch.zeros(len(self.tensors), len(self.tensors), dtype=torch.float64)
        for pair in self.pairs:
            updates = [
                self._update(own, scaling, pair, from_base)
                for own, scaling in zip(self.tensors, self.scalings, strict=True)
            ]
            for m, (a, b) in enumerate(updates):
                for n, (c, d) in enumerate(updates):
                    total[m, n] += float(((b.T @ d) * (a @ c.T)).sum())
        return total

    def _update(
        self,
        tensors: Mapping[str, Tensor],
        scaling: Mapping[str, float],
        pair: LowRankPair,
        from_base: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return A and B of a member's update, of twice the rank where the base's is taken off."""
        a, b = _factors(tensors, pair)
        b = scaling[pair.a] * b
        if not from_base or self._base is None:
            return a, b
        base, base_scaling = self._base
        base_a, base_b = _factors(base, pair)
        return torch.cat([a, base_a]), torch.cat([b, -base_scaling[pair.a] * base_b], 1)
