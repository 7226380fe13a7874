"""Where the scalars of a run go: TensorBoard's folder, and a logger of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from fisherkern import processes
from fisherkern.errors import InputError, shown
from fisherkern.training.state import PathLike


class ScalarLogger(Protocol):
    """What `train` needs of a logger; a run of W&B has it."""

    def log(self, values: Mapping[str, float], step: int) -> object:
        """Take the values of a step by name."""


class RunScalars:
    """Hands the scalars of a run to TensorBoard and a logger, on process 0; a context manager.

    Args:
        log_dir: folder that TensorBoard reads; None: none is written.
        logger: gets every step's values too; it is not closed.

    Raises:
        InputError: TensorBoard is not installed, or the logger has no method `log`.
    """

    def __init__(self, log_dir: PathLike | None, logger: ScalarLogger | None = None) -> None:
        if logger is not None and not callable(getattr(logger, "log", None)):
            raise InputError(f"logger: {shown(logger)} has no method log(values, step)")
        if log_dir is not None:
            _writer_class()
        first = processes.rank() == 0
        self.log_dir, self.logger = (log_dir, logger) if first else (None, None)
        self.writer: Any = None

    def resume(self, step: int) -> None:
        """Start at `step`; TensorBoard does not show what an interrupted run wrote from there."""
        if self.log_dir is not None:
            try:
                self.writer = _writer_class()(str(self.log_dir), purge_step=step or None)
            except OSError as error:
                reason = error.strerror
                raise InputError(f"log_dir: {self.log_dir}: cannot be written: {reason}") from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One point of each value's curve."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if self.logger is not None:
            self.logger.log(values, step)

    def __enter__(self) -> RunScalars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            self.writer.close()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "log_dir: TensorBoard is not installed; pip install 'fisherkern[tensorboard]'"
        ) from error
    return SummaryWriter
