"""The page's sections; what is not known is one sentence in place of a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fisherkern.errors import InputError
from fisherkern.evaluation import Comparison, compare
from fisherkern.fisher import DiagFisher
from fisherkern.merging import METHODS
from fisherkern.provenance import versions
from fisherkern.report.html import Element, bar, element, grid, interval, page, table
from fisherkern.report.measures import fisher_by_head, fisher_by_layer, fisher_shares
from fisherkern.report.result import Findings, about_model, sha256_of

METRIC, SHOWN = "ndcg@10", ("ndcg@10", "hr@10", "mrr@10")
# Methods whose result is one sum, in all tensors alike, of the members.
_SAME_WEIGHTS = ("uniform", "weighted", "greedy_soup", "learned_soup")


def merge_page(found: Findings) -> str:
    """Write the page of a merge as HTML."""
    title = f"Merge of {len(found.result.members)} models"
    body = [element("h1", title), *_lead(found)]
    fishers = found.fishers
    for head, parts in (
        ("Members", _members(found)),
        ("Did it help?", _gains(found)),
        ("For whom?", _groups(found)),
        ("Between the members", _paths(found)),
        ("The plane of three members", _plane(found)),
        ("Fisher by layer and head", _fisher_sums(found, fishers)),
        ("Coverage of the catalogue", _catalogue(found)),
        ("Weights by tensor", _tensors(found, fishers)),
        ("Provenance", _provenance(found)),
    ):
        content = [element("p", part) if isinstance(part, str) else part for part in parts]
        body += [element("h2", head), *content]
    return page(title, [*body, *(element("p", note) for note in found.notes)])


def _lead(found: Findings) -> Iterator[Element]:
    merge = found.result.report
    method = METHODS[merge.method].title if merge.method in METHODS else merge.method
    texts = [f"Method: {method}."]
    if found.best is not None and isinstance(gain := found.against(found.best), Comparison):
        d = gain[METRIC]
        verdict = (
            "The merge is better than its best member"
            if d.low > 0
            else "The merge is worse than its best member"
            if d.high < 0
            else "No difference between the merge and its best member can be told"
        )
        texts.append(
            f"{verdict}: NDCG@10 differs by {d.mean:+.4f}, with a 95 % interval from "
            f"{d.low:+.4f} to {d.high:+.4f} over {gain.num_users:,} users."
        )
    for text in texts:
        yield element("p", text, class_="lead")


def _members(found: Findings) -> Iterator[Element | str]:
    weights = found.result.report.weights
    rows = []
    for number, path in enumerate(found.result.members):
        about = about_model(path)
        config = about["config"] if isinstance(about.get("config"), dict) else {}
        ids, size = about.get("item_ids"), config.get("num_items", "")
        row: dict[str, Any] = {"member": str(number), "file": path}
        row["weight"] = weights[number] if isinstance(weights, list) else "by tensor"
        row["class"] = str(about.get("class", ""))
        row["items"] = len(ids) if isinstance(ids, list) else size
        row["sizes"] = ", ".join(f"{k} {config[k]}" for k in ("dim", "layers") if k in config)
        rows.append(row)
    yield table("The models that were merged, with their weights", rows)
    if found.result.used.base is not None:
        yield f"They started from the base {found.result.used.base}."


def _gains(found: Findings) -> Iterator[Element | str]:
    if not found.reports:
        yield "Nothing was measured, as no data was given."
        return
    merge = found.reports["merge"]
    gains = {name: found.against(name) for name in found.reports if name != "merge"}
    known = [own[METRIC] for own in gains.values() if isinstance(own, Comparison)]
    rows = []
    for name, report in found.reports.items():
        label = name if name == "merge" else f"member {name}"
        row: dict[str, Any] = {"model": label + (", best" if name == found.best else "")}
        gain = gains.get(name, "")
        row["merge minus member, NDCG@10"] = (
            gain if isinstance(gain, str) else interval(gain[METRIC], _reach(known))
        )
        row |= {metric.upper(): report[metric] for metric in SHOWN}
        rows.append(row)
    yield table(f"{merge.protocol}, {merge.num_users:,} users; paired 95 % intervals", rows)
    if found.best is not None:
        chance = " That favours the member here." if merge.split == "validation" else ""
        yield f"The best member is the one with the highest NDCG@10 on validation.{chance}"


def _groups(found: Findings) -> Iterator[Element | str]:
    if not found.groups:
        yield "Groups of users are not known without a measured merge and member."
    for title, groups in found.groups.items():
        gains = {label: compare(*pair)[METRIC] for label, pair in groups.items()}
        yield element("h3", f"By {title}")
        yield table(
            f"NDCG@10 by {title}; paired 95 % intervals",
            [
                {
                    "users": label,
                    "merge minus member": interval(gains[label], _reach(gains.values())),
                    "number": ours.num_users,
                    "merge": ours[METRIC],
                    "member": member[METRIC],
                }
                for label, (ours, member) in groups.items()
            ],
        )
    if found.best is not None and found.groups:
        yield f"The member is {found.best}, the best one, where a row names no other."
        yield "Each interval is for its own row: of twenty groups one leaves 0 out by chance."


def _paths(found: Findings) -> Iterator[Element | str]:
    if not found.paths:
        yield "Models between the members were not measured; --barriers with --data does it."
        return
    most = max(score for path in found.paths for score in path["scores"])
    for path in found.paths:
        first, second = path["members"]
        points = zip(path["t"], path["scores"], strict=True)
        yield table(
            f"NDCG@10 on validation from member {first} to member {second}: barrier "
            f"{path['barrier']:.4f}, gain {path['gain']:.4f}",
            [
                {f"share of member {second}": f"{t:.0%}", "NDCG@10": bar(s, most, f"{s:.4f}")}
                for t, s in points
            ],
        )


def _plane(found: Findings) -> Iterator[Element | str]:
    plane = found.plane
    if plane is None:
        yield "The plane was not measured; --plane with --data does it, of three members or more."
        return
    points, values = plane["points"], plane["values"]
    shown = {name: "M" if name == "merge" else name for name in points}
    yield element("div", grid("NDCG@10 on the plane of three members", plane, shown))
    yield (
        f"Lighter is better: NDCG@10 on validation is from {min(map(min, values)):.4f} to "
        f"{max(map(max, values)):.4f}. M is the merge, a number a member. A model off the plane "
        "is shown at its projection."
    )
    if plane["samples"]:
        yield (
            "Dots are draws from the posteriors that the members' Fishers say, as far as they are "
            "wider than a member's circle."
        )
    rows = []
    for name, (x, y) in points.items():
        row = {"model": name, "along 0 to 1": x, "across": y}
        if plane["samples"]:
            drawn = plane["samples"].get(name)
            spread = [statistics.stdev(axis) for axis in zip(*drawn, strict=True)] if drawn else []
            row["posterior's deviations"] = ", ".join(f"{value:.2g}" for value in spread)
        rows.append(row)
    yield table("Where the models are, in distances from member 0", rows)


def _fisher_sums(found: Findings, fishers: Sequence[DiagFisher]) -> Iterator[Element | str]:
    if not fishers:
        yield "No Fisher is known of the members."
        return
    sums = [fisher_by_layer(fisher) for fisher in fishers]
    layers = {layer: [own.get(layer, 0.0) for own in sums] for layer in sums[0]}
    yield _by_name("Share of each layer in a member's Fisher", "layer", layers)
    rows = []
    for number, (path, fisher) in enumerate(zip(found.result.members, fishers, strict=True)):
        config = about_model(path).get("config")
        heads = config.get("heads") if isinstance(config, dict) else None
        own = fisher_by_head(fisher, heads) if isinstance(heads, int) else {}
        rows += [(layer, number, head, s) for layer, o in own.items() for head, s in enumerate(o)]
    if not rows:
        yield "The attention heads of the members are not known."
        return
    most = max(share for *_, share in rows)
    yield table(
        "Share of each attention head's queries, keys and values in a member's Fisher",
        [
            {
                "attention": layer,
                "member": str(number),
                "head": str(head),
                "share": bar(share, most, f"{share:.3%}"),
            }
            for layer, number, head, share in sorted(rows, key=lambda row: row[:3])
        ],
    )


def _catalogue(found: Findings) -> Iterator[Element | str]:
    merge, members = found.result.report, len(found.result.members)
    owners = merge.items or (merge.catalogue.owners if merge.catalogue else {})
    total = sum(owners.values())
    if not total:
        yield "The result does not tell which items each member has."
        return
    yield table(
        f"How many of the merge's {total:,} items are known to how many members",
        [
            {
                "members": f"{number} of {members}",
                "items": count,
                "share": bar(count / total, 1.0, f"{count / total:.1%}"),
            }
            for number, count in owners.items()
        ],
    )


def _tensors(found: Findings, fishers: Sequence[DiagFisher]) -> Iterator[Element | str]:
    merge = found.result.report
    weights = merge.weights
    if isinstance(weights, dict):
        yield _by_name("Weights that were learned of each tensor", "tensor", weights)
    elif merge.method in _SAME_WEIGHTS:
        yield "All tensors have the members' weights, see above."
    elif fishers and merge.method == "fisher" and merge.options.get("group") == "entry":
        ids = [about_model(path).get("item_ids") for path in found.result.members]
        try:
            if any(own != ids[0] for own in ids[1:]):
                raise InputError("the members' items differ")
            shares = fisher_shares(fishers, weights, merge.floor or 0.0, merge.normalize)
            yield _by_name("Mean share of each member in a tensor's entries", "tensor", shares)
        except InputError as error:
            yield f"The members' shares by tensor are not known: {error}."
    else:
        yield "The folder does not tell the weights of single tensors."
    if merge.coverage:
        above = f"Share of entries whose Fisher is above the floor of {merge.floor}"
        yield _by_name(above, "tensor", merge.coverage)


def _provenance(found: Findings) -> Iterator[Element | str]:
    result, merge = found.result, found.result.report
    recorded = merge.members if isinstance(merge.members, list) else []
    about = {} if found.merged is None else about_model(found.merged)
    made = merge.versions or about.get("versions")
    if isinstance(made, dict):
        yield table("What made the merge", _pairs("part", "version", made))
    yield table("What made this page", _pairs("part", "version", versions()))
    stored = [*recorded, *(merge.fishers or [])]
    files = [*result.members, *result.used.fishers]
    hashes = [own.sha256 for own in stored] if len(stored) == len(files) else [None] * len(files)
    files += [str(path) for path in (result.used.base, found.merged) if path is not None]
    rows = []
    for number, path in enumerate(files):
        kept = hashes[number] if number < len(hashes) else None
        now = None if kept else sha256_of(path)
        taken = "of the merge" if kept else "as it is now" if now else "not a file that is here"
        rows.append({"file": path, "sha256": kept or now or "", "state": taken})
    yield table("Files", rows)
    given = {name: value for name, value in result.arguments.items() if value not in (None, [])}
    yield table("Arguments of the merge", _pairs("argument", "value", given))


def _pairs(head: str, other: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{head: name, other: str(value)} for name, value in values.items()]


def _by_name(caption: str, head: str, shares: Mapping[str, Sequence[float]]) -> Element:
    """Make a table with a row for each name and a bar for each member."""
    rows = []
    for name, values in shares.items():
        bars = {f"member {m}": bar(own, 1.0, f"{own:.1%}") for m, own in enumerate(values)}
        rows.append({head: name, **bars})
    return table(caption, rows)


def _reach(differences: Any) -> float:
    """How far from 0 the furthest end of an interval is."""
    return max((max(abs(d.low), abs(d.high)) for d in differences), default=0.0)
