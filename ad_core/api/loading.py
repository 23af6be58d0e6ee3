"""Checkpoint formats and compile backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ad_core.api.types import Declined

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.fx import GraphModule


class Checkpoint(ABC):
    """An opened checkpoint. Nothing large is read until `tensors` is iterated."""

    path: Path

    @abstractmethod
    def config(self) -> Any:
        """The model's `transformers.PretrainedConfig`."""

    @abstractmethod
    def tokenizer(self) -> Any | None:
        """The `transformers` tokenizer, or None if the checkpoint has none."""

    @abstractmethod
    def tensors(self, model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Streams every weight under the name that it has in `model` (on device meta), in `dtype` where it is floating.

        Ties are not repeated. Raises `CheckpointError` for what is truncated or cannot be converted. The consumer checks
        names and shapes.
        """

    def separate(self, model: nn.Module) -> Iterable[str]:
        """Names that `model` ties to another and that the checkpoint stores with values of their own: they are untied."""
        return ()

    def generation_defaults(self) -> dict[str, Any]:
        """`eos_token_id` and the like, if the checkpoint says."""
        return {}


class Loader(ABC):
    """A checkpoint format."""

    name: str

    @abstractmethod
    def accepts(self, path: Path) -> Declined | None:
        """None if this loader opens the path."""

    @abstractmethod
    def open(self, path: Path, *, trust_remote_code: bool = False) -> Checkpoint:
        """Opens it. Raises a `ModelError` that says what is wrong with the files."""


class CompileBackend(ABC):
    """Turns the last graph into something callable with the placeholders' values in order."""

    name: str

    def supports(self, device: torch.device) -> Declined | None:
        """None if the backend works on this device."""
        return None

    @abstractmethod
    def compile(self, graph: GraphModule) -> Callable[..., Any]:
        """The callable. Weights stay outside of it: it reads them from `graph` and does not copy them."""
