"""Every architecture through the public functions: python -m benchmarks.libraries.table

The Fisher equals autograd over every item, `merge` the formula, `evaluate` ranks by hand. A row
of `benchmarks/results/libraries.csv` holds one architecture; `libraries.md` beside it is the
table. `--glue` hands the logits over by hand, which proves the harness rather than the package.
"""

from __future__ import annotations

import argparse
import csv
import logging
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fisherkern as fk
from benchmarks.common import RESULTS
from benchmarks.libraries.architecture import Architecture, Member, build_all, dataset
from benchmarks.libraries.oracle import average_by_definition, fishers_by_definition, worst

K = 5
COLUMNS = (
    "architecture",
    "fisher",
    "topk",
    "fast path",
    "falls back",
    "other batches",
    "targets",
    "merge",
    "preflight",
    "evaluate",
    "seconds",
)


class FallbackLog(logging.Handler):
    """The parameters that the engine warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"no (?:rule|handler) for (.*): one backward", record.getMessage())
        self.names |= set(found[1].split(", ")) if found else set()


def attempted(check: Callable[[], Any]) -> Any:
    """The check's result, or in a few words why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def row_of(entry: Architecture, glue: bool) -> dict[str, Any]:
    """A line of the table; whatever is a text where a number should be is a failure."""
    started = time.perf_counter()
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row["architecture"] = entry.name
    try:
        members = [entry.build(seed) for seed in (0, 1)]
    except ImportError as error:
        return row | {"fisher": f"not installed: {error}"}
    first = members[0]
    right = [fishers_by_definition(m.module, m.logits, m.batches, K) for m in members]
    log = FallbackLog()
    logging.getLogger("fisherkern").addHandler(log)
    found = attempted(lambda: fisher(first, first.batches, glue, sampler="exact"))
    row["fisher"] = error_of(found, right[0]["exact"])
    top = attempted(lambda: fisher(first, first.batches, glue, sampler="topk", k=K))
    row["topk"] = error_of(top, right[0]["topk"])
    row["fast path"] = fast_path(first, found)
    row["falls back"] = " ".join(sorted(log.names))
    logging.getLogger("fisherkern").removeHandler(log)
    others = first.more_batches.items()
    row["other batches"] = worst_text({n: other_batches(first, b, glue) for n, b in others})
    if not glue:
        row |= doors(members, [r["exact"] for r in right])
    row["seconds"] = f"{time.perf_counter() - started:.1f}"
    return row


def doors(members: list[Member], fishers: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The other public functions on the models as they are."""
    return {
        "targets": attempted(lambda: target_error(members[0])),
        "merge": attempted(lambda: merge_error(members, fishers)),
        "preflight": attempted(lambda: preflight(members)),
        "evaluate": attempted(lambda: evaluate_error(members[0])),
    }


def fisher(member: Member, batches: list[Any], glue: bool, **settings: Any) -> Any:
    model = fk.adapt(member.module, logits=member.logits) if glue else member.model
    return fk.diag_fisher(model, batches, progress=False, **settings)


def error_of(found: Any, expected: dict[str, torch.Tensor]) -> Any:
    if isinstance(found, str):
        return found
    error, name = worst(found, expected)
    return error if error < 1e-3 else f"{error:.1e} at {name}"


def fast_path(member: Member, found: Any) -> str:
    """Whether "exact" took fewer passes than V: then a hidden state and a head were found."""
    if isinstance(found, str):
        return "no"
    columns = member.logits(member.module, member.batches[0]).shape[1]
    return "yes" if found.meta["probes"] < columns - 1 else "no"


def other_batches(member: Member, batches: list[Any], glue: bool) -> Any:
    right = fishers_by_definition(member.module, member.logits, batches, K)
    found = attempted(lambda: fisher(member, batches, glue, sampler="topk", k=K))
    return error_of(found, right["topk"])


def worst_text(results: dict[str, Any]) -> Any:
    wrong = [f"{name}: {result}" for name, result in results.items() if isinstance(result, str)]
    return "; ".join(wrong) or max(results.values(), default="")


def target_error(member: Member) -> Any:
    """The empirical Fisher of the next items, which the batches themselves must name."""
    if member.targets is None:
        return ""
    named = {n: p for n, p in member.module.named_parameters() if p.requires_grad}
    log_p = [member.logits(member.module, b).log_softmax(1) for b in member.batches]
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for value in torch.cat(log_p).gather(1, member.targets[:, None]):
        gradients = torch.autograd.grad(
            value.sum(), list(named.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.square() / len(member.targets)
    settings = {"sampler": "target", "weight": "one"}
    return error_of(fisher(member, member.batches, False, **settings), sums)


def merge_error(members: list[Member], fishers: list[dict[str, torch.Tensor]]) -> Any:
    """`merge` with the right Fishers against the formula, and the same wrapper given back."""
    tensors = [
        {n: p.detach() for n, p in m.module.named_parameters() if n in f}
        for m, f in zip(members, fishers, strict=True)
    ]
    expected = average_by_definition(tensors, fishers)
    merged = fk.merge([m.model for m in members], method="fisher", fishers=fishers)
    if type(merged) is not type(members[0].model):
        return f"a {type(merged).__name__} came back"
    found = {n: p.detach() for n, p in bare(members[0], merged).named_parameters() if n in expected}
    return error_of(found, expected)


def bare(member: Member, merged: Any) -> nn.Module:
    """The bare network inside what came back, at the path where the member has its own."""
    if member.module is member.model:
        return merged
    for name in ("torch_model", "module", "_orig_mod", "model", "lightning_model"):
        if getattr(member.model, name, None) is member.module:
            return getattr(merged, name)
    raise AssertionError("the harness does not know where this wrapper keeps its network")


def preflight(members: list[Member]) -> str:
    fk.preflight([m.model for m in members])
    return "runs"


def evaluate_error(member: Member) -> Any:
    """Every user's rank against the rank by hand, the history excluded."""
    if member.make_batch is None:
        return ""
    data = dataset()
    report = fk.evaluate(member.model, data, k=10)
    wrong = []
    for user, rank in zip(report.users.tolist(), report.ranks.tolist(), strict=True):
        items = data.items[data.offsets[user] : data.offsets[user + 1]].tolist()
        history, target = items[:-1], items[-1]
        with torch.no_grad():
            scores = member.logits(member.module, member.make_batch([history]))[0, member.columns]
        others = [v for v in range(1, len(scores) + 1) if v != target and v not in history]
        right = 1 + sum(bool(scores[v - 1] >= scores[target - 1]) for v in others)
        if rank != right:
            wrong.append(f"user {user} {rank} for {right}")
    return f"ranks {'; '.join(wrong[:3])} ({len(wrong)} wrong)" if wrong else "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue", action="store_true", help="hand the logits over by hand")
    parser.add_argument("--only", default="", help="a part of the architectures' names")
    parser.add_argument("--dry", action="store_true", help="write no results")
    arguments = parser.parse_args()
    rows = []
    for entry in build_all().values():
        if arguments.only.lower() in entry.name.lower():
            row = row_of(entry, arguments.glue)
            rows.append({n: f"{v:.1e}" if isinstance(v, float) else v for n, v in row.items()})
            print(" | ".join(f"{n}: {v}" for n, v in rows[-1].items() if v), flush=True)
    if arguments.dry or arguments.only or arguments.glue:
        return
    with (RESULTS / "libraries.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
