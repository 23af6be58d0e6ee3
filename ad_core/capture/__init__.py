"""From a model directory, file or module to one canonical graph with its weights."""

from ad_core.capture.export import Exported, export_module
from ad_core.capture.matching import apply_matchers
from ad_core.capture.source import ModelSource, load_weights, open_model
from ad_core.capture.ways import Captured, capture

__all__ = ["Captured", "Exported", "ModelSource", "apply_matchers", "capture", "export_module", "load_weights", "open_model"]
