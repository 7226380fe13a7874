"""merge(): one model out of several of the same class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor

from fisherkern import processes
from fisherkern.checks import check_count, takes_numpy
from fisherkern.members.checks import check_weights, listed
from fisherkern.merging import checks
from fisherkern.merging.auto import merge_auto
from fisherkern.merging.decay import decayed
from fisherkern.merging.full_fisher import Product, solve_full_fisher
from fisherkern.merging.learned import learn_weights
from fisherkern.merging.low_rank import LowRankMembers, LowRankOptions
from fisherkern.merging.member_set import MemberSet
from fisherkern.merging.plan import MergePlan, Weights
from fisherkern.merging.search import greedy_weights, search_weights

ModelT = TypeVar("ModelT")


@takes_numpy
def merge(
    models: Sequence[ModelT],
    *,
    method: str | None = None,
    weights: Sequence[float] | Tensor | str | None = None,
    fishers: Sequence[Mapping[str, Tensor]] | None = None,
    base: ModelT | None = None,
    grams: Sequence[Mapping[str, Tensor]] | None = None,
    products: Sequence[Product] | None = None,
    options: Mapping[str, Any] | None = None,
    floor: float = 0.1,
    normalize: str | None = "mean",
    score: Callable[[ModelT], float] | None = None,
    validation: Iterable[Any] | Callable[[ModelT], Iterable[Any]] | None = None,
    item_ids: Sequence[Sequence[str] | None] | None = None,
    check_fingerprint: bool = True,
    steps: int | None = None,
    seed: int = 0,
) -> ModelT:
    """Merge models of one class into a new one.

    By default, where Fishers are given, for every entry of every parameter

        theta* = sum_m lambda_m f_m theta_m / sum_m lambda_m f_m,   f_m = F_m/mean(F_m) + floor

    Parameters without Fisher information are averaged with weights lambda: entries where every
    member's Fisher is zero, tensors whose Fisher is rounding noise (largest entry below 1e-10 of
    the model's mean, as in attention's key biases), tensors that a member's Fisher lacks because
    they are frozen, and floating buffers that differ. Integer and boolean tensors must agree.
    Tensors that share memory are merged once, with the Fisher of the one that holds the others, and
    share memory in the result. All is computed in float64 and cast back.

    Members with different item ids are aligned by id. The result, built as
    `type(m)(**{**m.config, "num_items": V})`, has the union of the catalogues. An item's rows are
    merged among its owners (even if all of those have lambda 0), padding and mask rows among all
    members.

    Low-rank updates (LoRA: parameters named lora_A and lora_B, or lora_down and lora_up) are merged
    as what they add to a weight, and brought back to their rank (`merge_low_rank`); by "uniform" or
    "weighted" only, unless `options={"factors": True}` asks for the factors one by one. Models with
    other factors of weights (weight norm, parametrisations) are refused without that option.

    Allocates the new model and one merged copy of its tensors; the float64 work is done in blocks
    of some 65,000 entries. Where `torch.distributed` is initialised, a merge with `score`,
    `validation` or `products` is made by all processes together, any other by each for itself.

    Args:
        models: M models of one class with the same tensors, of any library and in any wrapper.
            They are left as they are.
        method: A name in `METHODS`; its function's docstring has the formula. Default: "fisher"
            where fishers are given, else "weighted" or "uniform".

            - "uniform", "weighted": lambda-averages.
            - "fisher": the formula above; option group: "entry", "row", "neuron", "head", "tensor".
            - "slerp": spherical interpolation; lambda are places on the great circle.
            - "task_arithmetic", "ties", "dare": task vectors from `base`; options scale, density,
              per.
            - "model_stock": between `base` and the average, by the angle of the task vectors.
            - "pcrec": layers mixed by their entropy; options criterion, alpha, bins.
            - "regmean": with `grams`; options alpha, ridge.
            - "full_fisher": with `products` and `fishers` (`solve_full_fisher`); option tol.
            - "greedy_soup": members are added while `score` does not fall (`greedy_weights`).
            - "learned_soup", "layer_wise": lambda, one or one per layer, by gradient descent on
              the cross-entropy of `validation` (`learn_weights`); options lr, temperature.
            - "auto": every member alone and every method whose inputs are given; the one with the
              highest `score` wins (`merge_auto`).
        weights: lambda, M numbers of at least 0, of any positive sum. Default: equal. If members
            saw different numbers of sequences, pass these numbers: lambda_m F_m is then the Fisher
            of all that a member saw, up to the unit. "search" finds those with the highest `score`
            (`search_weights`). "linear-decay", "cosine-decay" or "1-sqrt-decay": those by which
            one run's checkpoints, the oldest first, make up for a decay of its learning rate
            (`decay_weights`).
        fishers: M mappings from names of `named_parameters()` to non-negative tensors of the
            parameters' shapes. mean(F_m) is over all entries of the member's Fisher, so a Fisher
            scaled by a constant changes nothing.
        base: The model that the members were trained from, of their class; its items may differ.
        grams: M mappings from names of linear weights to (I, I) tensors, as `linear_grams` makes.
        products: M functions v -> F_m v, as `fisher_product` makes.
        options: The method's own options by name.
        floor: Weight of the plain lambda-average, relative to the mean Fisher entry. Default: 0.1.
        normalize: "mean" as above. None divides every F_m by the mean over all members instead, so
            that a member with a larger Fisher counts more.
        score: Maps a model to a number, higher is better, to be measured on validation data. It
            gets one and the same model with other values each time.
        validation: Batches with next items (mappings with "history" and "target", or pairs), or a
            function of the model that returns them.
        item_ids: External ids of each member's items, for models without an `item_ids` attribute.
        check_fingerprint: Whether a `.meta["fingerprint"]` of a Fisher must fit its member.
        steps: Random draws of the search (default 20), gradient steps of learned lambdas (default
            60), or iterations of "full_fisher" (default 20).
        seed: Seed of the draws, and of "dare".

    Returns:
        A model as member 0 is, its wrapper included. Its `merge_report` is a JSON-ready dict:
        method, members, weights (a list, or tensor -> list where learned by layer), options, floor,
        normalize, candidates (weights and score of each tried), items (number of owners -> number
        of items), coverage (tensor -> per member, share of entries whose Fisher exceeds the floor),
        averaged_buffers, counters (of training, that differ: member 0's are kept), residuals of
        "full_fisher", and low_rank (ranks, and the share of the energy kept).

    Raises:
        InputError: Something does not fit; the message names the member, tensor or argument.

    Source: Matena and Raffel, arXiv 2111.09832, for lambda and F; arXiv 2307.05476 for
    recommenders; the relative floor and the units are ours.
    """
    models = cast("list[ModelT]", listed(models))
    check_count("seed", seed, least=0)
    weights = decayed(weights, models)
    inputs = {
        "weights": weights,
        "fishers": fishers,
        "base": base,
        "grams": grams,
        "products": products,
        "score": score,
        "validation": validation,
    }
    if method == "auto":
        settings: dict[str, Any] = {"options": options, "floor": floor, "normalize": normalize}
        settings |= {"item_ids": item_ids, "check_fingerprint": check_fingerprint}
        settings |= {"steps": steps, "seed": seed}
        return merge_auto(merge, models, inputs, settings)
    # What is computed from tensors alone asks no other process.
    shared = any(own is not None for own in (score, validation, products))
    with processes.together(shared) as same:
        low_rank, options = LowRankOptions.split(options)
        chosen, options = checks.choose_method(method, inputs, options, floor, normalize, steps)
        members = MemberSet(models, item_ids)
        updates = LowRankMembers.of(members, low_rank, chosen.name, inputs)
        members.use(inputs, normalize, check_fingerprint)
        plan = MergePlan(members, chosen, options, floor, seed)
        if shared:
            same |= plan.compared() | {"steps": steps}
    lam, candidates = _choose(plan, weights, score, validation, steps)
    report = plan.report(lam, candidates) | {"normalize": normalize}
    solved, more = _solve(plan, lam, products, updates, steps)
    plan.write(lam, solved)
    plan.adapter.set_report(report | more)
    return cast("ModelT", plan.target)


def _solve(
    plan: MergePlan,
    lam: Weights,
    products: Sequence[Product] | None,
    updates: LowRankMembers | None,
    steps: int | None,
) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    """Tensors that are not merged entry by entry, and what the report says of them."""
    if isinstance(lam, Mapping):
        return None, {}
    if products is not None:
        tol = plan.options["tol"]
        solved, residuals = solve_full_fisher(
            plan.members, products, lam, plan.floor, steps=_or(steps, 20), tol=tol
        )
        return solved, {"residuals": residuals}
    if updates is not None:
        merged, about = updates.merged(lam)
        return merged, {"low_rank": about}
    return None, {}


def _or(steps: int | None, default: int) -> int:
    return default if steps is None else steps


def _choose(
    plan: MergePlan, weights: Any, score: Any, validation: Any, steps: int | None
) -> tuple[Weights, list[dict[str, Any]]]:
    """(lambda, the candidates tried): given, searched, greedy or learned."""
    number = len(plan.members)

    def score_of(point: list[float]) -> float:
        plan.write(point)
        return cast("float", score(plan.target))

    if plan.method.choose == "greedy":
        return greedy_weights(score_of, number)
    if plan.method.choose in ("learned", "learned by layer"):
        batches = validation(plan.target) if callable(validation) else validation
        return learn_weights(plan, batches, steps=_or(steps, 60))
    if isinstance(weights, str):
        return search_weights(score_of, number, steps=_or(steps, 20), seed=plan.seed)
    return check_weights(weights, number), []
