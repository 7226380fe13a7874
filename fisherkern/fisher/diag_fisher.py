"""The public entry point: checks, the loop over the loader, the result."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.fingerprint import fingerprint
from fisherkern.fisher.batchwise import add_batchwise_
from fisherkern.fisher.engine import Engine
from fisherkern.fisher.result import DiagFisher
from fisherkern.fisher.samplers import SAMPLERS, Settings
from fisherkern.fisher.subject import Subject, batch_size, batch_slice, evaluation_mode
from fisherkern.ops._dispatch import use_backend
from fisherkern.progress import progress_bar

DEFAULT_SKETCH_PROBES = 16


def diag_fisher(
    model: Any,
    loader: Iterable[Any],
    *,
    sampler: str = "topk",
    k: int = 30,
    probes: int | None = None,
    reduction: str = "sequence",
    seed: int = 0,
    tol: float | None = None,
    rescale: bool = False,
    weight: str = "probability",
    replacement: bool = True,
    chunk: int | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> DiagFisher:
    """Diagonal Fisher of every trainable parameter, the mean over the loader's sequences:

        F = (1/N) Σ_i Σ_y ω_i(y) (∂ log p_i(y) / ∂θ)²

    squared per sequence and item, after summing over positions and over all uses of a
    parameter, a tied embedding's lookup and output included. `sampler` chooses the
    items y and weights ω (Ryu et al., arXiv 2307.05476, eqs. 5 to 9):

    - "exact": all V items, ω = p, by min(D, V − 1) backward passes; `tol` drops the
      directions that hold at most that share of the energy, `probes` keeps a number.
    - "sketch": `probes` (default 16) random directions whose expectation is exact;
      up to V·D²/2 = 2²⁸ half of them are the top directions of the covariance, kept
      exactly. Unbiased; one more streamed pass over the items for any V.
    - "topk": the k most likely items, ω = p. Low by the captured mass, which
      `meta["captured_mass"]` holds; `rescale` divides it out per sequence.
    - "model": k draws from p, ω = 1/k. Unbiased. With replacement=False the draws are
      distinct and ω = p / P(drawn) (Kool et al., ICLR 2020): unbiased, with less
      noise the more of p they hold, and exact for k >= V.
    - "random": k uniform draws, ω = p V / k. Unbiased, noisy.
    - "target": the next item alone, ω = p, or 1 with weight="one" (empirical Fisher).

    Probes that go through the backward pass, in blocks: min(k, D) for the item samplers.
    Beside them "exact" costs N·V·D²/2 multiply-adds; every other sampler streams over the
    items in two matrix products of N·V·D, "sketch" for large V in four. A model with `encode`
    and `head` (see `adapt`) needs those few; one known only by its logits needs V probes for
    "exact" and k for the rest.

    reduction="batchwise" is the paper's eq. 6, which squares the gradient summed over
    each batch: for comparison only, its scale and direction depend on the batch size.

    Arguments: `model`, an nn.Module giving next-item logits (N, V) for a batch, or the
    result of `adapt`; `loader`, an iterable of batches (histories (N, T) int64,
    mappings with "history" and "target", or (history, target) pairs); `chunk`, the
    number of sequences worked on at once (default: the loader's batch), which bounds
    memory at about chunk × the activations of one sequence plus one tile of logits and
    the gradients of one block of probes; `seed` keys the random numbers by (seed,
    sequence), so they do not depend on batch or chunk; `backend`, "torch", "triton" or
    "cuda" for the ops ("auto": the environment's FISHERKERN_BACKEND, else PyTorch; see
    ops/_dispatch.py). The model runs in eval mode and is left as it was.

    Returns a DiagFisher: tensors keyed as `model.named_parameters()`, fp32 or wider;
    frozen parameters are left out. Raises InputError for bad arguments, an empty
    loader, or a trainable parameter that the logits do not depend on.
    """
    if reduction not in ("sequence", "batchwise"):
        raise InputError(f"reduction: {reduction!r} is not 'sequence' or 'batchwise'")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk: must be at least 1, got {chunk}")
    settings = _settings(sampler, k, probes, seed, tol, rescale, weight, replacement)
    if reduction == "batchwise" and sampler in ("exact", "sketch"):
        raise InputError(f"reduction: 'batchwise' needs an item sampler, not {sampler!r}")
    subject = Subject.of(model)
    engine = Engine(subject, settings)
    if not engine.parameters.named:
        raise InputError("model: it has no trainable parameter")
    count = 0
    bar = progress_bar(loader, desc=f"Fisher ({sampler})", unit="batch", show=progress)
    with use_backend(backend), evaluation_mode(subject.module):
        for batch in bar:
            n = batch_size(batch)
            if reduction == "batchwise":
                _add_whole_batch(engine, batch, count, n)
            else:
                _add_chunks(engine, batch, count, n, chunk or max(n, 1))
            count += n
    if count == 0:
        raise InputError("loader: it gave no sequences")
    meta = {
        "sampler": sampler,
        "k": k if sampler in ("topk", "model", "random") else None,
        "probes": engine.probes or None,
        "reduction": reduction,
        "seed": seed,
        "tol": tol,
        "rescale": rescale,
        "weight": weight if sampler == "target" else None,
        "replacement": replacement if sampler == "model" else None,
        "num_sequences": count,
        "captured_mass": float(engine.mass) / count if sampler == "topk" else None,
        "kept_energy": float(engine.kept) / count if sampler == "exact" else None,
        "fingerprint": fingerprint(subject.module),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    return DiagFisher(engine.finish(count), meta)


def _settings(
    sampler: str,
    k: int,
    probes: int | None,
    seed: int,
    tol: float | None,
    rescale: bool,
    weight: str,
    replacement: bool,
) -> Settings:
    if sampler not in SAMPLERS:
        raise InputError(f"sampler: {sampler!r} is not one of {', '.join(SAMPLERS)}")
    if k < 1:
        raise InputError(f"k: must be at least 1, got {k}")
    if probes is not None and probes < 1:
        raise InputError(f"probes: must be at least 1, got {probes}")
    if tol is not None and not 0 <= tol < 1:
        raise InputError(f"tol: must be in [0, 1), got {tol}")
    if weight not in ("probability", "one"):
        raise InputError(f"weight: {weight!r} is not 'probability' or 'one'")
    if not replacement and sampler != "model":
        raise InputError(f"replacement: False is for sampler 'model', not {sampler!r}")
    if sampler == "sketch" and probes is None:
        probes = DEFAULT_SKETCH_PROBES
    return Settings(sampler, k, probes, seed, tol, rescale, weight, replacement)


def _add_chunks(engine: Engine, batch: Any, first: int, n: int, size: int) -> None:
    for start in range(0, n, size):
        stop = min(start + size, n)
        part = batch if size >= n else batch_slice(batch, start, stop)
        engine.add(part, _numbers(engine, first + start, first + stop))


def _add_whole_batch(engine: Engine, batch: Any, first: int, n: int) -> None:
    reached, mass = add_batchwise_(
        engine.fisher,
        engine.subject,
        engine.parameters,
        engine.settings,
        batch,
        _numbers(engine, first, first + n),
    )
    engine.reached |= reached
    if mass is not None:
        engine.mass += mass.double().sum()


def _numbers(engine: Engine, start: int, stop: int) -> Tensor:
    device = next(iter(engine.fisher.values())).device
    return torch.arange(start, stop, device=device)
