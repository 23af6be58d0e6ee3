"""How routed experts are found: all by seams, since a loop over the experts that are hit depends on data and does not export."""

from ad_core.api import Matcher, Seam
from ad_moe.match.aria import AriaExpertsSeam
from ad_moe.match.dbrx import DbrxExpertsSeam
from ad_moe.match.expert_lists import ExpertListSeam
from ad_moe.match.hf_experts import HfExpertsSeam
from ad_moe.match.jetmoe import JetMoeAttentionSeam, JetMoeExpertsSeam
from ad_moe.match.llama4 import Llama4ExpertsSeam
from ad_moe.match.longcat import LongcatExpertsSeam

SEAMS: list[Matcher | Seam] = [
    HfExpertsSeam(),
    AriaExpertsSeam(),
    DbrxExpertsSeam(),
    LongcatExpertsSeam(),
    Llama4ExpertsSeam(),
    JetMoeExpertsSeam(),
    ExpertListSeam(),
]
LINEAR_SEAMS: list[Matcher | Seam] = [JetMoeAttentionSeam()]
