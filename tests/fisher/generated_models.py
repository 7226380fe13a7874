"""Small random recommenders from a seed, and their Fishers against brute force.

python -m tests.fisher.generated_models --models 2000
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import brute

import fisherkern as fk
from fisher.generated_blocks import Around, HandsOn, Head, Reading, block
from fisher.generated_pieces import ITEMS, LENGTH, Lookup, Positions

# Of the largest entry of a parameter's Fisher.
TOLERANCE = 1e-8


class Recommender(nn.Module):
    """A model whose pieces a generator draws."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.lookup = Lookup(rng)
        self.positions = Positions(rng)
        self.blocks = nn.ModuleList([block(rng) for _ in range(rng.choice([0, 1, 1, 2, 2, 3]))])
        if self.blocks and rng.random() < 0.15:
            self.blocks.append(self.blocks[0])
        self.reading = Reading(rng)
        self.head_layer = Head(rng)

    def states(self, ids: Tensor) -> Tensor:
        """h (N, D)."""
        x = self.positions(self.lookup(ids), ids)
        for own in self.blocks:
            x = own(x, ids)
        return self.reading(x, ids)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head_layer(self.states(ids), self.lookup)

    def __repr__(self) -> str:
        """The kinds of the pieces, in a line."""
        kinds = [(type(m).__name__, m.kind) for m in self.modules() if hasattr(m, "kind")]
        return " ".join(f"{name}:{kind}" for name, kind in kinds)


class SplitRecommender(Recommender):
    """The same with its encoder and head as methods."""

    def encode(self, ids: Tensor) -> Tensor:
        return self.states(ids)

    def head(self) -> tuple[Tensor, Tensor | None]:
        parts = self.head_layer.parts_of(self.lookup)
        assert parts is not None
        return parts


def generated(seed: int) -> tuple[nn.Module, nn.Module, list[Tensor], dict[str, Any], str]:
    """(The model as a user holds it, the bare one, batches, settings, what it is) of a seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Recommender(rng)
    split = rng.random() < 0.25 and model.head_layer.parts_of(model.lookup) is not None
    if split:
        model.__class__ = SplitRecommender
    model.double()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    model.train(rng.random() < 0.5)
    wrapper = rng.choices(["none", "parallel", "compiled", "hands_on"], [6, 1, 0.5, 1])[0]
    held: Any = model
    if wrapper == "parallel":
        held = nn.DataParallel(model)
    elif wrapper == "compiled":
        held = torch.compile(model, backend="eager")
    elif wrapper == "hands_on":
        held = HandsOn(model)
    n, t = rng.choice([1, 2, 3, 4, 4, 5]), rng.choice([1, 3, 4, 4, LENGTH])
    ids = torch.randint(1, ITEMS + 1, (n, t))
    if rng.random() < 0.6:
        for row in ids[:-1]:
            row[: rng.randrange(t)] = 0
    batches = [ids] if rng.random() < 0.7 or n == 1 else [ids[:1], ids[1:]]
    settings = {"chunk": rng.choice([None, None, 1, 2]), "sampler": "exact"}
    return held, model, batches, settings, f"{wrapper}{' split' if split else ''} {model!r}"


def outcome(seed: int) -> tuple[str, str]:
    """What became of a seed's model: ("equal" or "refused" or a fault, what is said of it)."""
    held, model, batches, settings, text = generated(seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    refused = fault = None
    fisher: Any = {}
    try:
        fisher = fk.diag_fisher(held, batches, progress=False, **settings)
    except fk.InputError as error:
        refused = str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__}: {str(error)[:200]} at {where.filename}:{where.lineno}"
    if fault is not None:
        return "exception", f"{fault} | {text}"
    if [module.training for module in model.modules()] != modes:
        return "mode", text
    after = model.state_dict()
    if refused is None and any(not torch.equal(after[name], before[name]) for name in before):
        return "changed", text
    if refused is not None:
        return "refused", f"{refused[:160]} | {text}"
    return _compared(fisher, model, torch.cat(batches), text)


def _compared(fisher: Any, model: nn.Module, ids: Tensor, text: str) -> tuple[str, str]:
    model.eval()
    for own in model.modules():
        if isinstance(own, Around) and own.kind == "checkpoint_reentrant":
            own.kind = "residual"  # the same function, and one with gradients that can be asked for
    p, gradients = brute.near_gradients(model, ids)
    expected = brute.fisher(gradients, p)
    if {name.removeprefix("model.") for name in fisher} != set(expected):
        return "names", f"{sorted(set(fisher) ^ set(expected))} | {text}"
    scale = max(float(value.max()) for value in expected.values())
    for given, value in fisher.items():
        true = expected[given.removeprefix("model.")]
        gap = float((value - true).abs().max())
        # A tensor whose Fisher is zero but for rounding has no largest entry of its own.
        largest = max(float(true.max()), 1e-12 * scale)
        if not gap <= TOLERANCE * largest:
            return "silent", f"{given}: {gap / largest:.1e} off | {text}"
    return "equal", text


def run(first: int, models: int) -> dict[str, list[tuple[int, str]]]:
    """The outcomes of so many seeds, by kind."""
    outcomes: dict[str, list[tuple[int, str]]] = {}
    log = logging.getLogger("fisherkern")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(first, first + models):
            kind, text = outcome(seed)
            outcomes.setdefault(kind, []).append((seed, text))
    log.setLevel(level)
    return outcomes


def main() -> int:
    """Run many models and print what is neither equal nor refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--refused", action="store_true", help="print what is refused as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    outcomes = run(arguments.first, arguments.models)
    for kind, found in outcomes.items():
        if kind != "equal" and (kind != "refused" or arguments.refused):
            for seed, text in found:
                print(f"{kind} {seed}: {text}")
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in sorted(outcomes.items()))
    print(f"{arguments.models} models in {time.perf_counter() - start:.0f} s: {counts}")
    return int(bool(set(outcomes) - {"equal", "refused"}))


if __name__ == "__main__":
    sys.exit(main())
