"""What was built of the extension `fisherkern._C`, and the GPUs that its code runs on."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

log = logging.getLogger("fisherkern")


@functools.cache
def load_extension() -> ModuleType | None:
    """Return the extension, or None where it was not built for this Python."""
    try:
        return importlib.import_module("fisherkern._C")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        log.warning("fisherkern._C cannot be loaded and is not used: %s", error)
        return None


def supports_arch(capability: tuple[int, int], archs: Sequence[int], ptx: Sequence[int]) -> bool:
    """Whether a GPU runs code made for `archs`: same major and no newer minor, or older PTX."""
    major, minor = capability
    here = 10 * major + minor
    return any(a // 10 == major and a <= here for a in archs) or any(p <= here for p in ptx)


def status() -> str:
    """One sentence for a person: what was built."""
    extension = load_extension()
    if extension is None:
        return (
            "fisherkern._C was not built (no C++ compiler, or it failed: pip install -v shows it);"
            " everything works without it, in PyTorch and Triton"
        )
    if not extension.cuda_archs:
        return "fisherkern._C was built for the CPU alone (no nvcc, or FISHERKERN_CUDA=0)"
    return f"fisherkern._C was built with CUDA kernels for {', '.join(_names(extension))}"


def _names(extension: Any) -> list[str]:
    return [f"sm_{a}" for a in extension.cuda_archs] + [f"PTX {p}" for p in extension.cuda_ptx]
