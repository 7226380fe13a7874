"""`fisherkern data`."""

from __future__ import annotations

import argparse
from typing import Any

from fisherkern.cli.common import command, finish, load_data, out_folder


def add_data(commands: Any) -> None:
    command(commands, "data", _data, "read a data set and say what is in it")


def _data(options: argparse.Namespace) -> None:
    data = load_data(options.data)
    lengths = data.offsets[1:] - data.offsets[:-1]
    result = {
        "name": data.name,
        "users": data.num_users,
        "items": data.num_items,
        "actions": data.num_actions,
        "length": {
            "min": int(lengths.min()),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "attributes": None if data.attributes is None else len(data.attributes),
        "fingerprint": data.fingerprint(),
    }
    finish(out_folder(options, f"data-{data.name}"), options, result)
    for name, value in result.items():
        print(f"{name:<12} {value}")
