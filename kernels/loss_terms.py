"""Heads: from statistics of scores to a loss a row. Each is a formula, differentiable.

All take and return [M] tensors, at least float32: `z` log-sum-exps of a row's scores over some set
of keys, `positive` and `weight` its positives' sum of logits and of weights, from `lse_stats`;
`scale` an inverse temperature, 0-dimensional or [M]. A row without a positive gives 0. Names and
numbers are those of the catalogue of objectives.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels.collect import row_top, sum_rows, take
from gigabatch.kernels.rules import Rule
from gigabatch.kernels.scores import Dot, Score
from gigabatch.kernels.sources import KeySource, full_precision, wide
from gigabatch.kernels.stats import Lse, lse_stats, pair_sum


def cross_entropy(z: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """CE: Z_i - sum_j P_ij x_ij / sum_j P_ij, x the logits.

    With several positives each is scored against all keys, other positives among them, and the
    logarithms are averaged (SupCon's "outside" form, Khosla et al. 2020, eq. 2).
    """
    has = weight > 0
    return torch.where(has, z - positive / torch.where(has, weight, 1), 0)


def lse_plus(z: Tensor, z_positive: Tensor) -> Tensor:
    """LSE+: Z_i - log sum_{p in P_i} e^(scale s_ip), the log of the positives' share of the mass
    (MIL-NCE; CACE-Net, 8; ReVersion, 35). `z_positive`: the `Lse` whose rule is the positives'."""
    has = z_positive > -torch.inf
    return torch.where(has, z - torch.where(has, z_positive, 0), 0)


def pair_wise(
    score: Score | Tensor, keys: KeySource, positives: Rule, scale: Tensor, z_negative: Tensor,
    count: Tensor, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """PAIR: mean_{p in P_i} log(1 + e^(Z_i^neg - scale s_ip)), each positive against the negatives
    alone (Hydra, 3). `z_negative`: over the negatives; `count`: the number of positives."""
    sums = pair_sum(score, keys, "softplus", -scale, z_negative, rule=positives, backend=backend)
    return sums / count.clamp(min=1)


def circle(z_negative: Tensor, z_positive: Tensor) -> Tensor:
    """CIRCLE: log(1 + e^(Z_i^neg) sum_p e^(-scale s_ip)) (HCL, 7). `z_positive`: the `Lse` over
    the positives with the scale negated."""
    return F.softplus(z_negative + z_positive, threshold=40)


def hinge_hardest(
    score: Score | Tensor, keys: KeySource, negatives: Rule, own: Tensor, margin: Tensor | float,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """HINGE: max_{j in N_i} [margin_i + s_ij - own_i]_+ (PC2, 1; UAR, 24). `own`: the positive's
    score. The hardest negative is searched without gradient and scored again with it."""
    score = Dot(score) if isinstance(score, Tensor) else score
    index = row_top(score, keys, 1, negatives, backend)[1][:, 0]
    hardest = score.pairs(take(keys, index))
    return torch.where(index >= 0, torch.relu(margin + hardest - own), 0)


def hinge_mean(
    score: Score | Tensor, keys: KeySource, negatives: Rule, own: Tensor, margin: Tensor | float,
    count: Tensor, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """HINGE: mean_{j in N_i} [margin_i + s_ij - own_i]_+ (SimCTG, 30; PC2's warm-up). `count`: the
    number of negatives."""
    one = own.new_ones(())
    sums = pair_sum(score, keys, "relu", one, margin - own, rule=negatives, backend=backend)
    return sums / count.clamp(min=1)


def fcco(z: Tensor, tau: Tensor, log_u: Tensor, negatives: Tensor | float) -> Tensor:
    """FCCO: tau_i sg[exp(Z_i - log(negatives u_i))] Z_i, whose gradient is that of a softmax
    normalised by a stored estimate u_i of mean_j e^(h_ij/tau_i) instead of the batch's (SogCLR and
    iSogCLR, 14). `z`: over negatives, of h_ij = s_ij - s_ii: take scale s_ii off the `Lse`."""
    weight = tau * torch.exp(z.detach() - log_u - torch.as_tensor(negatives).log())
    return torch.where(z > -torch.inf, weight * torch.where(z > -torch.inf, z, 0), 0)


def log_density(
    x: Tensor, keys: KeySource, tau: Tensor, count: Tensor | float, rule: Rule = (),
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """KDE: log mean_j e^(-|x_i - y_j|^2 / 2 tau) over the keys y: an RBF score as a dot product
    with a bias a key and a constant a row (uniformity, 5; SepCLR, 28). `count`: keys of each row
    that the rule lets through. The source must have one tensor."""
    (y,) = keys.tensors
    bias = -y.to(wide(y.dtype)).square().sum(1) / (2 * tau)
    (z,) = lse_stats(x, keys, [Lse("rows", 1 / tau, bias, rule)], backend=backend).z
    return z - x.to(z.dtype).square().sum(1) / (2 * tau) - torch.as_tensor(count).log()


def soft_positives(
    q: Tensor, k: Tensor, f_q: Tensor, f_k: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """[M]: sum_j P_ij <q_i, k_j> for P_ij = <f_i, f_j> of low rank R, over all ranks' keys, as
    <q_i, (sum_j k_j f_j^T) f_i>; `f_q` [M, R], `f_k` [n, R]. With f = 1 the sum over all keys:
    label smoothing never enters a tile."""
    kind = wide(q.dtype)
    with full_precision(q):
        moment = sum_rows(f_k.to(kind).T @ k.to(kind), group)
        return (q.to(kind) * (f_q.to(kind) @ moment)).sum(1)
