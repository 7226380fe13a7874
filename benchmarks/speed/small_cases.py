"""Small calls of everything that users wait for: milliseconds each, to compare revisions by.

Only public names are used, so that an earlier revision of the package runs the same calls.
`python -m pytest benchmarks/speed/test_small_cases.py` times them by pytest-benchmark,
`python -m benchmarks.speed --base REV` against a revision.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fisherkern as fk
from fisherkern import ops

# Sequences, items, width, positions, probes.
N, V, D, T, R = 64, 2000, 32, 20, 8
Call = Callable[[], Any]
CASES: dict[str, Callable[[], Call]] = {}


def case(make: Callable[[], Call]) -> Callable[[], Call]:
    """Enter `make`, which prepares a call, under its name without the leading underscore."""
    CASES[make.__name__[1:]] = make
    return make


@functools.cache
def layer() -> tuple[Tensor, Tensor, Tensor]:
    """h (N, D), W (V, D) and b (V,)."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (V,)))


def drawn() -> tuple[Tensor, ...]:
    """What the draws take: h, W, b, log-sum-exp, the ranges', rows."""
    h, weight, bias = layer()
    logits = h @ weight.T + bias
    # The log-sum-exp of every 256 items, as the ops hand it on.
    ranges = torch.stack([part.logsumexp(1) for part in logits.split(256, dim=1)], dim=1)
    return h, weight, bias, logits.logsumexp(1), ranges, torch.arange(N)


def op(name: str, *arguments: Any) -> Call:
    return functools.partial(getattr(ops, name), *arguments)


@case
def _softmax_lse() -> Call:
    return op("softmax_lse", *layer())


@case
def _softmax_topk() -> Call:
    return op("softmax_topk", *layer(), 30)


@case
def _softmax_mean() -> Call:
    return op("softmax_mean", *layer())


@case
def _softmax_covariance() -> Call:
    lse, mean = ops.softmax_mean(*layer())[:2]
    return op("softmax_covariance", *layer(), lse, mean)


@case
def _softmax_sketch() -> Call:
    lse, mean = ops.softmax_mean(*layer())[:2]
    return op("softmax_sketch", *layer(), lse, mean, torch.arange(N), R, 1)


@case
def _sample_items() -> Call:
    return op("sample_items", *drawn(), 10, 1)


@case
def _sample_distinct() -> Call:
    return op("sample_distinct", *drawn(), 10, 1)


@case
def _head_sqgrad_() -> Call:
    h, weight, bias = layer()
    lse = ops.softmax_lse(h, weight, bias)
    return op("head_sqgrad_", torch.zeros(V, D), torch.zeros(V), h, weight, bias, lse)


@case
def _segment_outer_square_() -> Call:
    delta, inputs = torch.ones(R, N, T, D), torch.ones(N, T, D)
    return op("segment_outer_square_", torch.zeros(D, D), delta, inputs)


@case
def _lookup_square_() -> Call:
    lookups = ops.lookup_segments(torch.arange(N * T).reshape(N, T) % V)
    beta, h = torch.ones(len(lookups.row), R), torch.ones(N, D)
    return op("lookup_square_", torch.zeros(V, D), torch.ones(R, N * T, D), lookups, beta, h)


@case
def _attention_backward() -> Call:
    p = torch.full((N, 2, T, T), 1 / T)
    q = torch.ones(N, T, 2, D // 2)
    return op("attention_backward", p, torch.ones(R, *q.shape), q, q, q, 0.5)


@case
def _layer_norm_backward() -> Call:
    x, rows = torch.ones(N * T, D), torch.ones(N * T)
    return op("layer_norm_backward", torch.ones(R, N * T, D), x, torch.ones(D), rows)


@functools.cache
def data() -> fk.SequenceDataset:
    return fk.synthetic(num_users=N, num_items=300, seed=0)


@functools.cache
def member(seed: int) -> fk.SASRec:
    torch.manual_seed(seed)
    return fk.SASRec(data().num_items, max_len=T, dim=D, layers=2)


def fisher(seed: int, **options: Any) -> fk.DiagFisher:
    batches = data().loader(split="train", batch_size=N, max_len=T)
    return fk.diag_fisher(member(seed), batches, progress=False, **options)


for _sampler in ("exact", "sketch", "topk", "model"):
    CASES[f"diag_fisher, {_sampler}"] = functools.partial(
        functools.partial, fisher, 0, sampler=_sampler
    )


@case
def _merge() -> Call:
    members, fishers = [member(0), member(1)], [fisher(0), fisher(1)]
    return functools.partial(fk.merge, members, fishers=fishers, item_ids=[None, None])


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """A folder with two model files and a ratings.csv, for as long as the process lives."""
    made = tempfile.TemporaryDirectory()
    for seed in range(2):
        fk.save_model(member(seed), Path(made.name) / f"{seed}.safetensors")
    rows = [f"u{i % 500},i{i * 7 % 301},{i}" for i in range(5000)]
    (Path(made.name) / "ratings.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows))
    return made


@case
def _merge_files() -> Call:
    files = Path(folder().name)
    paths = [files / "0.safetensors", files / "1.safetensors"]
    return functools.partial(fk.merge_files, paths, files / "merged.safetensors")


@case
def _evaluate() -> Call:
    return functools.partial(fk.evaluate, member(0), data())


@case
def _load() -> Call:
    return functools.partial(fk.load, Path(folder().name) / "ratings.csv")
