"""Every op on the GPU against its fp64 twin on the CPU: python benchmarks/gpu_correctness.py

`--small` keeps to shapes that finish under compute-sanitizer. Ends with status 1 and the list of
what was wrong if anything was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import fisherkern as fk
from fisherkern import ops
from fisherkern.ops.head_sqgrad import head_sqgrad_reference
from fisherkern.ops.sample_distinct import sample_distinct_reference
from fisherkern.ops.sample_items import sample_items_reference
from fisherkern.ops.segment_outer_square import segment_outer_square_reference
from fisherkern.ops.softmax_lse import softmax_lse_reference
from fisherkern.ops.softmax_moments import range_lse_reference, softmax_moments_reference
from fisherkern.ops.softmax_sketch import softmax_sketch_reference
from fisherkern.ops.softmax_topk import softmax_topk_reference

SMALL = [(3, 7, 8), (17, 257, 16), (33, 1031, 64)]
LARGE = [*SMALL, (256, 3706, 64), (64, 100_003, 128), (16, 50_000, 256)]

Check = tuple[str, Tensor, Tensor, float]


def checks(n: int, v: int, d: int, dtype: torch.dtype) -> Iterator[Check]:
    """(what, found, exact, error allowed in units of the largest entry) of every op."""
    g = torch.Generator().manual_seed(n)
    shapes = ((n, d), (v, d), (v,))
    cpu = [(0.5 * torch.randn(s, generator=g)).to(dtype) for s in shapes]
    h, weight, bias = (t.cuda() for t in cpu)
    rows = torch.arange(n)
    k = min(v, 50)
    p, ids, lse, mean = ops.softmax_topk(h, weight, bias, k)
    exact_p, exact_ids, exact_lse = softmax_topk_reference(*cpu, k)
    yield "softmax_topk p", p, exact_p, 1e-5
    yield "softmax_topk lse", lse, exact_lse, 1e-5
    few = 16  # the twin holds a number for every row, item and dimension
    exact_mean, exact_covariance = softmax_moments_reference(cpu[0][:few], *cpu[1:])
    yield "softmax_topk mean", mean[:few], exact_mean, 1e-5
    same = (ids.cpu() == exact_ids).double().mean()
    yield "softmax_topk ids", 1 - same[None], torch.zeros(1), 0.002
    lse = ops.softmax_lse(h, weight, bias)
    yield "softmax_lse", lse, softmax_lse_reference(*cpu), 1e-5
    lse, mean, ranges = ops.softmax_mean(h, weight, bias)
    yield "softmax_mean", mean[:few], exact_mean, 1e-5
    yield "softmax_mean ranges", ranges, range_lse_reference(*cpu), 1e-5
    sampled = h, weight, bias, lse, ranges, rows.cuda()
    drawn = ops.sample_items(*sampled, 20, 3)
    share = (drawn.cpu() != sample_items_reference(*cpu, rows, 20, 3)).double().mean()
    yield "sample_items", share[None], torch.zeros(1), 0.01
    drawn, _ = ops.sample_distinct(*sampled, min(v, 20), 3)
    expected, _ = sample_distinct_reference(*cpu, rows, min(v, 20), 3)
    share = (drawn.cpu() != expected).double().mean()
    yield "sample_distinct", share[None], torch.zeros(1), 0.01
    covariance = ops.softmax_covariance(h, weight, bias, lse, mean)
    yield "softmax_covariance", covariance[:few], exact_covariance, 1e-4
    u, totals = ops.softmax_sketch(h, weight, bias, lse, mean, rows.cuda(), 4, 9)
    exact_u, exact_totals = softmax_sketch_reference(*cpu, rows, 4, 9)
    yield "softmax_sketch u", u, exact_u, 1e-4
    yield "softmax_sketch totals", totals, exact_totals, 1e-4
    for sampled in (False, True):
        fisher, fisher_bias = torch.zeros(v, d).cuda(), torch.zeros(v).cuda()
        chosen = (ids, p) if sampled else (None, None)
        ops.head_sqgrad_(fisher, fisher_bias, h, weight, bias, lse, *chosen)
        on_cpu = tuple(None if t is None else t.cpu() for t in chosen)
        exact_w, exact_b = head_sqgrad_reference(*cpu, *on_cpu)
        yield f"head_sqgrad_ weight, sampled {sampled}", fisher, exact_w, 1e-4
        yield f"head_sqgrad_ bias, sampled {sampled}", fisher_bias, exact_b, 1e-4
    delta, inputs = torch.randn(2, n, 13, d, generator=g), torch.randn(n, 13, 32, generator=g)
    fisher = torch.zeros(d, 32).cuda()
    ops.segment_outer_square_(fisher, delta.cuda(), inputs.cuda())
    exact = segment_outer_square_reference(delta, inputs)
    yield "segment_outer_square_", fisher, exact, 1e-4


def whole_fisher() -> Iterator[Check]:
    """diag_fisher of a model on the GPU against the same model in float64 on the CPU."""
    torch.manual_seed(0)
    model = fk.BERT4Rec(500, max_len=20, dim=32)
    history = torch.randint(1, 501, (16, 20))
    for sampler in ("exact", "topk", "model", "sketch"):
        arguments = {"sampler": sampler, "k": 10, "probes": None, "progress": False}
        exact = fk.diag_fisher(model.double().cpu(), [history], backend="torch", **arguments)
        found = fk.diag_fisher(model.float().cuda(), [history.cuda()], **arguments)
        for name, value in exact.items():
            if not name.endswith("key.bias"):
                yield f"diag_fisher {sampler} {name}", found[name], value, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    wrong, count = [], 0
    torch.backends.cuda.matmul.allow_tf32 = False
    for shape in SMALL if options.small else LARGE:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for what, found, exact, allowed in checks(*shape, dtype):
                count += 1
                scale = max(float(exact.abs().max()), 1e-30) if exact.any() else 1.0
                error = float((found.cpu().double() - exact.double()).abs().max()) / scale
                if not error <= allowed:
                    wrong.append(f"{what} at {shape} {dtype}: error {error:.2e}")
    for what, found, exact, allowed in whole_fisher() if not options.small else []:
        count += 1
        error = float((found.cpu().double() - exact).norm() / exact.norm())
        if not error <= allowed:
            wrong.append(f"{what}: error {error:.2e}")
    print("\n".join(wrong) or f"{count} checks passed on {torch.cuda.get_device_name()}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
