"""The Fisher of somebody else's model: python examples/foreign_model.py

A causal Transformer from torch's own layers that knows nothing of fisherkern. It works as it
is; `adapt` tells where its hidden state and its output weight are, and opens the fast path.
"""

import time

import torch
from torch import Tensor, nn

import fisherkern as fk


class NextItem(nn.Module):
    """Logits over V items and the padding, id 0; the output weight is the embedding's."""

    def __init__(self, num_items: int, width: int = 32, length: int = 20) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items + 1, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def hidden(self, history: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(history.shape[1])
        return self.encoder(self.items(history) + self.position, mask=mask, is_causal=True)[:, -1]

    def forward(self, history: Tensor) -> Tensor:
        return self.hidden(history) @ self.items.weight.T


torch.manual_seed(0)
model = NextItem(num_items=50)
batches = [torch.randint(1, 51, (8, 20)) for _ in range(2)]
adapted = fk.adapt(
    model,
    encode=lambda model, history: model.hidden(history),
    head=lambda model: (model.items.weight, None),
)

results = {}
for name, subject in (("logits alone", model), ("adapted", adapted)):
    started = time.perf_counter()
    results[name] = fk.diag_fisher(subject, batches, sampler="exact", progress=False)
    seconds = time.perf_counter() - started
    print(f"{name}: {results[name].meta['probes']} backward passes, {seconds:.1f} s")

a, b = results["logits alone"], results["adapted"]
difference = max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in b)
print(f"largest difference between the two: {difference:.1e} of a tensor's largest entry")
