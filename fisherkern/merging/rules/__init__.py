"""The merge rules, by name: each takes blocks of all members and gives the merged block."""

from fisherkern.merging.rules.averages import fisher_average, group_means
from fisherkern.merging.rules.base import (
    Blocks,
    Operands,
    Option,
    Rule,
    average,
    check_options,
    choice,
    convex,
    integer,
    number,
)
from fisherkern.merging.rules.layer_mix import layer_criteria, layer_mix
from fisherkern.merging.rules.regmean import input_grams, regmean
from fisherkern.merging.rules.spherical import gram_of_members, slerp
from fisherkern.merging.rules.task_vectors import dare, task_arithmetic, ties, trim_thresholds

_TASK = {"weights": "may", "base": "must"}
_LEARNED = {"validation": "must", "fishers": "may"}
_LEARNING = {"lr": number(0.05, 0.0, above=True), "temperature": choice("learned", "fixed")}

RULES: dict[str, Rule] = {
    "uniform": Rule(average),
    "weighted": Rule(average, {"weights": "must"}),
    "fisher": Rule(
        fisher_average,
        {"weights": "may", "fishers": "must"},
        {"group": choice("entry", "row", "neuron", "head", "tensor")},
        group_means,
    ),
    "slerp": Rule(slerp, {"weights": "may"}, prepare=gram_of_members),
    "task_arithmetic": Rule(task_arithmetic, _TASK, {"scale": number(0.3, 0.0)}),
    "ties": Rule(
        ties,
        _TASK,
        {
            "density": number(0.2, 0.0, 1.0, above=True),
            "scale": number(1.0, 0.0),
            "per": choice("model", "tensor"),
        },
        trim_thresholds,
    ),
    "dare": Rule(
        dare, _TASK, {"density": number(0.5, 0.0, 1.0, above=True), "scale": number(0.3, 0.0)}
    ),
    "pcrec": Rule(
        layer_mix,
        {"weights": "may"},
        {
            "criterion": choice("entropy", "l1"),
            "alpha": number(30.0, 0.0),
            "bins": integer(10, 1),
        },
        layer_criteria,
    ),
    "regmean": Rule(
        regmean,
        {"weights": "may", "grams": "must", "fishers": "may"},
        {"alpha": number(0.9, 0.0, 1.0), "ridge": number(1e-6, 0.0)},
        input_grams,
    ),
    # The average is where the solver starts, and what stays where the Fisher says nothing.
    "full_fisher": Rule(
        average,
        {"weights": "may", "fishers": "must", "products": "must"},
        {"tol": number(1e-6, 0.0)},
    ),
    "greedy_soup": Rule(fisher_average, {"score": "must", "fishers": "may"}, choose="greedy"),
    "learned_soup": Rule(fisher_average, _LEARNED, _LEARNING, choose="learned"),
    "layer_wise": Rule(fisher_average, _LEARNED, _LEARNING, choose="learned by layer"),
}

__all__ = [
    "RULES",
    "Blocks",
    "Operands",
    "Option",
    "Rule",
    "average",
    "check_options",
    "convex",
]
