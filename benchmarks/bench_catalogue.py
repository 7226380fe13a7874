"""Time and memory of the Fisher's output-layer work as the catalogue grows.

    python benchmarks/bench_catalogue.py --items 1000 10000 100000 1000000

For V = 10³ … 10⁷ and every sampler: the factor and the closed form of the output layer for N
sequences (everything but the encoder's backward passes, which do not depend on V). Each V runs
in a process of its own, so that its peak memory is its own: `extra_mb` is the peak above
what weights, Fisher and inputs take. `two_products_s` is the time of the two products h Wᵀ and
cᵀ h² alone, in tiles.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from typing import Any

import torch
from common import append, peak_megabytes, seconds
from torch import Tensor

from fisherkern import ops
from fisherkern.fisher.samplers import Rows, Settings, factorise

SAMPLERS = ("topk", "model", "sketch", "exact")


def two_products(h: Tensor, weight: Tensor, fisher: Tensor, tile: int = 8192) -> None:
    squared = h.square()
    for start in range(0, len(weight), tile):
        z = h @ weight[start : start + tile].T
        fisher[start : start + tile] += z.T @ squared


def measure(v: int, n: int, d: int, sampler: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=g) * 0.3
    bias, h = torch.zeros(v), torch.randn(n, d, generator=g)
    fisher, fisher_bias = torch.zeros(v, d), torch.zeros(v)
    settings = Settings(sampler, min(30, v), 16, 0, None, False, "probability")
    two_products(h, weight, fisher)
    products = min(seconds(lambda: two_products(h, weight, fisher)) for _ in range(2))
    before = peak_megabytes()
    started = time.perf_counter()
    lse = ops.softmax_lse(h, weight, bias)
    rows = Rows(h, weight, bias, lse, torch.arange(n), None)
    factor = factorise(rows, settings)
    factored = time.perf_counter() - started
    head = seconds(
        lambda: ops.head_sqgrad_(
            fisher, fisher_bias, h, weight, bias, lse, factor.ids, factor.omega
        )
    )
    return {
        "sampler": sampler,
        "N": n,
        "V": v,
        "D": d,
        "factor_s": factored,
        "head_s": head,
        "two_products_s": products,
        "head_over_products": head / products,
        "extra_mb": peak_megabytes() - before,
        "weights_mb": 2 * weight.numel() * 4 / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    for v in options.items:
        for sampler in SAMPLERS:
            if sampler == "exact" and v > 10**5:
                continue  # V·D²/2 a sequence: the sketch is for these
            with context.Pool(1) as pool:
                arguments = (v, options.sequences, options.dim, sampler, options.threads)
                row = pool.apply(measure, arguments)
            rows.append(row)
            print(
                f"V={v:<9} {sampler:<7} factor {row['factor_s']:.2f} s  head {row['head_s']:.2f} s"
                f"  = {row['head_over_products']:.2f} × the two products"
                f"  extra {row['extra_mb']:.0f} MB",
                flush=True,
            )
    append("catalogue", rows)


if __name__ == "__main__":
    main()
