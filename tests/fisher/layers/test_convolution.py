"""Convolutions: every parameter against brute force, and served by rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import SIZES, Recommender, assert_right
from models import HISTORIES
from torch import Tensor, nn


class Convolution(nn.Module):
    """Over the positions of 4 channels (Conv1d), or over a plane of 2 channels (Conv2d)."""

    def __init__(self, plane: bool, out: int, kernel: Any, **kwargs: Any) -> None:
        super().__init__()
        self.plane = plane
        kind = nn.Conv2d if plane else nn.Conv1d
        self.convolution = kind(2 if plane else 4, out, kernel, **kwargs)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = torch.stack([x, torch.cos(x)], dim=1) if self.plane else x
        y = torch.tanh(self.convolution(x)).flatten(2)
        return torch.cat([y.mean(2), y[:, :, 0]], dim=1)[:, :4]


LINES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "kernel of one": (4, 1, {}),
    "stride, padding, dilation": (3, 2, {"stride": 2, "padding": 1, "dilation": 2}),
    "same, odd": (3, 3, {"padding": "same", "dilation": 2}),
    "same, even": (3, 4, {"padding": "same", "bias": False}),
    "valid": (3, 3, {"padding": "valid"}),
    "groups": (6, 3, {"groups": 2}),
    "of every channel": (4, 3, {"groups": 4, "padding": 1}),
    "circular": (3, 3, {"padding": 1, "padding_mode": "circular"}),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_conv1d(name: str, caplog: pytest.LogCaptureFixture) -> None:
    out, kernel, kwargs = LINES[name]
    assert_right(Recommender(Convolution(False, out, kernel, **kwargs)), caplog)


PLANES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "rectangle": (3, (2, 3), {}),
    "everything": (
        4,
        (3, 2),
        {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    ),
    "same": (3, (2, 3), {"padding": "same"}),
}


@pytest.mark.parametrize("name", PLANES)
def test_conv2d(name: str, caplog: pytest.LogCaptureFixture) -> None:
    out, kernel, kwargs = PLANES[name]
    assert_right(Recommender(Convolution(True, out, kernel, **kwargs)), caplog)


class Caser(nn.Module):
    """Horizontal filters (h, D), maximum over time; vertical ones (T, 1)."""

    def __init__(self, length: int = 5, width: int = 4) -> None:
        super().__init__()
        self.vertical = nn.Conv2d(1, 2, (length, 1))
        self.horizontal = nn.ModuleList(nn.Conv2d(1, 3, (h, width)) for h in range(1, 4))
        self.dense = nn.Linear(2 * width + 9, width)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        parts = [self.vertical(x).flatten(1)]
        for convolution in self.horizontal:
            y = F.relu(convolution(x).squeeze(3), inplace=True)
            parts.append(F.max_pool1d(y, y.shape[2]).squeeze(2))
        return torch.relu(self.dense(torch.cat(parts, dim=1)))


@pytest.mark.parametrize("size", SIZES)
def test_caser(size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Caser()), caplog, history=HISTORIES[:size])


class Twice(nn.Module):
    """One convolution applied twice; a kernel of one that a product uses as well."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, 3, padding=1, groups=groups)
        self.pointwise = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor, history: Tensor) -> Tensor:
        x = self.convolution(torch.tanh(self.convolution(x.transpose(1, 2))))
        x = self.pointwise(x).transpose(1, 2)
        return F.linear(x, self.pointwise.weight.squeeze(2)).sum(1)


@pytest.mark.parametrize("groups", [1, 2])
def test_used_twice(groups: int, caplog: pytest.LogCaptureFixture) -> None:
    assert_right(Recommender(Twice(groups)), caplog)


def test_over_the_sequences_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """A single unbatched plane of positions and sequences: nothing is per sequence there."""

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(4, 4, 1)

        def forward(self, x: Tensor, history: Tensor) -> Tensor:
            return self.convolution(x[:, -1].t()).t()

    names = ["body.convolution.weight", "body.convolution.bias"]
    assert_right(Recommender(Across()), caplog, fallback=names, history=HISTORIES[:4])
