"""Which of an op's two PyTorch paths runs: a CPU's, or the one that keeps a GPU busy.

A CPU wants tiles that stay in its caches and skips work that it finds to be none. A GPU wants
few launches, sums in a fixed order without atomics, and never to be waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_everywhere: ContextVar[bool] = ContextVar("fisherkern_gpu_paths", default=False)


def on_gpu(tensor: Tensor) -> bool:
    """Whether an op of `tensor` takes the path made for a GPU."""
    return tensor.is_cuda or _everywhere.get()


@contextlib.contextmanager
def gpu_paths() -> Iterator[None]:
    """Take the paths made for a GPU on every device: to test and to count them without one.

    Meant for backend="torch": what is compiled for a CPU serves a CPU's paths alone.
    """
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)
