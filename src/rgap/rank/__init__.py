"""Which layer protects the input, before any gradient exists: the paper's index, and the rank it stands for."""

from rgap.rank.analysis import rank_analysis
from rgap.rank.counts import LargestBatch, LayerRank, Measured
from rgap.rank.figure import plot
from rgap.rank.found import RankAnalysis

__all__ = ["LargestBatch", "LayerRank", "Measured", "RankAnalysis", "plot", "rank_analysis"]
