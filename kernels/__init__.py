"""Contrastive engine: exact losses over all pairs of a global batch, in linear memory.

It needs only torch. `ContrastiveLoss` and `SigmoidLoss` replace open_clip's losses in your own
loop; see docs/engine.md.
"""

from gigabatch.kernels.collect import gather_rows, row_top, take
from gigabatch.kernels.compound import Concat, Products, Ragged, all_pairings
from gigabatch.kernels.losses import (
    GatherMode,
    contrastive_loss,
    key_source,
    late_interaction_loss,
    sigmoid_loss,
)
from gigabatch.kernels.maxsim import MaxSim, maxsim, token_keys
from gigabatch.kernels.modules import ContrastiveLoss, SigmoidLoss
from gigabatch.kernels.rules import (
    AbsDiff,
    AtLeast,
    Clause,
    Either,
    Eq,
    Ne,
    Rule,
    SecondScore,
    Table,
)
from gigabatch.kernels.scores import Dot, GatedCosine, Score
from gigabatch.kernels.sources import Gather, KeyBlock, KeySource, Local, Ring
from gigabatch.kernels.stats import Axis, Lse, Stats, lse_stats, pair_sum

__all__ = [
    "AbsDiff", "AtLeast", "Axis", "Clause", "Concat", "ContrastiveLoss", "Dot", "Either", "Eq",
    "GatedCosine", "Gather", "GatherMode", "KeyBlock", "KeySource", "Local", "Lse", "MaxSim", "Ne",
    "Products", "Ragged", "Ring", "Rule", "Score", "SecondScore", "SigmoidLoss", "Stats", "Table",
    "all_pairings", "contrastive_loss", "gather_rows", "key_source", "late_interaction_loss",
    "lse_stats", "maxsim", "pair_sum", "row_top", "sigmoid_loss", "take", "token_keys",
]  # fmt: skip
