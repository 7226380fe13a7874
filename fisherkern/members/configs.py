"""Settings that shape no tensor but change what a network computes, compared between members."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Names and places of a model, what acts in training alone, and what alignment is for.
NO_FUNCTION = re.compile(
    r"^_|dropout|drop_rate|drop_prob|_?pdrop$|^layerdrop|name_or_path|version|^init_|initializer|"
    r"^num_items$|^vocab_size$|^architectures$|^auto_map$|^revision$|^inference_mode$|"
    r"^(torch_)?dtype$|^use_cache$|^gradient_checkpointing$|^output_|^return_dict|^task_specific|"
    r"^id2label$|^label2id$|^finetuning_task$|^problem_type$|^chunk_size_feed_forward$|"
    r"^experts_implementation$|^attn_implementation$|^tie_word_embeddings$|^loss|_loss$|_loss_"
)
# What of a trainer's settings, most of which are its own, belongs to the network.
OF_NETWORK = re.compile(
    r"(^|_)(n_?heads?|heads?|num_heads|head_num|act|activation|act_fn|acti|eps|epsilon|norm_first|"
    r"pre_?norm|normalize|similarity|causal|is_causal|bidirectional|rope_theta|dilations?|"
    r"use_pos_emb|use_key_padding_mask|use_causal_attn|ffn_type|layers_type)($|_)"
)


def function_settings(config: Mapping[str, Any], *, of_trainer: bool = False) -> dict[str, Any]:
    """Return the settings of a configuration that change what the network computes.

    Left out are names and paths, dropout, initial values, dtypes, caches, sizes of a catalogue,
    and all that acts in training alone.

    Args:
        config: A network's configuration by name, nested mappings included.
        of_trainer: Whether it is a training run's: then only what is known to belong to the
            network is taken.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if not isinstance(key, str) or NO_FUNCTION.search(key):
            continue
        if isinstance(value, Mapping):
            inner = function_settings(value, of_trainer=of_trainer)
            found |= {f"{key}.{name}": own for name, own in inner.items()}
        elif not of_trainer or OF_NETWORK.search(key):
            found[key] = value
    return found


def differing_setting(
    first: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """(Name, the first's value, the other's) of a setting that both have and that differs."""
    for key in sorted(first.keys() & other.keys()):
        if first[key] != other[key]:
            return key, first[key], other[key]
    return None
