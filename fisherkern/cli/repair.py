"""`fisherkern repair`."""

from __future__ import annotations

from pathlib import Path

from fisherkern.cli.arguments import command
from fisherkern.cli.recipe import weights_from
from fisherkern.cli.run import Run, over_catalogue_of
from fisherkern.postmerge import repair
from fisherkern.training import save_model


@command("repair", repair)
def repair_checkpoint(
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
        limit: histories of --data (default: one of each user).
        batch_size: histories in a batch.
    """
    out = run.out("repair", "repaired.safetensors")
    merged = run.model(checkpoint)
    data = over_catalogue_of(merged, run.data(), checkpoint)
    loader = run.batches(merged, data, split="train", batch_size=batch_size, limit=limit)
    models = [run.model(path) for path in members]
    given = {**run.of(repair), "members": models, "weights": weights_from(weights)}
    repaired = repair(merged, loader=loader, **given)
    path = out / "repaired.safetensors"
    about = {"merged": str(checkpoint), "members": [str(own) for own in members]}
    run.write(save_model, repaired, path, extra={"repaired": about})
    run.finish(out, {})
    print(f"written to {path}")
