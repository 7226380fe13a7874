"""RePlay's models and batches as they are; `make libraries` installs RePlay."""

from __future__ import annotations

import pytest
from helpers.libraries import EveryDoor, entries, name_of

pytest.importorskip("replay", reason="RePlay is not installed: make libraries")


@pytest.mark.parametrize("entry", entries("replay"), ids=name_of)
class TestRePlay(EveryDoor):
    pass
