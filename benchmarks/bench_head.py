"""The output-layer ops against the best plain PyTorch expression: python benchmarks/bench_head.py

The expression holds all N×V logits, which ours never do. Each row has the bytes that must
move and the FLOP that must be done, and their rate as a share of what this machine reaches
in a large copy and a large matrix product. Refuses to start unless both give the same numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import alternate, append, copy_bandwidth, device, matmul_rate, peak_megabytes
from torch import Tensor

from fisherkern import ops

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def head_sqgrad(h: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    """F_W += Σ_n p(1−p) h²: logits and one more product, 4·N·V·D FLOP."""
    lse = ops.softmax_lse(h, weight, bias)
    fisher = torch.zeros(weight.shape, device=h.device)
    fisher_bias = torch.zeros(bias.shape, device=h.device)

    def ours() -> Tensor:
        fisher.zero_()
        fisher_bias.zero_()
        ops.head_sqgrad_(fisher, fisher_bias, h, weight, bias, lse)
        return fisher

    def plain() -> Tensor:
        p = torch.softmax(h @ weight.T + bias, dim=1).float()
        return (p * (1 - p)).T @ h.float().square()

    return ours, plain


def softmax_topk(h: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    def ours() -> Tensor:
        return ops.softmax_topk(h, weight, bias, 50)[0]

    def plain() -> Tensor:
        return torch.softmax((h @ weight.T + bias).float(), dim=1).topk(50, dim=1).values

    return ours, plain


def softmax_mean(h: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    lse = ops.softmax_lse(h, weight, bias)

    def ours() -> Tensor:
        return ops.softmax_mean(h, weight, bias, lse)

    def plain() -> Tensor:
        return torch.softmax((h @ weight.T + bias).float(), dim=1) @ weight.float()

    return ours, plain


# Op -> (its pair, matrix products of N×V×D it must do).
OPS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Pair], int]] = {
    "head_sqgrad_": (head_sqgrad, 2),
    "softmax_topk": (softmax_topk, 1),
    "softmax_mean": (softmax_mean, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[3706, 100_000])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    bandwidth, rate = copy_bandwidth(), matmul_rate(2048, dtype)
    rows = []
    for v in options.items:
        for d in options.widths:
            g = torch.Generator().manual_seed(0)
            shapes = ((options.sequences, d), (v, d), (v,))
            h, weight, bias = (torch.randn(s, generator=g).to(device(), dtype) for s in shapes)
            for name, (build, products) in OPS.items():
                ours, plain = build(h, weight, bias)
                torch.testing.assert_close(ours().float(), plain().float(), rtol=2e-2, atol=1e-3)
                times = alternate({"fisherkern": ours, "torch": plain}, options.repeats)
                flop = 2 * products * options.sequences * v * d
                moved = v * d * weight.element_size() * products
                for provider, percentiles in times.items():
                    s = percentiles["p50_ms"] / 1e3
                    rows.append(
                        {
                            "op": name,
                            "provider": provider,
                            "N": options.sequences,
                            "V": v,
                            "D": d,
                            "dtype": options.dtype,
                            **percentiles,
                            "gflop_s": flop / s / 1e9,
                            "gb_s": moved / s / 1e9,
                            "share_of_matmul": flop / s / rate,
                            "share_of_copy": moved / s / bandwidth,
                            "peak_mb": peak_megabytes(),
                        }
                    )
                ratio = times["fisherkern"]["p50_ms"] / times["torch"]["p50_ms"]
                print(f"{name:<16} V={v:<8} D={d:<4} ours / torch {ratio:.2f}", flush=True)
    append("head", rows)


if __name__ == "__main__":
    main()
