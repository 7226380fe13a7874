"""`fisherkern report --plane`: the plane through three members, and posteriors on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pages import Page

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.report import weight_plane


def report(*words: Any) -> Page:
    """The page of a command that ends well."""
    assert main(["report", *map(str, words), "--quiet"]) == 0
    return Page((Path(words[0]) / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three members with their Fishers, and their merge by Fisher."""
    folder = tmp_path_factory.mktemp("three")
    write_seqrec(fk.synthetic(40, 20, clusters=4), folder / "data.txt")
    data = fk.load(folder / "data.txt")
    paths = [folder / f"m{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        model = fk.SASRec(data.num_items, max_len=5, dim=4, layers=1)
        model.item_ids = list(data.item_ids)
        fk.save_model(model, path)
        fisher = fk.diag_fisher(model, data.loader(max_len=5), k=5, progress=False)
        fisher.save(path.with_suffix(".fisher.safetensors"))
    fishers = [str(path.with_suffix(".fisher.safetensors")) for path in paths]
    words = ["merge", *map(str, paths), "--fisher", *fishers, "--out", str(folder / "run")]
    assert main(words) == 0
    return folder


def test_the_plane_has_the_members_and_their_posteriors(three: Path) -> None:
    page = report(three / "run", "--data", three / "data.txt", "--plane", "10")
    text = (three / "run" / "report.html").read_text(encoding="utf-8")
    assert "NDCG@10 on the plane of three members" in text
    drawn = text[text.index("NDCG@10 on the plane of three members") :]
    drawn = drawn[: drawn.index("</svg>")]
    assert drawn.count("<rect") == 81
    assert [name for name in ("0", "1", "2", "M") if f">{name}</text>" in drawn] == [*"012M"]
    where = page.tables["Where the models are, in distances from member 0"]
    assert [row["model"] for row in where] == ["0", "1", "2", "merge"]
    assert where[0]["posterior's deviations"].count(",") == 1
    assert where[3]["posterior's deviations"] == ""
    assert float(where[0]["along 0 to 1"]) == float(where[0]["across"]) == 0


def test_a_posterior_on_the_plane_has_the_covariance_of_its_definition(three: Path) -> None:
    models = [fk.load_model(three / f"m{number}.safetensors") for number in range(3)]
    fisher = fk.DiagFisher.load(three / "m1.fisher.safetensors")
    named = dict(zip("012", models, strict=True))
    plane = weight_plane(named, {}, lambda _: 0.0, fishers={"1": fisher}, size=2)
    vectors = [torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in models]
    axes = torch.linalg.qr(torch.stack([vectors[1] - vectors[0], vectors[2] - vectors[0]], 1))[0]
    variance = torch.cat(
        [
            1 / (fisher.meta["num_sequences"] * (own + 0.1 * own.mean())).flatten()
            for own in (fisher[name].double() for name, _ in models[1].named_parameters())
        ]
    )
    variance[torch.isinf(variance)] = 0
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for one in range(2):
        for two in range(2):
            expected[one, two] = (axes[:, one] * variance * axes[:, two]).sum()
    signs = torch.sign(axes.T @ torch.stack([vectors[1] - vectors[0], vectors[2] - vectors[0]], 1))
    expected *= signs.diagonal()[:, None] * signs.diagonal()
    drawn = np.random.default_rng(0).multivariate_normal(plane["points"]["1"], expected.numpy(), 40)
    np.testing.assert_allclose(plane["samples"]["1"], drawn, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plane", "10"], "--plane: a number of users of --data"),
        (["--plane", "0", "--data", "data.txt"], "--plane: a number of users of --data"),
        (
            ["--plane", "9", "--data", "data.txt"],
            "--plane: goes through three members; there are 2",
        ),
    ],
)
def test_planes_that_are_none(
    three: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(three / word) if word == "data.txt" else word for word in flags]
    pair = [str(three / f"m{number}.safetensors") for number in range(2)]
    assert main(["merge", *pair, "--out", str(three / "pair"), "--quiet"]) == 0
    page = three / "plane.html"
    assert main(["report", str(three / "pair"), *flags, "--out", str(page), "--quiet"]) == 2
    assert message in capsys.readouterr().err and not page.exists()


def test_members_on_a_line_and_of_other_shapes_are_refused() -> None:
    models = {name: torch.nn.Linear(2, 1) for name in "abc"}
    for scale, model in enumerate(models.values()):
        for parameter in model.parameters():
            parameter.data.fill_(scale)
    with pytest.raises(fk.InputError, match="on one line"):
        weight_plane(models, {}, lambda _: 0.0)
    with pytest.raises(fk.InputError, match="model x has other parameters"):
        weight_plane(models, {"x": torch.nn.Linear(3, 1)}, lambda _: 0.0)
