"""Every error a user can meet. One class a cause; each says what, where, why and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a person who typed `word` most likely meant, for the hint of an error."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


class AdError(Exception):
    """Base of all our errors.

    `what` is one sentence; `where` names the model, layer, plugin or file; `why` is the cause; `hint` is what to do next.
    """

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, hint: str | None = None):
        self.what, self.where, self.why, self.hint = what, where, why, hint
        lines = [what]
        lines += [f"  where: {where}"] if where else []
        lines += [f"  why:   {why}"] if why else []
        lines += [f"  do:    {hint}"] if hint else []
        super().__init__("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """The parts under their names, for logs and JSON answers."""
        return {"error": type(self).__name__, "what": self.what, "where": self.where, "why": self.why, "hint": self.hint}


# -- plugins and arbitration ------------------------------------------------------------------------------------------


class PluginError(AdError):
    """A plugin that is needed cannot be used."""


class PluginBrokenError(PluginError):
    """A plugin raised while it was imported, or in one of its hooks."""


class PluginIncompatibleError(PluginError):
    """A plugin was written for another version of the core or of the contract."""


class PluginConflictError(PluginError):
    """Two distributions claim one plugin name, op namespace or object name."""


class OpDefinitionError(PluginError):
    """An op is defined twice, in a foreign namespace, or with a schema that its kernels cannot honour."""


class NoKernelError(AdError):
    """No kernel can run a canonical op here; the message lists each candidate with its reason."""


class AmbiguousKernelError(AdError):
    """Kernels of different distributions tie; the message prints the line of configuration that decides."""


class PassOrderError(AdError):
    """The declared order of passes has a cycle, contradicts the stages, or a required pass is missing."""


class NumericGuardError(AdError):
    """A pass changed the model's numbers beyond what its declared safety allows."""


class GraphInvalidError(AdError):
    """The graph breaks its written spec after a pass."""


# -- models -----------------------------------------------------------------------------------------------------------


class ModelError(AdError):
    """The model given by the user cannot be loaded or captured."""


class UnknownModelError(ModelError):
    """The path holds no model that we know how to open, or its architecture is unknown."""


class CheckpointError(ModelError):
    """Weights are missing, truncated or of another shape."""


class CaptureError(ModelError):
    """No way of capture gave a graph that is equal to the module; the message lists each way with its reason."""


class UnclaimedMixerError(CaptureError):
    """A node moves information between tokens and no installed plugin claims it: decoding would be silently wrong."""


class RemoteCodeError(ModelError):
    """The model directory wants to run its own code and `trust_remote_code` is off."""


class TokenizerMissingError(ModelError):
    """Text was given or asked for and the model has no tokenizer; token ids still work."""


# -- configuration and requests ---------------------------------------------------------------------------------------


class ConfigError(AdError):
    """An unknown key, a wrong value, or a requested feature that cannot work here."""


class InvalidRequestError(AdError):
    """A prompt or a sampling parameter cannot be served as given."""


class PromptTooLongError(InvalidRequestError):
    """A prompt does not fit the model or the cache; the message holds both numbers."""


class QueueFull(AdError):
    """The waiting queue is at its limit. `limit` and `size` are numbers of requests."""

    def __init__(self, limit: int, size: int):
        self.limit, self.size = limit, size
        super().__init__(
            f"the queue is full: {size} requests wait, the limit is {limit}",
            hint="try again later, raise `max_queued_requests`, or use `generate`, which feeds at the queue's pace",
        )


class RequestFailedError(AdError):
    """One request cannot go on (its logits are not numbers, its text cannot be decoded); the others are untouched."""


class OutOfMemoryBudgetError(AdError):
    """The memory budget cannot hold even one page or slot of each pool."""


class EngineClosedError(AdError):
    """The engine was closed, or died of an earlier error that this one names."""


class CacheAuditError(AdError):
    """Pages or slots are not in exactly one of free, cached and owned. A bug of ours: please report it."""
