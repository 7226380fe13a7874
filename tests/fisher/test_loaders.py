"""What is no loader, and what is no model, is one sentence."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from models import HISTORIES, bert
from torch import nn

import fisherkern as fk
from fisherkern.errors import InputError

NO_LOADERS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "a NoneType gives no batches"),
    "a number": (3, "a int gives no batches"),
    "a batch": (HISTORIES, "a Tensor is no loader"),
    "an array": (HISTORIES.numpy(), "a ndarray is no loader"),
    "a mapping": ({"history": HISTORIES}, "a dict is no loader"),
    "a name": ("ml-1m", "a str is no loader"),
}


@pytest.mark.parametrize("name", NO_LOADERS)
def test_what_is_no_loader_is_refused(name: str) -> None:
    loader, message = NO_LOADERS[name]
    for function in (fk.diag_fisher, fk.linear_grams, fk.fisher_product):
        with pytest.raises(InputError, match=f"^loader: {message}"):
            function(bert(), loader)


def test_what_gives_batches_is_a_loader() -> None:
    expected = fk.diag_fisher(bert(), [HISTORIES], progress=False)

    class ByIndex:
        def __getitem__(self, number: int) -> torch.Tensor:
            return [HISTORIES][number]

    data = torch.utils.data.TensorDataset(HISTORIES)
    tensors = torch.utils.data.DataLoader(data, batch_size=len(HISTORIES))
    for loader in (iter([HISTORIES]), HISTORIES[None], ByIndex(), (HISTORIES,), tensors):
        found = fk.diag_fisher(bert(), loader, progress=False)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_model_without_parameters_is_refused() -> None:
    for model in (nn.Sequential(), nn.Identity()):
        with pytest.raises(InputError, match="no trainable parameter"):
            fk.diag_fisher(model, [np.ones((2, 3))], progress=False)


@pytest.mark.parametrize(
    ("sampler", "given"),
    [
        ("exact", {"k": 5}),
        ("topk", {"probes": 3}),
        ("exact", {"rescale": True}),
        ("topk", {"tol": 0.1}),
        ("model", {"weight": "one"}),
    ],
)
def test_settings_that_a_sampler_does_not_use_are_told_and_not_stored(
    sampler: str, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = bert()
    with caplog.at_level(logging.WARNING, logger="fisherkern"):
        found = fk.diag_fisher(model, [HISTORIES], sampler=sampler, progress=False, **given)
    (name,) = given
    told = [] if name == "k" else [f"{name}: sampler {sampler!r} makes no use of it"]
    assert [record.getMessage() for record in caplog.records] == told
    plain = fk.diag_fisher(model, [HISTORIES], sampler=sampler, progress=False)
    assert found.meta == plain.meta
