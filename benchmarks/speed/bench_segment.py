"""Σ_r Σ_n (Σ_t δ aᵀ)² against PyTorch expressions: python -m benchmarks.speed.bench_segment

The rivals are the R N per-sequence products stored, then squared and summed (as bmm, einsum and
vmap of one sequence's product), and the same in tiles that stay in cache. `bmm alone` is the
products, tile over tile in one buffer, without square or sum: what no use of PyTorch's batched
products beats. `share_of_matmul` and `share_of_copy` are of what this machine reaches in a
large product and a large copy; all count the multiply-adds of every product, though for
short T beside R ours does with fewer. Refuses to start unless ours is within 3 times the error of
the stored expression, against fp64, at every shape and some odd ones.
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
    with_peak,
)
from fisherkern import InputError, ops
from fisherkern.ops.backend import backend
from fisherkern.ops.segment_outer_square import segment_outer_square_reference

# R, T, O, I of a Transformer's linear layers at D = 64: one probe, and as many as are exact.
LAYERS = [(192, 64), (64, 64), (256, 64), (64, 256)]
SHAPES = [(1, 50, 64, 64), (1, 50, 256, 64), (1, 50, 64, 256), (1, 200, 64, 64), (1, 200, 256, 64)]
SHAPES += [(64, t, *layer) for t in (5, 8, 20, 44) for layer in LAYERS]
ODD = [(1, 1, 1, 1), (3, 1, 64, 64), (1, 7, 13, 31), (2, 65, 63, 129), (31, 7, 13, 31)]
# Elements of the products in one tile: 4 MB in fp32, which a CPU's cache holds; a GPU wants
# few launches instead.
TILE = 2**28 if torch.cuda.is_available() else 2**20

Expression = Callable[[Tensor, Tensor], Tensor]


def ours(delta: Tensor, inputs: Tensor) -> Tensor:
    fisher = delta.new_zeros(delta.shape[3], inputs.shape[2], dtype=torch.float32)
    ops.segment_outer_square_(fisher, delta, inputs)
    return fisher


def stored(delta: Tensor, inputs: Tensor) -> Tensor:
    return torch.matmul(delta.transpose(2, 3), inputs).square().sum(dim=(0, 1))


def einsum(delta: Tensor, inputs: Tensor) -> Tensor:
    return torch.einsum("rnto,nti->rnoi", delta, inputs).square().sum(dim=(0, 1))


def tiled(delta: Tensor, inputs: Tensor) -> Tensor:
    fisher = delta.new_zeros(delta.shape[3], inputs.shape[2])
    step = max(1, TILE // fisher.numel())
    for probe in delta:
        for d, a in zip(probe.split(step), inputs.split(step), strict=True):
            fisher += torch.bmm(d.transpose(1, 2), a).square_().sum(dim=0)
    return fisher


def vmapped(delta: Tensor, inputs: Tensor) -> Tensor:
    sequences = torch.func.vmap(lambda d, a: (d.T @ a).square())
    return torch.func.vmap(sequences, in_dims=(0, None))(delta, inputs).sum(dim=(0, 1))


def alone(delta: Tensor, inputs: Tensor) -> Tensor:
    """The products in tiles, each over the last: nothing squared, summed or kept."""
    o, i = delta.shape[3], inputs.shape[2]
    step = min(len(inputs), max(1, TILE // (o * i)))
    tile = delta.new_empty(step, o, i)
    for probe in delta:
        for d, a in zip(probe.split(step), inputs.split(step), strict=True):
            torch.bmm(d.transpose(1, 2), a, out=tile[: len(d)])
    return tile


RIVALS: dict[str, Expression] = {
    "torch bmm, stored": stored,
    "torch einsum, stored": einsum,
    "torch bmm, in tiles": tiled,
    "torch.func vmap, stored": vmapped,
}


def draw(r: int, n: int, t: int, o: int, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    delta, inputs = torch.randn(r, n, t, o, generator=g), torch.randn(n, t, i, generator=g)
    return delta.to(device(), dtype), inputs.to(device(), dtype)


def check(dtype: torch.dtype) -> None:
    """Raise SystemExit unless ours and every rival give the fp64 twin's numbers."""
    for r, t, o, i in [*ODD, *SHAPES]:
        delta, inputs = draw(r, 3, t, o, i, dtype)
        exact = segment_outer_square_reference(delta.cpu(), inputs.cpu())

        def error(found: Tensor, exact: Tensor = exact) -> float:
            return float((found.cpu().double() - exact).abs().max())

        allowed = 3 * error(stored(delta.float(), inputs.float())) + 1e-5 * float(exact.max())
        wrong = {"fisherkern": error(ours(delta, inputs)) / allowed}
        if dtype == torch.float32:
            wrong |= {name: error(run(delta, inputs)) / allowed for name, run in RIVALS.items()}
        for name, share in wrong.items():
            if not share <= 1:
                raise SystemExit(
                    f"bench_segment: {name} at R={r} T={t} O={o} I={i} is off by {share:.2g} times"
                    " the allowed error; stopped"
                )


def measure(shape: tuple[int, int, int, int], options: argparse.Namespace) -> None:
    r, t, o, i = shape
    n, dtype = max(1, options.sequences // r), getattr(torch, options.dtype)
    delta, inputs = draw(r, n, t, o, i, dtype)
    expressions: dict[str, Expression] = {"fisherkern": ours, **RIVALS, "bmm alone": alone}
    calls = {name: lambda run=run: run(delta, inputs) for name, run in expressions.items()}
    times = alternate(calls, options.repeats)
    flop, moved = 2 * r * n * t * o * i, n * t * (r * o + i) * delta.element_size()
    rows = []
    for provider, found in times.items():
        s = found["p50_ms"] / 1e3
        rows.append(
            {
                "provider": provider,
                "backend": backend() if provider == "fisherkern" else "torch",
                "R": r,
                "N": n,
                "T": t,
                "O": o,
                "I": i,
                "dtype": options.dtype,
                **found,
                "gflop_s": flop / s / 1e9,
                "gb_s": moved / s / 1e9,
                "share_of_matmul": flop / s / options.rate,
                "share_of_copy": moved / s / options.bandwidth,
                "share_of_bmm": times["bmm alone"]["p50_ms"] / found["p50_ms"],
                "extra_mb": with_peak(calls[provider])[1],
            }
        )
    append("segment", rows)
    best = min(RIVALS, key=lambda name: times[name]["p50_ms"])
    own = times["fisherkern"]["p50_ms"]
    print(
        f"R={r:<2} T={t:<3} O={o:<4} I={i:<4} ours {own:8.2f} ms,"
        f" {own / times[best]['p50_ms']:.2f} of the best PyTorch ({best}),"
        f" {own / times['bmm alone']['p50_ms']:.2f} of bmm alone",
        flush=True,
    )


COLUMNS = """provider backend R N T O I dtype p20_ms p50_ms p80_ms gflop_s gb_s share_of_matmul
    share_of_copy share_of_bmm extra_mb""".split()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=256, help="N R (default 256)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    for name in ("sequences", "repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: must be at least 1")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    try:
        check_columns("segment", COLUMNS)
    except InputError as error:
        raise SystemExit(f"bench_segment: {error}") from None
    dtype = getattr(torch, options.dtype)
    check(dtype)
    options.rate, options.bandwidth = matmul_rate(2048, dtype), copy_bandwidth()
    for shape in SHAPES:
        measure(shape, options)


if __name__ == "__main__":
    main()
