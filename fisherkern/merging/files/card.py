"""The model card of a merge: how the file beside it came about, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fisherkern.merging.rules import METHODS


def model_card(name: str, about: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Return a model card in Markdown, made of the provenance that is in the file too.

    Where huggingface_hub is installed, the card begins with the metadata that its hub reads.

    Args:
        name: Name of the model file.
        about: The file's fisherkern metadata (class, config); {} for tensors of an unknown class.
        provenance: See `merge_files`.
    """
    members, weights = provenance["members"], provenance["weights"]
    kind = about.get("class", "tensors")
    method = METHODS[provenance["method"]]
    title = f"[{method.title}]({method.source})" if method.source else method.title
    lines = [
        *_metadata(name, provenance),
        f"# {name}",
        "",
        f"{kind}, merged from {len(members)} members by fisherkern "
        f"{provenance['versions']['fisherkern']} (method `{method.name}`: {title}).",
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


def _metadata(name: str, provenance: Mapping[str, Any]) -> list[str]:
    """Return the lines of YAML before the text; none without huggingface_hub."""
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError:
        return []
    results = [
        # Which data the metric was measured on is not recorded.
        EvalResult("sequential-recommendation", "unknown", "unknown", metric, value)
        for metric, value in provenance["metrics"].items()
    ]
    tags = ["merge", "sequential-recommendation", provenance["method"]]
    data = ModelCardData(
        library_name="fisherkern", tags=tags, model_name=name, eval_results=results or None
    )
    return ["---", data.to_yaml(), "---", ""]
