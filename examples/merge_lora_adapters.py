"""Two LoRA adapters of one base, merged as what they add to its weights.

Tokens are items. `make libraries` installs peft; then run
.venv-libraries/bin/python examples/merge_lora_adapters.py. Takes under a minute on one core.
An average of the factors A and B would not be an average of their products. The merged adapter
has the rank of the members, so that a part of the average may be cut off.
"""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import fisherkern as fk

LENGTH = 20
data = fk.synthetic(num_users=300, num_items=200, seed=0)


def batch_of(users: list[int]) -> dict[str, torch.Tensor]:
    """What a collator makes of token ids: padding 0 on the right, labels −100 there."""
    ids = torch.zeros(len(users), LENGTH, dtype=torch.long)
    for row, user in zip(ids, users, strict=True):
        # The last two items of every user are held out for validation and test.
        items = data.items[data.offsets[user] : data.offsets[user + 1] - 2][-LENGTH:]
        row[: len(items)] = torch.from_numpy(items)
    labels = ids.masked_fill(ids == 0, -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def train(model: torch.nn.Module, users: torch.Tensor, seed: int, epochs: int) -> None:
    torch.manual_seed(seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    model.train()
    for _ in range(epochs):
        for part in users[torch.randperm(len(users))].split(32):
            loss = model(**batch_of(part.tolist())).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def adapted(seed: int, users: torch.Tensor) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    train(model, users, seed, epochs=5)
    return model


torch.manual_seed(0)
sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}
tokens = {"vocab_size": data.num_items + 1, "pad_token_id": 0, "bos_token_id": 0}
base = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, eos_token_id=0))
everybody = torch.arange(data.num_users)
train(base, everybody, seed=0, epochs=20)
# Each adapter knows one half of the users.
members = [adapted(seed, half) for seed, half in enumerate(everybody.chunk(2), start=1)]
merged = fk.merge(members)


def added(model: torch.nn.Module) -> torch.Tensor:
    """What an adapter adds to the attention's weight."""
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    weight = base.transformer.h[0].attn.c_attn.weight
    if not hasattr(layer, "get_delta_weight"):
        return layer.weight.detach() - weight
    return layer.get_delta_weight("default").detach()


mean = (added(members[0]) + added(members[1])) / 2
distance = float((added(merged) - mean).norm() / mean.norm())
print(f"from the average of what the adapters add: {distance:.1%} of its length")
print(fk.evaluate(merged, data).table())
