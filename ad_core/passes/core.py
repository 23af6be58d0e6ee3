"""The core's own passes, for every pipeline. The insertion of caches is made anew for each model and is not among them."""

from __future__ import annotations

from ad_core.api.passes import Pass
from ad_core.passes.asserts import RemoveAsserts
from ad_core.passes.clean import RemoveNoOps
from ad_core.passes.constant_masks import ConstantMasks
from ad_core.passes.devices import SetDevices
from ad_core.passes.duplicates import MergeDuplicates
from ad_core.passes.functional import MakeFunctional
from ad_core.passes.output_rows import GatherOutputRows
from ad_core.passes.padding import NoPadding
from ad_core.passes.positions import OwnPositions
from ad_core.passes.prepack import PrepackLinears
from ad_core.passes.transposes import CancelTransposes


def clean_passes() -> list[Pass]:
    """What makes the graph of an export canonical."""
    return [
        SetDevices(),
        RemoveAsserts(),
        MakeFunctional(),
        ConstantMasks(),
        RemoveNoOps(),
        CancelTransposes(),
        NoPadding(),
        OwnPositions(),
        MergeDuplicates(),
    ]


def engine_passes() -> list[Pass]:
    """What only the packed graph of an engine wants."""
    return [GatherOutputRows()]


def compile_passes(backend: str = "eager") -> list[Pass]:
    """What makes the last graph faster. Backends other than eager lay weights out themselves, and cannot read packed ones."""
    return [PrepackLinears()] if backend == "eager" else []
