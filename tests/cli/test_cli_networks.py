"""`fisherkern train --networks`: EMKD from the command line, and branches of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fisherkern as fk
from fisherkern.cli import main
from fisherkern.data import write_seqrec

SMALL = ["--epochs", "1", "--batch-size", "16", "--quiet"]
SHAPE = ["--max-len", "6", "--dim", "8", "--layers", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "data.txt"
    write_seqrec(fk.synthetic(40, 30, clusters=8), path)
    return str(path)


def test_networks_are_trained_evaluated_and_merged(data: str, tmp_path: Path) -> None:
    out = tmp_path / "a"
    flags = ["train", "--data", data, *SMALL, "--networks", "2", "--seed", "3"]
    assert main([*flags, *SHAPE, "--objective", "emkd", "--out", str(out)]) == 0
    found = fk.load_model(out / "model.safetensors")
    loaded = fk.load(data)
    model = fk.ParallelEncoders.seeded(
        lambda: fk.BERT4Rec(loaded.num_items, max_len=6, dim=8, layers=1), 2, seed=3
    )
    has = bool(loaded.attributes)
    objective = fk.EMKD(networks=2, dim=8, attribute_weight=float(has))
    fk.train(model, loaded, objective=objective, epochs=1, batch_size=16, seed=3, progress=False)
    members = [fk.load_model(out / f"member{index}.safetensors") for index in range(2)]
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
        _, index, own = name.split(".", 2)
        assert torch.equal(members[int(index)].state_dict()[own], value), name
    evaluated = ["evaluate", str(out / "model.safetensors"), "--data", data, "--quiet"]
    assert main([*evaluated, "--out", str(tmp_path / "e")]) == 0
    names = [str(out / f"member{index}.safetensors") for index in range(2)]
    assert main(["merge", *names, "--out", str(tmp_path / "m")]) == 0


def test_branches_of_a_checkpoint(data: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    train = ["train", "--data", data, *SMALL]
    assert main([*train, *SHAPE, "--encoder", "SASRec", "--out", str(base)]) == 0
    flags = ["--init", str(base / "model.safetensors"), "--networks", "3", "--noise", "0.01"]
    assert main([*train, *flags, "--lr", "1e-9", "--out", str(out)]) == 0
    members = [fk.load_model(out / f"member{index}.safetensors") for index in range(3)]
    start = fk.load_model(base / "model.safetensors")
    expected = fk.ParallelEncoders.copies(start, 3, noise=0.01)
    for own, branch in zip(members, expected.members, strict=True):
        assert type(own) is fk.SASRec
        for name, value in own.state_dict().items():
            assert torch.allclose(value, branch.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "emkd"], "give --networks"),
        (["--networks", "0"], "no members"),
        (["--objective", "nonsense"], "neither masked, next, emkd"),
    ],
)
def test_bad_flags(
    flags: list[str],
    message: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--data", data, *SMALL, *flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
