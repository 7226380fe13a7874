"""`fisherkern recalibrate`."""

from __future__ import annotations

from pathlib import Path

from fisherkern.cli.arguments import command
from fisherkern.cli.recipe import weights_from
from fisherkern.cli.run import Run, over_catalogue_of
from fisherkern.merging import recalibrate
from fisherkern.training import save_model


@command("recalibrate", recalibrate)
def recalibrate_checkpoint(
    run: Run,
    checkpoint: Path,
    *,
    members: list[Path],
    weights: str | None = None,
    limit: int | None = None,
    batch_size: int = 256,
) -> None:
    """Refit a merged model's layer norms to its members' statistics, at no cost in inference.

    Args:
        checkpoint: the merged model.
        members: the models it was merged from.
        weights: one number per member, comma-separated (default: equal).
        modules: names of the layer norms to refit (default: all).
        limit: histories of --data (default: one of each user).
        batch_size: histories in a batch.
    """
    merged = run.model(checkpoint)
    data = over_catalogue_of(merged, run.data(), checkpoint)
    loader = run.batches(merged, data, split="train", batch_size=batch_size, limit=limit)
    models = [run.model(path) for path in members]
    given = {**run.of(recalibrate), "members": models, "weights": weights_from(weights)}
    recalibrated = recalibrate(merged, loader=loader, **given)
    out = run.out("recalibrate")
    path = out / "recalibrated.safetensors"
    about = {"merged": str(checkpoint), "members": [str(own) for own in members]}
    save_model(recalibrated, path, extra={"recalibrated": about})
    run.finish(out, {})
    print(f"written to {path}")
