"""`fisherkern align`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fisherkern.alignment import align
from fisherkern.alignment.align import BY
from fisherkern.cli.common import command, finish, load_data, out_folder, over_catalogue_of
from fisherkern.encoders import SequenceEncoder
from fisherkern.objectives import MaskedItems, NextItem, Objective
from fisherkern.training import load_model, save_model


def add_align(commands: Any) -> None:
    parser = command(
        commands,
        "align",
        _align,
        "align checkpoints to the first one without changing their predictions",
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument(
        "--no-rotate", action="store_true", help="outside attention heads, permute only"
    )
    parser.add_argument("--sweeps", type=int, default=100, help="at most (default: 100)")
    parser.add_argument(
        "--by",
        choices=list(BY),
        default="weights",
        help="weights; activations: match channels that do the same on histories of --data; loss:"
        " rotate until the average of the members has a low training loss there",
    )
    parser.add_argument(
        "--limit", type=int, default=512, help="histories, by activations (default: 512)"
    )
    parser.add_argument(
        "--steps", type=int, default=500, help="of 64 windows each, by loss (default: 500)"
    )


def _align(options: argparse.Namespace) -> None:
    models = [load_model(path) for path in options.checkpoints]
    aligned = align(
        models,
        rotate=not options.no_rotate,
        sweeps=options.sweeps,
        by=options.by,
        seed=options.seed,
        **_from_data(options, models[0]),
    )
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
    for member in members:
        for group, (before, after) in member.get("agreement", {}).items():
            print(
                f"{Path(member['aligned']).name}: {group} correlates {before:.3f}, now {after:.3f}"
            )
    if "loss" in members[0]:
        before, after = members[0]["loss"]
        print(f"training loss of the average: {before:.4f} matched by weights, now {after:.4f}")


def _from_data(options: argparse.Namespace, model: SequenceEncoder) -> dict[str, Any]:
    """What `align` looks at beside the weights."""
    if options.by == "weights":
        return {}
    data = over_catalogue_of(model, load_data(options.data), options.checkpoints[0])
    if options.by == "activations":
        loader = data.loader(batch_size=128, max_len=model.max_len, limit=options.limit)
        return {"loader": loader}
    masks = hasattr(model, "mask_token")
    objective: Objective = MaskedItems() if masks else NextItem(last_only=not model.causal)
    windows = data.first_windows(
        max(1, options.steps),
        batch_size=64,
        max_len=model.max_len + objective.lookahead,
        seed=options.seed,
    )
    return {"loader": windows, "objective": objective, "steps": options.steps}
