"""Published objectives as compositions of the engine's functions.

Tests compare each derivative with finite differences, and each value with the dense formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import brute
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.kernels import (
    AbsDiff,
    AtLeast,
    Concat,
    Dot,
    Either,
    Eq,
    GatedCosine,
    Local,
    Lse,
    MaxSim,
    Ne,
    Products,
    Ragged,
    SecondScore,
    Table,
    all_pairings,
    contrastive_loss,
    late_interaction_loss,
    lse_stats,
    row_top,
    take,
    tiled,
    token_keys,
)
from gigabatch.kernels import loss_terms as h

N, D = 6, 4
ONE = torch.ones((), dtype=torch.float64)
ROW_INDEX = torch.arange(N)
Fn = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


IDS = torch.tensor([0, 1, 0, 2, 1, 3])
GROUP = torch.tensor([0, 0, 1, 1, 1, 2])
LABEL = torch.tensor([0.1, 0.9, 0.2, 0.6, 0.8, 0.3], dtype=torch.float64)
ROLE = torch.tensor([0, 1, 0, 1, 0, 1])
TEACHER = F.normalize(draw(N, 3, seed=7), dim=1)
SAME, OTHER = IDS[:, None] == IDS[None, :], IDS[:, None] != IDS[None, :]
SELF = torch.eye(N, dtype=torch.bool)


def source(k: Tensor) -> Local:
    columns = {"id": IDS, "index": ROW_INDEX, "group": GROUP, "label": LABEL, "role": ROLE}
    return Local(k, {**columns, "teacher": TEACHER})


def ce(logits: Tensor, share: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Sum Z - sum_j P_ij x_ij over the rows with a positive, by the dense formula."""
    z = brute.lse(logits if allowed is None else logits.masked_fill(~allowed, -torch.inf), 1)
    p = share.double()
    keep = p.sum(1) > 0
    return (z - (p * logits).sum(1) / p.sum(1).clamp(min=1e-300))[keep].sum()


def engine_ce(
    q: Tensor, k: Tensor, positives: object, rule: tuple = (), scale: Tensor = ONE
) -> Tensor:
    s = lse_stats(q, source(k), [Lse("rows", scale, None, rule)], positives)  # type: ignore[arg-type]
    return h.cross_entropy(s.z[0], s.positive[0], s.weight[0]).sum()


@dataclass(frozen=True)
class Composition:
    """An objective by the engine and by the dense formula, for inputs of these shapes."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    engine: Fn
    dense: Fn


QK = ((N, D), (N, D))
not_self, not_same, same = Ne(ROW_INDEX, "index"), Ne(IDS, "id"), Eq(IDS, "id")
own_key = Eq(ROW_INDEX, "index")
below_threshold = Either(SecondScore(TEACHER, "teacher", at_most=0.3), own_key)


def hydra(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    score, keys = GatedCosine(q, gate), source(k)
    s = lse_stats(score, keys, [Lse("rows", 5 * ONE, None, (not_same,))], (same,))
    return h.pair_wise(score, keys, (same,), 5 * ONE, s.z[0], s.weight[0]).sum()


def dense_hydra(q: Tensor, k: Tensor, gate: Tensor) -> Tensor:
    scores = 5 * brute.gated(q, gate, k)
    z = brute.lse(scores.masked_fill(SAME, -torch.inf), 1)
    sums = torch.where(SAME, F.softplus(z[:, None] - scores), 0).sum(1)
    return (sums / SAME.sum(1)).sum()


def queued(q: Tensor, k: Tensor, rule: tuple, group_of_queue: Tensor) -> Tensor:  # type: ignore[type-arg]
    extra = {"index": torch.full((5,), -1), "group": group_of_queue}
    batch = {"index": ROW_INDEX, "group": GROUP}
    keys = Concat(Local(k, batch), Local(draw(5, D, seed=3), extra))
    s = lse_stats(q, keys, [Lse("rows", 2 * ONE, None, rule)], own_key)
    return h.cross_entropy(s.z[0], s.positive[0], s.weight[0]).sum()


def dense_queued(q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    logits = 2 * q @ torch.cat([k, draw(5, D, seed=3)]).T
    return ce(logits, torch.cat([SELF, torch.zeros(N, 5, dtype=torch.bool)], 1), allowed)


QUEUE_GROUPS = torch.tensor([0, 1, 2, 1, 0])
SAME_GROUP = GROUP[:, None] == torch.cat([GROUP, QUEUE_GROUPS])[None, :]


def local_groups(q: Tensor, k: Tensor) -> Tensor:
    groups = Eq(GROUP, "group")
    keys = Ragged(k, GROUP, GROUP, {"role": ROLE}, rows=2)
    lses = [Lse("rows", 3 * ONE, None, (groups,)),
            Lse("rows", 3 * ONE, None, (groups, Eq(ROLE, "role")))]  # fmt: skip
    z, z_positive = lse_stats(q, keys, lses).z
    return h.lse_plus(z, z_positive).sum()


def dense_local_groups(q: Tensor, k: Tensor) -> Tensor:
    same_group = GROUP[:, None] == GROUP[None, :]
    same_role = same_group & (ROLE[:, None] == ROLE[None, :])
    logits = 3 * q @ k.T
    return (brute.lse(logits.masked_fill(~same_group, -torch.inf), 1)
            - brute.lse(logits.masked_fill(~same_role, -torch.inf), 1)).sum()  # fmt: skip


def circle(q: Tensor, k: Tensor) -> Tensor:
    lses = [Lse("rows", 2 * ONE, None, (not_same,)), Lse("rows", -2 * ONE, None, (same,))]
    return h.circle(*lse_stats(q, source(k), lses).z).sum()


def dense_circle(q: Tensor, k: Tensor) -> Tensor:
    s = 2 * q @ k.T
    negative = brute.lse(s.masked_fill(SAME, -torch.inf), 1)
    return F.softplus(negative + brute.lse((-s).masked_fill(OTHER, -torch.inf), 1)).sum()


def hinge(q: Tensor, k: Tensor, hardest: bool) -> Tensor:
    keys, score = source(k), Dot(q)
    positive_score = (q * k).sum(1)
    if hardest:
        return h.hinge_hardest(score, keys, (not_same,), positive_score, LABEL).sum()
    return h.hinge_mean(score, keys, (not_same,), positive_score, LABEL, OTHER.sum(1)).sum()


def dense_hinge(q: Tensor, k: Tensor, hardest: bool) -> Tensor:
    s = q @ k.T
    over = torch.relu(LABEL[:, None] + s - s.diagonal()[:, None])
    over = torch.where(OTHER, over, 0)
    return over.amax(1).sum() if hardest else (over.sum(1) / OTHER.sum(1)).sum()


def sog(q: Tensor, k: Tensor, log_tau: Tensor) -> Tensor:
    """iSogCLR with the estimate u equal to the batch's mean, whose weights w are constants."""
    tau = log_tau.exp()
    (z,) = lse_stats(q, source(k), [Lse("rows", 1 / tau, None, (not_self,))]).z
    return (z - (q * k).sum(1) / tau).sum()


def dense_sog(q: Tensor, k: Tensor, log_tau: Tensor) -> Tensor:
    s = q @ k.T
    margin = (s - s.diagonal()[:, None]) / log_tau.exp()[:, None]
    return brute.lse(margin.masked_fill(SELF, -torch.inf), 1).sum()


def symile(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    keys = Products([b, c], all_pairings(N, 2))
    s = lse_stats(a, keys, [Lse("rows", 2 * ONE)], Eq(ROW_INDEX, "tuple"))
    return h.cross_entropy(s.z[0], s.positive[0], s.weight[0]).sum()


def dense_symile(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    scores = 2 * torch.einsum("id,jd,ld->ijl", a, b, c)
    return (scores.flatten(1).logsumexp(1) - torch.einsum("iii->i", scores)).sum()


def symile_shuffled(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Symile's O(N) form: the true tuple replaces the row's own key and is scored separately."""
    shuffle = torch.tensor([3, 0, 5, 1, 2, 4])
    keys = Products([b, c], [(0, shuffle)])
    positive = (a * b * c).sum(1)
    (z,) = lse_stats(a, keys, [Lse("rows", ONE, None, (not_self,))]).z
    return (torch.logaddexp(z, positive) - positive).sum()


def dense_symile_shuffled(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    shuffle = torch.tensor([3, 0, 5, 1, 2, 4])
    scores = a @ (b * c[shuffle]).T
    positive = (a * b * c).sum(1)
    logits = torch.where(SELF, positive[:, None], scores)
    return (logits.logsumexp(1) - positive).sum()


def quantile(q: Tensor, k: Tensor) -> Tensor:
    """Keep the three best keys of a row: the threshold is between the third and fourth best."""
    keys = source(k)
    best, _ = row_top(q, keys, 4)
    hard = Either(AtLeast(best[:, 2:].mean(1)), own_key)
    return engine_ce(q, k, own_key, (hard,))


def dense_quantile(q: Tensor, k: Tensor) -> Tensor:
    s = q @ k.T
    top = s.detach().topk(4, 1).values
    return ce(s, SELF, (s.detach() >= top[:, 2:].mean(1, keepdim=True)) | SELF)


REVERSED = torch.arange(N) % 2
PAIR = torch.arange(N) // 2
ALPHA = torch.tensor([[0.0, -0.7], [-0.7, 0.0]], dtype=torch.float64)
PAIR_ALPHA = torch.tensor([[0.0, 1.1], [1.1, 0.0]], dtype=torch.float64)


def temporal(q: Tensor, k: Tensor) -> Tensor:
    """Pairs and their reversals: those of other pairs weigh e^-0.7, that of the same pair e^0.4."""
    keys = Local(k, {"index": ROW_INDEX, "reversed": REVERSED, "pair": PAIR})
    rule = (Table(REVERSED, "reversed", ALPHA),
            Table(REVERSED, "reversed", PAIR_ALPHA, only=Eq(PAIR, "pair")))  # fmt: skip
    s = lse_stats(q, keys, [Lse("rows", ONE, None, rule)], own_key)
    return h.cross_entropy(s.z[0], s.positive[0], s.weight[0]).sum()


def dense_temporal(q: Tensor, k: Tensor) -> Tensor:
    logits = q @ k.T
    cross = ALPHA[REVERSED][:, REVERSED]
    within = torch.where(PAIR[:, None] == PAIR[None, :], PAIR_ALPHA[REVERSED][:, REVERSED], 0)
    z = (logits + cross + within).logsumexp(1)
    return (z - logits.diagonal()).sum()


LAMBDA = torch.tensor([0.2, 0.1, 0.3, 0.25, 0.15, 0.4], dtype=torch.float64)


def supremix(q: Tensor, k: Tensor) -> Tensor:
    """Real negatives and mixtures lam z_i + (1 - lam) z_j.

    Scores of mixtures are affine in the real ones: a scale per row, and a constant per row outside
    the sum.
    """
    mixed = Lse("rows", 3 * (1 - LAMBDA), None, (AbsDiff(LABEL, "label", 1 - LAMBDA), not_self))
    real = Lse("rows", 3 * ONE, None, (AbsDiff(LABEL, "label"), not_self))
    s = lse_stats(q, source(k), [real, mixed], (same, not_self))
    positive_score = (q * k).sum(1)
    z = torch.logaddexp(s.z[0], s.z[1] + 3 * LAMBDA * positive_score)
    return h.cross_entropy(z, s.positive[0], s.weight[0]).sum()


def dense_supremix(q: Tensor, k: Tensor) -> Tensor:
    s, distance = q @ k.T, (LABEL[:, None] - LABEL[None, :]).abs()
    lam = LAMBDA[:, None]
    mixed = 3 * (lam * s.diagonal()[:, None] + (1 - lam) * s) + ((1 - lam) * distance + 1).log()
    both = torch.cat([3 * s + (distance + 1).log(), mixed], 1)
    z = both.masked_fill(torch.cat([SELF, SELF], 1), -torch.inf).logsumexp(1)
    p = (SAME & ~SELF).double()
    keep = p.sum(1) > 0
    return (z - (p * 3 * s).sum(1) / p.sum(1).clamp(min=1))[keep].sum()


def mixed_positive(q: Tensor, k: Tensor) -> Tensor:
    """A positive mixed from two keys of other rows, scored separately."""
    keys, one, two = source(k), torch.tensor([2, 3, 4, 5, 0, 1]), torch.tensor([1, 0, 3, 2, 5, 4])
    mixture = LAMBDA[:, None] * take(keys, one).keys + (1 - LAMBDA)[:, None] * take(keys, two).keys
    (z,) = lse_stats(q, keys, [Lse("rows", ONE)]).z
    return (z - (q * mixture).sum(1)).sum()


def dense_mixed_positive(q: Tensor, k: Tensor) -> Tensor:
    mixture = (LAMBDA[:, None] * k[torch.tensor([2, 3, 4, 5, 0, 1])]
            + (1 - LAMBDA)[:, None] * k[torch.tensor([1, 0, 3, 2, 5, 4])])  # fmt: skip
    return ((q @ k.T).logsumexp(1) - (q * mixture).sum(1)).sum()


def low_rank(q: Tensor, k: Tensor, f: Tensor) -> Tensor:
    """Soft positives from features: P_ij = <f_i, f_j>, without a tile."""
    share = f.softmax(1)
    (z,) = lse_stats(q, source(k), [Lse("rows", ONE)]).z
    return (z - h.soft_positives(q, k, share, share)).sum()


def kde(x: Tensor, y: Tensor) -> Tensor:
    tau = 0.5 * ONE
    inner = h.log_density(x, source(x), tau, N - 1, (not_self,)).logsumexp(0)
    joint = torch.cat([x, y], 1)  # a product of kernels is the kernel of the pair
    return inner + h.log_density(joint, source(joint), tau, N).mean()


def dense_kde(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor) -> Tensor:
        return -(a[:, None] - a[None]).square().sum(2) / (2 * 0.5)

    marginal = kernel(x).masked_fill(SELF, -torch.inf).logsumexp(1) - torch.log(ONE * (N - 1))
    joint = kernel(torch.cat([x, y], 1)).logsumexp(1) - torch.log(ONE * N)
    return marginal.logsumexp(0) + joint.mean()


def assigned(q: Tensor, prototypes: Tensor) -> Tensor:
    """Prototypes as keys, a teacher's softmax over them as positives."""
    keys = Local(prototypes, {"teacher": TEACHER})
    soft = (SecondScore(TEACHER, "teacher", scale=3.0),)
    s = lse_stats(q, keys, [Lse("rows", 2 * ONE)], soft)
    return h.cross_entropy(s.z[0], s.positive[0], s.weight[0]).sum()


def fcco_weighted(q: Tensor, k: Tensor, log_u: Tensor) -> Tensor:
    """FCCO, whose derivative is that of sum_j w_ij h_ij with w fixed."""
    tau = 0.3 * ONE
    (z,) = lse_stats(q, source(k), [Lse("rows", 1 / tau, None, (not_self,))]).z
    return h.fcco(z - (q * k).sum(1) / tau, tau, log_u.detach(), N - 1).sum()


COMPOSITIONS = [
    Composition("cold-start recommendation: popularity bias", (*QK, (N,)),
                lambda q, k, b: contrastive_loss(q, k, ONE, ids_q=IDS, bias=b, symmetric=False),
                lambda q, k, b: ce(q @ k.T + b, SAME) / N),
    Composition("Hydra: gated cosine, pair-wise", (*QK, (N, D)), hydra, dense_hydra),
    Composition("uniformity study: hard negatives by quantile", QK, quantile, dense_quantile),
    Composition("CoCoSoDa: batch and queue", QK, lambda q, k: queued(q, k, (), QUEUE_GROUPS),
                lambda q, k: dense_queued(q, k, None)),
    Composition("HCL: circle", QK, circle, dense_circle),
    Composition("CACE-Net: local groups, LSE+", QK, local_groups, dense_local_groups),
    Composition("PC2, UAR: hardest hinge", QK, lambda q, k: hinge(q, k, True),
                lambda q, k: dense_hinge(q, k, True)),
    Composition("SimCTG: mean hinge", QK, lambda q, k: hinge(q, k, False),
                lambda q, k: dense_hinge(q, k, False)),
    Composition("UniCon-HA: weights by role", QK,
                lambda q, k: engine_ce(q, k, (same,), (Table(ROLE, "role", ALPHA), not_self)),
                lambda q, k: (
                    (q @ k.T + ALPHA[ROLE][:, ROLE]).masked_fill(SELF, -torch.inf).logsumexp(1)
                    - (SAME * (q @ k.T)).sum(1) / SAME.sum(1)).sum()),
    Composition("iSogCLR: scale per row", (*QK, (N,)), sog, dense_sog),
    Composition("clustering: soft assignment to prototypes", QK, assigned,
                lambda q, k: ce(2 * q @ k.T, (3 * TEACHER @ TEACHER.T).softmax(1))),
    Composition("SPACE-2: soft positives of low rank", (*QK, (N, 3)), low_rank,
                lambda q, k, f: ce_soft(q @ k.T, f.softmax(1))),
    Composition("SupCon", ((N, D),),
                lambda z: engine_ce(z, z, (same, not_self), (not_self,), 2 * ONE),
                lambda z: ce(2 * z @ z.T, SAME & ~SELF, ~SELF)),
    Composition("SepCLR: kernel density", QK, kde, dense_kde),
    Composition("Symile: all pairings", ((N, D),) * 3, symile, dense_symile),
    Composition("Symile: shuffled", ((N, D),) * 3, symile_shuffled, dense_symile_shuffled),
    Composition("TeminAL: reversed captions", QK, temporal, dense_temporal),
    Composition("1-to-K: several positives, symmetric", (*QK, ()),
                lambda q, k, s: contrastive_loss(q, k, s.exp(), ids_q=IDS),
                lambda q, k, s: (
                    ce(s.exp() * q @ k.T, SAME) + ce(s.exp() * k @ q.T, SAME)) / N / 2),
    Composition("MultiCSR: teacher threshold", QK,
                lambda q, k: engine_ce(q, k, own_key, (below_threshold,)),
                lambda q, k: ce(q @ k.T, SELF, (TEACHER @ TEACHER.T <= 0.3) | SELF)),
    Composition("CLIP with label smoothing and excluded ids", QK,
                lambda q, k: contrastive_loss(q, k, ONE, ids_q=IDS, same_id="exclude",
                                              label_smoothing=0.1, symmetric=False),
                lambda q, k: smoothed(q @ k.T, OTHER | SELF, 0.1) / N),
    Composition("mixture of experts: negatives of one domain", QK,
                lambda q, k: engine_ce(q, k, own_key, (Eq(GROUP, "group"),)),
                lambda q, k: ce(q @ k.T, SELF, GROUP[:, None] == GROUP[None, :])),
    Composition("SupReMix: label distance and mixtures", QK, supremix, dense_supremix),
    Composition("SupReMix: mixed positives", QK, mixed_positive, dense_mixed_positive),
    Composition("CCP: queue per language", QK,
                lambda q, k: queued(q, k, (Eq(GROUP, "group"),), QUEUE_GROUPS),
                lambda q, k: dense_queued(q, k, SAME_GROUP)),
    Composition("DefSent+: frozen table as queries", QK,
                lambda q, k: columns_ce(k, q), lambda q, k: ce(q @ k.T, SAME)),
    Composition("COCONUT: negatives of another role", QK,
                lambda q, k: engine_ce(q, k, own_key, (Either(Ne(ROLE, "role"), own_key),)),
                lambda q, k: ce(q @ k.T, SELF, (ROLE[:, None] != ROLE[None, :]) | SELF)),
    Composition("CLSR: scale per item, symmetric", (*QK, (N,)),
                lambda q, k, t: both_ways(q, k, t.exp()),
                lambda q, k, t: ce(t.exp()[:, None] * q @ k.T, SELF)
                + ce(t.exp()[:, None] * k @ q.T, SELF)),
    Composition("FILIP: late interaction", ((N, 3, D), (N, 2, D)),
                lambda q, k: late_interaction_loss(q, k, 2 * ONE),
                lambda q, k: ce(2 * maxsim_of(q, k), SELF) / N / 2
                + ce(2 * maxsim_of(k, q), SELF) / N / 2),
    Composition("late interaction within groups", ((N, 3, D), (N, 2, D)),
                lambda q, k: late_groups(q, k),
                lambda q, k: ce(maxsim_of(q, k), SELF, GROUP[:, None] == GROUP[None, :])),
]  # fmt: skip


def ce_soft(logits: Tensor, share: Tensor) -> Tensor:
    return (logits.logsumexp(1) - (share @ share.T * logits).sum(1)).sum()


def smoothed(logits: Tensor, allowed: Tensor, e: float) -> Tensor:
    mean = torch.where(allowed, logits, 0).sum(1) / allowed.sum(1)
    z = logits.masked_fill(~allowed, -torch.inf).logsumexp(1)
    return (z - (1 - e) * logits.diagonal() - e * mean).sum()


def columns_ce(table: Tensor, q: Tensor) -> Tensor:
    """Use a table that is too large to communicate: its rows are the queries, the batch's rows are
    the keys, and each column has the loss of a batch row."""
    s = lse_stats(table, source(q), [Lse("columns", ONE)], same)
    return h.cross_entropy(s.z[0], s.positive[0], s.weight[0]).sum()


def both_ways(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    s = lse_stats(q, source(k), [Lse("rows", scale), Lse("columns", scale)], own_key)
    directions = zip(s.z, s.positive, s.weight, strict=True)
    return sum((h.cross_entropy(*values).sum() for values in directions), 0 * ONE)


def maxsim_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("itd,jud->ijtu", q, k).amax(3).mean(2)


def late_groups(q: Tensor, k: Tensor) -> Tensor:
    keys = Local(k, token_keys(k, None, index=ROW_INDEX, group=GROUP))
    s = lse_stats(MaxSim(q), keys, [Lse("rows", ONE, None, (Eq(GROUP, "group"),))], own_key)
    return h.cross_entropy(s.z[0], s.positive[0], s.weight[0]).sum()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "ROWS", 4)
    monkeypatch.setattr(tiled, "COLUMNS", 4)


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=lambda c: c.name)
def test_composition_equals_dense_formula(composition: Composition) -> None:
    inputs = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(composition.shapes)]
    value, expected = composition.engine(*inputs), composition.dense(*inputs)
    torch.testing.assert_close(value, expected)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    for a, b in zip(
        gradients, torch.autograd.grad(expected, inputs, allow_unused=True), strict=True
    ):
        if a is None or b is None:
            assert a is None
            assert b is None
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=lambda c: c.name)
def test_gradcheck_of_composition(composition: Composition) -> None:
    inputs = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(composition.shapes)]
    # One random direction is enough: every element was compared with the dense gradient above.
    assert torch.autograd.gradcheck(composition.engine, inputs, fast_mode=True)


def test_fcco_gradient_uses_the_stored_normalizer() -> None:
    """FCCO has a weight without gradient, so compare with its formula, not finite differences."""
    q, k = (draw(N, D, seed=i).requires_grad_() for i in range(2))
    log_u = draw(N, seed=2)
    gradients = torch.autograd.grad(fcco_weighted(q, k, log_u), (q, k))
    s = q @ k.T
    margin = s - s.diagonal()[:, None]
    weight = (margin / 0.3).exp().detach() / ((N - 1) * log_u.exp()[:, None])
    expected = torch.autograd.grad(torch.where(SELF, 0, weight * margin).sum(), (q, k))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)
