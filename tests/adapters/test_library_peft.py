"""PEFT's models and batches as they are; `make libraries` installs PEFT."""

from __future__ import annotations

import pytest
from helpers.libraries import EveryDoor, entries, name_of

pytest.importorskip("peft", reason="PEFT is not installed: make libraries")


@pytest.mark.parametrize("entry", entries("peft"), ids=name_of)
class TestPEFT(EveryDoor):
    pass
