"""curvlinops: the exact Fisher as a linear operator, its diagonal from matrix-vector products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fisherkern as fk
from benchmarks.rivals.port import Estimate, Port, Run

# Sequences at once: all k vectors go through the network together.
CHUNK = 4


def hutchinson(model: fk.BERT4Rec) -> Run:
    """mean of v ∘ F v over random signs v."""
    from curvlinops import hutchinson_diag

    return _diagonal(model, hutchinson_diag)


def xdiag(model: fk.BERT4Rec) -> Run:
    """Epperly, Tropp and Webber's estimator, which takes an even number of products."""
    from curvlinops import xdiag

    return _diagonal(model, xdiag)


def _diagonal(model: fk.BERT4Rec, estimator: Callable[[Any, int], Tensor]) -> Run:
    from curvlinops import GGNLinearOperator

    port = Port(model).eval()
    names, parameters = zip(*port.named_parameters(), strict=True)

    def run(history: Tensor, k: int) -> Estimate:
        # The Gauss-Newton matrix of a cross entropy is the Fisher, whatever the labels.
        batches = [
            (tokens, torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device))
            for tokens in port.tokens(history).split(CHUNK)
        ]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            flat = estimator(
                GGNLinearOperator(
                    port,
                    torch.nn.CrossEntropyLoss(),
                    list(parameters),
                    batches,
                    check_deterministic=False,
                    num_data=len(history),
                ),
                k,
            )
        parts = flat.detach().split([p.numel() for p in parameters])
        found = {n: part.view_as(p) for n, p, part in zip(names, parameters, parts, strict=True)}
        return port.estimate(found)

    return run
