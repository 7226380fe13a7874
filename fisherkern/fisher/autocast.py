"""The caller's autocast: on for the model, off for closed forms."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Autocast:
    """The caller's `torch.autocast` of a device type, for the model and for nothing else.

    Closed forms and squares are computed as their inputs are; a product in bf16 would cost
    them their accuracy.
    """

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @staticmethod
    def of(device: torch.device) -> Autocast:
        """Return what is in force for `device` now."""
        kind = device.type
        return Autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def on(self) -> torch.autocast:
        """Return a context in which the model runs as the caller asked for."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def off(self) -> torch.autocast:
        """Return a context without it."""
        return torch.autocast(self.device_type, enabled=False)
