"""How softmax attention is found: by transformers' attention interface, at SDPA nodes, at a softmax over the sequence."""

from ad_attention.match.hf_block_indexer import BlockIndexerSeam
from ad_attention.match.hf_compressed import CompressedAttentionSeam
from ad_attention.match.hf_convolved import ConvolvedAttentionSeam
from ad_attention.match.hf_dynamic_mask import DynamicMaskSeam
from ad_attention.match.hf_seam import HfAttentionSeam
from ad_attention.match.sdpa import SdpaMatcher
from ad_attention.match.softmax import SoftmaxMatcher
from ad_core.api import Matcher, Seam

SEAMS: list[Seam] = [HfAttentionSeam(), ConvolvedAttentionSeam(), DynamicMaskSeam(), CompressedAttentionSeam(), BlockIndexerSeam()]
MATCHERS: list[Matcher] = [SdpaMatcher(), SoftmaxMatcher()]
