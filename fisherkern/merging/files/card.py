"""The model card of a merge: how the file beside it came about, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import shown
from fisherkern.merging.rules import METHODS
from fisherkern.provenance import package_version
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
        *_metadata(name, ["merge", provenance["method"]], provenance["metrics"]),
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
    lines += _sections(
        Fishers=[_file(own) for own in provenance["fishers"] or ()],
        Base=[_file(own) for own in [provenance["base"]] if own],
        Settings=[{"setting": key, "value": value} for key, value in settings.items()],
        Metrics=_metrics(provenance),
        Configuration=[{"argument": key, "value": it} for key, it in _config(about).items()],
    )
    return "\n".join(lines) + "\n"


def encoder_card(encoder: SequenceEncoder, metrics: Mapping[str, float]) -> str:
    """Return a model card of an encoder, with how it was merged where it was.

    Args:
        encoder: Its `merge_report` may come from a file, which anybody may have written.
        metrics: Of the encoder.
    """
    kind, report = type(encoder).__name__, encoder.merge_report or {}
    method = report.get("method")
    tags = ["merge"] if report else []
    tags += [method] if isinstance(method, str) and method in METHODS else []
    rows = {key: report[key] for key in MERGE_SETTINGS if key in report}
    lines = [
        *_metadata(kind, tags, metrics),
        f"# {kind}",
        "",
        f"{kind} over {encoder.num_items} items, {'merged' if report else 'written'} by fisherkern "
        f"{package_version()}. It is read by `fisherkern.hub.HubEncoder.from_pretrained`.",
        *_sections(
            Merge=[{"setting": key, "value": _text(value)} for key, value in rows.items()],
            Members=_weights(report),
            Metrics=[{"metric": name, "value": value} for name, value in metrics.items()],
            Configuration=[{"argument": key, "value": it} for key, it in encoder.config.items()],
        ),
    ]
    return "\n".join(lines) + "\n"


#: What a card shows of a merge report, beside the members' weights.
MERGE_SETTINGS = ("method", "options", "floor", "normalize", "seed", "items", "low_rank")


def _weights(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each member, by its file where a report names one."""
    weights, members = report.get("weights"), report.get("members")
    if not isinstance(weights, list):  # learned by tensor
        return []
    files: dict[int, Any] = dict(enumerate(members if isinstance(members, list) else []))
    files = {number: own.get("file") for number, own in files.items() if isinstance(own, Mapping)}
    return [
        {"member": _text(files.get(number, number)), "weight": _text(weight)}
        for number, weight in enumerate(weights)
    ]


def _text(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else shown(value)


def _sections(**parts: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a heading and a table for each part that has rows."""
    lines = []
    for title, rows in parts.items():
        if rows:
            lines += ["", f"## {title}", "", markdown_table(rows)]
    return lines


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


def _metadata(name: str, tags: list[str], metrics: Mapping[str, float]) -> list[str]:
    """Return the lines of YAML before the text; none without huggingface_hub."""
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError:
        return []
    results = [
        # Which data the metric was measured on is not recorded.
        EvalResult("sequential-recommendation", "unknown", "unknown", metric, value)
        for metric, value in metrics.items()
    ]
    tags = ["sequential-recommendation", *tags]
    data = ModelCardData(
        library_name="fisherkern", tags=tags, model_name=name, eval_results=results or None
    )
    return ["---", data.to_yaml(), "---", ""]
