"""The command line follows the public functions: flags, help, configuration files, one line."""

from __future__ import annotations

import inspect
import json
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from torch import Tensor

import fisherkern as fk
from fisherkern.cli import COMMANDS, main
from fisherkern.cli.arguments import argument_help, command, flag_type
from fisherkern.cli.parsing import make_app, parse
from fisherkern.cli.run import Run
from fisherkern.data import write_seqrec
from fisherkern.errors import InputError
from fisherkern.files import read_json

FLAGS_OF = {
    "train": (fk.train, fk.TrainingSettings, fk.SASRec),
    "fisher": (fk.diag_fisher, fk.load),
    "align": (fk.align, fk.load),
    "preflight": (fk.preflight,),
    "merge": (fk.merge,),
    "evaluate": (fk.evaluate, fk.load),
}
# Objects of Python's, what a command fills in, and what has a flag of another name.
NO_FLAGS = {"progress", "state", "name", "name_or_path", "num_items"}


def public(
    steps: int = 3,
    *,
    loader: Iterable[Any] | None = None,
    ratio: float | None = 0.5,
    cut: int | Sequence[int] = (5, 10),
    column: str | int | None = "time",
    only: bool = False,
) -> None:
    """Do something.

    Args:
        steps: how many steps,
            and no more.
        cut: two numbers.
        ratio: a share: 0.5

            and more of it.
    """


@command("toy", public)
def toy(run: Run, files: list[Path], *, mode: str = "a") -> None:
    """Play with toys.

    Args:
        files: toys.
        steps: of play.
    """


def parsed(*words: str) -> dict[str, Any]:
    found = parse(make_app([toy]), ["toy", "x", *words])
    assert found is not None
    return dict(found[1].values)


def test_an_argument_of_the_function_is_a_flag() -> None:
    values = parsed("y", "--steps", "4", "--cut", "1", "2", "--only", "--ratio", "none")
    assert values["files"] == [Path("x"), Path("y")] and values["mode"] == "a"
    assert values["steps"] == 4 and values["cut"] == [1, 2] and values["only"] is True
    assert values["ratio"] is None and "loader" not in values
    assert parsed()["ratio"] == 0.5 and parsed()["cut"] == (5, 10)


def test_a_column_may_have_a_name_a_number_or_none() -> None:
    given = [parsed("--column", word)["column"] for word in ("when", "2", "none")]
    assert given == ["when", 2, None]
    with pytest.raises(InputError, match="--column"):
        parsed("--column", "1.5")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1.5"], "--steps"),
        (["--steps", "1e3"], "--steps"),
        (["--cut", "1", "2.5"], "--cut"),
        (["--steps", "true"], "--steps"),
        (["--step", "1"], "--step"),
        (["--quiet=3"], "--quiet"),
    ],
)
def test_what_is_no_value_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parsed(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (str | os.PathLike[str], Path),
        (str | os.PathLike[str] | None, Path | None),
        (Sequence[float] | Tensor | None, list[float] | None),
        (str | int, int | str),
        (bool | str, bool | str),
        (tuple[float, float], tuple[float, float]),
        (Literal["a", "b"], Literal["a", "b"]),
        (Tensor | None, None),
        (Mapping[str, Any] | None, None),
        (Sequence[Sequence[str] | None] | None, None),
    ],
)
def test_types_that_a_command_line_can_give(annotation: Any, expected: Any) -> None:
    assert flag_type(annotation) == expected
    assert typing.get_args(flag_type(annotation)) == typing.get_args(expected)


def test_help_is_the_docstrings() -> None:
    assert argument_help(public) == {
        "steps": "how many steps, and no more.",
        "cut": "two numbers.",
        "ratio": "a share: 0.5 and more of it.",
    }


def test_help_of_the_command_goes_first(capsys: pytest.CaptureFixture[str]) -> None:
    parse(make_app([toy]), ["toy", "--help"])
    printed = capsys.readouterr().out
    assert "Play with toys." in printed and "--steps INT: of play. [default: 3]" in printed
    assert "two numbers." in printed and "loader" not in printed


@pytest.mark.parametrize("name", FLAGS_OF)
def test_no_argument_is_forgotten(name: str) -> None:
    found = next(own for own in COMMANDS if own.name == name).signature.parameters
    for source in FLAGS_OF[name]:
        for parameter in inspect.signature(source, eval_str=True).parameters.values():
            if flag_type(parameter.annotation) and parameter.name not in NO_FLAGS:
                assert parameter.name in found, parameter.name


@pytest.mark.parametrize("own", COMMANDS, ids=lambda own: own.name)
def test_every_flag_has_a_line_of_help(own: Any) -> None:
    for parameter in own.signature.parameters.values():
        about = parameter.annotation.__metadata__[0]
        if about.group[0].name in ("Files", "Options", "Data", "General"):
            assert about.help, parameter.name
    assert own.run.__doc__ and own.run.__doc__[0].isupper()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fk.__version__}\n"


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fisherkern: name a command: demo, ") and not printed.out
    assert main(["trian"]) == 2
    assert 'Unknown command "trian". Did you mean "train"?' in capsys.readouterr().err


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(self: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "data", interrupt)
    assert main(["data", "--data", "synthetic"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and two untrained members with their Fishers."""
    folder = tmp_path_factory.mktemp("generated")
    write_seqrec(fk.synthetic(40, 30, clusters=8), folder / "data.txt")
    data = fk.load(folder / "data.txt")
    for number in (1, 2):
        model = fk.SASRec(data.num_items, max_len=6, dim=8, layers=1, init_std=0.1 * number)
        model.item_ids = list(data.item_ids)
        fk.save_model(model, folder / f"m{number}.safetensors")
    return folder


def members(folder: Path) -> list[str]:
    return [str(folder / f"m{number}.safetensors") for number in (1, 2)]


def test_a_result_of_any_command_is_a_configuration(folder: Path, tmp_path: Path) -> None:
    flags = ["--weights", "1,3", "--method", "weighted", "--no-check-fingerprint"]
    assert main(["merge", *members(folder), *flags, "--out", str(tmp_path / "a")]) == 0
    config = ["--config", str(tmp_path / "a" / "result.json")]
    assert main(["merge", *config, "--out", str(tmp_path / "b")]) == 0
    a, b = (read_json(tmp_path / name / "result.json") for name in "ab")
    assert a["report"] == b["report"] and b["report"]["weights"] == [0.25, 0.75]
    assert b["arguments"]["check_fingerprint"] is False
    assert b["arguments"]["checkpoints"] == members(folder)


def test_lists_of_numbers_stay_numbers(folder: Path, tmp_path: Path) -> None:
    flags = ["--data", str(folder / "data.txt"), "--quiet", "--users", "3", "5", "8"]
    flags += ["--batch-size", "2", "--k", "1", "3", "--out", str(tmp_path)]
    assert main(["evaluate", members(folder)[0], *flags]) == 0
    found = read_json(tmp_path / "result.json")
    assert found["arguments"]["k"] == [1, 3] and found["arguments"]["users"] == [3, 5, 8]
    report = fk.evaluate(
        fk.load_model(members(folder)[0]), fk.load(folder / "data.txt"), k=(1, 3), users=[3, 5, 8]
    )
    assert found[members(folder)[0]]["metrics"] == dict(report)


def test_a_split_by_time_trains_and_is_ranked_beside_popularity(tmp_path: Path) -> None:
    made = fk.synthetic(num_users=60, num_items=30, clusters=4, min_length=4, max_length=9)
    user = np.repeat(np.arange(60), np.diff(made.offsets))
    rows = np.stack([user, made.items, made.times], axis=1)
    path = tmp_path / "ratings.csv"
    text = "\n".join(f"{u},{v},{t}" for u, v, t in rows.tolist())
    path.write_text(f"user_id,item_id,timestamp\n{text}\n")
    split = ["--data", str(path), "--time-split", "0.8", "--time-targets", "successive", "--quiet"]
    network = ["--encoder", "SASRec", "--dim", "8", "--layers", "1", "--max-len", "8"]
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", *split, *network, "--epochs", "1", "--out", str(run)]) == 0
    model = str(run / "model.safetensors")
    flags = ["--popularity", "--metrics", "ndcg", "coverage", "--k", "10", "--out", str(out)]
    assert main(["evaluate", model, *split, *flags]) == 0
    data = fk.load(path, time_split=0.8, time_targets="successive")
    how = {"metrics": ("ndcg", "coverage"), "k": 10}
    found = read_json(out / "result.json")
    reports = {
        model: fk.evaluate(fk.load_model(model), data, **how),
        "popularity": fk.evaluate(fk.Popularity(data), data, **how),
        "popularity of the last 7 days": fk.evaluate(fk.Popularity(data, days=7), data, **how),
    }
    for name, report in reports.items():
        assert found[name] == report.to_json()
        if name != model:
            difference = fk.compare(reports[model], report).to_json()
            assert found[f"over {name}"] == difference


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sampel": "topk"}, "sampel"),
        ({"k": 1.5}, "k"),
        ({"k": True}, "k"),
        ({"split": 3, "data": None, "k": [1]}, "3"),
        ({"reduction": "mean"}, "mean"),
    ],
)
def test_what_is_wrong_in_a_configuration(
    content: dict[str, Any],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    out = tmp_path / "out"
    flags = ["--data", str(folder / "data.txt"), "--out", str(out), "--quiet"]
    assert main(["fisher", members(folder)[0], *flags, "--config", str(path)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed and not out.exists(), printed


def test_columns_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{user},{item},{item}" for user in (1, 2) for item in (1, 2, 3)]
    (tmp_path / "d.csv").write_text("\n".join(["who,what,when", *rows, ""]))
    names = next(own for own in COMMANDS if own.name == "data").data_arguments
    columns = {"user": "who", "item": "what", "time": "when"}
    flags = [
        word
        for start, column in columns.items()
        for name in names
        if name == start
        for word in ("--" + name.replace("_", "-"), column)
    ]
    assert len(flags) == 6
    where = ["--data", str(tmp_path / "d.csv"), "--out", str(tmp_path / "out")]
    assert main(["data", *where]) == 2
    assert main(["data", *where, *flags]) == 0
    assert read_json(tmp_path / "out" / "result.json")["actions"] == 6


def test_models_go_to_the_device(folder: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--data", str(folder / "data.txt"), "--quiet", "--out", str(tmp_path / "out")]
    for name in ("evaluate", "fisher", "align", "preflight", "merge"):
        assert main([name, *members(folder)[:1], *flags, "--device", "gpu"]) == 2
        assert "--device: 'gpu' is not like cpu, cuda or cuda:1" in capsys.readouterr().err
