"""A page of HTML, read as a browser would: tags, headings, and tables by caption."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta"}
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


class Page(HTMLParser):
    """A page's tags with their attributes, its headings, and its tables by caption."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[str, str]] = []
        self.tables: dict[str, list[dict[str, str]]] = {}
        self._cells: list[str] = []
        self._rows: list[list[str]] = []
        self.caption = self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.caption, self._rows = "", []
        elif tag == "tr":
            self._cells = []
        elif tag in ("td", "th"):
            self._cells.append("")
        elif tag in HEADINGS:
            self.headings.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr":
            self._rows.append(self._cells)
        elif tag == "table":
            heads, *rows = self._rows
            assert self.caption not in self.tables
            self.tables[self.caption] = [dict(zip(heads, row, strict=True)) for row in rows]

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "title" in self.open:
            return
        self.text += data
        if "caption" in self.open:
            self.caption += data
        elif "td" in self.open or "th" in self.open:
            self._cells[-1] += data
        elif self.open and self.open[-1] in HEADINGS:
            tag, text = self.headings[-1]
            self.headings[-1] = (tag, text + data)

    def table(self, start: str) -> list[dict[str, str]]:
        (found,) = (rows for caption, rows in self.tables.items() if caption.startswith(start))
        return found
