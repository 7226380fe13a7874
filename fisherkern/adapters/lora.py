"""Weights that are stored as factors: LoRA's pairs, and parametrisations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisherkern.errors import InputError, shown

_FIRST = re.compile(
    r"^(?P<module>.*?)(?P<key>\blora_A|\blora_embedding_A|\blora_down|lora(_linear_layer)?\.down)"
    r"(?P<rest>\..*)?$"
)
_SECOND = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}  # else down: up
_OF_LORA = re.compile(r"(^|[._])lora([._]|$)", re.IGNORECASE)
# What may scale an update beside its factors: DoRA's magnitudes, LyCORIS's learned factor.
_BESIDE = ("alpha", "dora_scale", "scalar", "magnitude")
_OTHER_FACTORS = re.compile(
    r"(^|\.)(parametrizations\.|lokr_|hada_|oft_|boft_|hra_u|vera_lambda_|randlora_|vblora_"
    r"|poly_lora_|gralora_|delora_|road_(theta|alpha))"
)
# A weight by its parts: weight norm's, spectral norm's, pruning's.
_PARTS = re.compile(r"(?P<weight>(^|.*\.)(weight|bias)\w*)(?P<part>_g|_orig)$")
_PARTNERS = {"_g": ("_v",), "_orig": ("_u", "_mask")}
# PEFT's methods whose tensors are a weight themselves, and no factors of one.
_PLAIN_PEFT = ("LORA", "LN_TUNING", "PROMPT_TUNING", "FOURIERFT", "TRAINABLE_TOKENS", "IA3")
# Variants of LoRA whose update is not B A.
_VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "target_parameters", "arrow_config")


@dataclass(frozen=True)
class LowRankPair:
    """The names of a low-rank update's factors A (r, in) and B (out, r).

    Args:
        module: Name of the module that is updated.
        adapter: Name of the adapter; empty where there is none in the names.
        a: Name of A.
        b: Name of B.
        bias: Name of the bias that is scaled like the product; None without one.
        embedding: Whether the module is an embedding, whose weight is the product transposed.
        alpha: Name of a number by which, over the rank r, the product is multiplied; or None.
    """

    module: str
    adapter: str
    a: str
    b: str
    bias: str | None
    embedding: bool
    alpha: str | None = None

    @property
    def names(self) -> set[str]:
        """Return the names of all its tensors."""
        return {name for name in (self.a, self.b, self.bias, self.alpha) if name is not None}

    def alpha_over_rank(self, tensors: Mapping[str, Tensor]) -> float | None:
        """Return what the product is multiplied by, where a tensor says it.

        Raises:
            InputError: The tensor is not one finite number, or the rank is not known.
        """
        if self.alpha is None:
            return None
        alpha, a, b = (tensors[name].detach() for name in (self.alpha, self.a, self.b))
        if alpha.numel() != 1 or not bool(alpha.double().isfinite().all()) or alpha.is_complex():
            raise InputError(f"tensor {shown(self.alpha)} is not one number, as alpha of LoRA is")
        if a.dim() < 2 or b.dim() < 2 or b.shape[1] != len(a):
            raise InputError(f"tensors {shown(self.a)} and {shown(self.b)} do not say their rank")
        return float(alpha) / len(a)


def find_low_rank(names: Iterable[str]) -> list[LowRankPair]:
    """Return the pairs of low-rank factors among the names of tensors.

    Raises:
        InputError: A tensor of LoRA has no partner, as DoRA's magnitudes and AdaLoRA's values.
    """
    known = list(names)
    present, used, pairs = set(known), set(), []
    scales: set[str] = set()
    for name in known:
        match = _FIRST.match(name)
        if match is None:
            continue
        key, rest = match["key"], match["rest"] or ""
        second = f"{match['module']}{_SECOND.get(key, key.replace('down', 'up'))}"
        partner = second + rest
        if partner not in present:
            raise InputError(
                f"tensor {name!r} is a factor of a weight, and {shown(partner)} is missing"
            )
        adapter = rest.removesuffix(".weight").strip(".")
        beside = {f"{match['module']}{own}" for own in _BESIDE} & present
        alpha = f"{match['module']}alpha" if key == "lora_down" else None
        scales |= beside - {alpha}
        bias = f"{second}{rest.removesuffix('.weight')}.bias"
        pair = LowRankPair(
            match["module"].rstrip("."),
            adapter,
            name,
            partner,
            bias if rest.endswith("weight") and bias in present else None,
            key == "lora_embedding_A",
            alpha if alpha in present else None,
        )
        pairs.append(pair)
        used |= pair.names
    odd = [n for n in known if n in scales or (_OF_LORA.search(n) and n not in used)]
    if odd:
        raise InputError(
            f"tensor {shown(odd[0])} makes an update that is not a product of two "
            "factors, and cannot "
            "be merged but factor by factor: options={'factors': True}"
        )
    return pairs


def check_no_factors(names: Iterable[str]) -> None:
    """Raise InputError for tensors that are other factors of a weight: weight norm's, LoHa's."""
    present = set(names)
    for name in sorted(present):
        parts = _PARTS.match(name)
        partners = () if parts is None else _PARTNERS[parts["part"]]
        if _OTHER_FACTORS.search(name) or any(
            parts is not None and parts["weight"] + other in present for other in partners
        ):
            raise InputError(
                f"tensor {name!r} is a factor of a weight, and the average of factors is not that "
                "of the weights: remove the parametrisation before, or say "
                "options={'factors': True}"
            )


def check_adapter_config(config: Mapping[str, Any], owner: str) -> None:
    """Raise InputError unless the update of a PEFT configuration is its factors' product."""
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2].upper()
    odd = [name for name in _VARIANTS if config.get(name)]
    if kind not in _PLAIN_PEFT or odd:
        what = f"has {odd[0]}" if odd else f"is of the kind {kind}"
        raise InputError(
            f"{owner}: its adapter {what}, whose update is not a product of two factors; it can be "
            "merged factor by factor: options={'factors': True}"
        )


def scaling_of(config: Mapping[str, Any], pair: LowRankPair, rank: int) -> float:
    """Return what PEFT multiplies B A by: lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA).

    Raises:
        InputError: The configuration has no number there.
    """
    alpha = _of_pattern(config.get("alpha_pattern"), pair.module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or rank < 1:
        raise InputError(
            f"adapter_config.json: lora_alpha is {shown(alpha)} where a number is expected"
        )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _of_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the pattern that ends the module's name, as PEFT looks for it."""
    if not isinstance(patterns, Mapping):
        return default
    for pattern, value in patterns.items():
        if not re.fullmatch(r"\^?[\w.-]+\$?", pattern):
            raise InputError(
                f"adapter_config.json: the pattern {shown(pattern)} is no plain name of a module"
            )
        plain = pattern.strip("^$")
        bare = module.removeprefix("base_model.model.")
        if bare == plain or (not pattern.startswith("^") and bare.endswith("." + plain)):
            return value
    return default
