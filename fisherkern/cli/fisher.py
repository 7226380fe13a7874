"""`fisherkern fisher`."""

from __future__ import annotations

from pathlib import Path

from fisherkern.cli.arguments import command
from fisherkern.cli.run import BEST_DEVICE, Run, over_catalogue_of
from fisherkern.fisher import diag_fisher
from fisherkern.tables import print_table


@command(
    "fisher",
    diag_fisher,
    choices={"reduction": ("sequence", "batchwise"), "weight": ("probability", "one")},
)
def fisher(
    run: Run,
    checkpoint: Path,
    *,
    split: str = "train",
    batch_size: int = 256,
    limit: int | None = None,
    device: str = BEST_DEVICE,
) -> None:
    """Compute the diagonal Fisher of a checkpoint.

    Args:
        checkpoint: a model file.
        split: train, validation or test: the histories.
        batch_size: sequences in a batch.
        limit: only this many sequences, evenly spread.
        device: cpu, cuda or cuda:1.
    """
    path = run.out(f"fisher-{checkpoint.stem}", f"{checkpoint.stem}.fisher.safetensors")
    path /= f"{checkpoint.stem}.fisher.safetensors"
    model = run.model(checkpoint)
    data = over_catalogue_of(model, run.data(), checkpoint)
    loader = run.batches(model, data, split=split, batch_size=batch_size, limit=limit)
    found = diag_fisher(model, loader, **run.of(diag_fisher))
    found.save(path)
    largest = {name: float(value.max()) for name, value in found.items()}
    mean = {name: float(value.mean()) for name, value in found.items()}
    run.finish(path.parent, {"meta": found.meta, "mean": mean, "max": largest})
    rows = [{"parameter": name, "mean": mean[name], "max": largest[name]} for name in found]
    print_table(rows, digits=".3e")
    print(f"written to {path}")
