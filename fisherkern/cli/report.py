"""`fisherkern report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fisherkern.cli.arguments import command
from fisherkern.cli.claims import MODEL_ENDINGS, result_path
from fisherkern.cli.run import BEST_DEVICE, Run, on_validation, over_catalogue_of
from fisherkern.data import SequenceDataset, load
from fisherkern.data.batching import evenly_spread
from fisherkern.documents import MAX_SETTINGS
from fisherkern.errors import InputError
from fisherkern.evaluation import evaluate
from fisherkern.files import atomic_path, is_file, read_json
from fisherkern.merging import preflight
from fisherkern.report import (
    METRIC,
    Findings,
    merge_page,
    read_result,
    user_groups,
    weight_plane,
)
from fisherkern.tables import print_table


@command("report", choices={"split": ("test", "validation")})
def report_merge(
    run: Run,
    folder: Path,
    *,
    out: Path | None = None,
    split: str = "test",
    barriers: bool = False,
    plane: int | None = None,
    batch_size: int = 256,
    device: str = BEST_DEVICE,
) -> None:
    """Write one HTML page of a merge: who its members are, and whether it helped and for whom.

    Args:
        folder: the --out of `fisherkern merge`. Without --data the page shows what is there.
        out: the page, ending in .html, or its folder (default: report.html in the merge's folder).
        split: what --data is measured on.
        barriers: also measure models on the lines between the members, on validation.
        plane: also measure 81 models on the plane through the first three members, for so many
            users of validation.
        batch_size: users ranked at once.
        device: cpu, cuda or cuda:1.
    """
    if barriers and run.values["data"] is None:
        raise InputError("--barriers: are measured on data; name --data")
    if plane is not None and (plane < 1 or run.values["data"] is None):
        raise InputError("--plane: a number of users of --data, at least 1")
    result = read_result(result_path(folder, "merge"))
    if plane is not None and len(result.members) < 3:
        raise InputError(f"--plane: goes through three members; there are {len(result.members)}")
    path = out if out is not None and out.suffix == ".html" else (out or folder) / "report.html"
    places = [folder / f"merged{ending}" for ending in ("", *MODEL_ENDINGS)]
    found = Findings(result, next((place for place in places if place.exists()), None))
    named = (*result.members, *result.used.fishers)
    inputs = [Path(name) for name in named if os.path.exists(name)]  # noqa: PTH110  # any text
    target = run.out("report", path.name, folder=path.parent, inputs=inputs)
    if run.values["data"] is not None:
        data = run.data()
        _measure(run, found, data)
        if barriers:
            models = [run.model(path) for path in found.members]
            score = lambda model: on_validation(model, data, batch_size)[METRIC]  # noqa: E731
            found.paths = preflight(models, score=score).paths or []
        if plane is not None:
            found.plane = _plane(run, found, data, plane)
    text = merge_page(found)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    reports = {name: report.to_json() for name, report in found.reports.items()}
    run.finish(target, {"page": str(path), "reports": reports, "best_member": found.best})
    if found.reports:
        print_table([{"model": name, METRIC: own[METRIC]} for name, own in found.reports.items()])
    print(f"written to {path}")


def _plane(run: Run, found: Findings, data: SequenceDataset, users: int) -> dict[str, Any]:
    """Measure the plane through the first three members."""
    first = list(zip(found.names, found.members, strict=True))[:3]
    members = {name: run.model(path) for name, path in first}
    assert found.merged is not None
    chosen, size = evenly_spread(data.num_users, users), run.values["batch_size"]

    def score(model: Any) -> float:
        return on_validation(model, data, size, users=chosen, progress=False)[METRIC]

    fishers = dict(zip(members, found.fishers, strict=False))
    return weight_plane(members, {"merge": run.model(found.merged)}, score, fishers=fishers)


def _measure(run: Run, found: Findings, data: SequenceDataset) -> None:
    """Measure the merge, which must be there, and the members that can be."""
    if found.merged is None:
        raise InputError(f"{run.values['folder']}: holds no merged model to measure on --data")
    size, best = run.values["batch_size"], -1.0
    files = {"merge": found.merged, **dict(zip(found.names, found.members, strict=True))}
    for name, path in files.items():
        try:
            model = run.model(path)
            score = on_validation(model, data, size)[METRIC]
            view = over_catalogue_of(model, data, path)
            found.reports[name] = evaluate(
                model, view, split=run.values["split"], batch_size=size, progress=run.progress
            )
        except InputError as error:
            if name == "merge":
                raise
            found.notes.append(f"Member {name} was not measured: {error}.")
            continue
        if name == "merge":
            groups = user_groups(view, found.reports[name])
        elif score > best:
            found.best, best = name, score
    if found.best is not None and not isinstance(found.against(found.best), str):
        for title, masks in groups.items():
            for label, mask in masks.items():
                found.add_group(title, label, found.best, mask)
    for name, path in zip(found.names, found.members, strict=True):
        own = _trained_on(run, path, data)
        if own is not None and not isinstance(found.against(name), str):
            users = own[found.reports["merge"].users]
            found.add_group("the members' own users", f"of member {name}", name, users)


def _trained_on(run: Run, path: Path, data: SequenceDataset) -> np.ndarray | None:
    """(num_users,) bool, users of a member's training; None where they are not known, or are all.

    Known from the result of `fisherkern train` beside the member.
    """
    try:
        result = result_path(path.parent, "train")
        known = path.name == "model.safetensors" and is_file(result)
        arguments = read_json(result, MAX_SETTINGS)["arguments"] if known else {}
        if not isinstance(arguments.get("data"), str):
            return None
        how = {name: arguments[name] for name in run.data_arguments if name in arguments}
        mask = np.isin(data.user_ids, load(arguments["data"], **how).user_ids)
    except (InputError, TypeError):
        return None
    return None if mask.all() else mask
