"""Output-layer ops against the best plain PyTorch: python -m benchmarks.speed.bench_head

The expression holds all N×V logits, which ours never do. Each row has the bytes that must
move and the FLOP that must be done, and their rate as a share of what this machine reaches
in a large copy and a large matrix product, and the time of its own products alone, in tiles.
Refuses to start unless ours gives the numbers of fp64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import (
    alternate,
    append,
    check_columns,
    copy_bandwidth,
    device,
    matmul_rate,
    peak_megabytes,
)
from benchmarks.gpu.twins import Softmax
from fisherkern import InputError, ops

Results = tuple[Tensor, ...]
Pair = tuple[Callable[[], Results], Callable[[], Results]]


def head_sqgrad(h: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    """F_W += Σ_n p(1−p) h²: logits and one more product, 4·N·V·D FLOP."""
    lse = ops.softmax_lse(h, weight, bias)
    fisher = torch.zeros(weight.shape, device=h.device)
    fisher_bias = torch.zeros(bias.shape, device=h.device)

    def ours() -> Results:
        fisher.zero_()
        fisher_bias.zero_()
        ops.head_sqgrad_(fisher, fisher_bias, h, weight, bias, lse)
        return fisher, fisher_bias

    def plain() -> Results:
        p = torch.softmax((h @ weight.T + bias).float(), dim=1)
        coefficient = p * (1 - p)
        return coefficient.T @ h.float().square(), coefficient.sum(dim=0)

    return ours, plain


def softmax_topk(h: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    """The 50 most likely items, log-sum-exp and w̄."""

    def ours() -> Results:
        p, _, lse, mean = ops.softmax_topk(h, weight, bias, 50)
        return p, lse, mean

    def plain() -> Results:
        z = (h @ weight.T + bias).float()
        p = torch.softmax(z, dim=1)
        return p.topk(50, dim=1).values, z.logsumexp(dim=1), p @ weight.float()

    return ours, plain


def softmax_mean(h: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    """Log-sum-exp and w̄."""

    def ours() -> Results:
        return ops.softmax_mean(h, weight, bias)[:2]

    def plain() -> Results:
        z = (h @ weight.T + bias).float()
        return z.logsumexp(dim=1), torch.softmax(z, dim=1) @ weight.float()

    return ours, plain


# Op -> (its pair, matrix products of N×V×D it must do).
OPS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Pair], int]] = {
    "head_sqgrad_": (head_sqgrad, 2),
    "softmax_topk": (softmax_topk, 2),
    "softmax_mean": (softmax_mean, 2),
}


# Of the largest number: ops multiply what they are given exactly, in bf16 as well.
ALLOWED = 1e-4
COLUMNS = """op provider N V D dtype p20_ms p50_ms p80_ms gflop_s gb_s share_of_matmul
    share_of_copy products_alone_ms over_products peak_mb""".split()


def products_alone(h: Tensor, weight: Tensor, second: Tensor, tile: int = 2048) -> None:
    """The two products that each op must do, in tiles: h Wᵀ, and its tile times `second`."""
    for start in range(0, len(weight), tile):
        z = weight[start : start + tile] @ h.T
        z @ second


def exact(name: str, h: Tensor, weight: Tensor, bias: Tensor) -> Results:
    """What both should give, in fp64 and in tiles: a bf16 expression rounds its logits twice."""
    softmax = Softmax(h, weight, bias)
    if name == "head_sqgrad_":
        return softmax.head()
    if name == "softmax_mean":
        return softmax.lse, softmax.mean()
    return softmax.top(50), softmax.lse, softmax.mean()


def check(name: str, v: int, d: int, pair: Pair, expected: Results) -> None:
    """Raise SystemExit unless ours is the fp64 twin's, relative to its largest number."""
    for found, right in zip(pair[0](), expected, strict=True):
        error = float((found.double() - right).abs().max() / right.abs().max())
        if not error <= ALLOWED:
            raise SystemExit(f"bench_head: {name} at V={v} D={d} is off by {error:.2g}; stopped")


def draw(v: int, d: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((n, d), (v, d), (v,))
    h, weight, bias = (torch.randn(s, generator=g).to(device(), dtype) for s in shapes)
    return h / d**0.5, weight, bias


def measure(v: int, d: int, options: argparse.Namespace) -> None:
    n, dtype = options.sequences, getattr(torch, options.dtype)
    h, weight, bias = draw(v, d, n, dtype)
    for name, (build, products) in OPS.items():
        ours, plain = build(h, weight, bias)
        calls = {
            "fisherkern": ours,
            "torch": plain,
            "products alone": lambda: products_alone(h, weight, h),
        }
        times = alternate(calls, options.repeats)
        alone = times.pop("products alone")["p50_ms"]
        flop = 2 * products * n * v * d
        moved = v * d * weight.element_size() * products
        rows = []
        for provider, found in times.items():
            s = found["p50_ms"] / 1e3
            rows.append(
                {
                    "op": name,
                    "provider": provider,
                    "N": n,
                    "V": v,
                    "D": d,
                    "dtype": options.dtype,
                    **found,
                    "gflop_s": flop / s / 1e9,
                    "gb_s": moved / s / 1e9,
                    "share_of_matmul": flop / s / options.rate,
                    "share_of_copy": moved / s / options.bandwidth,
                    "products_alone_ms": alone,
                    "over_products": found["p50_ms"] / alone,
                    "peak_mb": peak_megabytes(),
                }
            )
        append("head", rows)
        own = times["fisherkern"]["p50_ms"]
        print(
            f"{name:<14} V={v:<8} D={d:<4} ours / torch {own / times['torch']['p50_ms']:.2f},"
            f" ours / its products {own / alone:.2f}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[3706, 100_000])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    try:
        check_columns("head", COLUMNS)
    except InputError as error:
        raise SystemExit(f"bench_head: {error}") from None
    shapes = [(v, d) for v in options.items for d in options.widths]
    for v, d in shapes:
        inputs = draw(v, d, options.sequences, dtype)
        for name, (build, _) in OPS.items():
            check(name, v, d, build(*inputs), exact(name, *inputs))
    options.bandwidth, options.rate = copy_bandwidth(), matmul_rate(2048, dtype)
    for v, d in shapes:
        measure(v, d, options)


if __name__ == "__main__":
    main()
