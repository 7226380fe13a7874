"""Progress of long loops: a bar on a terminal or in a notebook, a line now and then in a log."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import TqdmWarning, tqdm

with warnings.catch_warnings():
    # In a notebook without ipywidgets the bar is made of text: nothing to warn of at an import.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm as live_bar

SECONDS = 30.0  # between two lines of a log


def progress_bar(
    iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any
) -> Any:
    """Wrap `iterable` in a tqdm bar that suits where stderr goes.

    Args:
        iterable: what is looped over; None for a bar that `update` moves.
        show: False shows nothing.
        options: of tqdm, such as `desc`, `unit` and `total`.

    Returns:
        A tqdm object, itself an iterable and a context manager.
    """
    live = sys.stderr.isatty() or "ipykernel" in sys.modules
    return (live_bar if live else _LogLines)(iterable, disable=not show, **options)


class _LogLines(tqdm):
    """Whole lines, at most one in `SECONDS`, and a last one: no carriage returns in a log."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._next = time.perf_counter() + SECONDS
        form = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        super().__init__(*arguments, bar_format=form, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line if one is due; False tells tqdm that there is nothing to wipe."""
        if msg is None and time.perf_counter() >= self._next:
            self._next = time.perf_counter() + SECONDS
            print(self, file=self.fp, flush=True)
        return False

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """Set the text before the numbers, without the colon that tqdm's own bars add."""
        self.set_description_str(desc, refresh)

    def close(self) -> None:
        """Write the last line."""
        if not self.disable:
            self._next = 0.0
            self.display()
            self.leave = False
        super().close()
