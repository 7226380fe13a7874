"""The public entry point: checks, the loop over the loader, the result."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import torch

from fisherkern import processes
from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.adapters.sharded.models import sharded_fingerprint
from fisherkern.checks import check_loader, takes_numpy
from fisherkern.errors import InputError
from fisherkern.fingerprint import buffer_hashes
from fisherkern.fisher.engine import Engine
from fisherkern.fisher.first_batch import FirstBatchCheck
from fisherkern.fisher.forward.plain_run import plainly, state_kept
from fisherkern.fisher.result import DiagFisher
from fisherkern.fisher.settings import Settings
from fisherkern.fisher.sharded.engine import engine_of
from fisherkern.modes import eval_mode
from fisherkern.ops.backend import use_backend
from fisherkern.progress import progress_bar


@takes_numpy
def diag_fisher(
    model: Any,
    loader: Iterable[Any],
    *,
    sampler: str = "topk",
    k: int | None = None,
    probes: int | None = None,
    positions: str | int = "last",
    reduction: str = "sequence",
    seed: int = 0,
    tol: float | None = None,
    rescale: bool = False,
    weight: str = "probability",
    replacement: bool = True,
    chunk: int | None = None,
    backend: str = "auto",
    check: bool = True,
    progress: bool = True,
) -> DiagFisher:
    """Compute the diagonal Fisher of every trainable parameter, the mean over the sequences.

        F = (1/N) Σ_i Σ_y ω_i(y) (∂ log p_i(y) / ∂θ)²

    The square is taken per sequence and item, after the sum over positions and over all uses of
    a parameter; a tied embedding's lookup and output count as one. A scaling of your training
    loss changes nothing here. `sampler` chooses the items y and their weights ω:

    - "exact": all V items, ω = p, by min(D, V − 1) backward passes. `tol` drops the directions
      that hold at most that share of the energy, `probes` keeps a number of them.
    - "sketch": `probes` random directions whose expectation is exact. For V·D²/2 up to 2²⁸,
      half of them are the top directions of the covariance, kept exactly. Unbiased; one more
      pass over the items, for any V.
    - "topk": the k most likely items, ω = p. Underestimates by the probability mass outside
      the top k; `meta["captured_mass"]` reports the mass inside.
    - "model": k draws from p, ω = 1/k. Unbiased. With `replacement=False` the draws are
      distinct and ω = p / P(drawn): unbiased, with less noise the more of p they hold, and
      exact for k >= V.
    - "random": k uniform draws, ω = p V / k. Unbiased, noisy.
    - "target": the next item alone, ω = p, or 1 with `weight="one"` (empirical Fisher).

    Cost: min(k, D) probes go through the backward pass for the item samplers. "exact" adds
    N·V·D²/2 multiply-adds; the others pass over the items in two matrix products of N·V·D,
    "sketch" for large V in four. A model with `encode` and `head` (see `adapt`) needs these few
    probes; one known only by its logits needs V for "exact" and k for the rest.
    Where `torch.distributed` is initialised, every process calls this with the same arguments and
    gets the same result. Whole batches are dealt by their total length, so give at least a few for
    each process.
    Hooks on gradients that parameters and modules bring along, as clipping, are left aside.
    Layers without a handler fall back to per-sequence autograd: slower, equally exact, with one
    warning that names the parameter.

    Args:
        model: An nn.Module giving next-item logits (N, V) for a batch, or the result of
            `adapt`. Runs in eval mode and is left as it was.
        loader: Batches: histories (N, T) int64, mappings with "history" and "target", or
            (history, target) pairs. A list of batches will do.
        sampler: One of the six above.
        k: Items per sequence, for "topk", "model" and "random". Default: 30, or all of a smaller
            catalogue.
        probes: Backward passes, for "exact" (default: all) and "sketch" (default: 16).
        positions: "last": the prediction after the last item. "all": the mean over all
            positions, of models that predict at each: those with a label, or where a batch has
            no labels, an item. A number: so many drawn of each sequence, unbiased. Random signs
            let one backward pass serve all positions of a sequence; "exact" takes one for each.
        reduction: "sequence", or "batchwise": the paper's eq. 6, which squares the gradient
            summed over a batch. For comparison only: its scale and direction depend on the
            batch size.
        seed: Key of the random numbers, with the sequence's index in the loader; results do
            not depend on how the loader or `chunk` divides the sequences.
        tol: Share of the energy to drop, in [0, 1), for "exact". Default: none.
        rescale: Divide the captured mass out per sequence, for "topk".
        weight: "probability" or "one", for "target".
        replacement: Whether draws may repeat, for "model".
        chunk: Sequences worked on at once (default: the loader's batch). Bounds memory at about
            chunk × the activations of one sequence, one tile of logits and the gradients of
            one probe block.
        backend: "torch", "triton" or "cuda" for the ops; "auto" takes the environment's
            FISHERKERN_BACKEND, else PyTorch and, on a GPU, the kernels proven faster there.
        check: Whether to compare gradients of two sequences of the first batch with those of plain
            autograd, parameter by parameter, but for tables of more than 2²⁶ entries, whose
            gradients are too large. Costs two passes of up to 32 sequences.
        progress: Whether to show a progress bar.

    Returns:
        A mapping from the names of `model.named_parameters()` to tensors of their shapes, fp32
        or wider, with `meta`. Frozen parameters are left out.

    Raises:
        InputError: Bad arguments, an empty loader, non-finite logits, a trainable parameter
            that the logits do not depend on, or a failed check.

    Source: Ryu et al., arXiv 2307.05476, eqs. 5 to 9; distinct draws: Kool et al., ICLR 2020.
    """
    with processes.together() as same:
        settings = Settings(
            sampler,
            k,
            probes,
            seed,
            tol,
            rescale,
            weight,
            replacement,
            reduction,
            chunk,
            positions,
            check,
        ).checked()
        check_loader(loader)
        engine = engine_of(adapter := ModelAdapter.of(model), settings)
        if not engine.parameters.named:
            raise InputError("model: it has no trainable parameter")
        same |= {"settings": settings, "model": (before := sharded_fingerprint(adapter.module))}
    first_batch = FirstBatchCheck(engine)
    count, show = 0, progress and processes.rank() == 0
    bar = progress_bar(loader, desc=f"Fisher ({sampler})", unit="batch", show=show)
    in_eval = eval_mode(adapter.module, gradients=True)
    with use_backend(backend), in_eval, state_kept(adapter.module), plainly():
        with processes.together() as same:
            for batch in bar:
                count += engine.add_batch(batch, count)
                first_batch(batch)
            same["loader"] = count
        engine.join()
    if count == 0:
        raise InputError("loader: it gave no sequences")
    total = int(engine.num_positions) if engine.every else count
    if total == 0:
        raise InputError("loader: none of its positions counts")
    after = sharded_fingerprint(adapter.module)
    if before != after:
        raise InputError("model: its forward pass changes its weights, in eval mode too")
    meta = settings.meta(engine.num_items) | _meta(engine, count, total) | {"fingerprint": after}
    return DiagFisher(engine.finish(total), meta)


def _meta(engine: Engine, count: int, total: int) -> dict[str, Any]:
    """Return what `meta` says of `count` sequences with `total` positions that count."""
    sampler = engine.settings.sampler
    return {
        "probes": engine.probes or None,
        "num_sequences": count,
        "num_positions": total if engine.every else None,
        "captured_mass": float(engine.mass) / total if sampler == "topk" else None,
        "kept_energy": float(engine.kept) / total if sampler == "exact" else None,
        # Of a model whose tables are over processes nobody has a buffer whole, perhaps.
        "buffers": {} if engine.shared_out else buffer_hashes(engine.model.module),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
