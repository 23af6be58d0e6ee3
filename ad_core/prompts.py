"""What a person gives as a prompt - text, chat messages, token ids, or a list of those - as token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ad_core.api.errors import InvalidRequestError, TokenizerMissingError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TokenizedPrompt:
    """Ids for the engine; `text` is what was given as text, or what the chat template made of messages."""

    ids: list[int]
    text: str | None = None


class PromptReader:
    """Reads prompts with a model's tokenizer, which is only asked for (`tokenizer()`) when text needs one."""

    def __init__(self, tokenizer: Callable[[], Any | None], vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def read(self, prompt: Prompt) -> TokenizedPrompt:
        """One prompt. Raises `InvalidRequestError` for what is none, `TokenizerMissingError` for text without a tokenizer."""
        if isinstance(prompt, str):
            return self._text(prompt)
        if _all(prompt, Mapping):
            return self._chat([dict(message) for message in prompt if isinstance(message, Mapping)])
        if hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not all(_is_id(token) for token in prompt):
            raise _not_a_prompt(prompt)
        return self._checked(TokenizedPrompt([int(token) for token in prompt]))  # type: ignore[arg-type]

    def read_all(self, prompts: Prompt | Sequence[Prompt]) -> tuple[list[TokenizedPrompt], bool]:
        """One prompt or a list of them, and whether it was a single one. An empty list holds no prompts."""
        if not isinstance(prompts, Sequence) and not hasattr(prompts, "tolist"):
            raise _not_a_prompt(prompts)
        if isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes) and not len(prompts):
            return [], False
        single = isinstance(prompts, str | bytes) or hasattr(prompts, "tolist") or _all(prompts, Mapping) or _all(prompts, int)
        each: Sequence[Any] = [prompts] if single else prompts  # type: ignore[assignment,list-item]
        return [self.read(prompt) for prompt in each], single

    def _text(self, text: str) -> TokenizedPrompt:
        if not text:
            raise InvalidRequestError("the prompt is empty", hint="give at least one character, or token ids")
        return self._checked(TokenizedPrompt(_encoded(self._needed("text"), text, special=True), text))

    def _chat(self, messages: list[dict[str, Any]]) -> TokenizedPrompt:
        tokenizer = self._needed("chat messages")
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidRequestError(
                "chat messages were given, but the model has no chat template",
                hint="give the prompt as text, in the form that the model expects",
            )
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template is a program of the model's author: any of its errors is about these messages
            raise InvalidRequestError(
                "the chat template refuses these messages", why=str(error), hint='messages look like {"role": "user", "content": "..."}'
            ) from error
        return self._checked(TokenizedPrompt(_encoded(tokenizer, text, special=False), text))

    def _checked(self, prompt: TokenizedPrompt) -> TokenizedPrompt:
        if not prompt.ids:
            raise InvalidRequestError("the prompt is empty", hint="give at least one token")
        strange = next((token for token in prompt.ids if not 0 <= token < self._vocab_size), None)
        if strange is not None:
            raise InvalidRequestError(
                f"the prompt holds the token id {strange}", why=f"the model's vocabulary has ids 0 to {self._vocab_size - 1}"
            )
        return prompt

    def _needed(self, what: str) -> Any:
        tokenizer = self._tokenizer()
        if tokenizer is None:
            raise TokenizerMissingError(
                f"the prompt is {what} and the model has no tokenizer", hint="give token ids, or LLM(..., tokenizer=PATH or a tokenizer)"
            )
        return tokenizer


def _encoded(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Ids by a tokenizer of transformers or of `tokenizers`; `special` adds what the model wants around a text, a BOS token say."""
    if callable(tokenizer):
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    else:
        ids = tokenizer.encode(text, add_special_tokens=special).ids
    return [int(token) for token in ids]


def _is_id(token: Any) -> bool:
    return isinstance(token, int) and not isinstance(token, bool)


def _not_a_prompt(value: Any) -> InvalidRequestError:
    inside = next((type(item).__name__ for item in value if not _is_id(item)), None) if isinstance(value, list | tuple) else None
    what = type(value).__name__ + (f" with a {inside} in it" if inside else "")
    return InvalidRequestError(f"a prompt cannot be a {what}", hint="give text, a list of chat messages, or a flat list of token ids")


def _all(values: Any, kind: type) -> bool:
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and len(values) > 0
        and all(isinstance(value, kind) for value in values)
    )
