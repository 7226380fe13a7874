"""The example's objectives of items made of parts against their equations as loops."""

from __future__ import annotations

import math

import pytest
import torch
from item_parts import CONTENT, ITEM_IDS, PARTS, PATHS, encoder, item_part_objectives
from objective_models import check_gradient, generator, padded

import fisherkern as fk
from fisherkern.objectives import NTXent, Objective

LEVELS = {"a": 0, "e": 0, "b": 1, "c": 1, "f": 1, "d": 2}
TOKENS = padded([[1, 2, 3, 6, 2], [4], [], [5, 7, 10]], 5)
OBJECTIVES = item_part_objectives()
SEEN = [1, 2, 3, 4, 5, 6, 7, 10]


def bound() -> Objective:
    objective = OBJECTIVES.CategoryNeighbours(6, seed=3)
    data = fk.SequenceDataset("t", [1, 2], [0, 2], ITEM_IDS, ["a"])
    return objective.bind(data, 5)


@pytest.mark.parametrize("name", ["hierarchy", "categories"])
def test_neighbours_are_predicted_by_relations(name: str) -> None:
    model = encoder("GRU4Rec", PARTS[name])
    objective = bound()
    relations = objective.modules()["relations"].double().weight
    order = [c for level in model.item_embedding.settings["categories"] for c in level]
    rows = {c: model.item_embedding.category.weight[1 + i] for i, c in enumerate(order)}
    terms = []
    for v in SEEN:
        for c in PATHS.get(ITEM_IDS[v - 1], []):
            for other in PATHS[ITEM_IDS[v - 1]]:
                step = LEVELS[other] - LEVELS[c] if name == "hierarchy" else 0
                if other != c and abs(step) <= 1:
                    query = rows[c] + relations[1 + step]
                    scores = {b: math.exp(float(query.detach() @ rows[b].detach())) for b in order}
                    terms.append(-math.log(scores[other] / sum(scores.values())))
    loss = objective(model, TOKENS, generator())
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)
    assert objective.targets(model, TOKENS) == len(terms)
    check_gradient(objective, model, TOKENS)
    assert objective(model, TOKENS[1:3], generator()) == 0  # item 4 has no categories


def test_ids_and_content_are_contrasted() -> None:
    model = encoder("SASRec", PARTS["all"])
    objective = OBJECTIVES.ContentContrast(NTXent(0.5, "cosine"))
    losses, counts = [], []
    for kind, array in CONTENT.items():
        has_both = [v for v in SEEN if v != 4 and array[v - 1].sum() == array[v - 1].sum()]
        pairs = []
        for v in has_both:
            (base, *content), _ = model.item_embedding.parts(torch.tensor(v))
            pairs.append((base, content[list(CONTENT).index(kind)]))
        views = [x for x, _ in pairs] + [x for _, x in pairs]
        views = [(x / x.norm()).detach() for x in views]
        total, n = 0.0, len(pairs)
        for i in range(2 * n):
            scores = [math.exp(float(views[i] @ x) / 0.5) for x in views]
            total -= math.log(scores[(i + n) % (2 * n)] / (sum(scores) - scores[i]))
        losses.append(total / (2 * n))
        counts.append(n)
    loss = objective(model, TOKENS, generator())
    assert loss.item() == pytest.approx(sum(losses) / 2, abs=1e-12)
    terms = objective.terms(model, TOKENS, generator())
    assert [(term.targets, term.weight) for term in terms] == [(n, 0.5) for n in counts]
    assert objective.targets(model, TOKENS) == sum(counts)
    check_gradient(objective, model, TOKENS)
    assert objective(model, TOKENS[1:3], generator()) == 0
