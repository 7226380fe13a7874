"""`fisherkern align`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fisherkern.alignment import align
from fisherkern.alignment.align import BY
from fisherkern.cli.arguments import command
from fisherkern.cli.run import Run, over_catalogue_of
from fisherkern.encoders import SequenceEncoder
from fisherkern.objectives import MaskedItems, NextItem, Objective
from fisherkern.tables import print_table
from fisherkern.training import save_model


@command("align", align, choices={"by": BY})
def align_checkpoints(
    run: Run, checkpoints: list[Path], *, limit: int = 512, batch_size: int | None = None
) -> None:
    """Align checkpoints to the first one without changing their predictions.

    Args:
        checkpoints: model files.
        reference: number of the checkpoint that the others are aligned to.
        rotate: also rotate and flip; --no-rotate only permutes, outside attention heads.
        by: what is matched: weights; activations on histories of --data; or loss, which then
            minimises the training loss of the members' average on --data.
        limit: histories to match activations on.
        steps: training steps, by loss.
        batch_size: sequences in a batch (default: 128 by activations, 64 by loss).
    """
    names = [f"aligned-{number}.safetensors" for number, _ in enumerate(checkpoints, start=1)]
    out = run.out("align", *names)
    models = [run.model(path) for path in checkpoints]
    aligned = align(models, **{**run.of(align), **_from_data(run, models)})
    members = []
    # Numbers: members of several runs are often all called model.safetensors.
    for name, path, model in zip(names, checkpoints, aligned, strict=True):
        target = out / name
        report: dict[str, Any] = model.align_report  # type: ignore[assignment]
        run.write(save_model, model, target, extra={"align_report": report})
        members.append({"member": str(path), "aligned": str(target), **report})
    run.finish(out, {"members": members})
    _show(members)


def _show(members: list[dict[str, Any]]) -> None:
    print_table(
        [
            {
                "written to": member["aligned"],
                "distance before": member["distance_before"],
                "after": member["distance_after"],
            }
            for member in members
        ],
        digits=".4g",
    )
    for member in members:
        for group, (before, after) in member.get("agreement", {}).items():
            print(
                f"{Path(member['aligned']).name}: {group} correlates {before:.3f}, now {after:.3f}"
            )
    if "loss" in members[0]:
        before, after = members[0]["loss"]
        print(f"training loss of the average: {before:.4f} matched by weights, now {after:.4f}")


def _from_data(run: Run, models: list[SequenceEncoder]) -> dict[str, Any]:
    """Return what `align` looks at beside the weights."""
    by, reference, size = (run.values[name] for name in ("by", "reference", "batch_size"))
    if by == "weights":
        return {}
    number = reference if 0 <= reference < len(models) else 0  # `align` refuses any other
    model = models[number]
    data = over_catalogue_of(model, run.data(), run.values["checkpoints"][number])
    if by == "activations":
        how = {"batch_size": 128 if size is None else size, "limit": run.values["limit"]}
        return {"loader": run.batches(model, data, **how)}
    masks = hasattr(model, "mask_token")
    objective: Objective = MaskedItems() if masks else NextItem(last_only=not model.causal)
    windows = data.first_windows(
        max(1, run.values["steps"]),
        batch_size=64 if size is None else size,
        max_len=model.max_len + objective.lookahead,
        seed=run.seed,
    )
    return {"loader": windows, "objective": objective}
