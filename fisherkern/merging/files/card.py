"""The model card of a merge: how the file beside it came about, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fisherkern.merging.rules import METHODS
from fisherkern.tables import Code, escaped, markdown_table


def model_card(name: str, about: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Return a model card in Markdown, made of the provenance that is in the file too.

    Where huggingface_hub is installed, the card begins with the metadata that its hub reads.

    Args:
        name: Name of the model file.
        about: The file's fisherkern metadata (class, config); {} for tensors of an unknown class.
        provenance: See `merge_files`.
    """
    members, weights = provenance["members"], provenance["weights"]
    kind = escaped(str(about.get("class", "tensors")))
    method = METHODS[provenance["method"]]
    title = f"[{method.title}]({method.source})" if method.source else method.title
    lines = [
        *_metadata(name, provenance),
        f"# {escaped(name)}",
        "",
        f"{kind}, merged from {len(members)} members by fisherkern "
        f"{provenance['versions']['fisherkern']} (method `{method.name}`: {title}).",
        "",
        markdown_table(
            [
                {"member": own["file"], "weight": weight, "sha256": Code(own["sha256"])}
                for own, weight in zip(members, weights, strict=True)
            ]
        ),
    ]
    catalogue = provenance["catalogue"]
    if catalogue is not None and len(catalogue["owners"]) > 1:
        owners = ", ".join(
            f"{count} of {number} member{'s' if number != '1' else ''}"
            for number, count in catalogue["owners"].items()
        )
        lines += ["", f"The members' catalogues are united: {catalogue['items']} items, {owners}."]
    settings = {
        **provenance["options"],
        **{key: provenance[key] for key in ("floor", "normalize", "seed")},
    }
    for title, rows in (
        ("Fishers", [_file(own) for own in provenance["fishers"] or ()]),
        ("Base", [_file(own) for own in [provenance["base"]] if own]),
        ("Settings", [{"setting": key, "value": value} for key, value in settings.items()]),
        ("Metrics", _metrics(provenance)),
        (
            "Configuration",
            [{"argument": key, "value": value} for key, value in _config(about).items()],
        ),
    ):
        if rows:
            lines += ["", f"## {title}", "", markdown_table(rows)]
    return "\n".join(lines) + "\n"


def _config(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a file's metadata, which anybody may have written."""
    config = about.get("config")
    return config if isinstance(config, Mapping) else {}


def _file(own: Mapping[str, Any]) -> dict[str, Any]:
    made = ", ".join(f"{key}={value}" for key, value in own.get("made", {}).items())
    return {"file": own["file"], "made with": made, "sha256": Code(own["sha256"])}


def _metrics(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for the model and each member; none without any metric."""
    measured = [("this model", provenance["metrics"])]
    measured += [(own["file"], own["metrics"]) for own in provenance["members"]]
    names = sorted({metric for _, metrics in measured for metric in metrics})
    return [
        {"": owner, **{name: metrics.get(name, "") for name in names}}
        for owner, metrics in measured
        if names
    ]


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
