"""One HTML file that needs nothing beside it: elements, tables, and drawings inside their cells.

A tree of elements is written out by the standard library, which escapes all text in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from fisherkern.errors import one_line
from fisherkern.evaluation import Difference
from fisherkern.tables import TableRows, table_cells

Element = ElementTree.Element

# Text and drawings have a contrast of 4.5 and more; nothing is said by colour alone.
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; border-top: 1px solid #bbb; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .5rem 0; max-width: 45rem; }
.lead { font-size: 1.1rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
.scroll:focus-visible { outline: 2px solid #0072b2; }
table { border-collapse: collapse; font-size: .9rem; min-width: min(100%, 30rem); }
caption { text-align: left; color: #595959; padding-bottom: .25rem; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #767676; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.drawn { white-space: nowrap; font-variant-numeric: tabular-nums; }
.text { white-space: nowrap; }
td.long { min-width: 15rem; overflow-wrap: anywhere; }
code { font: .85rem/1.4 ui-monospace, monospace; }
svg { vertical-align: middle; margin-left: .5rem; }
@media (max-width: 40rem) { .drawn svg { display: block; margin-left: 0; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  h2, h3, caption { break-after: avoid; }
  tr { break-inside: avoid; }
  svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
_BLUE, _GREY = "#0072b2", "#595959"  # 5.2 and 7 to 1 on white
_WIDTH, _HEIGHT = 120, 14  # of a drawing, in pixels
_SIDE = 320  # of a plane, in pixels
_LONG = 32  # characters that a cell does not break


def element(tag: str, *content: str | Element, **attributes: object) -> Element:
    """Make an element.

    Args:
        tag: its name.
        content: text, which is put on one line and cut where it is very long, and elements.
        attributes: an underscore stands for a hyphen, a last one for nothing.
    """
    names = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    made = ElementTree.Element(tag, {name: one_line(str(v)) for name, v in names.items()})
    for part in content:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + one_line(part)
        else:
            made.text = (made.text or "") + one_line(part)
    return made


def page(title: str, sections: Sequence[Element]) -> str:
    """Write the whole file.

    Args:
        title: of the page, in its head.
        sections: what stands in the body.

    Returns:
        HTML without scripts and without a link to anything outside.
    """
    style = ElementTree.Element("style")
    style.text = _STYLE
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content="fisherkern report"),
        element("title", title),
        style,
    )
    root = element("html", head, element("body", element("main", *sections)), lang="en")
    return f"<!DOCTYPE html>\n{ElementTree.tostring(root, encoding='unicode', method='html')}\n"


def table(caption: str, rows: TableRows, *, digits: str = ".4f") -> Element:
    """Make a table that scrolls by itself where the screen is narrow.

    Args:
        caption: what the numbers are.
        rows: mappings with the same keys, one at least; a value may be a drawing.
        digits: format of floating-point numbers.
    """
    heads, cells, numeric = table_cells(rows, digits)
    body = element("tbody")
    for row, texts in zip(rows, cells, strict=True):
        line = element("tr")
        for value, text, right in zip(row.values(), texts, numeric, strict=True):
            if isinstance(value, Element):
                line.append(element("td", value, class_="drawn"))
            else:
                kind = "number" if right else "long" if len(text) > _LONG else "text"
                line.append(element("td", text, class_=kind))
        body.append(line)
    first = element("tr")
    for head, right in zip(heads, numeric, strict=True):
        first.append(element("th", head, scope="col", class_="number" if right else "text"))
    made = element("table", element("caption", caption), element("thead", first), body)
    # To be scrolled by the keyboard too, it must take the focus and have a name.
    return element("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def bar(value: float, most: float, text: str) -> Element:
    """Draw a number as a bar beside its text.

    Args:
        value: the number, from 0.
        most: the number of a whole bar.
        text: what is written beside.
    """
    length = 0.0 if most <= 0 else _WIDTH * min(1.0, value / most)
    rect = element("rect", width=f"{length:.1f}", height=_HEIGHT, fill=_BLUE)
    return element("span", text, _drawing(f"bar of {text}", rect))


def interval(difference: Difference, reach: float) -> Element:
    """Draw a difference with its 95 % interval on an axis from -reach to reach, 0 in the middle."""
    text = f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"

    def x(value: float) -> str:
        inside = max(-1.0, min(1.0, value / reach if reach > 0 else 0.0))
        return f"{_WIDTH / 2 + inside * (_WIDTH / 2 - 5):.1f}"

    middle, half = _HEIGHT / 2, _WIDTH / 2
    return element(
        "span",
        text,
        _drawing(
            f"interval of {text} around the line of no difference",
            element("line", x1=half, x2=half, y1=0, y2=_HEIGHT, stroke=_GREY),
            element(
                "line", x1=x(difference.low), x2=x(difference.high), y1=middle, y2=middle,
                stroke=_BLUE, stroke_width=2,
            ),
            element("circle", cx=x(difference.mean), cy=middle, r=4, fill=_BLUE),
        ),
    )  # fmt: skip


def grid(title: str, plane: Mapping[str, Any], shown: Mapping[str, str]) -> Element:
    """Draw scores on a plane as shades, lighter where they are higher, and models as letters.

    Args:
        title: what the drawing shows.
        plane: of `weight_plane`.
        shown: a model's name -> its letter.
    """
    x, y, values = plane["x"], plane["y"], plane["values"]
    side, step = _SIDE / len(x), (x[1] - x[0], y[1] - y[0])
    low, high = min(map(min, values)), max(map(max, values))

    def place(point: Sequence[float]) -> tuple[float, float]:
        across, up = ((point[i] - axis[0]) / step[i] + 0.5 for i, axis in enumerate((x, y)))
        return side * across, _SIDE - side * up

    shapes = []
    for number, row in enumerate(values):
        for column, value in enumerate(row):
            light = 40 + 55 * ((value - low) / (high - low) if high > low else 1.0)
            left, top = side * column, _SIDE - side * (number + 1)
            shapes.append(
                element(
                    "rect", x=f"{left:.1f}", y=f"{top:.1f}", width=f"{side + 0.5:.1f}",
                    height=f"{side + 0.5:.1f}", fill=f"hsl(205 60% {light:.0f}%)",
                )
            )  # fmt: skip
    for points in plane["samples"].values():
        for across, up in map(place, points):
            if 0 <= across <= _SIDE and 0 <= up <= _SIDE:
                at = {"cx": f"{across:.1f}", "cy": f"{up:.1f}"}
                shapes.append(element("circle", **at, r=2, fill="#1a1a1a", fill_opacity=0.6))
    for name, letter in shown.items():
        across, up = place(plane["points"][name])
        at = {"cx": f"{across:.1f}", "cy": f"{up:.1f}"}
        text = {"x": f"{across:.1f}", "y": f"{up + 4:.1f}", "text_anchor": "middle"}
        shapes.append(element("circle", **at, r=9, fill="#fff", stroke="#1a1a1a"))
        shapes.append(element("text", letter, **text, font_size=11, fill="#1a1a1a"))
    return _drawing(title, *shapes, size=(_SIDE, _SIDE))


def _drawing(title: str, *shapes: Element, size: tuple[int, int] = (_WIDTH, _HEIGHT)) -> Element:
    inner = (element("title", title), *shapes)
    return element("svg", *inner, width=size[0], height=size[1], role="img", aria_label=title)
