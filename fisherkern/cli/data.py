"""`fisherkern data`."""

from __future__ import annotations

from fisherkern.cli.arguments import command
from fisherkern.cli.run import Run
from fisherkern.tables import print_table


@command("data")
def data(run: Run) -> None:
    """Read a data set and show what is in it."""
    found = run.data()
    lengths = found.offsets[1:] - found.offsets[:-1]
    result = {
        "name": found.name,
        "users": found.num_users,
        "items": found.num_items,
        "actions": found.num_actions,
        "length": {
            "min": int(lengths.min()),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "attributes": None if found.attributes is None else len(found.attributes),
        "times": found.times is not None,
        "split": found.holdout.name,
        "training": int(found.holdout.train.sum()),
        "targets": {part: len(found.targets(part)[0]) for part in ("validation", "test")},
        "fingerprint": found.fingerprint(),
    }
    run.finish(run.out(f"data-{found.name}"), result)
    print_table([{"data set": name, "value": str(value)} for name, value in result.items()])
