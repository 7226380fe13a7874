"""TensorBoard scalars of a run."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from fisherkern.errors import InputError
from fisherkern.training.state import PathLike


class TensorBoardLogger:
    """Writes scalars to the folder `log_dir`, or nothing for None; a context manager.

    Raises InputError if TensorBoard is not installed.
    """

    def __init__(self, log_dir: PathLike | None) -> None:
        self.log_dir, self.writer = log_dir, None
        if log_dir is not None:
            _writer_class()

    def resume(self, step: int) -> None:
        """Start writing at `step`; what an interrupted run wrote from there on is not shown."""
        if self.log_dir is not None:
            try:
                self.writer = _writer_class()(str(self.log_dir), purge_step=step or None)
            except OSError as error:
                reason = error.strerror
                raise InputError(f"log_dir: {self.log_dir}: cannot be written: {reason}") from None

    def add(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""
        if self.writer is not None:
            self.writer.add_scalar(name, value, step)

    def __enter__(self) -> TensorBoardLogger:
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
