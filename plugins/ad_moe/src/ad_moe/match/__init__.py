"""How routed experts are found: all by seams, since a loop over experts that depends on data does not export."""

from ad_core.api import Matcher, Seam
from ad_moe.match.hf_experts import HfExpertsSeam

SEAMS: list[Matcher | Seam] = [HfExpertsSeam()]
