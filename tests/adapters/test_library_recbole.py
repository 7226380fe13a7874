"""RecBole's models and batches as they are; `make libraries` installs RecBole."""

from __future__ import annotations

import pytest
from helpers.libraries import EveryDoor, entries, name_of

pytest.importorskip("recbole", reason="RecBole is not installed: make libraries")


@pytest.mark.parametrize("entry", entries("recbole"), ids=name_of)
class TestRecBole(EveryDoor):
    pass
