"""`fisherkern align`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fisherkern.cli.common import command, finish, out_folder
from fisherkern.merging import align
from fisherkern.training import load_model, save_model


def add_align(commands: Any) -> None:
    parser = command(commands, "align", _align, "members moved towards the first, functions kept")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument(
        "--no-rotate", action="store_true", help="outside attention heads, permute only"
    )
    parser.add_argument("--sweeps", type=int, default=100, help="at most (default: 100)")


def _align(options: argparse.Namespace) -> None:
    models = [load_model(path) for path in options.checkpoints]
    aligned = align(models, rotate=not options.no_rotate, sweeps=options.sweeps)
    out = out_folder(options, "align")
    members = []
    for number, (path, model) in enumerate(zip(options.checkpoints, aligned, strict=True), start=1):
        # Members of several runs are often all called model.safetensors.
        target = out / f"aligned-{number}.safetensors"
        report: dict[str, Any] = model.align_report  # type: ignore[assignment]
        save_model(model, target, extra={"align_report": report})
        members.append({"member": str(path), "aligned": str(target), **report})
    finish(out, options, {"members": members})
    width = max(len(member["aligned"]) for member in members)
    print(f"{'written to':<{width}}  distance before   after")
    for member in members:
        before, after = member["distance_before"], member["distance_after"]
        print(f"{member['aligned']:<{width}}  {before:15.4g} {after:7.4g}")
