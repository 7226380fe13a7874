"""Time, error and memory of Fisher estimates, ours and others', on one model: the paper's Fig. 2.

    python benchmarks/bench_fisher.py --checkpoint runs/.../base.safetensors --data ml-1m
    python benchmarks/bench_fisher.py --checkpoint ... --sequences 6040 --only sketch --repeats 1

Every estimate runs in this process, in turn with the batch-wise one of the same size, whose time
is the unit of the `ratio` column: absolute times of a shared machine mean nothing. Rivals that
take minutes for all sequences are run on `--rival-sequences` and scaled up, which the column
`sequences` shows. Refuses to start unless ours equals brute force on the first sequences.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import append, peak_megabytes, seconds
from torch import Tensor

import fisherkern as fk
from fisherkern.experiments.fisher_cost import best_scaled_error, relative_error

Estimate = dict[str, Tensor]


def naive_topk(model: torch.nn.Module, history: Tensor, k: int) -> Estimate:
    """One backward pass for every (sequence, item): the definition, with no library."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    for row in history.split(1):
        log_p = torch.log_softmax(model(row), dim=1)[0]
        top = log_p.detach().exp().topk(k)
        for p, item in zip(top.values, top.indices, strict=True):
            gradients = torch.autograd.grad(log_p[item], parameters, retain_graph=True)
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += p * gradient.square()
    return {name: value / len(history) for name, value in total.items()}


class FromTokens(torch.nn.Module):
    """The model after its input checks, whose data-dependent branches vmap cannot enter."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        last = torch.full((len(tokens), 1), tokens.shape[1] - 1)
        h = self.model.transform(self.model.states(tokens, last).squeeze(1))
        weight, bias = self.model.head()
        return h @ weight.T + bias


def vmap_topk(model: torch.nn.Module, history: Tensor, k: int, chunk: int = 32) -> Estimate:
    """torch.func: vmap over sequences of the gradient, one rank after the other."""
    inner = FromTokens(model)
    parameters = {name: p.detach() for name, p in inner.named_parameters()}
    tokens = model.append_mask(history)
    with torch.no_grad():
        top = torch.log_softmax(model(history), dim=1).exp().topk(k)

    def log_probability(parameters: Estimate, row: Tensor, item: Tensor) -> Tensor:
        logits = torch.func.functional_call(inner, parameters, (row[None],))
        return torch.log_softmax(logits, dim=1)[0].gather(0, item[None])[0]

    gradient = torch.func.vmap(
        torch.func.grad(log_probability), in_dims=(None, 0, 0), chunk_size=chunk
    )
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for j in range(k):
        found = gradient(parameters, tokens, top.indices[:, j])
        for name, g in found.items():
            total[name] += torch.einsum("n,n...->...", top.values[:, j], g.square())
    return {name.removeprefix("model."): value / len(history) for name, value in total.items()}


RIVALS: dict[str, Callable[[torch.nn.Module, Tensor, int], Estimate]] = {
    "naive loop": naive_topk,
    "torch.func vmap(grad)": vmap_topk,
}

OURS: list[tuple[str, dict[str, Any]]] = [
    *[("topk", {"sampler": "topk", "k": k}) for k in (10, 30, 50, 100)],
    *[("model", {"sampler": "model", "k": k}) for k in (10, 30, 50, 100)],
    *[("random", {"sampler": "random", "k": k}) for k in (10, 30, 50)],
    ("target", {"sampler": "target", "k": 1}),
    *[("sketch", {"sampler": "sketch", "probes": r, "k": r}) for r in (4, 8, 16)],
    *[("exact, top directions", {"sampler": "exact", "probes": r, "k": r}) for r in (8, 32)],
    ("exact", {"sampler": "exact", "k": 64}),
]


def check(model: torch.nn.Module, history: Tensor) -> None:
    """Ours against brute force on a few sequences, before anything is timed."""
    few = history[:3]
    ours = fk.diag_fisher(model, [few], sampler="topk", k=5, progress=False)
    error = relative_error(ours, naive_topk(model, few, 5))
    assert error < 1e-4, f"ours differs from brute force by {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--rival-sequences", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="estimates whose name holds this, and batchwise K = 10")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, data = fk.load_model(options.checkpoint), fk.load(options.data)
    loader = data.loader(
        split="train",
        batch_size=256,
        max_len=model.max_len,
        limit=options.sequences,
    )
    batches = list(loader)
    history = batches[0]["history"]
    check(model, history)
    exact = fk.diag_fisher(model, batches, sampler="exact", progress=False)
    units: dict[int, float] = {}
    rows = []

    def batchwise(k: int) -> fk.DiagFisher:
        return fk.diag_fisher(model, batches, k=k, reduction="batchwise", progress=False)

    def row(provider: str, k: int, times: list[float], n: int, found: Any) -> None:
        shared = {name: exact[name] for name in found}
        p50 = statistics.median(times)
        unit = units[max((size for size in units if size <= k), default=10)]
        rows.append(
            {
                "provider": provider,
                "data": data.name,
                "T": model.max_len,
                "D": model.dim,
                "V": data.num_items,
                "k": k,
                "sequences": n,
                "seconds": p50,
                "seconds_min": min(times),
                "ratio": p50 / unit,
                "error": best_scaled_error(found, shared),
                "relative_error": relative_error(found, shared),
                "peak_mb": peak_megabytes(),
            }
        )
        print(f"{provider:<24} k={k:<4} {p50:8.2f} s  ratio {p50 / unit:6.2f}", flush=True)

    for k in (10,) if options.only else (10, 30, 50):
        times = [seconds(lambda k=k: batchwise(k)) for _ in range(options.repeats)]
        units[k] = statistics.median(times)
        row("batchwise (paper)", k, times, options.sequences, batchwise(k))
    for name, arguments in OURS:
        if options.only and options.only not in name:
            continue

        def ours(arguments: dict[str, Any] = arguments) -> fk.DiagFisher:
            return fk.diag_fisher(model, batches, progress=False, **arguments)

        times = [seconds(ours) for _ in range(options.repeats)]
        found = ours()
        row(name, arguments["k"], times, options.sequences, found)
    n = options.rival_sequences
    for name, rival in [] if options.only else RIVALS.items():
        for k in (10, 50):
            part = history[:n]
            rival(model, part[:2], 2)
            elapsed = seconds(lambda k=k, rival=rival, part=part: rival(model, part, k))
            row(name, k, [elapsed * options.sequences / n], n, rival(model, history[:n], k))
    append("fisher", rows)


if __name__ == "__main__":
    main()
