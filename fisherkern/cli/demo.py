"""`fisherkern demo`."""

from __future__ import annotations

import argparse
from typing import Any

from fisherkern import demo
from fisherkern.cli.common import command, finish, load_data, out_folder
from fisherkern.errors import InputError
from fisherkern.files import atomic_path, read_json, write_json


def add_demo(commands: Any) -> None:
    parser = command(commands, "demo", _demo, "merge three models of made-up data, in minutes")
    # Its tensors are small: a second thread mostly waits for the first.
    parser.set_defaults(data="synthetic", threads=1)


def _demo(options: argparse.Namespace) -> None:
    data, out = load_data(options.data), out_folder(options, "demo")
    settings = {"data_fingerprint": data.fingerprint(), "seed": options.seed}
    path = out / "config.json"
    if path.exists() and read_json(path) != settings:
        raise InputError(
            f"{path}: holds a run with other data or another seed; choose another --out"
        )
    write_json(path, settings)
    result = demo.run(data, out, seed=options.seed, progress=not options.quiet)
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(f"{result['table']}\n", encoding="utf-8")
    print(result.pop("table"))
    finish(out, options, result)
    print(f"\nwritten to {out}: merged.safetensors ({result['merged']}), result.json, table.md")
