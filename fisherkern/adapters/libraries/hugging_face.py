"""Hugging Face language models, PEFT's around them, and recommenders built on them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.adapters.batches import field, histories, model_input
from fisherkern.adapters.libraries.base import Library, config_of, right_padded, token_ids
from fisherkern.adapters.libraries.plain import logits_in
from fisherkern.errors import InputError

# What a configuration says of files, versions, outputs and training rather than the function.
_BESIDE_FUNCTION = {
    "_name_or_path",
    "architectures",
    "dtype",
    "gradient_checkpointing",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_TRAINING = ("drop", "init", "attn_implementation")
_LOSSES = ("labels", "target", "targets", "user", "return_dict", "label")


class HuggingFace(Library):
    """Knows a model by `get_output_embeddings` and a configuration object."""

    name = "Hugging Face"

    def fits(self, module: nn.Module) -> bool:
        config = getattr(module, "config", None)
        return hasattr(module, "get_output_embeddings") and hasattr(config, "to_dict")

    def logits(self, module: Any, batch: Any) -> Tensor:
        batch = model_input(batch)
        if isinstance(batch, Tensor):
            pad = self.pad_id(module)
            batch = {"input_ids": batch}
            if pad is not None:
                batch["attention_mask"] = (batch["input_ids"] != pad).long()
        taken = {name: value for name, value in batch.items() if name not in _LOSSES}
        accepted = _accepted(module)
        taken = {name: value for name, value in taken.items() if name in accepted}
        if self._encodes(module) and "decoder_input_ids" not in taken:
            taken["decoder_input_ids"] = _decoder_ids(module, batch)
        return logits_in(module(**taken))

    def places(self, module: Any, batch: Any) -> Tensor | None:
        if not self._encodes(module):
            return super().places(module, batch)
        if (mask := field(batch, ("decoder_attention_mask",))) is not None:
            return mask[1] != 0
        labels = field(batch, ("labels",))
        return None if labels is None else labels[1] != -100

    def labels(self, module: Any, batch: Any) -> Tensor | None:
        if (found := field(batch, ("labels",))) is None or found[1].dim() != 2:
            return None
        labels = found[1]
        if not self._is_causal(module):
            return labels
        # Position t of a causal model is scored by the label at t + 1.
        none = torch.full_like(labels[:, :1], -100)
        return torch.cat([labels[:, 1:], none], dim=1)

    def targets(self, module: Any, batch: Any) -> Tensor | None:
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return torch.as_tensor(batch[1])
        found = field(batch, ("target", "targets"))
        return None if found is None or found[1].dim() != 1 else found[1]

    def pad_id(self, module: Any) -> int | None:
        pad = getattr(module.config, "pad_token_id", None)
        return pad if isinstance(pad, int) else None

    def first_token(self, module: Any) -> int:
        return 0 if self.pad_id(module) not in (None, 0) else 1

    def max_len(self, module: Any) -> int | None:
        for name in ("max_position_embeddings", "n_positions"):
            value = getattr(module.config, name, None)
            if isinstance(value, int):
                return value
        return None

    def settings(self, module: Any) -> Mapping[str, Any] | None:
        config = config_of(module)
        return None if config is None else _of_function(config)

    def make_batch(self, module: Any, items: Tensor) -> Any:
        if not self._encodes(module) and not self._is_causal(module):
            raise InputError(
                f"model: {_bare_name(module)} is asked by a mask token, which its configuration "
                "does not name; give fk.adapt(model, make_batch=...)"
            )
        # Padded as collators do: positions of the left-padded would begin at the padding.
        items, _ = right_padded(items, 0)
        tokens = token_ids(items, self.first_token(module), self.pad_id(module) or 0)
        return {"input_ids": tokens, "attention_mask": (items != 0).long()}

    @staticmethod
    def _encodes(module: Any) -> bool:
        return bool(getattr(module.config, "is_encoder_decoder", False))

    def _is_causal(self, module: Any) -> bool:
        return not self._encodes(module) and "MaskedLM" not in _bare_name(module)


def _of_function(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change what a model computes, also those inside of others."""
    return {
        name: _of_function(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in _BESIDE_FUNCTION and not any(part in name for part in _TRAINING)
    }


def _bare_name(module: Any) -> str:
    """Return the class of the model that PEFT holds, or of the model."""
    get = getattr(module, "get_base_model", None)
    return type(get() if callable(get) else module).__name__


def _accepted(module: Any) -> set[str]:
    get = getattr(module, "get_base_model", None)
    forward = (get() if callable(get) else module).forward
    return set(inspect.signature(forward).parameters)


def _decoder_ids(module: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return what an encoder-decoder's decoder is given: the labels shifted, or its start token."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        shift = getattr(module, "prepare_decoder_input_ids_from_labels", None)
        if callable(shift):
            shifted: Tensor = shift(labels=labels)
            return shifted
        return labels.clamp(min=0)
    ids = histories(batch)
    assert ids is not None
    start = getattr(module.config, "decoder_start_token_id", None) or 0
    return torch.full_like(ids[:, :1], start)
