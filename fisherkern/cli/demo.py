"""`fisherkern demo`."""

from __future__ import annotations

from pathlib import Path

from fisherkern import demo
from fisherkern.cli.arguments import command
from fisherkern.cli.run import Run
from fisherkern.errors import InputError
from fisherkern.files import atomic_path, read_json, write_json


@command("demo")
def show_demo(run: Run, *, data: str = "synthetic", threads: int = 1) -> None:
    """Merge three models of made-up data, in minutes.

    Args:
        data: synthetic, ml-1m, beauty, or a file.
        threads: CPU threads; the tensors are small, so a second one mostly waits.
    """
    sequences = run.data()
    folder = run.values["out"] or Path("runs/demo")
    begun = (folder / "config.json").exists()  # which says below whose run it is
    out = run.out("demo", *(() if begun else ("config.json", "merged.safetensors", "table.md")))
    settings = {"data_fingerprint": sequences.fingerprint(), "seed": run.seed}
    path = out / "config.json"
    if path.exists() and read_json(path) != settings:
        raise InputError(
            f"{path}: holds a run with other data or another seed; choose another --out"
        )
    write_json(path, settings)
    result = demo.run(sequences, out, seed=run.seed, progress=run.progress)
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(f"{result['table']}\n", encoding="utf-8")
    print(result.pop("table"))
    run.finish(out, result)
    print(f"\nwritten to {out}: merged.safetensors ({result['merged']}), result.json, table.md")
