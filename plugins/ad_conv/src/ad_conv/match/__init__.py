"""How causal convolutions are found in a model: seams while it is exported, matchers in the exported graph."""

from ad_conv.match.aten import AtenConv1dMatcher
from ad_conv.match.hf_seam import MarkedConvSeam

SEAMS = (MarkedConvSeam(),)
MATCHERS = (AtenConv1dMatcher(),)

__all__ = ["MATCHERS", "SEAMS"]
