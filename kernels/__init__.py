"""The contrastive engine: exact losses over all pairs of a global batch, in memory linear in it.

Needs torch alone. See docs/engine.md.
"""

from gigabatch.kernels.collect import gather_rows, row_top, take
from gigabatch.kernels.compound import Concat, Products, Ragged, all_pairings
from gigabatch.kernels.losses import (
    Schedule,
    contrastive_loss,
    key_source,
    late_interaction_loss,
    sigmoid_loss,
)
from gigabatch.kernels.maxsim import MaxSim, maxsim, token_keys
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
from gigabatch.kernels.sources import Gather, Local, Ring
from gigabatch.kernels.stats import Axis, Lse, Stats, lse_stats, pair_sum

__all__ = [
    "AbsDiff", "AtLeast", "Axis", "Clause", "Concat", "Dot", "Either", "Eq", "GatedCosine",
    "Gather", "Local", "Lse", "MaxSim", "Ne", "Products", "Ragged", "Ring", "Rule", "Schedule",
    "Score", "SecondScore", "Stats", "Table", "all_pairings", "contrastive_loss", "gather_rows",
    "key_source", "late_interaction_loss", "lse_stats", "maxsim", "pair_sum", "row_top",
    "sigmoid_loss", "take", "token_keys",
]  # fmt: skip
