"""`fisherkern report`: the page says what result.json and the data say, whatever the names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pages import Page

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.files import read_json
from fisherkern.report import user_groups
from fisherkern.report.measures import fisher_by_head, fisher_by_layer, fisher_shares


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, two members near one base with their Fishers, and their merge by Fisher."""
    folder = tmp_path_factory.mktemp("report")
    write_seqrec(fk.synthetic(60, 30, clusters=8), folder / "data.txt")
    data = fk.load(folder / "data.txt")
    torch.manual_seed(0)
    base = fk.BERT4Rec(data.num_items, max_len=6, dim=8, layers=2, heads=2)
    for number in range(2):
        model = fk.BERT4Rec(**base.config)
        model.item_ids = list(data.item_ids)
        for own, start in zip(model.parameters(), base.parameters(), strict=True):
            own.data = start.data + 0.3 * torch.randn_like(start)
        fk.save_model(model, folder / f"m{number}.safetensors")
        fisher = fk.diag_fisher(model, data.loader(max_len=6), k=5, progress=False)
        fisher.save(folder / f"m{number}.fisher.safetensors")
    merge(folder, "--fisher", *files(folder, ".fisher"), "--weights", "1,3")
    return folder


def files(folder: Path, ending: str = "") -> list[str]:
    return [str(folder / f"m{number}{ending}.safetensors") for number in range(2)]


def merge(folder: Path, *flags: str, out: str = "run") -> None:
    assert main(["merge", *files(folder), *flags, "--out", str(folder / out)]) == 0


def report(*words: Any) -> Page:
    """The page of a command that ends well."""
    assert main(["report", *map(str, words), "--quiet"]) == 0
    out = next((Path(words[n + 1]) for n, word in enumerate(words) if word == "--out"), None)
    return Page((out or Path(words[0]) / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(folder: Path) -> Page:
    return report(folder / "run", "--data", folder / "data.txt", "--barriers")


def test_the_members_are_those_of_the_result(folder: Path, measured: Page) -> None:
    result = read_json(folder / "run" / "result.json")
    rows = measured.table("The models that were merged")
    assert [row["file"] for row in rows] == result["members"]
    assert [float(row["weight"]) for row in rows] == result["report"]["weights"] == [0.25, 0.75]
    assert {(row["class"], row["items"]) for row in rows} == {("BERT4Rec", "30")}


def test_metrics_and_intervals_are_those_of_evaluate_and_compare(
    folder: Path, measured: Page
) -> None:
    data = fk.load(folder / "data.txt")
    models = [fk.load_model(folder / "run" / "merged.safetensors")]
    models += [fk.load_model(path) for path in files(folder)]
    reports = [fk.evaluate(model, data) for model in models]
    scores = [fk.evaluate(model, data, split="validation")["ndcg@10"] for model in models[1:]]
    best = int(np.argmax(scores))
    rows = measured.table("test split, full ranking, seen items excluded, 60 users")
    for row, own in zip(rows, reports, strict=True):
        for metric in ("ndcg@10", "hr@10", "mrr@10"):
            assert row[metric.upper()] == f"{own[metric]:.4f}"
    for number, own in enumerate(reports[1:]):
        d = fk.compare(reports[0], own)["ndcg@10"]
        row = rows[number + 1]
        told = f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
        assert row["merge minus member, NDCG@10"].startswith(told)
        assert ("best" in row["model"]) == (number == best)
    d = fk.compare(reports[0], reports[1 + best])["ndcg@10"]
    verdict = "better" if d.low > 0 else "worse" if d.high < 0 else "No difference"
    assert verdict in measured.text.split("NDCG@10 differs by")[0]
    stored = read_json(folder / "run" / "result-report.json")
    assert stored["reports"]["merge"]["metrics"] == dict(reports[0])
    assert stored["best_member"] == str(best)


@pytest.mark.parametrize(("split", "held_out"), [("test", 1), ("validation", 2)])
def test_groups_of_users_by_a_loop(folder: Path, split: str, held_out: int) -> None:
    data = fk.load(folder / "data.txt")
    own = fk.evaluate(fk.load_model(files(folder)[0]), data, split=split)
    lengths, seen = [], []
    for user in own.users:
        history = list(data.sequence(user))
        lengths.append(len(history) - held_out)
        target = history[-held_out]
        others = [list(data.sequence(other))[:-2] for other in range(data.num_users)]
        seen.append(sum(other.count(target) for other in others))
    groups = user_groups(data, own)
    for title, values, words in (
        ("history length", lengths, "{} to {} actions before"),
        ("popularity of the item to find", seen, "seen {} to {} times"),
    ):
        masks = groups[title]
        assert len(masks) == 3 and np.array_equal(
            sum(m.astype(int) for m in masks.values()), [1] * 60
        )
        highest = -1
        for label, mask in masks.items():
            inside = [value for value, chosen in zip(values, mask, strict=True) if chosen]
            assert label == words.format(min(inside), max(inside)) and min(inside) > highest
            assert 10 <= len(inside) <= 35
            highest = max(inside)


def test_groups_of_successive_targets_by_a_loop() -> None:
    data = fk.synthetic(num_users=40, num_items=30, clusters=4, min_length=3, max_length=9)
    data = data.split_by_time(0.6, targets="successive")
    model = fk.Popularity(data)
    whole = fk.evaluate(model, data)
    some = fk.evaluate(model, data, users=np.unique(whole.users)[::-2])
    for own in (whole, some):
        masks = user_groups(data, own)["history length"]
        lengths = []
        for user in dict.fromkeys(own.users.tolist()):
            first = max(int(data.holdout.validated[user]), 1)
            lengths += range(first, len(data.sequence(user)))
        for label, mask in masks.items():
            inside = [value for value, chosen in zip(lengths, mask, strict=True) if chosen]
            assert label == f"{min(inside)} to {max(inside)} actions before"
        assert len(own.users) > own.num_users and sum(m.sum() for m in masks.values()) == len(
            lengths
        )


def test_groups_on_the_page_are_paired(folder: Path, measured: Page) -> None:
    data = fk.load(folder / "data.txt")
    best = read_json(folder / "run" / "result-report.json")["best_member"]
    paths = [folder / "run" / "merged.safetensors", files(folder)[int(best)]]
    models = [fk.load_model(path) for path in paths]
    whole = fk.evaluate(models[0], data)
    for title, masks in user_groups(data, whole).items():
        rows = measured.table(f"NDCG@10 by {title}")
        for row, (label, mask) in zip(rows, masks.items(), strict=True):
            ours, member = (fk.evaluate(m, data, users=whole.users[mask]) for m in models)
            d = fk.compare(ours, member)["ndcg@10"]
            assert row["users"] == label and int(row["number"]) == mask.sum()
            assert row["merge"] == f"{ours['ndcg@10']:.4f}"
            assert row["member"] == f"{member['ndcg@10']:.4f}"
            told = f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
            assert row["merge minus member"].startswith(told)


def test_layers_and_heads_by_a_loop(folder: Path) -> None:
    fisher = fk.DiagFisher.load(files(folder, ".fisher")[0])
    total = sum(float(value) for tensor in fisher.values() for value in tensor.flatten())
    layers: dict[str, float] = {}
    heads: dict[str, list[float]] = {}
    for name, tensor in fisher.items():
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] in ("blocks", "transform") else parts[0]
        for row, values in enumerate(tensor.reshape(len(tensor), -1)):
            layers[layer] = layers.get(layer, 0.0) + float(values.double().sum()) / total
            if "attention." in name and parts[3] in ("query", "key", "value"):
                own = heads.setdefault(".".join(parts[:3]), [0.0, 0.0])
                own[row // 4] += float(values.double().sum()) / total
    assert fisher_by_layer(fisher) == pytest.approx(layers)
    found = fisher_by_head(fisher, 2)
    assert found.keys() == heads.keys() == {"blocks.0.attention", "blocks.1.attention"}
    for name, own in heads.items():
        assert found[name] == pytest.approx(own)
    assert fisher_by_head(fisher, 3) == {}


def test_shares_are_the_weights_that_the_merge_used(folder: Path) -> None:
    """θ* = Σ_m share_m θ_m: members that are 1 and 0 everywhere merge into the share itself."""
    fishers = [fk.DiagFisher.load(path) for path in files(folder, ".fisher")]
    members = [fk.load_model(path) for path in files(folder)]
    for value, model in zip((1.0, 0.0), members, strict=True):
        for parameter in model.parameters():
            parameter.data.fill_(value)
    for normalize in ("mean", None):
        settings: dict[str, Any] = {"floor": 0.2, "normalize": normalize}
        merged = fk.merge(
            members, fishers=fishers, method="fisher", weights=[1, 3],
            check_fingerprint=False, **settings,
        )  # fmt: skip
        shares = fisher_shares(fishers, [0.25, 0.75], **settings)
        for name, own in shares.items():
            mean = float(merged.get_parameter(name).detach().double().mean())
            assert own == pytest.approx([mean, 1 - mean], abs=1e-6), name


def test_tensors_and_catalogue(folder: Path, measured: Page) -> None:
    result = read_json(folder / "run" / "result.json")["report"]
    rows = measured.table("Share of entries whose Fisher is above the floor of 0.1")
    assert [row["tensor"] for row in rows] == list(result["coverage"])
    for row, own in zip(rows, result["coverage"].values(), strict=True):
        assert [row["member 0"], row["member 1"]] == [f"{share:.1%}" for share in own]
    (row,) = measured.table("How many of the merge's 30 items")
    assert row == {"members": "2 of 2", "items": "30", "share": "100.0%"}
    assert measured.table("Mean share of each member in a tensor's entries")
    assert (
        measured.table("NDCG@10 on validation from member 0 to member 1")[-1]["share of member 1"]
        == "100%"
    )


def test_the_page_needs_nothing_and_its_headings_are_in_order(measured: Page) -> None:
    tags = {tag for tag, _ in measured.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "a"}
    assert not any(
        name.startswith("on") or name in ("src", "href") for _, own in measured.tags for name in own
    )
    levels = [int(tag[1]) for tag, _ in measured.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    for tag, own in measured.tags:
        if tag == "svg":
            assert own["role"] == "img" and own["aria-label"]
    assert ("html", {"lang": "en"}) in measured.tags


def test_the_same_run_gives_the_same_page(folder: Path, tmp_path: Path) -> None:
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for path in pages:
        report(folder / "run", "--out", path)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_what_is_not_known_is_said(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    result = read_json(folder / "run" / "result.json")
    result["members"] = [str(tmp_path / "gone" / name) for name in "ab"]
    result["used"]["fishers"] = []
    result["report"] |= {"items": {}, "coverage": {}, "method": "uniform"}
    (run / "result.json").write_text(json.dumps(result))
    page = report(run)
    for sentence in (
        "Nothing was measured, as no data was given.",
        "Groups of users are not known",
        "Models between the members were not measured",
        "No Fisher is known of the members.",
        "The result does not tell which items each member has.",
        "All tensors have the members' weights, see above.",
    ):
        assert sentence in page.text
    assert {row["state"] for row in page.table("Files")} == {"not a file that is here"}
    assert len(page.tables) == 4  # members, version of this page, files, arguments


HOSTILE = [
    "<script>alert(1)</script>",
    "\"' onmouseover='x'\" &amp; </td></table>",
    "two\nlines\tand \x00 \x1b[31m",
    "x" * 5000,
    "\u202eright to left",
]


def test_hostile_names_are_text(folder: Path, tmp_path: Path) -> None:
    result = read_json(folder / "run" / "result.json")
    result["members"] = HOSTILE
    result["arguments"] = {"command": "merge", **{name: name for name in HOSTILE}}
    result["used"] = {"fishers": [], "base": HOSTILE[2]}
    values = [0.2] * len(HOSTILE)
    result["report"] |= {
        "method": HOSTILE[0],
        "weights": dict.fromkeys(HOSTILE, values),
        "coverage": dict.fromkeys(HOSTILE, values),
        "items": {HOSTILE[1]: 5},
        "versions": {HOSTILE[0]: HOSTILE[1]},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = report(tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, own in page.tags for name in own)
    rows = page.table("The models that were merged")
    assert [row["file"] for row in rows][:2] == HOSTILE[:2]
    assert rows[2]["file"] == "two\\nlines\\tand \\x00 \\x1b[31m"
    assert len(rows[3]["file"]) == 1000 and rows[4]["file"].startswith("\\u202e")
    assert f"Method: {HOSTILE[0]}." in page.text
    assert f"from the base {rows[2]['file']}." in page.text


def test_own_users_come_from_the_training_beside_a_member(folder: Path, tmp_path: Path) -> None:
    data = fk.load(folder / "data.txt")
    write_seqrec(data.subset(np.arange(20)), tmp_path / "part.txt")
    result = read_json(folder / "run" / "result.json")
    member = tmp_path / "a" / "model.safetensors"
    member.parent.mkdir()
    for ending in (".safetensors", ".json"):
        shutil.copy(folder / f"m0{ending}", member.with_suffix(ending))
    told = {"arguments": {"command": "train", "data": str(tmp_path / "part.txt")}}
    (member.parent / "result.json").write_text(json.dumps(told))
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    result["members"][0] = str(member)
    (run / "result.json").write_text(json.dumps(result))
    page = report(run, "--data", folder / "data.txt")
    (row,) = page.table("NDCG@10 by the members' own users")
    models = [fk.load_model(path) for path in (run / "merged.safetensors", member)]
    reports = [fk.evaluate(model, data, users=range(20)) for model in models]
    d = fk.compare(*reports)["ndcg@10"]
    assert row["users"] == "of member 0" and row["number"] == "20"
    told = f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
    assert row["merge minus member"].startswith(told)


def test_a_member_of_another_catalogue_is_left_out(folder: Path, tmp_path: Path) -> None:
    data = fk.load(folder / "data.txt")
    less = fk.BERT4Rec(data.num_items - 1, max_len=6, dim=8, layers=2, heads=2)
    less.item_ids = list(data.item_ids[1:])
    fk.save_model(less, tmp_path / "less.safetensors")
    words = [
        "merge",
        files(folder)[0],
        str(tmp_path / "less.safetensors"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    page = report(tmp_path / "run", "--data", folder / "data.txt")
    assert "Member 1 was not measured: " in page.text and "not in the other catalogue" in page.text
    owners = {
        row["members"]: row["items"] for row in page.table("How many of the merge's 30 items")
    }
    assert owners == {"1 of 2": "1", "2 of 2": "29"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no result of `fisherkern merge`"),
        ("{", "holds no result of `fisherkern merge`"),
        ({"arguments": {"command": "evaluate"}}, "holds no result of `fisherkern merge`"),
        ({"arguments": {"command": "merge"}}, "is no result of `fisherkern merge`"),
        ({"members": 3}, "is no result of `fisherkern merge`: Expected `array`, got `int`"),
        ({"members": []}, "does not have one weight for each of its members"),
        ({"members": ["a"]}, "does not have one weight for each of its members"),
    ],
)
def test_no_page_of_what_is_no_merge(
    content: Any, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, dict) and "members" in content:
        content = read_json(folder / "run" / "result.json") | content
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "result.json").write_text(text)
    before = sorted(tmp_path.iterdir())
    assert main(["report", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed, printed
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--barriers"], "--barriers: are measured on data; name --data"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--split", "train"], "train"),
        (["--out", "{tmp}/theirs.html"], "`fisherkern report` did not make it"),
        (["--out", "{tmp}/theirs.html/page.html"], "no folder can be written there"),
    ],
)
def test_refusals_leave_nothing(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs.html").write_text("theirs")
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run, ignore=shutil.ignore_patterns("*report*"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(run), *(word.format(tmp=tmp_path) for word in words)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed, printed
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "theirs.html").read_text() == "theirs"


def test_a_page_is_written_over_by_the_next(folder: Path, tmp_path: Path) -> None:
    first = report(folder / "run", "--out", tmp_path / "page.html")
    again = report(folder / "run", "--out", tmp_path / "page.html", "--data", folder / "data.txt")
    assert "Nothing was measured" in first.text and "Nothing was measured" not in again.text
