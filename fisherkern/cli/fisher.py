"""`fisherkern fisher`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fisherkern.cli.common import command, finish, load_data, out_folder, over_catalogue_of
from fisherkern.fisher import diag_fisher
from fisherkern.fisher.settings import SAMPLERS
from fisherkern.training import load_model


def add_fisher(commands: Any) -> None:
    parser = command(commands, "fisher", _fisher, "the diagonal Fisher of a checkpoint")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sampler", default="topk", metavar="|".join(SAMPLERS))
    parser.add_argument("--k", type=int, default=30, help="items per sequence")
    parser.add_argument("--probes", type=int, help="directions of sketch and exact")
    parser.add_argument("--reduction", choices=["sequence", "batchwise"], default="sequence")
    parser.add_argument("--rescale", action="store_true", help="divide by the captured mass")
    parser.add_argument("--tol", type=float, help="share of the energy that exact may drop")
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--chunk", type=int, help="sequences worked on at once")
    parser.add_argument("--limit", type=int, help="only so many sequences, evenly spread")


def _fisher(options: argparse.Namespace) -> None:
    model = load_model(options.checkpoint)
    data = over_catalogue_of(model, load_data(options.data), options.checkpoint)
    loader = data.loader(
        split=options.split,
        batch_size=options.batch_size,
        max_len=model.max_len,
        limit=options.limit,
    )
    found = diag_fisher(
        model,
        loader,
        sampler=options.sampler,
        k=options.k,
        probes=options.probes,
        reduction=options.reduction,
        seed=options.seed,
        tol=options.tol,
        rescale=options.rescale,
        chunk=options.chunk,
        progress=not options.quiet,
    )
    out = out_folder(options, f"fisher-{options.checkpoint.stem}")
    path = out / f"{options.checkpoint.stem}.fisher.safetensors"
    found.save(path)
    largest = {name: float(value.max()) for name, value in found.items()}
    mean = {name: float(value.mean()) for name, value in found.items()}
    finish(out, options, {"meta": found.meta, "mean": mean, "max": largest})
    width = max(map(len, found))
    print(f"{'parameter':<{width}}  {'mean':>10}  {'max':>10}")
    for name in found:
        print(f"{name:<{width}}  {mean[name]:10.3e}  {largest[name]:10.3e}")
    print(f"written to {path}")
