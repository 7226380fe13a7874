"""Fishers of large matrices in few numbers: V + D of them for V × D, as Adafactor keeps moments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fisherkern.checks import check_count
from fisherkern.errors import InputError, shown

ROWS, COLUMNS = ".row_sums", ".column_shares"


def factor(tensors: Mapping[str, Tensor], least: int) -> tuple[dict[str, Tensor], list[str]]:
    """Replace every matrix of `least` entries or more by its factors.

        F ≈ r cᵀ,   r_i = Σ_j F_ij,   c_j = Σ_i F_ij / Σ F

    It has the sums of rows and columns that F has, and of all such matrices of rank 1 it is the
    nearest in Kullback-Leibler divergence.

    Returns:
        The tensors, the factors of `x` being `x.row_sums` (V,) and `x.column_shares` (D,), in the
        matrix's type; and the names of the matrices.

    Source: Shazeer and Stern, Adafactor, ICML 2018, arXiv 1804.04235.
    """
    check_count("factored", least)
    found: dict[str, Tensor] = {}
    names = []
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.numel() < least:
            found[name] = tensor
            continue
        wide = tensor.double()
        columns = wide.sum(dim=0)
        total = columns.sum()
        found[name + ROWS] = wide.sum(dim=1).to(tensor.dtype)
        shares = columns / total if total > 0 else columns
        found[name + COLUMNS] = shares.to(tensor.dtype)
        names.append(name)
    if len(found) < len(tensors) + len(names):
        raise InputError(f"factored: a parameter is named like the factors, *{ROWS}")
    return found, names


def multiply_factors(rows: Tensor, columns: Tensor) -> Tensor:
    """Return r cᵀ: (V,), (D,) -> (V, D)."""
    return rows[:, None] * columns


def factored_names(
    header: Mapping[str, Any], layout: Mapping[str, Any], path: str | os.PathLike[str]
) -> list[str]:
    """Return the matrices that a Fisher file has the factors of.

    layout: what the file has, by name. Raises InputError where a factor is missing.
    """
    names = header.get("factored", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: its list of factored matrices is {shown(names)}")
    for name in names:
        for part in (name + ROWS, name + COLUMNS):
            if part not in layout:
                raise InputError(f"{path}: tensor {shown(part)} is missing")
        if name in layout or names.count(name) > 1:
            raise InputError(f"{path}: tensor {shown(name)} stands there twice")
    return names


def multiplied(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """Return a file's tensors with the matrices in place of their factors."""
    found = dict(tensors)
    for name in factored_names(header, tensors, path):
        rows, columns = found.pop(name + ROWS), found.pop(name + COLUMNS)
        check_factors(name, (rows.dtype, rows.shape), (columns.dtype, columns.shape), path)
        found[name] = multiply_factors(rows, columns)
    return found


def check_factors(
    name: str, rows: tuple[Any, Any], columns: tuple[Any, Any], path: str | os.PathLike[str]
) -> None:
    """Raise InputError unless two factors, (type, shape) each, are vectors of one type."""
    if len(rows[1]) != 1 or len(columns[1]) != 1 or rows[0] != columns[0]:
        raise InputError(f"{path}: the factors of {shown(name)} are no vectors of one type")
