"""The contrastive engine: exact losses over all pairs of a global batch, in memory linear in it.

Needs torch alone. See docs/engine.md.
"""

from gigabatch.kernels.losses import contrastive_loss
from gigabatch.kernels.rules import Eq
from gigabatch.kernels.sources import Gather, Local
from gigabatch.kernels.stats import Lse, Stats, lse_stats

__all__ = ["Eq", "Gather", "Local", "Lse", "Stats", "contrastive_loss", "lse_stats"]
