"""Models that are copied as one file, and what people wrap around a network."""

from __future__ import annotations

import pytest
from helpers.libraries import EveryDoor, entries, name_of


@pytest.mark.parametrize("entry", entries("torch"), ids=name_of)
class TestSingleFiles(EveryDoor):
    pass
