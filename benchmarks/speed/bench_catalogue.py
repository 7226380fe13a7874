"""Time and memory of the Fisher's output-layer work as the catalogue grows.

    python -m benchmarks.speed.bench_catalogue --items 1000 10000 100000 1000000

For V = 10³ … 10⁷ and every sampler: the pass for the statistics, the factor and the closed
form of the output layer for N sequences (everything but the encoder's backward passes, which do
not depend on V). Each V runs in a process of its own, so that its memory is its own: `extra_mb`
is the peak above what weights, Fisher and inputs take. `two_products_s` is the time of the two
products h Wᵀ and cᵀ h² alone, by PyTorch's matmul in tiles: what the closed form must do (ours
take oneDNN's on a CPU, which are faster where it is not Intel's). The whole pass must do four:
w̄ = Wᵀ p takes the softmax, and its sum must be known before p can be squared.
Seconds on a CPU are the process's own, so that other work on the machine counts less.
Refuses to start unless every sampler's numbers are those of the fp64 twins.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import append, check_columns, device, seconds, with_peak
from fisherkern import InputError, ops
from fisherkern.fisher.factors.factor import CovarianceFactor
from fisherkern.fisher.factors.item_table import ItemTable
from fisherkern.fisher.factors.samplers import SoftmaxStats, factor_covariance
from fisherkern.fisher.settings import Settings
from fisherkern.ops.head_sqgrad import head_sqgrad_reference
from fisherkern.ops.sample_distinct import sample_distinct_reference
from fisherkern.ops.sample_items import sample_items_reference
from fisherkern.ops.softmax_lse import softmax_lse_reference
from fisherkern.ops.softmax_moments import softmax_moments_reference
from fisherkern.ops.softmax_sketch import softmax_sketch_reference
from fisherkern.ops.softmax_topk import softmax_topk_reference

SAMPLERS = ("topk", "model", "distinct", "sketch", "exact")
# Beyond this "exact" is left out: V·D²/2 a sequence, the sketch is for these.
MOST_ITEMS_EXACT = 10**5
PROBES = 16
# Of the check: several ranges and, beside 48 sequences, several tiles.
CHECKED_ITEMS = 20_011
COLUMNS = """sampler N V D k statistics_s factor_s head_s two_products_s head_over_products
    whole_over_products extra_mb weights_mb""".split()


class Layer:
    """An output layer with its inputs and Fishers, drawn from one seed."""

    def __init__(self, v: int, n: int, d: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.weight = (torch.randn(v, d, generator=g) * 0.3).to(device())
        self.h = torch.randn(n, d, generator=g).to(device())
        self.bias = torch.zeros(v, device=device())
        self.number = torch.arange(n, device=device())
        self.fisher, self.fisher_bias = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def settings(self, sampler: str, k: int) -> Settings:
        name, k = "model" if sampler == "distinct" else sampler, min(k, len(self.weight))
        return Settings(name, k, PROBES, 0, None, False, "probability", sampler != "distinct")

    def rows(self, settings: Settings) -> SoftmaxStats:
        table = ItemTable(self.weight, self.bias)
        return SoftmaxStats.of(self.h, table, self.number, None, settings)

    def add_head(self, rows: SoftmaxStats, factor: CovarianceFactor) -> None:
        ops.head_sqgrad_(
            self.fisher, self.fisher_bias, self.h, self.weight, self.bias, rows.lse,
            factor.ids, factor.omega,
        )  # fmt: skip

    def two_products(self, tile: int = 2048) -> None:
        """In the tiles and the orientation that a CPU is fastest with."""
        squared = self.h.square()
        for start in range(0, len(self.weight), tile):
            z = self.weight[start : start + tile] @ self.h.T
            self.fisher[start : start + tile].addmm_(z, squared)


def check(n: int, d: int, k: int) -> None:
    """Raise SystemExit unless a catalogue of several tiles gives the twins' numbers."""
    for sampler in SAMPLERS:
        layer = Layer(CHECKED_ITEMS, min(n, 48), d)
        settings = layer.settings(sampler, k)
        rows = layer.rows(settings)
        factor = factor_covariance(rows, settings)
        layer.add_head(rows, factor)
        inputs = [t.cpu() for t in (layer.h, layer.weight, layer.bias)]
        few = 2  # the twin of the mean holds a number for every row, item and column
        wanted = [
            ("lse", rows.lse, softmax_lse_reference(*inputs)),
            ("mean", rows.mean[:few], softmax_moments_reference(inputs[0][:few], *inputs[1:])[0]),
        ]
        ids = omega = None
        if factor.ids is not None and factor.omega is not None:
            expected = expected_items(sampler, inputs, rows.sequence_ids.cpu(), settings)
            ids, omega = factor.ids.cpu(), factor.omega.cpu()
            same = ids == expected[0]
            if float(same.double().mean()) < 0.99:  # next to a step fp32 may take the other side
                raise SystemExit(f"bench_catalogue: {sampler} took other items than its twin")
            wanted.append(("weights", omega[same], expected[1][same]))
        exact = head_sqgrad_reference(*inputs, ids, omega) if ids is not None else closed(inputs)
        wanted += [
            ("Fisher", layer.fisher, exact[0]),
            ("bias's Fisher", layer.fisher_bias, exact[1]),
        ]
        if sampler == "sketch":
            wanted += sketched(layer, rows)
        for what, found, expected in wanted:
            error = float((found.cpu().double() - expected).abs().max() / expected.abs().max())
            if not error <= 1e-4:
                raise SystemExit(f"bench_catalogue: {what} of {sampler} is off by {error:.1e}")


def expected_items(
    sampler: str, inputs: list[Tensor], number: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    if sampler == "topk":
        p, ids, _ = softmax_topk_reference(*inputs, settings.k)
        return ids, p
    if sampler == "model":
        ids = sample_items_reference(*inputs, number, settings.k, 0)
        return ids, torch.full(ids.shape, 1 / settings.k)
    return sample_distinct_reference(*inputs, number, settings.k, 0)


def closed(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ p (1 − p) h² and Σ p (1 − p)."""
    h, weight, bias = (t.double() for t in inputs)
    p = (h @ weight.T + bias).softmax(dim=1)
    coefficient = p * (1 - p)
    return coefficient.T @ h.square(), coefficient.sum(dim=0)


def sketched(layer: Layer, rows: SoftmaxStats) -> list[tuple[str, Tensor, Tensor]]:
    """The streamed sketch, which smaller catalogues than the check's would not take."""
    arguments = layer.h, layer.weight, layer.bias, rows.lse, rows.mean, layer.number
    few = [t.cpu() for t in (layer.h[:2], layer.weight, layer.bias, layer.number[:2])]
    u, totals = ops.softmax_sketch(*arguments, PROBES, 0)
    exact_u, exact_totals = softmax_sketch_reference(*few, PROBES, 0)
    return [("sketch", u[:2], exact_u), ("sketch's sums", totals[:2], exact_totals)]


def one_pass(layer: Layer, sampler: str, k: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of the statistics, the factor and the closed form."""
    settings = layer.settings(sampler, k)
    found: dict[str, Any] = {}

    def statistics() -> None:
        found["rows"] = layer.rows(settings)

    def factor() -> None:
        found["factor"] = factor_covariance(found["rows"], settings)

    def head() -> None:
        layer.add_head(found["rows"], found["factor"])

    return [seconds(step, clock) for step in (statistics, factor, head)]


def measure(v: int, n: int, d: int, k: int, sampler: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    one_pass(Layer(300, n, d), sampler, k, clock)  # what is slow but once
    layer = Layer(v, n, d)
    layer.two_products()
    products = [seconds(layer.two_products, clock)]
    parts, extra = with_peak(lambda: one_pass(layer, sampler, k, clock))
    # The products again on the other side of what they are compared with.
    products.append(seconds(layer.two_products, clock))
    two = sum(products) / len(products)
    megabytes = 2 * layer.weight.numel() * 4 / 2**20
    sizes = (sampler, n, v, d, min(k, v))
    values = (*sizes, *parts, two, parts[2] / two, sum(parts) / two, extra, megabytes)
    return dict(zip(COLUMNS, values, strict=True))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    for name in ("sequences", "dim", "k", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: must be at least 1")
    if min(options.items) < 1:
        parser.error("--items: must be at least 1")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        check_columns("catalogue", COLUMNS)
    except InputError as error:
        raise SystemExit(f"bench_catalogue: {error}") from None
    torch.set_num_threads(options.threads)
    check(options.sequences, options.dim, options.k)
    context = multiprocessing.get_context("spawn")
    for v in options.items:
        for sampler in options.samplers:
            if sampler == "exact" and v > MOST_ITEMS_EXACT:
                continue
            sizes = v, options.sequences, options.dim, options.k
            with context.Pool(1) as pool:
                row = pool.apply(measure, (*sizes, sampler, options.threads))
            append("catalogue", [row])
            print(
                f"V={v:<9} {sampler:<8} statistics {row['statistics_s']:.2f} s  factor"
                f" {row['factor_s']:.2f} s  head {row['head_s']:.2f} s"
                f" = {row['head_over_products']:.2f} × the two products, all"
                f" {row['whole_over_products']:.2f} ×  extra {row['extra_mb']:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
