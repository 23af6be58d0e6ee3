"""How recurrences by channel are found: three seams of transformers, and one pattern in the graph."""

from ad_rnn.match.ngrams import NGramEmbeddingSeam
from ad_rnn.match.pad_shift import PadShift
from ad_rnn.match.rg_lru import RgLruScan
from ad_rnn.match.rwkv import WkvFunction

__all__ = ["NGramEmbeddingSeam", "PadShift", "RgLruScan", "WkvFunction"]
