"""NumPy's numbers in the place of Python's, in every public function that takes any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import HISTORIES, NUM_ITEMS, bert, shaken

import fisherkern as fk
from fisherkern.checks import takes_numpy
from fisherkern.files import write_json
from fisherkern.training.checkpoint import save_model

KINDS = [np.int64, np.int32, np.uint8, np.array]


def data() -> fk.SequenceDataset:
    counts = {"min_length": np.int64(5), "max_length": np.int8(9), "clusters": np.int64(2)}
    return fk.synthetic(
        np.int64(60), np.uint8(NUM_ITEMS), np.int16(1), tastes=np.int64(1), **counts
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["topk", "model", "random", "sketch", "exact"])
def test_diag_fisher(kind: Any, sampler: str, tmp_path: Path) -> None:
    """The same numbers, and a file that says the same of them."""
    size = "probes" if sampler in ("sketch", "exact") else "k"
    sizes = {size: 3, "seed": 2, "chunk": 2}
    floats = {"tol": 0.25} if sampler == "exact" else {}
    model = shaken(bert())
    expected = fk.diag_fisher(
        model, [HISTORIES], sampler=sampler, progress=False, **sizes, **floats
    )
    given = {name: kind(value) for name, value in sizes.items()}
    given |= {name: np.float32(value) for name, value in floats.items()}
    found = fk.diag_fisher(model, [HISTORIES], sampler=sampler, progress=False, **given)
    assert found.meta == expected.meta
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    found.save(tmp_path / "a.safetensors")
    assert fk.DiagFisher.load(tmp_path / "a.safetensors").meta == expected.meta


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"k": 3.0}, "k: must be an integer, got 3.0"),
        ({"k": True}, "k: must be an integer, got True"),
        ({"k": "3"}, "k: must be an integer, got '3'"),
        ({"k": 10**30}, "k: must be below"),
        ({"seed": 1.5}, "seed: must be an integer"),
        ({"seed": -1}, "seed: must not be negative"),
        ({"chunk": np.float64(2)}, "chunk: must be an integer"),
        ({"sampler": "exact", "tol": "x"}, "tol: must be in"),
        ({"positions": [1]}, "positions: "),
    ],
)
def test_what_is_no_number_of_its_kind_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(fk.InputError, match=said):
        fk.diag_fisher(bert(), [HISTORIES], progress=False, **wrong)


def test_merge_and_preflight(tmp_path: Path) -> None:
    """A report that is JSON, in a checkpoint that is read again."""
    models = [shaken(bert(), seed) for seed in (0, 1)]
    fishers = [fk.diag_fisher(model, [HISTORIES], progress=False) for model in models]
    merged = fk.merge(
        models, fishers=fishers, floor=np.float32(0.1), weights=[np.int64(1), np.float64(2)]
    )
    json.dumps(merged.merge_report)
    save_model(merged, tmp_path / "a.safetensors")
    options = {"density": np.float64(0.5)}
    drawn = fk.merge(
        models, method="dare", base=shaken(bert(), 2), seed=np.int64(3), options=options
    )
    json.dumps(drawn.merge_report)
    fk.preflight(models, points=np.int64(3))
    json.dumps(fk.align(models, sweeps=np.int64(2))[1].align_report)


def test_evaluate(tmp_path: Path) -> None:
    model = shaken(bert())
    expected = fk.evaluate(model, data(), k=5, candidates="full", seed=1)
    found = fk.evaluate(model, data(), k=np.int64(5), batch_size=np.uint8(7), seed=np.int64(1))
    assert dict(found) == dict(expected)
    several = fk.evaluate(model, data(), k=np.array([5, 10]), users=np.arange(5))
    json.dumps(several.to_dict() if hasattr(several, "to_dict") else dict(several))
    json.dumps(dict(fk.evaluate(model, data(), k=[np.int64(5), np.int64(10)])))


def test_train(tmp_path: Path) -> None:
    model = fk.BERT4Rec(
        np.int64(NUM_ITEMS), dim=np.int64(8), heads=np.int64(2), max_len=np.int64(5)
    )
    log = fk.train(
        model, data(), epochs=np.int64(1), batch_size=np.uint8(200), lr=np.float32(1e-3),
        seed=np.int64(2), weight_decay=np.float64(0), progress=False,
    )  # fmt: skip
    save_model(model, tmp_path / "a.safetensors")
    write_json(tmp_path / "log.json", log.__dict__ if hasattr(log, "__dict__") else {})


def test_what_is_taken_for_a_number() -> None:
    """Inside lists and mappings too; everything else arrives as it is."""

    @takes_numpy
    def given(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    array, names = np.arange(3), ["a"]
    args, kwargs = given(array, names, (np.int64(1), 2), a={"b": np.float32(0.5)}, c=np.bool_(True))
    assert args[0] is array and args[1] is names and args[2] == (1, 2)
    assert kwargs == {"a": {"b": 0.5}, "c": True} and type(kwargs["c"]) is bool
