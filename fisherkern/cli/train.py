"""`fisherkern train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fisherkern.cli.common import command, finish, load_data, out_folder, over_catalogue_of
from fisherkern.encoders import BERT4Rec, SequenceEncoder
from fisherkern.evaluation import evaluate
from fisherkern.objectives import MaskedItems
from fisherkern.training import load_model, save_model, train


def add_train(commands: Any) -> None:
    parser = command(commands, "train", _train, "train a BERT4Rec; resumes if interrupted")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--schedule", choices=["constant", "linear"], default="constant")
    parser.add_argument("--mask-ratio", type=float, default=0.2)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--norm", choices=["post", "pre"], default="post")
    parser.add_argument("--init", type=Path, help="a checkpoint to start from")


def _train(options: argparse.Namespace) -> None:
    data = load_data(options)
    out = out_folder(options, f"train-{data.name}")
    if options.init is not None:
        model: SequenceEncoder = load_model(options.init)
        data = over_catalogue_of(model, data, options.init)
    else:
        torch.manual_seed(options.seed)
        model = BERT4Rec(
            data.num_items,
            max_len=options.max_len,
            dim=options.dim,
            layers=options.layers,
            heads=options.heads,
            dropout=options.dropout,
            norm=options.norm,
        )
    log = train(
        model,
        data,
        objective=MaskedItems(options.mask_ratio),
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        schedule=options.schedule,
        seed=options.seed,
        state=out / "state.safetensors",
        progress=not options.quiet,
    )
    report = evaluate(model, data, split="validation", progress=not options.quiet)
    save_model(model, out / "model.safetensors", metrics=dict(report))
    (out / "state.safetensors").unlink(missing_ok=True)
    finish(out, options, {"losses": log.losses, "validation": report.to_json()})
    print(report.table())
    print(f"written to {out / 'model.safetensors'}")
