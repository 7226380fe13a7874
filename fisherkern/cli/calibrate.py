"""`fisherkern calibrate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fisherkern.cli.arguments import command
from fisherkern.cli.recipe import weights_from
from fisherkern.cli.run import Run, over_catalogue_of
from fisherkern.encoders import SequenceEncoder
from fisherkern.merging import calibrate
from fisherkern.training import save_model


@command("calibrate", calibrate)
def calibrate_checkpoint(
    run: Run,
    checkpoint: Path,
    *,
    members: list[Path],
    weights: str | None = None,
    batch_size: int = 128,
) -> None:
    """Train low-rank corrections that move a merged model's representations to its members'.

    Args:
        checkpoint: the merged model.
        members: the models it was merged from.
        weights: one number per member, comma-separated (default: equal).
        version: 1 corrects the final state, 2 also after every Transformer block.
        targets: numbers of the members to move towards (default: all).
        rank: of a correction.
        steps: of Adam.
        lr: learning rate of Adam.
        batch_size: histories in a batch.
    """
    data = run.data()
    merged = run.model(checkpoint)

    def histories(model: SequenceEncoder) -> Iterable[Any]:
        own = over_catalogue_of(model, data, checkpoint)
        return run.batches(model, own, split="train", batch_size=batch_size)

    models = [run.model(path) for path in members]
    given = {**run.of(calibrate), "members": models, "weights": weights_from(weights)}
    calibrated = calibrate(merged, loader=histories, **given)
    out = run.out("calibrate")
    path = out / "calibrated.safetensors"
    save_model(calibrated, path, extra={"losses": calibrated.losses})
    run.finish(out, {"losses": calibrated.losses})
    if calibrated.losses:
        print(f"distance to the members: {calibrated.losses[0]:.4g} before the first step,")
        print(f"                         {calibrated.losses[-1]:.4g} before the last")
    print(f"written to {path}")
