"""align(): members brought as close to a reference as their symmetries allow, functions kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from fisherkern import processes
from fisherkern.alignment.activations import item_map, match_activations, paired_activations
from fisherkern.alignment.loss import learn_rotations
from fisherkern.alignment.weights import WeightPair, match_weights
from fisherkern.checks import takes_numpy
from fisherkern.encoders.symmetry import Symmetries, SymmetryGroup
from fisherkern.errors import InputError, shown
from fisherkern.members import checks
from fisherkern.members.catalogue import CatalogueUnion
from fisherkern.members.checks import check_encoders
from fisherkern.members.fitting import collect_batches
from fisherkern.members.item_parts import align_rows, united_tensors
from fisherkern.members.symmetries import Transforms, fold_norms, symmetries_of, transform_model
from fisherkern.members.ties import named_tensors
from fisherkern.objectives import Objective

ModelT = TypeVar("ModelT", bound=nn.Module)

# What channels are brought together by, and what it looks at.
BY = {
    "weights": "nothing",
    "activations": "batches of histories",
    "loss": "batches of training windows",
}


@takes_numpy
def align(
    models: Sequence[ModelT],
    *,
    reference: int = 0,
    item_ids: Sequence[Sequence[str] | None] | None = None,
    symmetries: Callable[[ModelT], Symmetries] | None = None,
    rotate: bool = True,
    sweeps: int = 100,
    by: str = "weights",
    loader: Iterable[Any] | Callable[[Any], Iterable[Any]] | None = None,
    objective: Objective | None = None,
    steps: int = 500,
    lr: float = 0.005,
    seed: int = 0,
) -> list[ModelT]:
    """Align models to a reference without changing their functions.

        minimise  sum_k || theta_ref,k - (T theta_m)_k ||^2  over the admissible T of each member

    T is a product of one element per group of the encoder's `symmetries()`: the order of
    feed-forward units (linear assignment); the order of attention heads (linear assignment) with an
    orthogonal map within each head for queries and keys and another for values and outputs
    (Procrustes: the largest sum of singular values); the channels of the residual stream and of h,
    permuted (linear assignment), or rotated (Procrustes among Q with Q 1 = 1) where no layer norm's
    gain stands in the way; GRU4Rec's and Caser's: see there. Groups are solved in turn, each
    exactly with the others held, until a round lowers the sum by less than 1e-8 of the reference's
    own: once from the members as they are, once from the match of their item tables, whose rows
    mean the same item in every member. The lower end wins, so the distance never grows. It is a
    local minimum.

    by="activations" brings channels together that do the same on the histories of `loader`:

        maximise  sum_labels <T, C>,   C = corr(reference's channels, member's channels)

    for each group, over the activations with an axis of the group (what linear layers read and
    write, what layer norms read, embedded items, recurrent states, h) and all positions without
    padding, solved as above. C is of channels where they may be permuted, and a covariance in units
    of each head, or of the whole, where they may be turned (see `Correlations`). Where channels
    stand only beside those of another group (Caser's vertical filters, for each of which there is a
    channel for each of the items') the loader is gone through until nothing moves, else once. What
    the histories do not show, such as units that never fire, is decided by the weights. The
    distance may grow.

    by="loss" matches by weights first. Then it optimises the remaining rotations (of the residual
    stream, within heads), T <- exp(S - Sᵀ) T, to

        minimise over all S   mean over batches of objective( (1/M) sum_m T_m theta_m )

    by `steps` steps of Adam from S = 0, one batch each, around and around, without dropout; S = 0
    stays if the mean over the first 32 batches is no lower after it. It is for a plain average of
    all members, who need one catalogue; permutations stay, and Fishers have little to add.

    Several processes deal out the batches of histories, and share each batch of windows; what looks
    at weights alone is done by each.

    Permutations move values without rounding; for the rest logits agree to rounding of the dtype. A
    Fisher belongs to the weights it was computed at: compute it after aligning.

    Allocates the new models and, a tensor at a time, float64 copies of it and of the reference's;
    products with the reference's item table, D x D, are made once.

    Args:
        models: M >= 1 modules of one class and configuration with a method `symmetries()`.
        reference: Number of the model that the others are aligned to.
        item_ids: As for `merge`. Where catalogues differ, the items common to the member and the
            reference count.
        symmetries: Maps a model to its `Symmetries`, in place of the method.
        rotate: False keeps to permutations outside the heads. Where all members admit a rotation of
            the residual stream, the gains and biases of layer norms are first folded into the
            layers that read them, in every member and in the reference too.
        sweeps: The most rounds over the groups.
        by: "weights", "activations" or "loss".
        loader: Batches of histories, of the reference's items, or a function of the reference that
            returns them; kept. Items that a member lacks are taken out of the histories for its
            match. By the loss: of training windows (N, T + objective.lookahead) int64; many epochs,
            such as `data.first_windows` returns, are better than one epoch repeated.
        objective: The loss, by the loss alone.
        steps: Steps of Adam, by the loss alone.
        lr: Learning rate, by the loss alone.
        seed: Seed of the objective's draws, by the loss alone.

    Returns:
        New models. Each carries `align_report`, JSON-ready: reference, by, groups (name -> kind),
        distance before (after folding, if any) and after (the square root of the sum above, over
        parameters that the function depends on), sweeps; by activations, agreement (group -> mean
        correlation of what is matched, before and after; 1 where channels do the same); by the
        loss, loss (of the average, before and after the rotations) and steps.

    Raises:
        InputError: As `merge`; or the class has no symmetries.

    Source: Ainsworth et al., arXiv 2209.04836 (weight and activation matching, coordinate descent);
    rotations within heads and of the residual stream as in arXiv 2502.00264 and 2506.22712, the
    latter for learning them from the loss too.
    """
    # What looks at weights alone asks no other process.
    with processes.together(by != "weights") as same:
        adapters = checks.adapters_of(checks.listed(models))
        modules: list[Any] = checks.bare_modules(adapters)
        ties, catalogue = checks.check_members(modules), align_rows(adapters, item_ids)
        checks.check_config(adapters)
        checks.check_tensors(united_tensors(modules, catalogue), ties, catalogue)
        _check_counts(reference, sweeps, len(modules))
        common, members = _foldable(modules, symmetries, rotate)
        batches = _batches(by, loader, objective, members[reference]) if members else []
        if by == "loss" and catalogue.positions is not None:
            raise InputError("by='loss' averages the members, which need one catalogue")
        if by != "weights":
            loss = objective.settings() if isinstance(objective, Objective) else None
            given = (reference, rotate, sweeps, by, loss, steps, lr, seed)
            same |= checks.compared(modules, arguments=given)
    pair = partial(_pair, common, members, catalogue, reference)

    def matched(number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if number == reference:
            return {}, {"sweeps": 0}
        if by == "activations":
            items = item_map(catalogue, reference, number)
            run = paired_activations((members[reference], members[number]), common, batches, items)
            how = (pair(number).correlation, sweeps, adapters[reference].device)
            transforms, rounds, agreement = match_activations(common, run, *how)
            return transforms, {"sweeps": rounds, "agreement": agreement}
        transforms, rounds = match_weights(pair(number), sweeps)
        return transforms, {"sweeps": rounds}

    matches = [matched(number) for number in range(len(members))]
    if by == "loss":
        starts = [transforms for transforms, _ in matches]
        how = (members, common, starts, batches, objective)
        turned, learned = learn_rotations(*how, reference=reference, steps=steps, lr=lr, seed=seed)
        reports = [{**report, **learned} for _, report in matches]
        matches = list(zip(turned, reports, strict=True))
    aligned = []
    for number, (member, (transforms, report)) in enumerate(zip(members, matches, strict=True)):
        new, own = transform_model(member, common, transforms), pair(number)
        about = {"reference": reference, "by": by, **_distances(common, own, transforms)}
        new.align_report = {**about, **report}
        aligned.append(adapters[number].wrapped(new))
    return aligned


def _distances(common: Symmetries, pair: WeightPair, transforms: Transforms) -> dict[str, Any]:
    """Return what a report says of the groups, and of the distance before and after."""
    return {
        "groups": {name: group.kind for name, group in common.groups.items()},
        "distance_before": pair.distance({}),
        "distance_after": pair.distance(transforms),
    }


def _batches(by: str, loader: Any, objective: Any, reference: nn.Module) -> list[Any]:
    """Return the loader's batches; checks that there is one where there is something to see."""
    if by not in BY:
        raise InputError(f"by is {shown(by)} where {', '.join(map(repr, BY))} was expected")
    if (loader is None) != (by == "weights"):
        raise InputError(
            f"by={by!r} needs loader: {BY[by]}"
            if loader is None
            else "loader= is used by by='activations' and 'loss' only"
        )
    if (objective is None) != (by != "loss"):
        raise InputError(
            "by='loss' needs objective: what the average is to be good at"
            if objective is None
            else "objective= is used by by='loss' only"
        )
    if loader is None:
        return []
    check_encoders([reference], "model")
    return collect_batches(loader, reference)


def _pair(
    common: Symmetries,
    members: Sequence[nn.Module],
    catalogue: CatalogueUnion,
    reference: int,
    number: int,
) -> WeightPair:
    tensors = [named_tensors(member) for member in members]
    rows, tables = {}, catalogue.parameters | catalogue.moving
    for name in tables:
        found = catalogue.rows(name, [len(own[name]) for own in tensors])
        if found is not None:
            shared = (found[reference] >= 0) & (found[number] >= 0)
            rows[name] = (found[reference][shared], found[number][shared])
    return WeightPair(common, tensors[reference], tensors[number], rows, tables)


def _symmetries(model: Any, given: Callable[[Any], Symmetries] | None) -> Symmetries:
    if given is None:
        return symmetries_of(model)
    found = given(model)
    found.check(model)
    return found


def _check_counts(reference: int, sweeps: int, members: int) -> None:
    if not 0 <= reference < members:
        raise InputError(f"reference is {reference} where 0..{members - 1} was expected")
    if sweeps < 1:
        raise InputError(f"sweeps is {sweeps} where at least 1 was expected")


def _foldable(
    models: list[ModelT], symmetries: Callable[[ModelT], Symmetries] | None, rotate: bool
) -> tuple[Symmetries, list[ModelT]]:
    """Return what all members admit, and the members, norms folded where that is a rotation."""
    common = _common([_symmetries(model, symmetries) for model in models], rotate)
    if any(group.kind == "rotation" for group in common.groups.values()):
        models = [fold_norms(model, common) for model in models]
    return common, models


def _common(found: Sequence[Symmetries], rotate: bool) -> Symmetries:
    """Return what all members admit: where one admits no rotation, a permutation for all."""
    groups = dict(found[0].groups)
    for name, group in groups.items():
        if group.kind in ("rotation", "orthogonal") and not (
            rotate and all(own.groups[name].kind == group.kind for own in found)
        ):
            groups[name] = SymmetryGroup(group.size, "permutation", group.labels)
    return Symmetries(groups, found[0].axes, found[0].idle, found[0].folds)
