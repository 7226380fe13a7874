"""Two folders of Hugging Face models, their Fishers, one merged folder.

Tokens are items. It needs transformers alone, which `make libraries` installs as well:
.venv-libraries/bin/python examples/merge_hugging_face_folders.py. Takes under a minute on one
core. Both members go on from one start, which is what lets their weights be averaged.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, logging

import fisherkern as fk

logging.set_verbosity_error()
logging.disable_progress_bar()
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


def trained(model: GPT2LMHeadModel, folder: str, seed: int, epochs: int) -> str:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
    model.train()
    for _ in range(epochs):
        for users in torch.randperm(data.num_users).split(32):
            loss = model(**batch_of(users.tolist())).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    return folder


torch.manual_seed(0)
sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}
tokens = {"vocab_size": data.num_items + 1, "pad_token_id": 0, "bos_token_id": 0}
model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, eos_token_id=0))
start = trained(model, "start", seed=0, epochs=20)
load = GPT2LMHeadModel.from_pretrained
folders = [trained(load(start), f"member-{seed}", seed, epochs=5) for seed in (1, 2)]

members = [load(folder) for folder in folders]
batches = [batch_of(list(range(i, i + 50))) for i in range(0, data.num_users, 50)]
fishers = [fk.diag_fisher(member, batches, progress=False) for member in members]
merged = fk.merge(members, method="fisher", fishers=fishers)
merged.save_pretrained("merged")

reports = [fk.evaluate(model, data) for model in (load("merged"), *members)]
print(reports[0].table())
for number, report in enumerate(reports[1:], start=1):
    difference = fk.compare(reports[0], report)["ndcg@10"]
    print(
        f"over member {number}: {difference.mean:+.4f}"
        f" (95 % interval {difference.low:+.4f} to {difference.high:+.4f})"
    )
