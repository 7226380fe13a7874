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
