"""Our encoders on Hugging Face's Hub; importing this module imports huggingface_hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError
except ImportError as error:
    raise ImportError("huggingface_hub is missing: pip install 'fisherkern[hub]'") from error

from fisherkern.encoders import SequenceEncoder
from fisherkern.errors import InputError, one_line, shown
from fisherkern.merging.files.card import encoder_card
from fisherkern.training import load_model, save_model

MODEL = "model.safetensors"
READ_BACK = [MODEL, "model.json", "config.json"]


class HubEncoder(ModelHubMixin):
    """An encoder with huggingface_hub's `save_pretrained`, `from_pretrained` and `push_to_hub`.

    A folder or repository has the two files of `save_model`, the model card README.md, which is
    written where there is none, and config.json, by which the Hub counts downloads and which is
    not believed.

    Args:
        encoder: a model that `save_model` takes; its `merge_report` goes along.
        metrics: numbers by name, for the card and the file.
    """

    def __init__(self, encoder: SequenceEncoder, metrics: Mapping[str, float] | None = None):
        self.encoder = encoder
        self.metrics = {name: float(value) for name, value in (metrics or {}).items()}
        self._hub_mixin_config = {"class": type(encoder).__name__, **encoder.config}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> HubEncoder:
        """Read what `save_pretrained` or `push_to_hub` wrote, as `load_model` does.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hub.
            **options: revision, token, cache_dir, force_download and local_files_only, of
                `huggingface_hub.snapshot_download`.

        Returns:
            The holder of the `encoder`, which is on the CPU and in eval mode.

        Raises:
            InputError: a repository that cannot be had, or files that `load_model` refuses.
        """
        name = str(pretrained_model_name_or_path)
        with _asking(name):
            folder = Path(name)
            if not folder.is_dir():
                folder = Path(snapshot_download(name, allow_patterns=READ_BACK, **options))
        return cls(load_model(folder / MODEL))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Write to a repository, as huggingface_hub's mixin does; returns the commit's address."""
        with _asking(repo_id):
            return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """Make the card that is written where there is none."""
        return ModelCard(encoder_card(self.encoder, self.metrics), ignore_metadata_errors=True)

    def _save_pretrained(self, save_directory: Path) -> None:
        report = self.encoder.merge_report
        extra = {} if report is None else {"merge_report": report}
        save_model(self.encoder, save_directory / MODEL, metrics=self.metrics, extra=extra)


@contextlib.contextmanager
def _asking(name: str) -> Iterator[None]:
    """Say in one sentence what the Hub refused."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = one_line(str(error) or type(error).__name__, 300)
        raise InputError(f"{shown(name)}: the Hub: {reason}") from error
