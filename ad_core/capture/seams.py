"""Seams in scope: those that reach the module are opened together, count what they put in, and are closed whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata

from packaging.specifiers import SpecifierSet
from torch import nn

from ad_core.api.matching import Seam
from ad_core.api.types import Declined
from ad_core.capture.export import Entries
from ad_core.registry.records import Offer


def reaching(module: nn.Module, seams: Sequence[Offer[Seam]]) -> tuple[list[Offer[Seam]], list[str]]:
    """The seams that can be opened on `module`, and of the others "name: reason"."""
    usable, refused = [], []
    for offer in seams:
        declined = out_of_range(offer.item) or offer.item.applies(module)
        if declined is None:
            usable.append(offer)
        else:
            refused.append(f"{offer.item.name}: {declined.reason}")
    return usable, refused


def out_of_range(seam: Seam) -> Declined | None:
    """Why the installed transformers is not one for which the seam is known to hold; None if it is."""
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return Declined("transformers is not installed")
    if SpecifierSet(seam.transformers).contains(installed, prereleases=True):
        return None
    return Declined(f"it is known to hold for transformers {seam.transformers}, and {installed} is installed")


@contextmanager
def opened(module: nn.Module, seams: Sequence[Offer[Seam]], entries: Entries) -> Iterator[None]:
    """All of `seams` are open on `module`; `entries` counts what they put in. The last one opened is closed first."""
    with ExitStack() as stack:
        for offer in seams:
            stack.enter_context(offer.item.open(module, entries))
        yield
