"""Per-row loss terms: differentiable formulas over score statistics.

All take and return [M] tensors, at least float32. In formulas, sg is stop-gradient (`detach`).
Shared arguments:

- `z`: log-sum-exps of a row's logits over some set of keys, from `lse_stats`; -inf without keys.
- `positive`, `weight`: sums of the row's positive logits and of their weights, from `lse_stats`.
- `scale`: logit scale (inverse temperature), 0-dim or [M].

A row without a positive gives 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels.collect import row_top, sum_over_ranks, take
from gigabatch.kernels.rules import Rule
from gigabatch.kernels.scores import Dot, Score
from gigabatch.kernels.sources import KeySource, accumulator_dtype, no_autocast
from gigabatch.kernels.stats import Lse, lse_stats, pair_sum


def cross_entropy(z: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Compute Z_i - sum_j P_ij x_ij / sum_j P_ij, where x are the logits.

    Several positives are averaged outside the logarithm: each is scored against all keys, the
    other positives included (SupCon, Khosla et al. 2020, eq. 2).

    A row with a positive but no key in `z` (its rule masks the positives, and the row has no
    negative) gives -inf, with a finite gradient. Drop such rows before the mean, for example
    with `torch.where(z > -torch.inf, loss, 0)`.
    """
    has_positive = weight > 0
    return torch.where(has_positive, z - positive / torch.where(has_positive, weight, 1), 0)


def lse_plus(z: Tensor, z_positive: Tensor) -> Tensor:
    """Compute Z_i - log sum_{p in P_i} e^(scale s_ip), minus the log of the positives' share.

    Used by MIL-NCE, CACE-Net and ReVersion. `z_positive` is the `Lse` whose rule selects positives.
    """
    has_positive = z_positive > -torch.inf
    return torch.where(has_positive, z - torch.where(has_positive, z_positive, 0), 0)


def pair_wise(
    score: Score | Tensor, keys: KeySource, positives: Rule, scale: Tensor, z_negative: Tensor,
    count: Tensor, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Compute mean_{p in P_i} log(1 + e^(Z_i^neg - scale s_ip)): positives against negatives only.

    Used by Hydra. `z_negative` is the `Lse` over the negatives, `count` the number of positives.
    """
    sums = pair_sum(score, keys, "softplus", -scale, z_negative, rule=positives, backend=backend)
    return sums / count.clamp(min=1)


def circle(z_negative: Tensor, z_positive: Tensor) -> Tensor:
    """Compute log(1 + e^(Z_i^neg) sum_p e^(-scale s_ip)).

    Used by HCL. `z_positive` is the `Lse` over the positives, with the scale negated.
    """
    return F.softplus(z_negative + z_positive, threshold=40)


def hinge_hardest(
    score: Score | Tensor, keys: KeySource, negatives: Rule, positive_score: Tensor,
    margin: Tensor | float, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Compute max_{j in N_i} [margin_i + s_ij - positive_score_i]_+.

    Used by PC2 and UAR. The hardest negative is found without gradient; its score is computed again
    with gradient.
    """
    score = Dot(score) if isinstance(score, Tensor) else score
    index = row_top(score, keys, 1, negatives, backend)[1][:, 0]
    hardest = score.pairs(take(keys, index))
    return torch.where(index >= 0, torch.relu(margin + hardest - positive_score), 0)


def hinge_mean(
    score: Score | Tensor, keys: KeySource, negatives: Rule, positive_score: Tensor,
    margin: Tensor | float, count: Tensor, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Compute mean_{j in N_i} [margin_i + s_ij - positive_score_i]_+.

    Used by SimCTG and the warm-up of PC2. `count` is the number of negatives.
    """
    one, shift = positive_score.new_ones(()), margin - positive_score
    sums = pair_sum(score, keys, "relu", one, shift, rule=negatives, backend=backend)
    return sums / count.clamp(min=1)


def fcco(z: Tensor, tau: Tensor, log_u: Tensor, negatives: Tensor | float) -> Tensor:
    """Compute tau_i sg[exp(Z_i - log(negatives u_i))] Z_i; sg is stop-gradient (detach).

    This is finite-sum coupled compositional optimization (FCCO), used by SogCLR and iSogCLR. Its
    gradient is that of a softmax normalized by a stored estimate u_i of mean_j e^(h_ij/tau_i)
    instead of the batch's mean. `z` is over negatives, of h_ij = s_ij - s_ii: subtract scale s_ii
    from the `Lse`.
    """
    has_negative = z > -torch.inf
    weight = tau * torch.exp(z.detach() - log_u - torch.as_tensor(negatives).log())
    return torch.where(has_negative, weight * torch.where(has_negative, z, 0), 0)


def log_density(
    x: Tensor, keys: KeySource, tau: Tensor, count: Tensor | float, rule: Rule = (),
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Compute the kernel density log mean_j e^(-|x_i - y_j|^2 / 2 tau) over the keys y.

    Used by uniformity losses and SepCLR. An RBF score is a dot product with a bias per key and a
    constant per row. `count` is the number of keys that the rule leaves for each row. The source
    must have one tensor.
    """
    (y,) = keys.tensors
    bias = -y.to(accumulator_dtype(y.dtype)).square().sum(1) / (2 * tau)
    (z,) = lse_stats(x, keys, [Lse("rows", 1 / tau, bias, rule)], backend=backend).z
    return z - x.to(z.dtype).square().sum(1) / (2 * tau) - torch.as_tensor(count).log()


def soft_positives(
    q: Tensor, k: Tensor, f_q: Tensor, f_k: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute sum_j P_ij <q_i, k_j> over all ranks' keys for P_ij = <f_i, f_j> of low rank R.

    It equals <q_i, (sum_j k_j f_j^T) f_i>, so no tile is needed. With f = 1 it is the sum over all
    keys, which label smoothing uses.

    Args:
        q: [M, D] queries.
        k: [n, D] this rank's keys.
        f_q: [M, R] features of the queries.
        f_k: [n, R] features of the keys.
        group: Process group, or None for this process only.
    """
    dtype = accumulator_dtype(q.dtype)
    with no_autocast(q):
        moment = sum_over_ranks(f_k.to(dtype).T @ k.to(dtype), group)
        return (q.to(dtype) * (f_q.to(dtype) @ moment)).sum(1)
