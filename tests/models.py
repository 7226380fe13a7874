"""Small models that tests share: ours in float64 with weights worth testing, and foreign ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkern.encoders import BERT4Rec

NUM_ITEMS = 11

# Padding, repeated items, a full row and a row of one item.
HISTORIES = torch.tensor(
    [[0, 0, 3, 5, 3], [1, 2, 3, 4, 5], [0, 0, 0, 0, 7], [0, 6, 6, 6, 2], [9, 9, 1, 9, 1]]
)


def shaken(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """The model in float64 and eval mode, every parameter moved away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return model


def bert(tied: bool = True, norm: str = "post", max_len: int = 5, **kwargs: int) -> BERT4Rec:
    """A float64 BERT4Rec of 2 layers, width 6 and 11 items: V > D, as in life."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"dim": 6, "layers": 2, "heads": 2, "inner_dim": 7, **kwargs}
        model = BERT4Rec(NUM_ITEMS, max_len=max_len, norm=norm, tied=tied, **settings)
        return shaken(model)


class Foreign(nn.Module):
    """Somebody else's recommender: mean of item and bare position vectors, one MLP, logits only.

    `tie` is "matmul" (h @ E.T), "module" (a Linear whose weight is the embedding's), "alias" (the
    parameter registered a second time on the model) or "none". Item ids are columns, 0 is padding.
    """

    def __init__(self, tie: str, width: int = 6, positions: int = 5) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS + 1, width, padding_idx=0)
        self.position = nn.Parameter(torch.zeros(positions, width))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.tie = tie
        if tie in ("module", "none"):
            self.decoder = nn.Linear(width, NUM_ITEMS + 1)
        if tie == "module":
            self.decoder.weight = self.items.weight
        if tie == "alias":
            self.output = self.items.weight

    def hidden(self, history: Tensor) -> Tensor:
        x = self.items(history) + self.position
        mask = (history > 0).to(x.dtype).unsqueeze(2)
        return self.mlp((x * mask).sum(1) / mask.sum(1))

    def forward(self, history: Tensor) -> Tensor:
        h = self.hidden(history)
        if self.tie == "matmul":
            return h @ self.items.weight.t()
        if self.tie == "alias":
            return F.linear(h, self.output)
        return self.decoder(h)
