"""The loader for GGUF files: block-quantised weights become plain ones in the dtype that the model runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ad_core.api import Checkpoint, Declined, Loader
from ad_core.api.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ad_quant.gguf_file import GgufFile


class GGUFLoader(Loader):
    """Opens one file."""

    name = "quant.gguf"

    def accepts(self, path: Path) -> Declined | None:
        """A file that ends in .gguf or begins with the letters GGUF."""
        if not path.is_file():
            return Declined("it is no file")
        if path.suffix == ".gguf":
            return None
        with path.open("rb") as file:
            return None if file.read(4) == b"GGUF" else Declined("it is no GGUF file")

    def open(self, path: Path, *, trust_remote_code: bool = False) -> Checkpoint:
        """Reads the header. A GGUF file brings no code, so the flag has no meaning here."""
        from ad_quant.gguf_file import GgufFile

        file = GgufFile(path)
        parts = file.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"the file is one of {parts} parts of a model, which are not read",
                where=str(path),
                hint="join them first: llama-gguf-split --merge",
            )
        return GGUFCheckpoint(file)


class GGUFCheckpoint(Checkpoint):
    """Configuration, tokenizer and weights all come from the file."""

    def __init__(self, file: GgufFile):
        self.path, self.file = file.path, file

    def config(self) -> Any:
        """See `ad_quant.gguf_config.config_of`."""
        from ad_quant.gguf_config import config_of

        return config_of(self.file)

    def tokenizer(self) -> Any | None:
        """The tokenizer that the metadata describes, or None if it describes none."""
        if "tokenizer.ggml.tokens" not in self.file.metadata:
            return None
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(self.path.parent, gguf_file=self.path.name, local_files_only=True)
        except Exception as error:  # transformers raises ValueError, KeyError, NotImplementedError for what it does not know
            raise ModelError(
                "the tokenizer in the file cannot be read",
                where=str(self.path),
                why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
                hint="token ids work without it, or give another with tokenizer=",
            ) from error

    def tensors(self, model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """See `ad_quant.gguf_weights.module_tensors`."""
        from ad_quant.gguf_weights import module_tensors

        return module_tensors(self.file, model, dtype)

    def generation_defaults(self) -> dict[str, Any]:
        """The tokens that end a text or a turn."""
        found = [self.file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
        ids = list(dict.fromkeys(value for value in found if isinstance(value, int)))
        return {"eos_token_id": ids} if ids else {}
