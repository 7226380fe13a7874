"""Recurrent layers and cells by captured Linears.

A layer is computed once without a graph; then its gates are two Linears over all steps,
of the input and of the states before each step, and a function whose backward pass is
the recurrence gives the states of the gates. So a weight has one use for all steps, and
a probe costs a few products each step. Gates in PyTorch's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherkern.fisher.forward.capture import CapturedCall, Handlers, Rewrite
from fisherkern.fisher.forward.fast_ops import apply

# The states, then the input's and the state's parts of the gates -> the next states.
_State = tuple[Tensor, ...]
Step = Callable[[_State, Tensor, Tensor], _State]


def _gru(state: _State, gi: Tensor, gh: Tensor) -> _State:
    (h,) = state
    (ir, iz, new), (hr, hz, hn) = gi.chunk(3, dim=-1), gh.chunk(3, dim=-1)
    candidate = torch.tanh(new + torch.sigmoid(ir + hr) * hn)
    return (candidate + torch.sigmoid(iz + hz) * (h - candidate),)


def _lstm(state: _State, gi: Tensor, gh: Tensor) -> _State:
    i, f, g, o = (gi + gh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _tanh(state: _State, gi: Tensor, gh: Tensor) -> _State:
    return (torch.tanh(gi + gh),)


def _relu(state: _State, gi: Tensor, gh: Tensor) -> _State:
    return (torch.relu(gi + gh),)


def _time_first(*parts: Tensor) -> Tensor:
    """G tensors (N, T, H) -> (T, N, G, H)."""
    return torch.stack([part.transpose(0, 1) for part in parts], dim=2)


def _backwards(*tensors: Tensor) -> Any:
    """Return the steps (T, N, ...) from the last to the first."""
    return zip(*(tensor.unbind(0)[::-1] for tensor in tensors), strict=True)


def _forwards(steps: list[Tensor]) -> Tensor:
    """Join steps (N, ...) listed from the last to the first: (N, T, ...)."""
    return torch.stack(steps[::-1], dim=1)


class _GruStates(torch.autograd.Function):
    """h_t (N, T, H) of the gates and the states before each step.

    All gradients are ∂h times a derivative that the forward pass keeps.
    """

    @staticmethod
    def forward(
        ctx: Any, gi: Tensor, gh: Tensor, weight: Tensor, h: Tensor, first: Tensor
    ) -> Tensor:
        r, z = torch.sigmoid(gi + gh).chunk(3, dim=2)[:2]
        new, hn = gi.chunk(3, dim=2)[2], gh.chunk(3, dim=2)[2]
        n = torch.tanh(new + r * hn)
        dn, dz = (1 - z) * (1 - n * n), (h - n) * z * (1 - z)
        dr = dn * hn * r * (1 - r)
        ctx.save_for_backward(_time_first(dr, dz, dn * r), z.transpose(0, 1), dn, weight)
        return n + z * (h - n)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        derivatives, z, dn, weight = ctx.saved_tensors
        carry: Any = 0
        states, gates = [], []
        for delta, d, kept in _backwards(deltas[0].transpose(0, 1), derivatives, z):
            dh = delta + carry
            gate = (dh[:, None] * d).flatten(1)
            carry = torch.addmm(dh * kept, gate, weight)
            states.append(dh)
            gates.append(gate)
        dgh = _forwards(gates)
        dgi = torch.cat([dgh[..., : -weight.shape[1]], _forwards(states) * dn], dim=2)
        return dgi, dgh, None, None, carry


class _LstmStates(torch.autograd.Function):
    """h_t (N, T, H) and the last c of the gates and the states before each step."""

    @staticmethod
    def forward(
        ctx: Any,
        gi: Tensor,
        gh: Tensor,
        weight: Tensor,
        h: Tensor,
        c: Tensor,
        first: Tensor,
        first_c: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gates = gi + gh
        i, f, _, o = torch.sigmoid(gates).chunk(4, dim=2)
        g = torch.tanh(gates.chunk(4, dim=2)[2])
        after = f * c + i * g
        t = torch.tanh(after)
        by_c = (g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), torch.zeros_like(o))
        by_h = (*[torch.zeros_like(o)] * 3, t * o * (1 - o))
        into, keep = (o * (1 - t * t)).transpose(0, 1), f.transpose(0, 1)
        ctx.save_for_backward(_time_first(*by_c), _time_first(*by_h), into, keep, weight)
        return o * t, after[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        *derivatives, weight = ctx.saved_tensors
        carry: Any = 0
        dc, gates = deltas[1], []
        for delta, by_c, by_h, into, keep in _backwards(deltas[0].transpose(0, 1), *derivatives):
            dh = delta + carry
            dc = torch.addcmul(dc, dh, into)
            gate = torch.addcmul(dc[:, None] * by_c, dh[:, None], by_h).flatten(1)
            carry, dc = gate @ weight, dc * keep
            gates.append(gate)
        both = _forwards(gates)
        return both, both, None, None, None, carry, dc


class _PlainStates(torch.autograd.Function):
    """h_t = f(gi_t + gh_t), (N, T, H), of the gates alone; f is torch.tanh or torch.relu."""

    @staticmethod
    def forward(
        ctx: Any, gi: Tensor, gh: Tensor, weight: Tensor, f: Callable[..., Tensor], first: Tensor
    ) -> Tensor:
        after = f(gi + gh)
        derivative = 1 - after * after if f is torch.tanh else (after > 0).to(after.dtype)
        ctx.save_for_backward(derivative.transpose(0, 1), weight)
        return after

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        derivatives, weight = ctx.saved_tensors
        carry: Any = 0
        gates = []
        for delta, d in _backwards(deltas[0].transpose(0, 1), derivatives):
            gates.append((delta + carry) * d)
            carry = gates[-1] @ weight
        both = _forwards(gates)
        return both, both, None, None, carry


def _states(
    step: Step, gi: Tensor, gh: Tensor, weight: Tensor, before: _State, first: _State
) -> tuple[Tensor, _State]:
    """All states (N, T, H), and the last ones, with a graph to the gates and the first ones."""
    if step is _lstm:
        hidden, c = apply(_LstmStates, gi, gh, weight, *before, *first)
        return hidden, (hidden[:, -1], c)
    if step is _gru:
        hidden = apply(_GruStates, gi, gh, weight, *before, *first)
    else:
        f = torch.tanh if step is _tanh else torch.relu
        hidden = apply(_PlainStates, gi, gh, weight, f, *first)
    return hidden, (hidden[:, -1],)


def _run(
    call: CapturedCall,
    step: Step,
    input: Tensor,
    first: _State,
    parameters: Sequence[Tensor],
    backwards: bool,
) -> tuple[Tensor, _State]:
    """One layer in one direction over (N, T, I): the states (N, T, H), and the last ones."""
    input_weight, state_weight, input_bias, state_bias = (*parameters, None, None)[:4]
    assert input_weight is not None and state_weight is not None
    gi = call(F.linear, input, input_weight, input_bias)
    gi = gi.flip(1) if backwards else gi
    # Under autocast the gates are narrower than the weights, and PyTorch's states with them.
    first = tuple(state.to(gi.dtype) for state in first)
    with torch.no_grad():
        state, before = first, []
        for gates in gi.unbind(dim=1):
            before.append(state)
            state = step(state, gates, F.linear(state[0], state_weight, state_bias))
        stacked = tuple(torch.stack(part, dim=1) for part in zip(*before, strict=True))
    gh = call(F.linear, stacked[0], state_weight, state_bias)
    hidden, last = _states(step, gi, gh, state_weight.detach().to(gi.dtype), stacked, first)
    return (hidden.flip(1) if backwards else hidden), last


def _layer(step: Step) -> Rewrite:
    """torch.gru and its kin; NotImplemented for packed sequences and projections."""

    def replacement(
        call: CapturedCall,
        input: Tensor,
        state: Any,
        weights: Any,
        biases: Any = None,
        num_layers: Any = None,
        dropout: Any = None,
        train: Any = None,
        bidirectional: Any = None,
        batch_first: Any = None,
    ) -> Any:
        # A packed sequence's batch_sizes stand where the state does here.
        if not isinstance(weights, (list, tuple)) or not isinstance(batch_first, bool):
            return NotImplemented
        directions = 2 if bidirectional else 1
        each = 4 if biases else 2
        if (train and dropout) or len(weights) != num_layers * directions * each:
            return NotImplemented
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        x = input if batch_first else input.transpose(0, 1)
        last = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                parameters = weights[index * each : (index + 1) * each]
                first = tuple(s[index] for s in states)
                hidden, final = _run(call, step, x, first, parameters, direction == 1)
                outputs.append(hidden)
                last.append(final)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=2)
        finals = [torch.stack(part) for part in zip(*last, strict=True)]
        return (x if batch_first else x.transpose(0, 1)), *finals

    return Rewrite(replacement)


def _cell(step: Step) -> Rewrite:
    """torch.gru_cell and its kin, used in the model's loops."""

    def replacement(
        call: CapturedCall,
        input: Tensor,
        state: Any,
        input_weight: Tensor,
        state_weight: Tensor,
        input_bias: Tensor | None = None,
        state_bias: Tensor | None = None,
    ) -> Any:
        states = (state,) if isinstance(state, Tensor) else tuple(state)
        gi = call(F.linear, input, input_weight, input_bias)
        gh = call(F.linear, states[0], state_weight, state_bias)
        result = step(states, gi, gh)
        return result[0] if isinstance(state, Tensor) else result

    return Rewrite(replacement)


HANDLERS: Handlers = {
    torch.gru: _layer(_gru),
    torch.lstm: _layer(_lstm),
    torch.rnn_tanh: _layer(_tanh),
    torch.rnn_relu: _layer(_relu),
    torch.gru_cell: _cell(_gru),
    torch.lstm_cell: _cell(_lstm),
    torch.rnn_tanh_cell: _cell(_tanh),
    torch.rnn_relu_cell: _cell(_relu),
}
