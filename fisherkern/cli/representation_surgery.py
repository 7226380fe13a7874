"""`fisherkern representation-surgery`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fisherkern.cli.arguments import command
from fisherkern.cli.recipe import weights_from
from fisherkern.cli.run import Run, check_most, over_catalogue_of
from fisherkern.encoders import SequenceEncoder
from fisherkern.postmerge import representation_surgery
from fisherkern.training import save_model


@command("representation-surgery", representation_surgery)
def correct_checkpoint(
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
        batch_size: histories in a batch.
    """
    check_most("rank", run.values["rank"])
    out = run.out("representation-surgery", "corrected.safetensors")
    data = run.data()
    merged = run.model(checkpoint)

    def histories(model: SequenceEncoder) -> Iterable[Any]:
        own = over_catalogue_of(model, data, checkpoint)
        return run.batches(model, own, split="train", batch_size=batch_size)

    models = [run.model(path) for path in members]
    given = {**run.of(representation_surgery), "members": models, "weights": weights_from(weights)}
    corrected = representation_surgery(merged, loader=histories, **given)
    path = out / "corrected.safetensors"
    run.write(save_model, corrected, path, extra={"losses": corrected.losses})
    run.finish(out, {"losses": corrected.losses})
    if corrected.losses:
        print(f"distance to the members: {corrected.losses[0]:.4g} before the first step,")
        print(f"                         {corrected.losses[-1]:.4g} before the last")
    print(f"written to {path}")
