"""generative-recommenders, research part: attributes, methods and tensor flow of its models."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SequentialFeatures(NamedTuple):
    """What the models take: lengths (N,), ids (N, T) padded right by 0, tensors by name."""

    past_lengths: Tensor
    past_ids: Tensor
    past_embeddings: Tensor | None
    past_payloads: dict[str, Tensor]


class LocalEmbeddingModule(nn.Module):
    def __init__(self, num_items: int, width: int) -> None:
        super().__init__()
        self._item_emb = nn.Embedding(num_items + 1, width, padding_idx=0)

    def get_item_embeddings(self, item_ids: Tensor) -> Tensor:
        return self._item_emb(item_ids)


class LearnablePositions(nn.Module):
    """Scaled item embeddings plus positions, zero at padding."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self._width = width
        self._pos_emb = nn.Embedding(length, width)

    def forward(self, past_ids: Tensor, past_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        rows, count = past_ids.shape
        positions = torch.arange(count).unsqueeze(0).repeat(rows, 1)
        states = past_embeddings * self._width**0.5 + self._pos_emb(positions)
        valid = (past_ids != 0).unsqueeze(-1).to(states.dtype)
        return states * valid, valid


class L2NormEmbeddingPostprocessor(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states / states.norm(dim=-1, keepdim=True).clamp(min=1e-6)


class Recommender(nn.Module):
    """What both models share."""

    def __init__(self, num_items: int, length: int, width: int) -> None:
        super().__init__()
        self._embedding_dim, self._max_sequence_length = width, length
        self._embedding_module = LocalEmbeddingModule(num_items, width)
        self._input_features_preproc = LearnablePositions(length, width)
        self._output_postproc = L2NormEmbeddingPostprocessor()
        future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        self.register_buffer("_attn_mask", future)

    def get_item_embeddings(self, item_ids: Tensor) -> Tensor:
        return self._embedding_module.get_item_embeddings(item_ids)

    def generate_user_embeddings(
        self, past_lengths: Tensor, past_ids: Tensor, past_embeddings: Tensor, past_payloads: Any
    ) -> Any:
        raise NotImplementedError

    def encode(
        self, past_lengths: Tensor, past_ids: Tensor, past_embeddings: Tensor, past_payloads: Any
    ) -> Tensor:
        """(N, D): the state of the last item."""
        states = self.generate_user_embeddings(
            past_lengths, past_ids, past_embeddings, past_payloads
        )
        states = states[0] if isinstance(states, tuple) else states
        rows, count, width = states.shape
        places = past_lengths - 1 + torch.arange(0, rows * count, count)
        return states.reshape(-1, width)[places, :]

    def forward(
        self, past_lengths: Tensor, past_ids: Tensor, past_embeddings: Tensor, past_payloads: Any
    ) -> Tensor:
        """(N, T, D)."""
        states = self.generate_user_embeddings(
            past_lengths, past_ids, past_embeddings, past_payloads
        )
        return states[0] if isinstance(states, tuple) else states


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self._conv1d = nn.Sequential(
            nn.Conv1d(width, 2 * width, kernel_size=1),
            nn.ReLU(),
            nn.Conv1d(2 * width, width, kernel_size=1),
        )

    def forward(self, states: Tensor) -> Tensor:
        return self._conv1d(states.transpose(-1, -2)).transpose(-1, -2) + states


class SASRec(Recommender):
    def __init__(self, num_items: int, length: int, width: int) -> None:
        super().__init__(num_items, length, width)
        self.attention_layers = nn.ModuleList([nn.MultiheadAttention(width, 2, batch_first=True)])
        self.forward_layers = nn.ModuleList([FeedForward(width)])

    def generate_user_embeddings(
        self, past_lengths: Tensor, past_ids: Tensor, past_embeddings: Tensor, past_payloads: Any
    ) -> Tensor:
        states, valid = self._input_features_preproc(past_ids, past_embeddings)
        for attention, feed_forward in zip(self.attention_layers, self.forward_layers, strict=True):
            queries = F.layer_norm(states, (self._embedding_dim,), eps=1e-8)
            mixed, _ = attention(queries, states, states, attn_mask=self._attn_mask)
            states = feed_forward(F.layer_norm(queries + mixed, (self._embedding_dim,), eps=1e-8))
            states = states * valid
        return self._output_postproc(states)


class TimeAndPositionBias(nn.Module):
    """(N, T, T): a bias per distance, and one per logarithm of the time between."""

    def __init__(self, length: int, buckets: int) -> None:
        super().__init__()
        self._length, self._buckets = length, buckets
        self._ts_w = nn.Parameter(torch.randn(buckets + 1))
        self._pos_w = nn.Parameter(torch.randn(2 * length - 1))

    def forward(self, timestamps: Tensor) -> Tensor:
        n = self._length
        positions = F.pad(self._pos_w[: 2 * n - 1], [0, n]).repeat(n)[..., :-n]
        positions = positions.reshape(1, n, 3 * n - 2)[:, :, n - 1 : 1 - n]
        later = torch.cat([timestamps, timestamps[:, -1:]], dim=1)
        between = later[:, 1:].unsqueeze(2) - later[:, :-1].unsqueeze(1)
        bucket = (torch.log(between.abs().clamp(min=1)) / 0.301).long().clamp(0, self._buckets)
        times = torch.index_select(self._ts_w, dim=0, index=bucket.view(-1))
        return positions + times.view(len(timestamps), n, n)


class JaggedUnit(nn.Module):
    """Pointwise attention on rows that are stored one after another without padding."""

    def __init__(self, length: int, width: int, heads: int) -> None:
        super().__init__()
        self._width, self._heads, self._head = width, heads, width // heads
        self._rel_attn_bias = TimeAndPositionBias(length, 16)
        self._uvqk = nn.Parameter(torch.randn(width, 4 * width))
        self._o = nn.Linear(width, width)

    def forward(self, x: Tensor, real: Tensor, timestamps: Tensor | None, past: Tensor) -> Tensor:
        rows, n = real.shape
        u, v, q, k = F.silu(torch.mm(F.layer_norm(x, [self._width]), self._uvqk)).chunk(4, dim=1)
        q, k, v = (self._padded(m, real).view(rows, n, self._heads, self._head) for m in (q, k, v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
        if timestamps is not None:
            scores = scores + self._rel_attn_bias(timestamps).unsqueeze(1)
        shares = F.silu(scores) / n * past[None, None]
        mixed = torch.einsum("bhnm,bmhd->bnhd", shares, v).reshape(rows, n, self._width)[real]
        return self._o(u * F.layer_norm(mixed, [self._width])) + x

    @staticmethod
    def _padded(values: Tensor, real: Tensor) -> Tensor:
        """(rows of all sequences, D) -> (N, T, D), zero at padding."""
        dense = values.new_zeros(*real.shape, values.shape[1])
        dense[real] = values
        return dense


class HSTU(Recommender):
    def __init__(self, num_items: int, length: int, width: int) -> None:
        super().__init__(num_items, length, width)
        self._attention_layers = nn.ModuleList([JaggedUnit(length, width, 2)])

    def generate_user_embeddings(
        self, past_lengths: Tensor, past_ids: Tensor, past_embeddings: Tensor, past_payloads: Any
    ) -> tuple[Tensor, list[Any]]:
        states, _ = self._input_features_preproc(past_ids, past_embeddings)
        real = torch.arange(past_ids.shape[1])[None] < past_lengths[:, None]
        x = states[real]
        for layer in self._attention_layers:
            past = 1.0 - self._attn_mask.to(x.dtype)
            x = layer(x, real, past_payloads.get("timestamps"), past)
        return self._output_postproc(JaggedUnit._padded(x, real)), []
