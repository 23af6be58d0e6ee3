"""How recurrences by channel are found: five seams of transformers, and one pattern in the graph."""

from ad_rnn.match.dynamic_conv import DynamicConvolution
from ad_rnn.match.ngrams import NGramEmbeddingSeam
from ad_rnn.match.pad_shift import PadShift
from ad_rnn.match.rg_lru import RgLruScan
from ad_rnn.match.rwkv import WkvFunction

__all__ = ["DynamicConvolution", "NGramEmbeddingSeam", "PadShift", "RgLruScan", "WkvFunction"]
