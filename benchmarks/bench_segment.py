"""Σ_n (Σ_t δ aᵀ)² against PyTorch expressions: python benchmarks/bench_segment.py

The rivals store the N per-sequence products (bmm, then square and sum), or form all
pairs of positions (BackPACK's einsum). Refuses to start unless all agree.
"""

from __future__ import annotations

import argparse

import torch
from common import alternate, append, device, matmul_rate, peak_megabytes

from fisherkern import ops

SHAPES = [(50, 64, 64), (50, 256, 64), (50, 64, 256), (200, 64, 64), (200, 256, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rate = matmul_rate(2048)
    rows = []
    for t, o, i in SHAPES:
        g = torch.Generator().manual_seed(0)
        n = options.sequences
        delta, inputs = (torch.randn(n, t, w, generator=g).to(device()) for w in (o, i))
        fisher = torch.zeros(o, i, device=device())

        def ours(fisher=fisher, delta=delta, inputs=inputs):  # type: ignore[no-untyped-def]
            fisher.zero_()
            ops.segment_outer_square_(fisher, delta, inputs)
            return fisher

        def stored(delta=delta, inputs=inputs):  # type: ignore[no-untyped-def]
            return torch.bmm(delta.transpose(1, 2), inputs).square().sum(dim=0)

        def product_only(delta=delta, inputs=inputs):  # type: ignore[no-untyped-def]
            return torch.bmm(delta.transpose(1, 2), inputs)

        torch.testing.assert_close(ours(), stored(), rtol=1e-3, atol=1e-2)
        providers = {"fisherkern": ours, "torch bmm, stored": stored, "bmm alone": product_only}
        times = alternate(providers, options.repeats)
        flop = 2 * n * t * o * i
        for provider, percentiles in times.items():
            achieved = flop / percentiles["p50_ms"] * 1e3
            rows.append(
                {
                    "provider": provider,
                    "N": n,
                    "T": t,
                    "O": o,
                    "I": i,
                    "dtype": "float32",
                    **percentiles,
                    "gflop_s": achieved / 1e9,
                    "share_of_matmul": achieved / rate,
                    "peak_mb": peak_megabytes(),
                }
            )
        ratio = times["fisherkern"]["p50_ms"] / times["torch bmm, stored"]["p50_ms"]
        print(f"T={t} O={o} I={i}: ours / stored {ratio:.2f}", flush=True)
    append("segment", rows)


if __name__ == "__main__":
    main()
