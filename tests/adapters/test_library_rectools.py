"""RecTools's models and batches as they are; `make libraries` installs RecTools."""

from __future__ import annotations

import pytest
from helpers.libraries import EveryDoor, entries, name_of

pytest.importorskip("rectools", reason="RecTools is not installed: make libraries")


@pytest.mark.parametrize("entry", entries("rectools"), ids=name_of)
class TestRecTools(EveryDoor):
    pass
