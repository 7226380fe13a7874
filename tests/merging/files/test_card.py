"""The model card: the same text with and without huggingface_hub, and its metadata."""

import sys

import pytest
import yaml

from fisherkern.merging import METHODS
from fisherkern.merging.files.card import model_card

PROVENANCE = {
    "method": "weighted",
    "weights": [0.25, 0.75],
    "options": {},
    "floor": 0.1,
    "normalize": "mean",
    "seed": 0,
    "members": [{"file": f"m{n}.safetensors", "sha256": "0", "metrics": {}} for n in range(2)],
    "catalogue": None,
    "fishers": None,
    "base": None,
    "metrics": {"ndcg@10": 0.5},
    "versions": {"fisherkern": "0", "torch": "0"},
}


def test_without_huggingface_hub_the_card_is_its_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    card = model_card("m.safetensors", {}, PROVENANCE)
    assert card.startswith("# m.safetensors\n")
    source = METHODS["weighted"].source
    assert f"(method `weighted`: [Weighted average]({source}))" in card


def test_metadata_that_the_hub_reads(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    card = model_card("m.safetensors", {}, PROVENANCE)
    _, metadata, text = card.split("---\n", 2)
    read = yaml.safe_load(metadata)
    assert read["library_name"] == "fisherkern" and "merge" in read["tags"]
    (result,) = hub.ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value) == ("ndcg@10", 0.5)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert text.lstrip() == model_card("m.safetensors", {}, PROVENANCE)


HOSTILE = (
    "a|b",
    "# a",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "`code`",
    "a\r\n## heading",
    "![x](http://a.b/c.png)",
    "[x](javascript:alert(1))",
    "https://a.b/c",
    "**bold** _it_ ~~no~~ $x$",
    "&lt;b&gt;",
    "\x1b[31m",
    "\u202egpj.exe",
    "| --- |\n| x |",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_files_say_of_themselves_is_text_on_a_card(text, monkeypatch):
    """Whatever stands in names, classes, configurations, metrics and settings is shown as it is."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # whose writer of YAML quotes
    provenance = PROVENANCE | {
        "members": [{"file": text, "sha256": "0", "metrics": {text: 1.0}} for _ in range(2)],
        "fishers": [{"file": text, "sha256": "0", "made": {text: text}} for _ in range(2)],
        "options": {text: text},
    }
    about = {"class": text, "config": {text: text, "nested": {text: [text]}}}
    card = model_card(text, about, provenance)
    plain = model_card("x", {"class": "x", "config": {"x": "x", "nested": {"x": ["x"]}}}, {
        **provenance,
        "members": [{"file": "x", "sha256": "0", "metrics": {"x": 1.0}} for _ in range(2)],
        "fishers": [{"file": "x", "sha256": "0", "made": {"x": "x"}} for _ in range(2)],
        "options": {"x": "x"},
    })  # fmt: skip

    def shape(source):
        tokens = markdown.parse(source)
        inner = [child for token in tokens for child in token.children or ()]
        return [t.type for t in tokens], [t.type for t in inner if t.type != "text"]

    assert shape(card) == shape(plain)
    assert "<" not in card and "://" not in card.replace(METHODS["weighted"].source, "")
