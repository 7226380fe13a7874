"""Inputs of the output layer's ops, what an op gives for them, and what it should."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.twins import Softmax
from fisherkern import ops
from fisherkern.ops import counter_rng
from fisherkern.ops.sample_distinct import sample_distinct_reference
from fisherkern.ops.softmax_lse import reference_logits

# Types of (h, weight and bias).
KINDS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.float32, torch.bfloat16),
}
OPS = (
    "softmax_lse",
    "softmax_topk",
    "softmax_mean",
    "softmax_covariance",
    "softmax_sketch",
    "sample_items",
    "sample_distinct",
    "head_sqgrad_",
)
K, DRAWN, PROBES, SEED = 50, 20, 4, 3
# The interpreter goes through them one by one.
DRY_K, DRY_DRAWN = 5, 3
GUARD = 7.0
Outputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Where draws by inversion should lie: cdf (N, V) and the uniform numbers u (N, K), fp64.

    The log-sum-exp that the ops are given is fp32, and so is off by the mass of a fair part of an
    item of 100,000: a draw may be its neighbour's, and is judged by how far u is beyond the item.
    """

    cdf: Tensor
    u: Tensor

    def beyond(self, ids: Tensor) -> float:
        """The largest mass between u and the item taken; impossible ids are infinitely far."""
        if ids.shape != self.u.shape or bool((ids < 0).any() or (ids >= self.cdf.shape[1]).any()):
            return float("inf")
        above = self.cdf.gather(1, ids)
        below = torch.where(ids > 0, self.cdf.gather(1, (ids - 1).clamp(min=0)), 0.0)
        return float(torch.maximum(below - self.u, self.u - above).clamp(min=0).max())


Wanted = dict[str, tuple["Tensor | Drawn", float]]


def walled(tensor: Tensor, before: int) -> Tensor:
    """The same numbers as rows of a larger table that is NaN around them."""
    table = tensor.new_full((before + len(tensor) + 3, *tensor.shape[1:]), torch.nan)
    part = table[before : before + len(tensor)]
    part.copy_(tensor)
    return part


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or integers that no index may be."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def made(*arguments: Any, **options: Any) -> Tensor:
            found = make(*arguments, **options)
            if found.is_floating_point():
                found.fill_(torch.nan)
            elif found.dtype in (torch.int32, torch.int64):
                found.fill_(2**30)
            return found

        return made

    places = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), make in zip(places, before, strict=True):
        setattr(owner, name, poison(make))
    try:
        yield
    finally:
        for (owner, name), make in zip(places, before, strict=True):
            setattr(owner, name, make)


@dataclasses.dataclass
class Case:
    """One output layer: h (N, D), weight (V, D), bias (V,) or None, rows' numbers (N,).

    `checked` is how many rows are compared, all by default; what an op takes beside the layer
    comes from the twin, so that an error is the op's own.
    """

    h: Tensor
    weight: Tensor
    bias: Tensor | None
    checked: int | None = None
    k: int = K
    drawn: int = DRAWN

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.h), device=self.h.device)

    def most(self, k: int) -> int:
        """k, or the number of items that are possible."""
        possible = len(self.weight)
        if self.bias is not None:
            possible = int((self.bias > -torch.inf).sum())
        return max(1, min(k, possible - 1))

    @functools.cached_property
    def exact(self) -> Softmax:
        """Of the rows compared."""
        return Softmax(self.h[: self.checked], self.weight, self.bias)

    @functools.cached_property
    def lse(self) -> Tensor:
        if self.checked is None:
            return self.exact.lse.float()
        return Softmax(self.h, self.weight, self.bias).lse.float()

    @functools.cached_property
    def mean(self) -> Tensor:
        return self._whole().mean().float()

    @functools.cached_property
    def ranges(self) -> Tensor:
        return self._whole().ranges()

    def _whole(self) -> Softmax:
        return self.exact if self.checked is None else Softmax(self.h, self.weight, self.bias)


def draw(
    kind: str,
    n: int,
    v: int,
    d: int,
    device: str,
    *,
    bias: str = "some",
    checked: int | None = None,
) -> Case:
    """A case of random numbers; `bias` is "some", "none" or "impossible" (some are −inf).

    Odd sizes start inside larger tables, where no address is a multiple of 16.
    """
    g = torch.Generator(device).manual_seed(n + v + d)
    own, item = KINDS[kind]
    h, weight, b = (
        0.5 * torch.randn(shape, generator=g, device=device) for shape in ((n, d), (v, d), (v,))
    )
    if bias == "impossible":
        b[::3] = -torch.inf
    before = int(v % 16 != 0)
    # Copies around a catalogue of gigabytes are not worth their memory.
    wall = walled if v * d < 2**28 else lambda tensor, before: tensor
    h, weight, b = (wall(t.to(dtype), before) for t, dtype in ((h, own), (weight, item), (b, item)))
    counts = (DRY_K, DRY_DRAWN) if device == "cpu" else (K, DRAWN)
    return Case(h, weight, None if bias == "none" else b, checked, *counts)


def outputs(op: str, case: Case) -> Outputs:
    """What the op gives in the backend in force, by name; a Fisher with the rows around it."""
    h, weight, bias = case.h, case.weight, case.bias
    layer = (h, weight, bias)
    if op == "softmax_lse":
        return {"lse": ops.softmax_lse(*layer)}
    if op == "softmax_topk":
        return dict(
            zip(
                ("p", "ids", "lse", "mean"),
                ops.softmax_topk(*layer, case.most(case.k)),
                strict=True,
            )
        )
    if op == "softmax_mean":
        return dict(zip(("lse", "mean", "ranges"), ops.softmax_mean(*layer), strict=True))
    if op == "softmax_covariance":
        return {"covariance": ops.softmax_covariance(*layer, case.lse, case.mean)}
    if op == "softmax_sketch":
        u, totals = ops.softmax_sketch(*layer, case.lse, case.mean, case.rows, PROBES, SEED)
        return {"u": u, "totals": totals}
    if op == "sample_items":
        given = (*layer, case.lse, case.ranges, case.rows)
        return {"items": ops.sample_items(*given, case.most(case.drawn), SEED)}
    if op == "sample_distinct":
        given = (*layer, case.lse, case.ranges, case.rows)
        items, omega = ops.sample_distinct(*given, case.most(case.drawn), SEED)
        return {"items": items, "omega": omega}
    assert op == "head_sqgrad_", op
    found = _head(case, None, None)
    ids, omega = sampled(case)
    return found | {f"{name}, sampled": t for name, t in _head(case, ids, omega).items()}


def sampled(case: Case) -> tuple[Tensor, Tensor]:
    """Items (N, 3), one of which every row has, and their weights."""
    g = torch.Generator(case.h.device).manual_seed(1)
    v, shape, device = len(case.weight), (len(case.h), 3), case.h.device
    ids = torch.randint(0, v, shape, generator=g, device=device)
    ids[:, 1] = v // 2
    return ids, torch.rand(shape, generator=g, device=device)


def _head(case: Case, ids: Tensor | None, omega: Tensor | None) -> Outputs:
    """Both Fishers, each a part of a larger table whose other rows must stay as they are."""
    v, d = case.weight.shape
    table = torch.full((v + 2, d), GUARD, device=case.h.device)
    line = torch.full((v + 2,), GUARD, device=case.h.device)
    weight, bias = table[1:-1].zero_(), line[1:-1].zero_()
    ops.head_sqgrad_(weight, bias, case.h, case.weight, case.bias, case.lse, ids, omega)
    around = torch.cat((table[[0, -1]].flatten(), line[[0, -1]]))
    return {"weight": weight, "bias": bias, "guard rows": around}


def wanted(op: str, case: Case) -> Wanted:
    """By name: the float64 numbers, and the error allowed.

    Of floats it is a share of the largest number, of ids the share that may differ: next to a
    tie rounding decides. Of independent draws it is mass: see `Drawn`.
    """
    exact, h, rows = case.exact, case.h[: case.checked], case.rows[: case.checked]
    layer = (h, case.weight, case.bias)
    if op == "softmax_lse":
        return {"lse": (exact.lse, 1e-5)}
    if op == "softmax_topk":
        p, ids = exact.topk(case.most(case.k))
        more = {"lse": (exact.lse, 1e-5), "mean": (exact.mean(), 1e-5)}
        return {"p": (p, 1e-5), "ids": (ids, 0.002)} | more
    if op == "softmax_mean":
        more = {"ranges": (exact.ranges(), 1e-5)}
        return {"lse": (exact.lse, 1e-5), "mean": (exact.mean(), 1e-5)} | more
    if op == "softmax_covariance":
        return {"covariance": (exact.covariance(), 1e-4)}
    if op == "softmax_sketch":
        u, totals = exact.sketch(rows, PROBES, SEED)
        return {"u": (u, 1e-4), "totals": (totals, 1e-4)}
    if op == "sample_items":
        cdf = reference_logits(*layer).softmax(dim=1).cumsum(dim=1)
        u = counter_rng.uniform(SEED, rows, torch.arange(case.most(case.drawn), device=h.device))
        return {"items": (Drawn(cdf, u), 4e-6)}
    if op == "sample_distinct":
        items, omega = sample_distinct_reference(*layer, rows, case.most(case.drawn), SEED)
        return {"items": (items, 0.01), "omega": (omega, 1e-3)}
    ids, omega = sampled(case)
    whole = case.exact if case.checked is None else Softmax(case.h, case.weight, case.bias)
    pairs = zip(("weight", "bias", "weight, sampled", "bias, sampled"),
                (*whole.head(), *whole.head(ids, omega)), strict=True)  # fmt: skip
    found: Wanted = {name: (tensor, 1e-4) for name, tensor in pairs}
    guard = torch.full((2 * case.weight.shape[1] + 2,), GUARD, dtype=torch.float64)
    guard = guard.to(case.h.device)
    return found | {"guard rows": (guard, 0.0), "guard rows, sampled": (guard, 0.0)}


def of_allowed(
    found: Tensor, exact: Tensor | Drawn, allowed: float, same: Tensor | None = None
) -> float:
    """The error in units of what is allowed: at most 1 is right. NaN is infinitely wrong.

    `same`, boolean of the results' shape, leaves out what need not be compared.
    """
    if isinstance(exact, Drawn):
        return exact.beyond(found[: len(exact.u)]) / allowed
    found = found[: len(exact)]
    if found.shape != exact.shape:
        return float("inf")
    if not exact.is_floating_point():
        error = float((found != exact).double().mean()) if exact.numel() else 0.0
    elif exact.numel() == 0:
        error = 0.0
    else:
        off = (found.double() - exact).abs()
        if same is not None:
            off = torch.where(same, off, 0.0)
        error = float(off.max()) / max(float(exact.abs().max()), 1e-30)
    if error != error:
        return float("inf")
    return error / allowed if allowed else (float("inf") if error else 0.0)
