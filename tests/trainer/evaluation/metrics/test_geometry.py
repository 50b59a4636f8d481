from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from sharded_metrics import case

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.metrics.geometry import (
    domain_auc,
    geometry_metrics,
    isotropy,
    tolerance,
)

SINGLE = World(0, 1, torch.device("cpu"), None)


def unit(x: torch.Tensor) -> np.ndarray:
    rows = x.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_metrics_match_definitions_over_all_pairs() -> None:
    rows = case()
    labels = rows["label"].numpy()
    outputs = {"image": rows["image"], "text": rows["text"]}
    metrics = geometry_metrics(outputs, rows["label"], SINGLE, seed=0)
    for name in ("image", "text"):
        z = unit(rows[name])
        pairs = list(combinations(range(len(z)), 2))
        distances = [((z[i] - z[j]) ** 2).sum() for i, j in pairs]
        cosines = [z[i] @ z[j] for i, j in pairs]
        same = [c for c, (i, j) in zip(cosines, pairs, strict=True) if labels[i] == labels[j]]
        uniformity = np.log(np.mean(np.exp(-2 * np.array(distances))))
        assert metrics[f"{name}_uniformity"] == pytest.approx(uniformity, rel=1e-6)
        assert metrics[f"{name}_isotropy"] == pytest.approx(1 - np.mean(cosines))
        assert metrics[f"{name}_tolerance"] == pytest.approx(np.mean(same))
        values = np.linalg.svd(rows[name].double().numpy(), compute_uv=False)
        share = values / values.sum()
        entropy = -(share * np.log(share)).sum()
        assert metrics[f"{name}_effective_rank"] == pytest.approx(np.exp(entropy))
    x, y = unit(rows["image"]), unit(rows["text"])
    assert metrics["alignment"] == pytest.approx(((x - y) ** 2).sum(1).mean())
    assert metrics["modality_gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))


def test_three_modalities_report_every_pair_of_equal_width() -> None:
    random = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(40, 6, generator=random) for _ in range(3))
    outputs = {"image": x, "text": y, "path": z, "wide": torch.eye(40)}
    metrics = geometry_metrics(outputs, None, SINGLE, seed=0)
    pairs = {"image_text": (x, y), "image_path": (x, z), "text_path": (y, z)}
    gaps = {name for name in metrics if "gap" in name}
    assert gaps == {f"{pair}_modality_gap" for pair in pairs}
    for pair, (first, second) in pairs.items():
        two = geometry_metrics({"a": first, "b": second}, None, SINGLE, seed=0)
        for name in ("alignment", "modality_gap", "domain_auc"):
            assert metrics[f"{pair}_{name}"] == two[name]


def test_adding_a_constant_of_norm_three_reduces_isotropy_to_a_tenth() -> None:
    """A shared component makes all directions similar (contrastive search)."""
    z = torch.nn.functional.normalize(
        torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    )
    assert isotropy(z, SINGLE) == pytest.approx(1, abs=0.01)
    assert isotropy(z + torch.eye(64)[0] * 3, SINGLE) == pytest.approx(0.1, abs=0.01)


def test_collapsed_embedding_has_rank_one_and_no_uniformity() -> None:
    same = torch.ones(20, 8)
    metrics = geometry_metrics({"image": same}, None, SINGLE, seed=0)
    assert metrics["image_uniformity"] == pytest.approx(0, abs=1e-6)
    assert metrics["image_isotropy"] == pytest.approx(0, abs=1e-9)
    assert metrics["image_effective_rank"] == pytest.approx(1, abs=1e-5)
    axes = geometry_metrics({"image": torch.eye(8)}, None, SINGLE, 0)
    assert axes["image_effective_rank"] == pytest.approx(8)


def test_domain_auc_separates_two_clouds_but_not_one() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(800, 6, generator=random) for _ in range(2))
    assert domain_auc(x, y, SINGLE, seed=0) == pytest.approx(0.5, abs=0.06)
    assert domain_auc(x, y + 5 * torch.eye(6)[0], SINGLE, seed=0) > 0.99


def test_too_few_samples_raise() -> None:
    with pytest.raises(GigabatchError, match="every class has one"):
        tolerance(torch.eye(3), torch.arange(3), SINGLE)
    with pytest.raises(GigabatchError, match="two samples"):
        isotropy(torch.ones(1, 3), SINGLE)
