"""The public functions on other libraries' models, against the definition of each result."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import fisherkern as fk
from benchmarks.libraries.architecture import Architecture, Member, dataset
from benchmarks.libraries.oracle import (
    Fisher,
    average_by_definition,
    fishers_by_definition,
    worst,
)

K = 5


class Wrong(AssertionError):
    """A result that is not what its definition gives."""


@functools.cache
def members(entry: Architecture) -> tuple[Member, Member]:
    """Two networks of one architecture."""
    pair = entry.build(0), entry.build(1)
    # RecBole's trainer switches it on for the whole process. gSASRec has NaN between two masks.
    torch.autograd.set_detect_anomaly(False)
    return pair


@functools.cache
def definition(entry: Architecture) -> tuple[dict[str, Fisher], dict[str, Fisher]]:
    """By member: the Fishers of its batches."""
    first, second = (
        fishers_by_definition(m.module, m.logits, m.batches, K) for m in members(entry)
    )
    return first, second


def fisher_of(member: Member, batches: list[Any], glue: bool, **settings: Any) -> fk.DiagFisher:
    """`diag_fisher` of the model as it is, or with its logits handed over."""
    model = fk.adapt(member.module, logits=member.logits) if glue else member.model
    return fk.diag_fisher(model, batches, progress=False, **settings)


def error_of(found: Any, expected: Fisher) -> float:
    """The worst relative error of a tensor."""
    error, name = worst(found, expected)
    if error > 1e-3:
        raise Wrong(f"off by {error:.1e} at {name}")
    return error


def fisher_error(entry: Architecture, sampler: str, glue: bool = False) -> float:
    """`sampler` "exact" or "topk", over the native batches."""
    member = members(entry)[0]
    found = fisher_of(member, member.batches, glue, sampler=sampler, k=K)
    return error_of(found, definition(entry)[0][sampler])


def more_batches_error(entry: Architecture, glue: bool = False) -> float | None:
    """The same over batches of other kinds that the library makes; None without any."""
    member, errors = members(entry)[0], []
    for name, batches in member.more_batches.items():
        right = fishers_by_definition(member.module, member.logits, batches, K)["topk"]
        try:
            errors.append(error_of(fisher_of(member, batches, glue, sampler="topk", k=K), right))
        except Exception as error:
            raise Wrong(f"{name}: {type(error).__name__}: {error}") from error
    return max(errors, default=None)


def targets_error(entry: Architecture) -> float | None:
    """The empirical Fisher of the next items that the batches name.

    None where the package says that they name none.
    """
    member = members(entry)[0]
    settings = {"sampler": "target", "weight": "one"}
    if member.targets is None:
        try:
            fisher_of(member, member.batches, False, **settings)
        except fk.InputError as refusal:
            if "sampler 'target'" in str(refusal):
                return None
            raise
        raise Wrong("next items that no batch names")
    named = {n: p for n, p in member.module.named_parameters() if p.requires_grad}
    log_p = torch.cat([member.logits(member.module, b).log_softmax(1) for b in member.batches])
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for value in log_p.gather(1, member.targets[:, None])[:, 0]:
        gradients = torch.autograd.grad(
            value, list(named.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.square() / len(member.targets)
    found = fisher_of(member, member.batches, False, **settings)
    return error_of(found, sums)


def merge_error(entry: Architecture) -> float:
    """`merge` with the definition's Fishers against the formula, in what came in."""
    if entry.library == "peft":
        # Its factors mean nothing one by one, so that no Fisher can weigh them.
        return products_error(entry)
    pair = members(entry)
    fishers = [definition(entry)[i]["exact"] for i in (0, 1)]
    tensors = [
        {name: p.detach() for name, p in member.module.named_parameters() if name in fishers[0]}
        for member in pair
    ]
    expected = average_by_definition(tensors, fishers)
    merged = fk.merge([member.model for member in pair], method="fisher", fishers=fishers)
    if type(merged) is not type(pair[0].model):
        raise Wrong(f"a {type(merged).__name__} came back")
    named = dict(module_inside(pair[0], merged).named_parameters())
    return error_of({name: named[name].detach() for name in expected}, expected)


def products_error(entry: Architecture) -> float:
    """LoRA: `merge` against the mean of B A scale, cut back to the members' rank by an SVD."""
    pair = [member.model for member in members(entry)]
    merged = fk.merge(pair)
    expected, found = {}, {}
    for name, layer in merged.named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "lora_A"):
            own = [m.get_submodule(name).get_delta_weight("default").detach() for m in pair]
            u, values, v = torch.linalg.svd((own[0] + own[1]) / 2, full_matrices=False)
            rank = layer.r["default"]
            expected[name] = (u[:, :rank] * values[:rank]) @ v[:rank]
            found[name] = layer.get_delta_weight("default").detach()
    return error_of(found, expected)


def module_inside(member: Member, merged: Any) -> nn.Module:
    """The bare network of what came back, at the attribute where the member has its own."""
    if member.module is member.model:
        return merged
    for name in ("torch_model", "module", "_orig_mod", "model"):
        if getattr(member.model, name, None) is member.module:
            return getattr(merged, name)
    raise AssertionError("the member keeps its network at no attribute that is known here")


def preflight_runs(entry: Architecture) -> str:
    fk.preflight([member.model for member in members(entry)])
    return "runs"


def ranks_are_right(entry: Architecture) -> str | None:
    """Every user's rank by `evaluate` against the rank by hand, its history left out.

    None where the package says that a history alone is no question to the model.
    """
    member, wrong = members(entry)[0], []
    if member.make_batch is None:
        try:
            fk.evaluate(member.model, dataset(member.item_ids), k=10)
        except fk.InputError as refusal:
            if "make_batch" in str(refusal):
                return None
            raise
        raise Wrong("ranks of a question that the model was not trained on")
    data = dataset(member.item_ids)
    report = fk.evaluate(member.model, data, k=10)
    for user, rank in zip(report.users.tolist(), report.ranks.tolist(), strict=True):
        items = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
        if member.item_ids is not None:
            items = [data.num_items + 1 - item for item in items]
        right = rank_by_hand(member, user, items[:-1], items[-1])
        if rank != right:
            wrong.append(f"user {user} {rank} for {right}")
    if wrong:
        raise Wrong(f"{len(wrong)} wrong ranks: {'; '.join(wrong[:3])}")
    return "right"


def rank_by_hand(member: Member, user: int, history: list[int], target: int) -> int:
    assert member.make_batch is not None
    users = ([user],) if member.takes_users else ()
    with torch.no_grad():
        row: Tensor = member.logits(member.module, member.make_batch([history], *users))[0]
    scores = row[member.columns].float()
    others = [v for v in range(1, len(scores) + 1) if v != target and v not in history]
    return 1 + sum(bool(scores[v - 1] >= scores[target - 1]) for v in others)
