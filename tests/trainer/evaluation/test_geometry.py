from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from figures_of_ranks import case

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.geometry import domain_auc, geometry, isotropy, tolerance

ALONE = World(0, 1, torch.device("cpu"), None)


def unit(x: torch.Tensor) -> np.ndarray:
    rows = x.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_every_figure_equals_its_definition_over_all_pairs() -> None:
    held = case()
    labels = held["label"].numpy()
    told = geometry({"image": held["image"], "text": held["text"]}, held["label"], ALONE, seed=0)
    for name in ("image", "text"):
        z = unit(held[name])
        pairs = list(combinations(range(len(z)), 2))
        far = [((z[i] - z[j]) ** 2).sum() for i, j in pairs]
        cosine = [z[i] @ z[j] for i, j in pairs]
        same = [c for c, (i, j) in zip(cosine, pairs, strict=True) if labels[i] == labels[j]]
        spread = np.log(np.mean(np.exp(-2 * np.array(far))))
        assert told[f"{name}_uniformity"] == pytest.approx(spread, rel=1e-6)
        assert told[f"{name}_isotropy"] == pytest.approx(1 - np.mean(cosine))
        assert told[f"{name}_tolerance"] == pytest.approx(np.mean(same))
        values = np.linalg.svd(held[name].double().numpy(), compute_uv=False)
        share = values / values.sum()
        entropy = -(share * np.log(share)).sum()
        assert told[f"{name}_effective_rank"] == pytest.approx(np.exp(entropy))
    x, y = unit(held["image"]), unit(held["text"])
    assert told["alignment"] == pytest.approx(((x - y) ** 2).sum(1).mean())
    assert told["modality_gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))


def test_of_three_modalities_every_pair_of_one_width_is_told() -> None:
    random = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(40, 6, generator=random) for _ in range(3))
    told = geometry({"image": x, "text": y, "path": z, "wide": torch.eye(40)}, None, ALONE, seed=0)
    pairs = {"image_text": (x, y), "image_path": (x, z), "text_path": (y, z)}
    assert {name for name in told if "gap" in name} == {f"{pair}_modality_gap" for pair in pairs}
    for pair, (one, other) in pairs.items():
        alone = geometry({"a": one, "b": other}, None, ALONE, seed=0)
        for name in ("alignment", "modality_gap", "domain_auc"):
            assert told[f"{pair}_{name}"] == alone[name]


def test_a_constant_added_to_unit_features_takes_isotropy_to_a_tenth() -> None:
    """The catalogue's case for number 30: a constant vector of norm 3."""
    z = torch.nn.functional.normalize(
        torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    )
    assert isotropy(z, ALONE) == pytest.approx(1, abs=0.01)
    assert isotropy(z + torch.eye(64)[0] * 3, ALONE) == pytest.approx(0.1, abs=0.01)


def test_a_collapsed_embedding_has_rank_one_and_no_uniformity() -> None:
    same = torch.ones(20, 8)
    told = geometry({"image": same}, None, ALONE, seed=0)
    assert told["image_uniformity"] == pytest.approx(0, abs=1e-6)
    assert told["image_isotropy"] == pytest.approx(0, abs=1e-9)
    assert told["image_effective_rank"] == pytest.approx(1, abs=1e-5)
    assert geometry({"image": torch.eye(8)}, None, ALONE, 0)[
        "image_effective_rank"
    ] == pytest.approx(8)


def test_a_domain_classifier_tells_clouds_apart_and_not_one_cloud() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(800, 6, generator=random) for _ in range(2))
    assert domain_auc(x, y, ALONE, seed=0) == pytest.approx(0.5, abs=0.06)
    assert domain_auc(x, y + 5 * torch.eye(6)[0], ALONE, seed=0) > 0.99


def test_what_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(GigabatchError, match="all are single"):
        tolerance(torch.eye(3), torch.arange(3), ALONE)
    with pytest.raises(GigabatchError, match="two samples"):
        isotropy(torch.ones(1, 3), ALONE)
