"""Models of transformers and its collators' batches as they are."""

from __future__ import annotations

import pytest
from helpers.libraries import EveryDoor, entries, name_of

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("entry", entries("transformers"), ids=name_of)
class TestHuggingFace(EveryDoor):
    pass
