"""The calls of RecBole, RecTools and RePlay, where the libraries are not installed as well."""

from __future__ import annotations

import pytest
from helpers.libraries import EveryDoor, name_of
from library_skeletons import SKELETONS


@pytest.mark.parametrize("entry", SKELETONS, ids=name_of)
class TestSkeletons(EveryDoor):
    pass
