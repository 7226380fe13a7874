"""Ctrl-C while the command line is imported: one line, as later, and no traceback."""

import sys
from pathlib import Path
from types import TracebackType


def _excepthook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# As a program: `fisherkern ...`, or `python -m fisherkern ...`, whose argv[0] is "-m" until the
# package is imported. In anybody else's program nothing is changed.
if Path(sys.argv[0]).name == "fisherkern" or (
    sys.argv[0] == "-m" and "fisherkern" in sys.orig_argv[1:]
):
    sys.excepthook = _excepthook
