"""What a person may ask of one request."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ad_core.api.errors import InvalidRequestError, nearest

Nonempty = Annotated[str, Field(min_length=1)]


class SamplingParams(BaseModel):
    """How to continue a prompt. Anything wrong raises `InvalidRequestError`, which names the field.

    Order of the steps: repetition, presence and frequency penalties; `min_tokens`; temperature; top-k; top-p; min-p.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    temperature: float = Field(1.0, ge=0.0, le=100.0, allow_inf_nan=False)
    """0 is greedy: the most likely token, and the filters below have nothing to choose."""
    top_k: int = Field(0, ge=0)
    """The k most likely tokens (and those that tie with the last of them); 0 is off."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """The fewest tokens whose probabilities sum to this; 1 is off."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Tokens at least this likely in relation to the most likely one; 0 is off."""
    repetition_penalty: float = Field(1.0, gt=0.0, le=100.0, allow_inf_nan=False)
    """Divides positive and multiplies negative logits of tokens in the prompt or the answer; 1 is off."""
    presence_penalty: float = Field(0.0, ge=-100.0, le=100.0, allow_inf_nan=False)
    """Subtracted from logits of tokens in the answer."""
    frequency_penalty: float = Field(0.0, ge=-100.0, le=100.0, allow_inf_nan=False)
    """Subtracted from logits of tokens in the answer, once for each time."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    """The same seed gives the same text, whatever else runs. None draws one."""
    stop: list[Nonempty] = Field([], max_length=64)
    """Strings that end the answer; one may be given without a list. The text ends before the string."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([], max_length=1024)
    """Ids that end the answer, beside the model's own."""
    include_stop_str: bool = False
    """Keep the stop string, or the text of the stop token, in the text."""
    logprobs: int | None = Field(None, ge=0, le=100)
    """Log-probabilities of the chosen token and of the most likely n, before penalties and temperature. None: none."""
    n: int = Field(1, ge=1, le=128)
    """Samples of one prompt."""
    min_tokens: int = Field(0, ge=0)
    """Nothing ends the answer before this many tokens but its length."""
    max_tokens: int | None = Field(256, ge=0)
    """Tokens of the answer at most; None goes on to the model's length."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence ids."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explain(error) from None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        if value is None:
            return []
        return [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _as_ids(cls, value: object) -> object:
        return [] if value is None else list(value) if isinstance(value, tuple) else value

    @model_validator(mode="after")
    def _least_below_most(self) -> SamplingParams:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _explain(error: ValidationError) -> InvalidRequestError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = nearest(field, SamplingParams.model_fields)
        hint = f"did you mean `{close}`?" if close else f"known are {', '.join(SamplingParams.model_fields)}"
        return InvalidRequestError(f"unknown sampling parameter `{field}`", hint=hint)
    why = first["msg"].removeprefix("Value error, ")
    return InvalidRequestError(f"sampling parameter `{field}` is {_shown(first['input'])}" if field else why, why=why if field else None)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
