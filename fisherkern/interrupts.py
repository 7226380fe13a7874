"""Ctrl-C while the command line is imported: one line, as later, and no traceback."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    # An exception would pass through the C++ of libraries that load, and some abort on it.
    os.write(2, b"interrupted\n")
    os._exit(130)


def raise_again() -> None:
    """Raise KeyboardInterrupt at Ctrl-C, once all is imported."""
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# As a program: `fisherkern ...`, or `python -m fisherkern ...`, whose argv[0] is "-m" until the
# package is imported. In anybody else's program nothing is changed, nor under nohup.
if (
    Path(sys.argv[0]).name == "fisherkern"
    or (sys.argv[0] == "-m" and "fisherkern" in sys.orig_argv[1:])
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop_at_once)
