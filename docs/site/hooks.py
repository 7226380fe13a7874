"""What turns the pages, as they stand on GitHub, into a site: mkdocs calls these functions.

Pages link to files beside docs/. Those that are pages of the site, or figures on one, come
along; other files of the repository are shown by their names. Between `<!-- tabs -->` and
`<!-- end tabs -->` a heading is a tab. The API page is made from `fisherkern/__init__.py`.
"""

from __future__ import annotations

import ast
import os
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Pages of the site that stand elsewhere in the repository, or have another name there.
ELSEWHERE = {
    "README.md": "index.md",
    "docs/index.md": "pages.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/results/libraries.md": "libraries.md",
    "docs/site/site.css": "site.css",
    "docs/site/site.js": "site.js",
}
# Pictures of another host: the site asks no other.
BADGE = re.compile(r"^.*img\.shields\.io.*\n", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
TABS = re.compile(r"<!-- tabs -->\n(.*?)<!-- end tabs -->", re.DOTALL)


def repository_files() -> dict[Path, str]:
    """Of every file outside docs/ that the site takes along, its place in the site."""
    taken = {ROOT / name: place for name, place in ELSEWHERE.items()}
    pages = [*(ROOT / "docs").glob("*.md"), *(path for path in taken if path.suffix == ".md")]
    for page in pages:
        for mark, _, target in LINK.findall(page.read_text(encoding="utf-8")):
            path = Path(os.path.normpath(page.parent / target))
            if mark and path.is_relative_to(ROOT / "benchmarks"):
                taken[path] = f"figures/{path.relative_to(ROOT / 'benchmarks/results')}"
    return taken


def definition(module: str, name: str) -> str:
    """Where a name that a module imports is defined: a module may have its function's name."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return definition(node.module or "", name)
    return f"{module}.{name}"


def api_page() -> str:
    """A heading for each room of the package, under it what `fisherkern` exports of it."""
    tree = ast.parse((ROOT / "fisherkern/__init__.py").read_text(encoding="utf-8"))
    rooms: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module != "fisherkern":
            room = (node.module or "").removeprefix("fisherkern.")
            rooms.setdefault(room, []).extend(alias.name for alias in node.names)
    exported = {
        name
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    }
    parts = ["# API", "`import fisherkern as fk` has these names."]
    for room, names in rooms.items():
        shown = [name for name in names if name in exported]
        if shown:
            parts.append(f"## {room.capitalize()}")
            for name in shown:
                place = definition(f"fisherkern.{room}", name)
                parts.append(f"::: {place}\n    options:\n      heading: fk.{name}")
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: Any) -> Files:
    files.remove(files.src_uris["index.md"])
    for path, place in repository_files().items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source, markdown = page.file.abs_src_path, BADGE.sub("", markdown)
    # Code stays as it is: a link in it is none.
    parts, fences = FENCE.split(markdown), [*FENCE.findall(markdown), ""]
    if source is not None:
        places = {Path(f.abs_src_path): f.src_uri for f in files if f.abs_src_path}
        here = Path(page.file.src_uri).parent
        parts = [
            LINK.sub(lambda found: moved(found, Path(source).parent, here, places), part)
            for part in parts
        ]
    markdown = "".join(part + fence for part, fence in zip(parts, fences, strict=True))
    return TABS.sub(lambda found: tabs(found[1]), markdown)


def moved(found: re.Match[str], folder: Path, here: Path, places: dict[Path, str]) -> str:
    """A link of a page in `folder` of the repository, as it is from `here` in the site."""
    mark, text, target = found.groups()
    name, hash_sign, anchor = target.partition("#")
    path = Path(os.path.normpath(folder / name))
    if "://" in target or not name:
        return found[0]
    if path in places:
        return f"{mark}[{text}]({os.path.relpath(places[path], here)}{hash_sign}{anchor})"
    assert path.exists(), f"{folder}: {target} leads nowhere"
    return f"{text} (`{path.relative_to(ROOT)}`)"


def tabs(markdown: str) -> str:
    """Every part under a heading as a tab of that name."""
    _, *parts = re.split(r"^#+ (.+)$", markdown, flags=re.MULTILINE)
    return "".join(
        f'=== "{name}"\n{textwrap.indent(body, "    ")}\n'
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    )
