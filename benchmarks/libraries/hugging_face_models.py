"""transformers 5.24.0 and peft 0.21.2: tokens are items, id 0 is the padding, on either side."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.libraries.architecture import (
    MAX_LEN,
    NUM_ITEMS,
    WIDTH,
    Histories,
    Member,
    architecture,
    histories,
    padded,
    shaken,
)

VOCABULARY = NUM_ITEMS + 2
MASK = NUM_ITEMS + 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = {**SIZES, "num_key_value_heads": 1, "head_dim": 4}
# RMSNorm and rotary angles are computed in float32.
FLOAT32 = 2e-6


def collated(histories: Histories, side: str = "right", **more: Tensor) -> Any:
    """What a tokenizer's `pad` gives: a BatchEncoding."""
    from transformers import BatchEncoding

    ids = padded(histories, MAX_LEN, side=side)
    return BatchEncoding({"input_ids": ids, "attention_mask": (ids != 0).long(), **more})


def causal_batch(histories: Histories, side: str = "right") -> Any:
    """Labels as `DataCollatorForLanguageModeling(mlm=False)` gives them: ids, −100 at padding."""
    batch = collated(histories, side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def parts() -> list[list[list[int]]]:
    users = histories()
    return [users[:4], users[4:6]]


def last_place(mask: Tensor) -> Tensor:
    """(N,) the last place that is no padding."""
    return torch.tensor([int(row.nonzero().max()) for row in mask])


def causal_logits(model: Any, batch: Any) -> Tensor:
    mask = batch["attention_mask"]
    scores = model(input_ids=batch["input_ids"], attention_mask=mask).logits
    return scores[torch.arange(len(mask)), last_place(mask)]


def small(model_class: str, config_class: str, seed: int, **sizes: Any) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**sizes)
    return shaken(getattr(transformers, model_class)(config), seed)


def causal(module: nn.Module, model: Any = None) -> Member:
    return Member(
        model=module if model is None else model,
        module=module,
        batches=[causal_batch(part) for part in parts()],
        logits=causal_logits,
        columns=torch.arange(1, NUM_ITEMS + 1),
        make_batch=collated,
        more_batches={
            "BatchEncoding": [collated(part) for part in parts()],
            "left padding": [causal_batch(part, "left") for part in parts()],
        },
    )


def gpt2(seed: int) -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 16, "n_inner": 16}
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return small("GPT2LMHeadModel", "GPT2Config", seed, **sizes, **common)


def llama(seed: int, tied: bool) -> nn.Module:
    sizes = {**LLAMA, "tie_word_embeddings": tied}
    return small("LlamaForCausalLM", "LlamaConfig", seed, **sizes)


@architecture("HF GPT2", "transformers")
def hf_gpt2(seed: int) -> Member:
    return causal(gpt2(seed))


@architecture("HF Llama, tied", "transformers", FLOAT32)
def hf_llama_tied(seed: int) -> Member:
    return causal(llama(seed, tied=True))


@architecture("HF Llama, untied", "transformers", FLOAT32)
def hf_llama(seed: int) -> Member:
    return causal(llama(seed, tied=False))


@architecture("HF Qwen2, tied", "transformers", FLOAT32)
def hf_qwen2(seed: int) -> Member:
    sizes = {**LLAMA, "tie_word_embeddings": True}
    del sizes["head_dim"]
    return causal(small("Qwen2ForCausalLM", "Qwen2Config", seed, **sizes))


@architecture("HF Qwen3", "transformers", FLOAT32)
def hf_qwen3(seed: int) -> Member:
    return causal(small("Qwen3ForCausalLM", "Qwen3Config", seed, **LLAMA))


def masked_batch(histories: Histories) -> dict[str, Tensor]:
    """[MASK] after the last item; its label is the next item where there is one."""
    batch = collated([[*history[:-1], MASK] for history in histories])
    labels = torch.full_like(batch["input_ids"], -100)
    places = last_place(batch["attention_mask"])
    labels[torch.arange(len(labels)), places] = torch.tensor([h[-1] for h in histories])
    return {**batch, "labels": labels}


def masked(module: nn.Module) -> Member:
    return Member(
        model=module,
        module=module,
        batches=[masked_batch(part) for part in parts()],
        logits=causal_logits,
        columns=torch.arange(1, NUM_ITEMS + 1),
        targets=torch.tensor([h[-1] for part in parts() for h in part]),
    )


@architecture("HF BertForMaskedLM", "transformers")
def hf_bert(seed: int) -> Member:
    return masked(small("BertForMaskedLM", "BertConfig", seed, **SIZES))


@architecture("HF ModernBERT", "transformers", 1e-8)
def hf_modernbert(seed: int) -> Member:
    more = {"cls_token_id": None, "sep_token_id": None, "attn_implementation": "sdpa"}
    module = small("ModernBertForMaskedLM", "ModernBertConfig", seed, **SIZES, **more)
    return masked(module)


def sequence_batch(histories: Histories) -> dict[str, Tensor]:
    """The history for the encoder; the next item, as the only label, for the decoder."""
    labels = torch.tensor([[history[-1]] for history in histories])
    return {**collated([history[:-1] for history in histories]), "labels": labels}


def sequence_logits(model: Any, batch: Any, start: int) -> Tensor:
    """The decoder's first step, after its start token."""
    first = torch.full((len(batch["input_ids"]), 1), start)
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=first,
    ).logits[:, -1]


def encoder_decoder(module: nn.Module, start: int) -> Member:
    return Member(
        model=module,
        module=module,
        batches=[sequence_batch(part) for part in parts()],
        logits=functools.partial(sequence_logits, start=start),
        columns=torch.arange(1, NUM_ITEMS + 1),
        make_batch=collated,
        targets=torch.tensor([h[-1] for part in parts() for h in part]),
    )


@architecture("HF T5", "transformers", FLOAT32)
def hf_t5(seed: int) -> Member:
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 0}
    return encoder_decoder(
        small("T5ForConditionalGeneration", "T5Config", seed, **sizes, **tokens), start=0
    )


@architecture("HF BART", "transformers")
def hf_bart(seed: int) -> Member:
    sides = ("encoder", "decoder")
    sizes: dict[str, Any] = {"d_model": WIDTH, "max_position_embeddings": 16}
    for side in sides:
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    tokens = {"bos_token_id": None, "eos_token_id": None, "forced_eos_token_id": None}
    tokens |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": MASK}
    return encoder_decoder(
        small("BartForConditionalGeneration", "BartConfig", seed, **sizes, **tokens), start=MASK
    )


def lora(base: Callable[[], nn.Module], seed: int, targets: list[str]) -> Member:
    """An adapter on a base that all members share."""
    from peft import LoraConfig, get_peft_model

    module = base()
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(module, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter.dtype))
    return causal(model.double().eval())


@architecture("PEFT LoRA on Llama", "peft", FLOAT32)
def peft_llama(seed: int) -> Member:
    return lora(lambda: llama(7, tied=False), seed, ["q_proj", "v_proj"])


@architecture("PEFT LoRA on GPT2", "peft")
def peft_gpt2(seed: int) -> Member:
    return lora(lambda: gpt2(7), seed, ["c_attn"])
