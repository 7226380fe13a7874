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


class Bench:
    """The model, its sequences and exact Fisher, the unit times, and the rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, self.data = fk.load_model(options.checkpoint), fk.load(options.data)
        loader = self.data.loader(
            split="train", batch_size=256, max_len=self.model.max_len, limit=options.sequences
        )
        self.batches = list(loader)
        self.history = self.batches[0]["history"]
        check(self.model, self.history)
        self.exact = self.fisher(sampler="exact")
        self.units: dict[int, float] = {}
        self.rows: list[dict[str, Any]] = []

    def fisher(self, **arguments: Any) -> fk.DiagFisher:
        return fk.diag_fisher(self.model, self.batches, progress=False, **arguments)

    def ours(self, name: str, arguments: dict[str, Any]) -> None:
        """Time one of our estimates, in turn with batch-wise K = 10 which keeps the unit fresh."""
        times, units = [], []
        for _ in range(self.options.repeats):
            units.append(seconds(lambda: self.fisher(k=10, reduction="batchwise")))
            times.append(seconds(lambda: self.fisher(**arguments)))
        drift = statistics.median(units) / self.units[10]
        found = self.fisher(**arguments)
        self.row(name, arguments["k"], times, self.options.sequences, found, drift)

    def rival(self, name: str, rival: Callable[..., Estimate]) -> None:
        """Time a rival on a few sequences, scaled up, beside batch-wise as it runs just then."""
        part = self.history[: self.options.rival_sequences]
        exact = fk.diag_fisher(self.model, [part], sampler="exact", progress=False)
        rival(self.model, part[:2], 2)
        for k in (10, 50):
            unit = seconds(lambda: self.fisher(k=10, reduction="batchwise"))
            elapsed = seconds(lambda k=k: rival(self.model, part, k))
            scaled = elapsed * self.options.sequences / len(part)
            found = rival(self.model, part, k)
            self.row(name, k, [scaled], len(part), found, unit / self.units[10], exact)

    def row(
        self,
        name: str,
        k: int,
        times: list[float],
        n: int,
        found: Any,
        drift: float = 1.0,
        exact: fk.DiagFisher | None = None,
    ) -> None:
        unit = drift * self.units[max((size for size in self.units if size <= k), default=10)]
        p50 = statistics.median(times)
        shared = dict(self.exact if exact is None else exact)
        self.rows.append(
            {
                "provider": name,
                "data": self.data.name,
                "T": self.model.max_len,
                "D": self.model.dim,
                "V": self.data.num_items,
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
        print(f"{name:<24} k={k:<4} {p50:8.2f} s  ratio {p50 / unit:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--rival-sequences", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="estimates whose name holds this, and batchwise K = 10")
    parser.add_argument("--size", type=int, help="with --only: of this size alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    for k in (10,) if options.size else (10, 30, 50):
        arguments: dict[str, Any] = {"k": k, "reduction": "batchwise"}
        times = [seconds(lambda a=arguments: bench.fisher(**a)) for _ in range(options.repeats)]
        bench.units[k] = statistics.median(times)
        bench.row("batchwise (paper)", k, times, options.sequences, bench.fisher(**arguments))
    for name, arguments in OURS:
        chosen = not options.only or options.only in name
        if chosen and options.size in (None, arguments["k"]):
            bench.ours(name, arguments)
    for name, rival in RIVALS.items():
        if not options.only or options.only in name:
            bench.rival(name, rival)
    append("fisher", bench.rows)


if __name__ == "__main__":
    main()
