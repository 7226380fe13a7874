"""The README and docs/: their size, sentences, tables, links, and that their code runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisherkern as fk
from benchmarks import readme_tables
from fisherkern.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *readme_tables.pages(),
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
README_BYTES = 6000
# Words a sentence in the mean, of the prose alone.
README_WORDS, WORDS = 15, 20

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
VARIABLE = re.compile(r"\bFISHERKERN_[A-Z_]+\b")
# Macros that setup.py hands to the compiler.
MACROS = {f"FISHERKERN_{name}" for name in ("WITH_CUDA", "CUDA_SOURCES", "CUDA_PTX")}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sentences(markdown: str) -> list[str]:
    """The sentences of a page's paragraphs, list items and captions; no code, no tables."""
    text = FENCE.sub("\n\n", markdown)
    text = re.sub(r"<!--.*?-->|<[^>]+>", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    # A sentence may begin with code: § marks where.
    text = re.sub(r"`([^`]*)`", r"§\1", text).replace("**", "")
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        line = line.strip()
        item = re.match(r"([-*]|\d+\.) (.*)", line)
        if not line or line.startswith(("#", "|")):
            paragraphs.append([])
        elif item:
            paragraphs.append([item[2]])
        else:
            paragraphs[-1].append(line)
    ends = re.compile(r"(?<=[.!?])\s+(?=[(*]*[A-Z§])|(?<=[.!?][)*])\s+(?=[(*]*[A-Z§])")
    found = [part for paragraph in paragraphs for part in ends.split(" ".join(paragraph))]
    return [sentence for sentence in found if re.search(r"[A-Za-z]{2}", sentence)]


def mean_words(markdown: str) -> float:
    lengths = [len(sentence.split()) for sentence in sentences(markdown)]
    return sum(lengths) / max(len(lengths), 1)


def anchors(markdown: str) -> set[str]:
    """What `#...` may lead to on a page: its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page: Path, markdown: str) -> list[str]:
    broken = []
    for link in LINK.findall(FENCE.sub("", markdown)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if (
            not target.exists()
            or anchor
            and anchor
            not in anchors(markdown if target == page else target.read_text(encoding="utf-8"))
        ):
            broken.append(link)
    return broken


class OwnModel(nn.Module):
    """A user's model: what the README says of one, and nothing of fisherkern."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items + 1, 8)
        self.layer = nn.Linear(8, 8)

    def hidden(self, history: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.items(history).mean(1)))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        history = batch["history"] if isinstance(batch, dict) else batch
        return self.hidden(history) @ self.items.weight.T


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a ratings.csv of 40 items."""
    random = np.random.default_rng(0)
    rows = ["user_id,item_id,timestamp"]
    rows += [
        f"u{user},i{item},{t}" for user in range(9) for t, item in enumerate(random.permutation(40))
    ]
    (tmp_path / "ratings.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(name: str) -> list[str]:
    return [code for language, code in FENCE.findall(text_of(name)) if language == "python"]


PYTHON = [(name, number) for name in NAMES for number in range(len(blocks(name)))]


@pytest.mark.parametrize(("name", "number"), PYTHON, ids=lambda value: str(value))
def test_code_blocks_run(name, number, folder):
    torch.manual_seed(0)
    data = fk.load(folder / "ratings.csv")
    models = [OwnModel(data.num_items) for _ in range(3)]
    loader = data.loader(split="train", batch_size=4, max_len=5)
    fishers = [fk.diag_fisher(model, loader, progress=False) for model in models]
    given = {"model": models[0], "model_a": models[0], "model_b": models[1]}
    given |= {f"m{i}": model for i, model in enumerate(models, start=1)}
    given |= {f"f{i}": fisher for i, fisher in enumerate(fishers, start=1)}
    given |= {"data": data, "loader": loader, "other_report": fk.evaluate(models[1], data)}
    # As they stand, but for the length of a training.
    code = re.sub(r"epochs=\d+", "epochs=1", blocks(name)[number])
    exec(compile(code, f"{name}, block {number}", "exec"), given)


def test_the_readme_runs_code():
    assert blocks("README.md")


def test_the_readme_is_short():
    assert len(text_of("README.md").encode()) <= README_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_short(name):
    assert mean_words(text_of(name)) <= (README_WORDS if name == "README.md" else WORDS)


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_current(name):
    text = text_of(name)
    assert text == readme_tables.current(text), "run python -m benchmarks.readme_tables"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    assert broken_links(ROOT / name, text_of(name)) == []


def test_every_page_is_in_the_index():
    index = text_of("docs/index.md")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages == {link for link in LINK.findall(index) if "/" not in link}


def copied_code(markdown: str) -> list[tuple[str, str]]:
    """(script, code) of a page's `py` blocks: the script is the last that the text names."""
    found = []
    for block in re.finditer(r"^```py\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE):
        scripts = re.findall(r"`(examples/\w+\.py)`", markdown[: block.start()])
        found.append((scripts[-1], block[1]))
    return found


COPIED = [(name, *copy) for name in NAMES for copy in copied_code(text_of(name))]


@pytest.mark.parametrize(("name", "script", "code"), COPIED)
def test_code_of_other_libraries_is_that_of_an_example(name, script, code):
    example = text_of(script)
    assert [part for part in code.strip().split("\n\n") if part.strip() not in example] == []


def test_every_page_has_its_place_in_the_site():
    places = re.findall(r"(\S+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert sorted(set(pages) - set(places)) == [] and len(places) == len(set(places))


def test_every_environment_variable_is_documented():
    sources = [ROOT / "setup.py", *(ROOT / "fisherkern").rglob("*.py")]
    sources += (ROOT / "benchmarks").rglob("*.py")
    used = {v for path in sources for v in VARIABLE.findall(path.read_text(encoding="utf-8"))}
    assert used - MACROS == set(VARIABLE.findall(text_of("docs/environment.md")))


def commands(name: str) -> list[list[str]]:
    """The words of every command line of a page's blocks without a language."""
    code = "".join(code for language, code in FENCE.findall(text_of(name)) if not language)
    lines = code.replace("\\\n", " ").split("\n")
    return [line.partition("#")[0].split() for line in lines]


def alone(words: list[str]) -> list[str]:
    """A command of ours without the torchrun that starts several of it."""
    return words[words.index("fisherkern") :] if words[0] == "torchrun" else words


COMMANDS = [alone(words) for name in NAMES for words in commands(name) if words]


@pytest.mark.parametrize(
    "words", [w for w in COMMANDS if w[0] == "fisherkern"], ids=lambda words: " ".join(words)
)
def test_commands_and_their_flags_exist(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    try:
        status = main([words[1], "--help"])
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr().out
    assert not status
    flags = [word for word in words if word.startswith("--")]
    assert [flag for flag in flags if not re.search(rf"{flag}\b", shown)] == []


def test_scripts_and_targets_exist():
    makefile = text_of("Makefile")
    for words in COMMANDS:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif words[0] == "python":
            module = words[2].replace(".", "/") if words[1] == "-m" else words[1]
            found = [ROOT / module, ROOT / f"{module}.py"]
            assert any(path.exists() for path in found), words


PUBLIC = re.compile(r"\bfk\.([A-Za-z_]\w*)")


# The changelog has names that are gone.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_public_names_exist(name):
    assert {n for n in PUBLIC.findall(text_of(name)) if not hasattr(fk, n)} == set()


PATH = re.compile(r"`((?:fisherkern|benchmarks|tests|docs|examples|csrc)/[\w./-]*\w/?)`")


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name):
    assert [path for path in PATH.findall(text_of(name)) if not (ROOT / path).exists()] == []


def test_sentences_are_told_apart():
    page = "# No\n\nOne two\nthree. `Four` *five.* Six\n\n- seven eight\n| no | no |\n"
    page += "```\nno no\n```\n<!-- no no -->\n1. [Nine](no.md) ten? Eleven, e.g. twelve\n"
    found = ["One two three.", "§Four *five.*", "Six", "seven eight"]
    assert sentences(page) == [*found, "Nine ten?", "Eleven, e.g. twelve"]
    assert mean_words(page) == pytest.approx(13 / 6)


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "a.md"
    text = "# A `b` heading\n[1](#a-b-heading) [2](#none) [3](b.md) [4](a.md#none) [5](https://x.y)"
    page.write_text(text)
    assert broken_links(page, text) == ["#none", "b.md", "a.md#none"]
