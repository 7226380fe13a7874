"""preflight(): what to expect of a merge before it is made."""

from __future__ import annotations

import importlib.resources
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fisherkern import processes
from fisherkern.adapters.lora import find_low_rank
from fisherkern.checks import check_callable, takes_numpy
from fisherkern.errors import InputError
from fisherkern.members.checks import compared, listed
from fisherkern.merging.low_rank import LowRankMembers
from fisherkern.merging.member_set import MemberSet
from fisherkern.merging.merge import merge
from fisherkern.merging.scores import finite_score

ModelT = TypeVar("ModelT", bound=nn.Module)

# Shares of the best member's score: a dip below the line that counts as none, and a rise above
# the better end that counts, as validation scores are uncertain by about as much.
FLAT, RISE = 0.02, 0.005
# Cosines of whole models, from experiments on ML-1M (experiment `branches`): branches of one run,
# .94 to .99, gained by averaging or lost nothing; members of one untrained start, .77 to .82, lost
# 3 to 9 % of the best one's NDCG@10, and less once aligned; of different starts, 0, at least half.
NEAR, FAR = 0.9, 0.5


@dataclass(frozen=True)
class Preflight:
    """What `preflight` found; matrices are M lists of M numbers.

    Args:
        cosine: Cosines of the members' weights.
        task_cosine: Cosines of their task vectors; None without a base.
        scores: Each member's score; None without `score`.
        paths: Per pair: "members", "t", "scores", "barrier" and "gain".
        inconsistency: Shares of users; None without `hits`.
        items: Number of owners -> number of items.
        verdict: One sentence.
        record: One sentence: how often this way of telling was right about stored merges.
        recipe: "align" (whether to align first), "fine_tune" (whether to train on afterwards) and
            "merge" (arguments for `merge`).
    """

    cosine: list[list[float]]
    task_cosine: list[list[float]] | None
    scores: list[float] | None
    paths: list[dict[str, Any]] | None
    inconsistency: list[list[float]] | None
    items: dict[str, int]
    verdict: str
    record: str
    recipe: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@takes_numpy
def preflight(
    models: Sequence[ModelT],
    *,
    base: ModelT | None = None,
    score: Callable[[ModelT], float] | None = None,
    hits: Callable[[ModelT], Any] | None = None,
    points: int = 3,
    item_ids: Sequence[Sequence[str] | None] | None = None,
) -> Preflight:
    """Estimate how near models are, in weights and in what they do, and recommend a recipe.

    cosine of members a and b:  <theta_a, theta_b> / (|theta_a| |theta_b|) over all parameters but
        those that are frozen and equal in all members (a frozen base), item rows that both own,
        low-rank updates as the products of their factors; with a `base`, also of theta - theta_base
        (task vectors).
    Along the line between two members, s(t) the score of (1-t) theta_a + t theta_b:
        barrier = max_t [(1-t) s(0) + t s(1) - s(t)],   gain = max_{0<t<1} s(t) - max(s(0), s(1)).
    error inconsistency: the share of users on which exactly one of the two is right.

    The best single member is a candidate of the recipe, merge(method="auto"), which is thus never
    worse than it on the data of `score`. The verdict rests on the paths where there is a score,
    else on cosines, whose bounds (0.9, 0.5) come from a few small experiments; how often either was
    right about the averages of benchmarks/results/preflight.csv is the result's `record`.
    Inconsistency is reported and not used: it did not tell good merges from bad ones there.

    Scores M + points M (M-1)/2 models (with different catalogues, the ends of each path too), and
    holds one merged model at a time. Several processes score every model together: `evaluate` in
    `score` and `hits` deals out the users, and anything else is done by each process.

    Args:
        models: As for `merge`.
        base: As for `merge`.
        score: Maps a model to a number, higher is better, on validation data.
        hits: Maps a model to (U,) bool, whether it is right for each user (the item within its
            first k), the same users for all models.
        points: Models scored between two ends. Default: 3.
        item_ids: As for `merge`.

    Returns:
        A `Preflight`.

    Raises:
        InputError: As `merge`; or a score is not finite; or hits differ in length, or hold other
            values than 0 and 1.

    Source: Frankle et al., arXiv 1912.05671 (barrier); arXiv 2307.05476, A.1 and Gontijo-Lopes et
    al., arXiv 2110.12899 (error inconsistency).
    """
    models = listed(models)
    # What looks at weights alone asks no other process.
    shared = score is not None or hits is not None
    with processes.together(shared) as same:
        if points < 1:
            raise InputError(f"points is {points} where at least 1 was expected")
        check_callable("score", score)
        check_callable("hits", hits)
        members = MemberSet(models, item_ids)
        if base is not None:
            members.use_base(base)
        cosine, task_cosine = _cosines(members, base)
        if shared:
            same |= compared(members.models, points=points)
    scores = paths = None
    if score is not None:
        scores = [finite_score(score, model, f"of member {n}") for n, model in enumerate(models)]
        paths = _paths(models, score, scores, points, item_ids, members.catalogue.positions is None)
    verdict, recipe = _judge(cosine, scores, paths)
    return Preflight(
        cosine=cosine,
        task_cosine=task_cosine,
        scores=scores,
        paths=paths,
        inconsistency=None if hits is None else _inconsistency(models, hits),
        items=members.catalogue.owners(),
        verdict=verdict,
        record=_record(scored=score is not None),
        recipe=recipe,
    )


def _cosines(
    members: MemberSet, base: nn.Module | None
) -> tuple[list[list[float]], list[list[float]] | None]:
    number = len(members)
    found = []
    sums = torch.zeros(4, number, number, dtype=torch.float64)
    pairs = find_low_rank(members.tensors[0])
    updates = LowRankMembers(members, pairs, base) if pairs else None
    factors = set() if updates is None else updates.names
    shared = _frozen(members) if factors or _trained(members) else set()
    for tie in members.merged:
        if tie.name in factors:
            continue
        for block in members.blocks(tie, 0.0, 0):
            parts = [(0, block.theta, block.owns.double())] if tie.name not in shared else []
            if base is not None and block.base is not None:
                owns = block.owns & block.base_owns
                parts.append((2, (block.theta - block.base) * owns, owns.double()))
            for index, theta, owned in parts:
                # Rows that a member lacks hold zeros; the other's must not count in its norm.
                sums[index] += torch.einsum("anc,bnc->ab", theta, theta).cpu()
                square = theta.square().sum(2)
                sums[index + 1] += (square @ owned.squeeze(2).t()).cpu()
    for index in (0, 2) if updates is not None else ():
        inner = updates.inner_products(from_base=index == 2)  # type: ignore[union-attr]
        sums[index] += inner
        sums[index + 1] += inner.diagonal()[:, None]
    for inner, square in (sums[:2], sums[2:]):
        norms = (square * square.t()).sqrt()
        found.append(torch.where(norms > 0, inner / norms, 0.0).clamp(-1, 1).tolist())
    return found[0], found[1] if base is not None else None


def _trained(members: MemberSet) -> bool:
    return any(p.requires_grad for model in members.models for p in model.parameters())


def _frozen(members: MemberSet) -> set[str]:
    """Tensors of a frozen base, the same in all members: they would make any two look alike."""
    found = set()
    for tie in members.merged:
        first, *others = members.of(tie)
        frozen = not any(own.requires_grad for own in (first, *others))
        if frozen and all(torch.equal(first, own) for own in others):
            found.add(tie.name)
    return found


def _paths(
    models: Sequence[Any],
    score: Callable[[Any], float],
    ends: Sequence[float],
    points: int,
    item_ids: Sequence[Sequence[str] | None] | None,
    same_items: bool,
) -> list[dict[str, Any]]:
    """Every pair's scores along the line between them."""
    found = []
    shares = [step / (points + 1) for step in range(points + 2)]
    for a, b in itertools.combinations(range(len(models)), 2):
        ids = None if item_ids is None else [item_ids[a], item_ids[b]]
        values = []
        for t in shares:
            # With other items the end is the member with the rows it lacks filled in.
            if same_items and t in (0, 1):
                values.append(ends[b if t else a])
                continue
            between = merge(
                [models[a], models[b]], method="weighted", weights=[1 - t, t], item_ids=ids
            )
            values.append(finite_score(score, between, f"of the point {t:g} between {a} and {b}"))
        first, last = values[0], values[-1]
        dips = [(1 - t) * first + t * last - s for t, s in zip(shares, values, strict=True)]
        found.append(
            {
                "members": [a, b],
                "t": shares,
                "scores": values,
                "barrier": max(dips),
                "gain": max(values[1:-1]) - max(first, last),
            }
        )
    return found


def _inconsistency(models: Sequence[Any], hits: Callable[[Any], Any]) -> list[list[float]]:
    found: list[Tensor] = []
    for number, model in enumerate(models):
        with processes.together() as same:
            own = torch.as_tensor(hits(model)).cpu()
            if own.dim() != 1 or len(own) == 0 or not bool(((own == 0) | (own == 1)).all()):
                raise InputError(f"hits of member {number} are no (U,) tensor of true and false")
            if found and len(own) != len(found[0]):
                raise InputError(
                    f"hits of member {number} are of {len(own)} users and those of member 0 of "
                    f"{len(found[0])}"
                )
            found.append(own.bool())
            same[f"the hits of member {number}"] = found[-1].numpy().tobytes()
    table = torch.stack(found).double()
    return ((table[:, None] != table[None]).double().mean(2)).tolist()


def _record(scored: bool) -> str:
    """Tell how often verdicts were right; `benchmarks/preflight_record.py` counts."""
    text = importlib.resources.files("fisherkern").joinpath("merging/preflight_record.json")
    counts = json.loads(text.read_text(encoding="utf-8"))
    if scored:
        return (
            f"An average's score on validation was right about {counts['scores']} of "
            f"{counts['merges']} stored averages, whether they beat their best member."
        )
    return (
        f"Cosines alone were right about {counts['cosines']} of {counts['merges']} stored "
        "averages, whether they beat their best member: a score on validation knows more."
    )


def _judge(
    cosine: Sequence[Sequence[float]],
    scores: Sequence[float] | None,
    paths: Sequence[dict[str, Any]] | None,
) -> tuple[str, dict[str, Any]]:
    """Return (the verdict, the recipe)."""
    pairs = list(itertools.combinations(range(len(cosine)), 2))
    recipe: dict[str, Any] = {"align": False, "fine_tune": False, "merge": {"method": "uniform"}}
    mend = {"align": True, "fine_tune": True}
    if not pairs:
        return "There is one member, so there is nothing to merge.", recipe
    if scores is None or paths is None:
        a, b = min(pairs, key=lambda pair: cosine[pair[0]][pair[1]])
        where = f"the cosine of members {a} and {b} is {cosine[a][b]:.2f}"
        if cosine[a][b] >= NEAR:
            return f"Merging is likely to help: {where}, as of branches of one run.", recipe
        if cosine[a][b] >= FAR:
            verdict = (
                f"Merging may help or harm, so measure it: {where}, as of one start and different "
                "training; align first."
            )
            return verdict, recipe | {"align": True}
        verdict = (
            f"Merging is likely to harm: {where}, as of different starts; align first, and train "
            "on afterwards."
        )
        return verdict, recipe | mend
    recipe["merge"] = {"method": "auto"}
    best = max(paths, key=lambda path: path["gain"])
    worst = max(paths, key=lambda path: path["barrier"])
    scale = max(abs(value) for value in scores)
    if best["gain"] > RISE * scale:
        a, b = best["members"]
        verdict = (
            f"Merging is likely to help: between members {a} and {b} the score reaches "
            f"{max(best['scores']):.4g}, {best['gain']:.2g} above the better of the two."
        )
        return verdict, recipe
    a, b = worst["members"]
    if worst["barrier"] <= FLAT * scale:
        verdict = (
            "Merging is unlikely to help or harm much: between no two members does the score rise "
            f"above the better one by {100 * RISE:g} % or fall below their line by "
            f"{100 * FLAT:g} %."
        )
        return verdict, recipe
    verdict = (
        f"Merging is likely to harm: between members {a} and {b} the score falls "
        f"{worst['barrier']:.2g} below their line, and their cosine is {cosine[a][b]:.2f}; align "
        "first, and train on afterwards if it still falls."
    )
    return verdict, recipe | mend
