"""Fisher files whose large matrices are kept as factors, read like any other."""

from __future__ import annotations

import os

from torch import Tensor

from fisherkern.errors import InputError
from fisherkern.fisher.factored import (
    COLUMNS,
    ROWS,
    check_factors,
    factored_names,
    multiply_factors,
)
from fisherkern.merging.files.tensor_files import TensorFile


class FactoredFile(TensorFile):
    """A file of `DiagFisher.save`; a matrix's rows are multiplied as they are read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._factors = TensorFile(path)  # whose layout has the factors by their names
        self._columns: dict[str, Tensor] = {}
        try:
            self._find_factors()
        except InputError:
            self.close()
            raise

    def _find_factors(self) -> None:
        for name in factored_names(self.about, self.layout, self.path):
            rows, columns = self.layout.pop(name + ROWS), self.layout.pop(name + COLUMNS)
            check_factors(name, rows, columns, self.path)
            self._columns[name] = self._factors.rows(name + COLUMNS, 0, columns[1][0])
            self.layout[name] = rows[0], (*rows[1], *columns[1])

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._factors.close()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """As in `TensorFile`."""
        if name not in self._columns:
            return super().rows(name, start, stop)
        return multiply_factors(self._factors.rows(name + ROWS, start, stop), self._columns[name])

    def take(self, name: str, index: Tensor) -> Tensor:
        """As in `TensorFile`."""
        if name not in self._columns:
            return super().take(name, index)
        return multiply_factors(self._factors.take(name + ROWS, index), self._columns[name])
