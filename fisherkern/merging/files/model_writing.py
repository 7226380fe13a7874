"""A merged model of ours in a file: each process writes its rows, process 0 what is beside."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisherkern.errors import InputError
from fisherkern.files import atomic_path
from fisherkern.merging.files.card import model_card
from fisherkern.merging.files.item_ids import MergedIds
from fisherkern.merging.files.tensor_files import (
    TYPES,
    in_file_order,
    own_rows,
    raw,
    write_header,
)
from fisherkern.processes import gathered, rank, together

if TYPE_CHECKING:
    from fisherkern.merging.files.streaming import StreamingMerge


def write_model(out: Path, merge: StreamingMerge, provenance: dict[str, Any]) -> None:
    """Write the model, its JSON file if it is a model of ours, and its card, all or none.

    Completes the provenance by the hashes.
    """
    with _common_path(out) as model:
        with together():
            if rank() == 0:
                with model.open("wb") as stream:
                    write_header(stream, merge.members.layout, _metadata(merge, provenance))
        with together():
            try:
                _write_rows(model, merge)
            except OSError as error:
                reason = error.strerror or error
                raise InputError(f"{out}: could not be written: {reason}") from error
            # Before the others are waited for: they have fewer files to hash, and more rows.
            for file in merge.hashed:
                file.sha256()
        merge.read_hashes()
        provenance |= merge.identities()
        with together():
            if rank() == 0:
                with model.open("r+b") as stream:  # as long as before
                    write_header(stream, merge.members.layout, _metadata(merge, provenance))
                _write_beside(out, merge, provenance)


def _header(merge: StreamingMerge, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return what fisherkern says in the model file."""
    first = merge.members.files[0]
    header = {**first.about, "merge": provenance}
    if first.about.get("kind") == "model":
        header |= {"config": merge.members.config, "item_ids_sha256": merge.members.ids_sha256}
    return header


def _metadata(merge: StreamingMerge, provenance: dict[str, Any]) -> dict[str, str]:
    text = json.dumps(_header(merge, provenance), sort_keys=True, allow_nan=False)
    return {**merge.members.files[0].metadata, "fisherkern": text}


def _write_beside(out: Path, merge: StreamingMerge, provenance: dict[str, Any]) -> None:
    """Write the card, and the JSON of a model of ours."""
    members, first = merge.members, merge.members.files[0]
    card = model_card(out.name, _header(merge, provenance), provenance)
    with atomic_path(out.with_suffix(".md")) as beside:
        beside.write_text(card, encoding="utf-8")
        if first.about.get("kind") == "model":
            about = {
                "class": first.about.get("class"),
                "item_ids": None,
                "config": members.config,
                "metrics": provenance["metrics"],
                "extra": {"merge": provenance},
                "versions": provenance["versions"],
            }
            with atomic_path(out.with_suffix(".json")) as temporary:
                _write_about(temporary, about, members.item_ids)


@contextlib.contextmanager
def _common_path(out: Path) -> Iterator[Path]:
    """`atomic_path` of process 0 for all, which takes its name when all are done."""
    with contextlib.ExitStack() as stack:
        with together():
            own = stack.enter_context(atomic_path(out)) if rank() == 0 else None
        path = gathered(own)[0]
        yield path
        with together():
            stack.close()


def _write_rows(path: Path, merge: StreamingMerge) -> None:
    """Write this process's rows of every tensor behind the header."""
    layout = merge.members.layout
    with path.open("r+b") as stream:
        place = 8 + int.from_bytes(stream.read(8), "little")
        for name in in_file_order(layout):
            kind, shape = layout[name]
            row = TYPES[kind].itemsize * math.prod(shape[1:])
            length = shape[0] if shape else 1
            part = own_rows(len(merge.members.everything), length, merge.step(name))
            stream.seek(place + part.start * row)
            for block in merge.blocks(name, part) if part.start < part.stop else ():
                stream.write(raw(block))
            place += TYPES[kind].itemsize * math.prod(shape)


def _write_about(path: Path, about: dict[str, Any], item_ids: MergedIds | None) -> None:
    """Write the JSON beside a model, its item ids in the place of None and a piece at a time."""
    text = json.dumps(about, indent=1, allow_nan=False)
    # A word of the class before it would have its quotation marks behind backslashes.
    before, after = text.split('"item_ids": null', 1)
    with path.open("w", encoding="utf-8") as stream:
        stream.write(f'{before}"item_ids": ')
        if item_ids is None:
            stream.write("null")
        else:
            start = "["
            for ids in item_ids.pieces():
                if ids:
                    lines = json.dumps(ids, separators=(",\n  ", ": "))[1:-1]
                    stream.write(f"{start}\n  {lines}")
                    start = ","
            stream.write("[]" if start == "[" else "\n ]")
        stream.write(f"{after}\n")
