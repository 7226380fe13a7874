"""The model card of a merge: how the file beside it came about, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(name: str, about: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Markdown made of the provenance that is in the file too.

    name: of the model file. about: its fisherkern metadata (class, config), {} for tensors of
    an unknown class. provenance: see `merge_files`.
    """
    members, weights = provenance["members"], provenance["weights"]
    kind = about.get("class", "tensors")
    lines = [
        f"# {name}",
        "",
        f"{kind}, merged from {len(members)} members by fisherkern "
        f"{provenance['versions']['fisherkern']} (method `{provenance['method']}`).",
        "",
        "| member | weight | sha256 |",
        "|---|---|---|",
    ]
    for own, weight in zip(members, weights, strict=True):
        lines.append(f"| {_cell(own['file'])} | {weight:.6g} | `{own['sha256']}` |")
    catalogue = provenance["catalogue"]
    if catalogue is not None and len(catalogue["owners"]) > 1:
        owners = ", ".join(
            f"{count} of {number} member{'s' if number != '1' else ''}"
            for number, count in catalogue["owners"].items()
        )
        lines += ["", f"The members' catalogues are united: {catalogue['items']} items, {owners}."]
    for title, files in (
        ("Fishers", provenance["fishers"]),
        ("Base", [provenance["base"]] if provenance["base"] else None),
    ):
        if files:
            lines += ["", f"## {title}", "", "| file | made with | sha256 |", "|---|---|---|"]
            for own in files:
                made = ", ".join(f"{k}={v}" for k, v in own.get("made", {}).items())
                lines.append(f"| {_cell(own['file'])} | {_cell(made)} | `{own['sha256']}` |")
    settings = {
        **provenance["options"],
        **{key: provenance[key] for key in ("floor", "normalize", "seed")},
    }
    lines += ["", "## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in settings.items()]
    rows = [("this model", provenance["metrics"])]
    rows += [(own["file"], own["metrics"]) for own in members]
    names = sorted({metric for _, metrics in rows for metric in metrics})
    if names:
        lines += ["", "## Metrics", "", f"| | {' | '.join(map(_cell, names))} |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for owner, metrics in rows:
            values = [_cell(metrics.get(metric, "")) for metric in names]
            lines.append(f"| {_cell(owner)} | {' | '.join(values)} |")
    if about.get("config"):
        lines += ["", "## Configuration", "", "| argument | value |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in about["config"].items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    """`value` as one table cell."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
