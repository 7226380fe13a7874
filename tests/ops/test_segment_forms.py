"""The CPU's two forms of segment_outer_square_ against float64 loops, and the choice of one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.extension import NO_EXTENSION, SEGMENTS, assert_close, brute_segments, guarded, tf32

from fisherkern.ops import _extension, build

CHEAPER, DIRECT, GRAM = 0, 1, 2


@pytest.fixture
def built() -> Any:
    extension = build.load_extension()
    if extension is None:
        pytest.skip(NO_EXTENSION)
    return extension


class Fixed:
    """The extension with the CPU's number of threads, vector width and form fixed."""

    def __init__(self, extension: Any, **fixed: int) -> None:
        self.extension, self.fixed = extension, fixed

    def segment_outer_square_cpu(self, **arguments: Any) -> None:
        self.extension.segment_outer_square_cpu(**{**arguments, **self.fixed})


# Beside those above: blocks of 3 and 4 positions and 1 to 3 less; more pairs than are held at
# once; probes enough that short segments are cheaper in the Gram form and long ones are not.
FORMS = [
    *SEGMENTS,
    (5, [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 21, 19),
    (3, [11, 0, 12], 150, 70),
    (16, [1, 5, 18, 19, 40], 37, 72),
]


@pytest.mark.parametrize("form", [DIRECT, GRAM, CHEAPER])
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_every_form_vector_width_and_number_of_threads(
    built: Any, case: tuple[int, list[int], int, int], lanes: int, form: int
) -> None:
    probes, lengths, rows, columns = case
    starts = [0, *itertools.accumulate(lengths)]
    delta, inputs = guarded(probes, starts[-1], rows), guarded(starts[-1], columns, seed=1)
    found = []
    for threads in (1, 2, 3, 50):
        fisher = torch.zeros(rows, columns)
        try:
            extension = Fixed(built, threads=threads, lanes=lanes, form=form)
            _extension.segment_outer_square_(extension, fisher, delta, inputs, torch.tensor(starts))
        except ValueError as error:
            assert "this processor has no vectors" in str(error)
            pytest.skip(str(error))
        found.append(fisher)
    assert_close(found[0], brute_segments(delta, inputs, starts))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ["fp32", "tf32", "bf16"])
def test_both_forms_read_every_number(built: Any, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    starts = [0, 7, 7, 13]
    delta, inputs = guarded(5, 13, 37, dtype=dtype), guarded(13, 70, dtype=dtype, seed=1)
    exact = brute_segments(*(tf32(x) if kind == "tf32" else x for x in (delta, inputs)), starts)
    for form in (DIRECT, GRAM):
        fisher = torch.zeros(37, 70)
        _extension.segment_outer_square_(
            Fixed(built, form=form),
            fisher,
            delta,
            inputs,
            torch.tensor(starts),
            tf32=kind == "tf32",
        )
        assert_close(fisher, exact)


# (R, T, I) of which the Gram form has 3/4 of the multiply-adds or more, or of which 16 rows' G and
# deltas take more than 8 MB; each beside one that has fewer.
BOUNDARY = [
    ((64, 46, 64), GRAM), ((64, 47, 64), DIRECT), ((64, 75, 256), GRAM), ((64, 76, 256), DIRECT),
    ((4, 4, 64), GRAM), ((4, 5, 64), DIRECT), ((3, 2, 64), GRAM), ((2, 2, 64), DIRECT),
    ((600, 188, 600), GRAM), ((600, 189, 600), DIRECT),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "form"), BOUNDARY, ids=str)
def test_the_shapes_alone_choose_the_form(
    built: Any, shape: tuple[int, int, int], form: int
) -> None:
    probes, length, columns = shape
    delta, inputs = guarded(probes, length, 1), guarded(length, columns, seed=1)
    found = []
    for given in (CHEAPER, DIRECT, GRAM):
        fisher = torch.zeros(1, columns)
        _extension.segment_outer_square_(Fixed(built, form=given), fisher, delta, inputs, length)
        found.append(fisher)
    assert not torch.equal(found[DIRECT], found[GRAM])
    assert torch.equal(found[CHEAPER], found[form])


def test_rows_of_more_than_are_held_at_once(built: Any) -> None:
    """Several panels of G: 100 rows of 600 · 97 deltas."""
    delta, inputs = guarded(600, 97, 100), guarded(97, 3, seed=1)
    found = []
    for threads in (1, 3):
        fisher = torch.zeros(100, 3)
        extension = Fixed(built, threads=threads, form=GRAM)
        _extension.segment_outer_square_(extension, fisher, delta, inputs, 97)
        found.append(fisher)
    products = torch.einsum("rto,ti->roi", delta.double(), inputs.double())
    assert_close(found[0], products.square().sum(dim=0))
    assert torch.equal(*found)


def test_a_form_that_is_none(built: Any) -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"segment_outer_square: form must be .* got 3"):
        _extension.segment_outer_square_(Fixed(built, form=3), one, one[None], one, 1)
