"""`model`, with and without replacement, `random` and `sketch` have the exact Fisher as their
expectation.
"""

from __future__ import annotations

import brute
import pytest
import torch
from models import HISTORIES, bert

from fisherkern.adapters.adapter import ModelAdapter
from fisherkern.fisher.engine import Engine
from fisherkern.fisher.settings import Settings

SEEDS = 120


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "sampler, streamed",
    [("model", 0), ("distinct", 0), ("random", 0), ("sketch", 0), ("sketch", 1)],
)
def test_mean_over_seeds_is_exact(
    sampler: str, streamed: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over seeds lies inside its own standard error of the exact Fisher.

    The engine's sums are looked at before `finish`, which holds them above zero.
    """
    if streamed:
        monkeypatch.setattr("fisherkern.fisher.factors.samplers._COVARIANCE_LIMIT", 0)
    model = bert(tied, layers=1)
    histories = HISTORIES[:3]
    p, gradients = brute.all_gradients(model, histories)
    exact = brute.fisher(gradients, p)
    replacement, sampler = sampler != "distinct", "model" if sampler == "distinct" else sampler
    draws: dict[str, list[torch.Tensor]] = {name: [] for name in exact}
    for seed in range(SEEDS):
        engine = Engine(
            ModelAdapter.of(model),
            Settings(sampler, 4, 3, seed, None, False, "probability", replacement),
        )
        engine.add_batch(histories, 0)
        for name, total in engine.fisher.items():
            draws[name].append(total / 3)
    for name, value in exact.items():
        sample = torch.stack(draws[name])
        error = sample.mean(0) - value.flatten()
        standard_error = sample.std(0) / SEEDS**0.5
        # Entries that hardly vary are compared to rounding; the rest to 5 standard errors.
        allowed = 5 * standard_error + 1e-9 * float(value.abs().max()) + 1e-25
        assert (error.abs() <= allowed).all(), name
        # A bias of a tenth would be noticed in the tensor's sum.
        if not name.endswith("key.bias"):
            spread = float(sample.sum(1).std() / SEEDS**0.5)
            assert spread < 0.2 * float(value.sum()), name
