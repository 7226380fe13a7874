"""A folder of results that an interrupted experiment goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError
from fisherkern.files import read_json, write_json
from fisherkern.fisher import DiagFisher
from fisherkern.training import load_model, save_model


class Workspace:
    """Stages by name, each made once: a stage whose file exists is read instead.

    `config` is everything the results depend on; a folder that holds another
    config's results is refused rather than mixed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        path = folder / "config.json"
        if not path.exists():
            write_json(path, dict(config))
        elif (found := read_json(path)) != dict(config):
            differing = sorted(
                key for key in {*found, *config} if found.get(key) != config.get(key)
            )
            raise InputError(
                f"{path}: holds a run with other settings ({', '.join(differing)});"
                " choose another --out"
            )

    def path(self, name: str) -> Path:
        """The path of a file in the folder."""
        return self.folder / name

    def model(self, name: str, build: Callable[[], SequenceEncoder]) -> SequenceEncoder:
        """The model `name`.safetensors, built and saved, with its merge report, when absent."""
        path = self.path(f"{name}.safetensors")
        if not path.exists():
            model = build()
            report = getattr(model, "merge_report", None)
            save_model(model, path, extra={} if report is None else {"merge_report": report})
        return load_model(path)

    def about(self, name: str) -> dict[str, Any]:
        """What was saved beside the model `name`."""
        return read_json(self.path(f"{name}.json"))["extra"]

    def fisher(self, name: str, build: Callable[[], DiagFisher]) -> DiagFisher:
        """The Fisher `name`.fisher.safetensors, computed and saved when absent."""
        path = self.path(f"{name}.fisher.safetensors")
        if not path.exists():
            build().save(path)
        return DiagFisher.load(path)

    def json(self, name: str, build: Callable[[], Any]) -> Any:
        """The JSON value `name`.json, computed and saved when absent."""
        path = self.path(f"{name}.json")
        if not path.exists():
            write_json(path, build())
        return read_json(path)
