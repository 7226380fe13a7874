"""`fisherkern merge`: every method from flags and from a recipe, and what is wrong in either."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec
from fisherkern.files import read_json
from fisherkern.merging import METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a base, two members near it (untrained, which no merge minds) and their Fishers."""
    folder = tmp_path_factory.mktemp("merge")
    data = fk.synthetic(40, 30, clusters=8)
    write_seqrec(data, folder / "data.txt")
    data = fk.load(folder / "data.txt")
    torch.manual_seed(0)
    base = fk.BERT4Rec(data.num_items, max_len=6, dim=8, layers=1)
    base.item_ids = list(data.item_ids)
    fk.save_model(base, folder / "base.safetensors")
    for number in (1, 2):
        model = fk.BERT4Rec(**base.config)
        model.item_ids = base.item_ids
        for own, start in zip(model.parameters(), base.parameters(), strict=True):
            own.data = start.data + 0.1 * torch.randn_like(start)
        fk.save_model(model, folder / f"m{number}.safetensors")
        loader = data.loader(max_len=6)
        fisher = fk.diag_fisher(model, loader, k=5, progress=False)
        fisher.save(folder / f"m{number}.fisher.safetensors")
    return folder


def files(folder: Path, pattern: str) -> list[str]:
    return [str(folder / pattern.format(number)) for number in (1, 2)]


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_every_method(method: str, folder: Path, tmp_path: Path) -> None:
    rule = METHODS.get(method, METHODS["uniform"])
    flags = ["--method", method, "--quiet", "--data", str(folder / "data.txt"), "--steps", "2"]
    entry = {"model": "{}/m{}.safetensors"}
    lines = [f"method: {method}", "steps: 2", "data: data.txt"]
    if rule.inputs.get("fishers") == "must":
        flags += ["--fisher", *files(folder, "m{}.fisher.safetensors")]
        entry["fisher"] = "{}/m{}.fisher.safetensors"
    if "base" in rule.inputs:
        flags += ["--base", str(folder / "base.safetensors")]
        lines.append(f"base: {folder}/base.safetensors")
    if "weights" in rule.inputs:
        flags += ["--weights", "1,3"]
        lines.append("weights: [1, 3]")
    option = {"density": "0.5", "alpha": "0.5", "lr": "1e-1", "tol": "1e-2", "group": "row"}
    own = {name: option[name] for name in rule.options if name in option}
    flags += [word for name, value in own.items() for word in ("--option", f"{name}={value}")]
    if own:
        lines.append("options: {" + ", ".join(f"{n}: {v}" for n, v in own.items()) + "}")
    members = [
        ", ".join(f"{key}: {value.format(folder, m)}" for key, value in entry.items())
        for m in (1, 2)
    ]
    lines.append("members: [" + ", ".join("{" + member + "}" for member in members) + "]")
    (tmp_path / "data.txt").write_bytes((folder / "data.txt").read_bytes())
    (tmp_path / "recipe.yaml").write_text("\n".join([*lines, "out: b", ""]))
    first = ["merge", *files(folder, "m{}.safetensors"), *flags, "--out", str(tmp_path / "a")]
    assert main(first) == 0
    assert main(["merge", "--quiet", "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    one, two = (fk.load_model(tmp_path / name / "merged.safetensors") for name in "ab")
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name)), name
    report = read_json(tmp_path / "b" / "result.json")["report"]
    assert report == read_json(tmp_path / "a" / "result.json")["report"]
    assert report["method"] == method or "auto" in report
    assert {n: report["options"][n] for n in own} == {
        n: float(v) if v[0].isdigit() else v for n, v in own.items()
    }


def test_the_merge_is_that_of_python(folder: Path, tmp_path: Path) -> None:
    models = [fk.load_model(path) for path in files(folder, "m{}.safetensors")]
    base = fk.load_model(folder / "base.safetensors")
    expected = fk.merge(models, method="ties", base=base, options={"density": 0.3, "per": "tensor"})
    flags = ["--method", "ties", "--option", "density=0.3", "--option", "per=tensor"]
    paths = [*files(folder, "m{}.safetensors"), "--base", str(folder / "base.safetensors")]
    assert main(["merge", *paths, *flags, "--out", str(tmp_path)]) == 0
    merged = fk.load_model(tmp_path / "merged.safetensors")
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name)), name


def test_weights_of_members_and_flags_beside_a_recipe(folder: Path, tmp_path: Path) -> None:
    recipe = folder / "weights.yaml"
    recipe.write_text(
        "members:\n- {model: m1.safetensors, weight: 3}\n- {model: m2.safetensors, weight: 1e0}\n"
    )
    assert main(["merge", "--recipe", str(recipe), "--out", str(tmp_path / "x")]) == 0
    assert read_json(tmp_path / "x" / "result.json")["report"]["weights"] == [0.75, 0.25]


GOOD = "members: [m1.safetensors, m2.safetensors]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping with the keys members, base"),
        ("- a", "must hold a mapping"),
        ("members: [a", ":1: not valid YAML"),
        ("a: 1\nb: 'x\n", "not valid YAML"),
        ("x: !!python/object/apply:os.getcwd []", "is not read"),
        ("method: ties", "it has no key 'members'"),
        ("members: []", "'members' must be a list"),
        ("members: {a: b}", "'members' must be a list"),
        ("members: [3]", "'members' entry 0 must be a file or have a key 'model'"),
        ("members: [{fisher: a}]", "'members' entry 0 must be a file or have a key 'model'"),
        ("members: [{model: 3}]", "'model' of 'members' entry 0 is 3 where a word was expected"),
        ("members: [{model: a, fishers: b}]", "'members' entry 0 has a key 'fishers'"),
        ("members: [{model: a, weight: x}]", "'weight' of 'members' entry 0 is 'x'"),
        ("members: [a, {model: b, fisher: c}]", "some of 'members' have a 'fisher'"),
        ("members: [a, {model: b, weight: 1}]", "some of 'members' have a 'weight'"),
        ("members: [{model: b, weight: 1}]\nweights: [1]", "'weights' and the members' 'weight'"),
        (GOOD + "methd: ties", "there is no key 'methd'"),
        (GOOD + "floor: 1\nfloor: 2", ":3: the key 'floor' stands here twice"),
        (GOOD + "3: x", ":2: the key 3 is not a word"),
        (GOOD + "method: [ties]", "'method' is ['ties'] where a word was expected"),
        (GOOD + "method: tiez", "method 'tiez' is not one of"),
        (GOOD + "options: [1]", "'options' is [1] where a mapping was expected"),
        (GOOD + "method: pcrec\noptions: {alfa: 1}", "method 'pcrec' has no option 'alfa'"),
        (
            GOOD + "weights: best",
            "'weights' is 'best' where a list of numbers or one of search, linear-decay",
        ),
        (GOOD + "weights: [1, x]", "'weights' is [1, 'x'] where a number was expected"),
        (GOOD + "weights: [1, 2, 3]", "weights has 3 numbers for 2 members"),
        (GOOD + "weights: search", "--data: name a data set"),
        (GOOD + "floor: low", "'floor' is 'low' where a number was expected"),
        (GOOD + "normalize: max", "normalize is 'max'"),
        (GOOD + "steps: 1.5", "'steps' is 1.5 where an integer was expected"),
        (GOOD + "steps: -1", "'steps' is -1 where an integer of at least 0 was expected"),
        (GOOD + "limit: 0", "'limit' is 0 where an integer of at least 1 was expected"),
        (GOOD + "seed: true", "'seed' is True where an integer was expected"),
        (GOOD + "batch_size: true", ":2: 'batch_size' is True where an integer was expected"),
        (GOOD + "floor: true", ":2: 'floor' is True where a number was expected"),
        (GOOD + "check_fingerprint: 1", "'check_fingerprint' is 1 where true or false"),
        (GOOD + "base: 3", "'base' is 3 where a word was expected"),
        (GOOD + "method: ties\nbase: gone.safetensors", "gone.safetensors"),
        ("members: [gone.safetensors]", "gone.safetensors"),
    ],
)
def test_what_is_wrong_in_a_recipe(
    text: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = folder / "wrong.yaml"
    recipe.write_text(text)
    out = tmp_path / "out"
    assert main(["merge", "--recipe", str(recipe), "--out", str(out)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed, printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "checkpoints: name the members' files, or a --recipe"),
        (["--recipe", "gone.yaml"], "gone.yaml: no such file"),
        (["--recipe", "r.yaml", "--method", "ties"], "--method: the --recipe says it"),
        (["a.safetensors", "--recipe", "r.yaml"], "checkpoints: the --recipe says it"),
        (["m1", "--option", "density"], "--option: 'density' is not like density=0.2"),
        (["m1", "--method", "regmean"], "--data: name a data set"),
        (["m1", "--method", "ties"], "method 'ties' needs base"),
        (["m1", "--method", "full_fisher"], "--data: name a data set"),
    ],
)
def test_what_is_wrong_with_flags(
    flags: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(folder / "m1.safetensors") if flag == "m1" else flag for flag in flags]
    assert main(["merge", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed, printed
