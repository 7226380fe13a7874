"""Other libraries' models against our own, by the one-liner.

    python -m benchmarks.speed.bench_libraries

At ML-1M's size (3,706 items, T = 50, D = 64, 2 blocks), by `fk.diag_fisher(model, batches)`. The
unit is our SASRec of that size; T5's is T5 with its relative biases frozen. The two take turns in
this process, and a ratio is of two runs side by side. Histories are full, so that no padding is
left out on either side. Refuses to start unless `exact` at a small size equals autograd (the checks
of `benchmarks.libraries`).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fisherkern as fk
from benchmarks.common import append, check_columns, percentiles, seconds
from benchmarks.libraries import checks
from benchmarks.libraries.architecture import build_all
from fisherkern.encoders import SASRec

ITEMS, LENGTH, WIDTH, LAYERS = 3706, 50, 64, 2
# "cpu" counts this process's own time, for machines that others use as well.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SETTINGS: dict[str, dict[str, Any]] = {
    "topk 30": {"sampler": "topk", "k": 30},
    "sketch 8": {"sampler": "sketch", "probes": 8},
    "exact": {"sampler": "exact"},
}
COLUMNS = """model unit settings sequences T V D clock unit_ms p20_ms p50_ms p80_ms ratio ratio_low
    ratio_high""".split()
# A model, its batch, and the unit's.
Pair = tuple[Any, Any, Any, Any]


def paired(
    unit: Callable[[], Any], subject: Callable[[], Any], repeats: int, clock: str
) -> dict[str, float]:
    """Times of the two in turn after a warm-up each; the ratios of neighbours, median and range."""
    unit()
    subject()
    times = [tuple(seconds(run, CLOCKS[clock]) for run in (unit, subject)) for _ in range(repeats)]
    ratios = [ours / reference for reference, ours in times]
    return {
        "unit_ms": 1e3 * statistics.median(reference for reference, _ in times),
        **percentiles([1e3 * ours for _, ours in times]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def histories(sequences: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, ITEMS + 1, (sequences, LENGTH), generator=generator)


def own() -> SASRec:
    return SASRec(ITEMS, max_len=LENGTH, dim=WIDTH, layers=LAYERS, heads=2).eval()


def rectools(items: Tensor) -> Pair:
    import pandas as pd
    from rectools import Columns, models
    from rectools.dataset import Dataset

    from benchmarks.libraries.rectools_models import quiet_trainer

    rows = [
        (first, item, 1.0, pd.Timestamp(86400 * (30 + day), unit="s"))
        for first in range(0, ITEMS, 10)
        for day, item in enumerate(range(first, min(first + 12, ITEMS)))
    ]
    names = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    model = models.SASRecModel(
        n_factors=WIDTH,
        n_blocks=LAYERS,
        n_heads=2,
        session_max_len=LENGTH,
        get_trainer_func=quiet_trainer,
    )
    model.fit(Dataset.construct(pd.DataFrame(rows, columns=names)))
    model.torch_model.eval()
    return model, {"x": items}, own(), {"history": items}


def replay(items: Tensor) -> Pair:
    from replay.data import FeatureHint, FeatureSource, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
    from replay.nn.sequential import SasRec

    feature = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=WIDTH,
        padding_value=ITEMS,
        cardinality=ITEMS,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
    model = SasRec.from_params(
        TensorSchema([feature]),
        embedding_dim=WIDTH,
        num_heads=2,
        num_blocks=LAYERS,
        max_sequence_length=LENGTH,
    )
    mask = torch.ones_like(items, dtype=torch.bool)
    batch = {"feature_tensors": {"item_id": items - 1}, "padding_mask": mask}
    return model.eval(), batch, own(), {"history": items}


def t5(items: Tensor) -> Pair:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=ITEMS + 1,
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=WIDTH,
        num_layers=LAYERS,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    frozen = copy.deepcopy(model)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name)
    start = torch.zeros(len(items), 1, dtype=torch.int64)
    batch = {
        "input_ids": items,
        "attention_mask": torch.ones_like(items),
        "decoder_input_ids": start,
    }
    return model, batch, frozen, batch


MODELS: dict[str, tuple[Callable[[Tensor], Pair], str, str]] = {
    "RecTools SASRec": (rectools, "our SASRec", "RecTools SASRec"),
    "RePlay SasRec": (replay, "our SASRec", "RePlay SasRec"),
    "HF T5": (t5, "T5, biases frozen", "HF T5"),
}


def measure(name: str, options: argparse.Namespace) -> None:
    make, unit_name, architecture = MODELS[name]
    error = checks.fisher_error(build_all()[architecture], "exact")
    if not error < 1e-6:
        raise SystemExit(f"bench_libraries: {name} is off by {error:.1e}; stopped")
    torch.manual_seed(0)
    model, batch, unit, unit_batch = make(histories(options.sequences))
    for settings_name, settings in SETTINGS.items():
        found = paired(
            lambda s=settings: fk.diag_fisher(unit, [unit_batch], progress=False, **s),
            lambda s=settings: fk.diag_fisher(model, [batch], progress=False, **s),
            options.repeats,
            options.clock,
        )
        row = {"model": name, "unit": unit_name, "settings": settings_name}
        row |= {"sequences": options.sequences, "T": LENGTH, "V": ITEMS, "D": WIDTH}
        append("libraries_speed", [{**row, "clock": options.clock, **found}])
        low, high = found["ratio_low"], found["ratio_high"]
        print(f"{name}, {settings_name}: {found['ratio']:.2f} ({low:.2f} to {high:.2f})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the models' names")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    check_columns("libraries_speed", COLUMNS)
    for name in MODELS:
        if options.only.lower() in name.lower():
            measure(name, options)


if __name__ == "__main__":
    main()
