"""The gradients of an exact step equal those of one graph over the global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support import run_ranks, write_rich

from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.inputs import make_tokenizer, open_train

PROBE = Path(__file__).with_name("step_probe.py")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_exact_step_equals_one_graph_at_every_zero_stage(
    world_size: int, tiny: Path, tmp_path: Path
) -> None:
    config = load_config(tiny)
    tokenizer = tmp_path / "tokenizer.json"
    make_tokenizer(config, open_train(config)).save(str(tokenizer))
    report = run_ranks(PROBE, world_size, tiny, tokenizer)
    assert set(report) == {"0", "1", "2", "3"}
    for stage in report.values():
        assert stage["gap"] < 1e-5, stage
        few, many = stage["reductions"]
        assert few == many, "the number of reductions grows with the number of micro-batches"
        assert few > 0 or world_size == 1


RICH = """
data:
  captions: {member: json, field: names, choose: all, most: 3}
  missing: mask
  group: lang
  augment: {crop: 0.5, flip: 0.5, blur: 1.0, erase: 0.5, grey: 0.3}
"""


@pytest.mark.slow
def test_exact_step_with_several_captions_missing_images_and_groups(
    tiny: Path, tmp_path: Path
) -> None:
    write_rich(tmp_path / "rich" / "train", 120, seed=4)
    settings = yaml.safe_load(tiny.read_text())
    merge(settings, yaml.safe_load(RICH))
    settings["data"]["root"] = str(tmp_path / "rich")
    path = tmp_path / "rich.yaml"
    path.write_text(yaml.safe_dump(settings))
    config = load_config(path, ["eval.sets=[]"])
    tokenizer = tmp_path / "tokenizer.json"
    make_tokenizer(config, open_train(config)).save(str(tokenizer))
    report = run_ranks(PROBE, 3, path, tokenizer)
    for stage in report.values():
        assert stage["gap"] < 1e-5, stage


TAPS = """
objective: {name: sum, terms: [
  {name: infonce, taps: [text, image@1]},
  {name: infonce, taps: [image.encoder, image.encoder@1]},
  {name: late_interaction},
]}
"""


@pytest.mark.slow
def test_exact_step_with_views_tokens_and_features_before_the_head(
    tiny: Path, tmp_path: Path
) -> None:
    settings = yaml.safe_load(tiny.read_text()) | yaml.safe_load(TAPS)
    path = tmp_path / "taps.yaml"
    path.write_text(yaml.safe_dump(settings))
    config = load_config(path)
    tokenizer = tmp_path / "tokenizer.json"
    make_tokenizer(config, open_train(config)).save(str(tokenizer))
    for stage in run_ranks(PROBE, 2, path, tokenizer).values():
        assert stage["gap"] < 1e-5, stage
        few, many = stage["reductions"]
        assert few == many


def merge(tree: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            merge(tree[name], value)
        else:
            tree[name] = value


@pytest.mark.slow
def test_non_finite_step_on_one_rank_changes_no_rank(tiny: Path, tmp_path: Path) -> None:
    config = load_config(tiny)
    tokenizer = tmp_path / "tokenizer.json"
    make_tokenizer(config, open_train(config)).save(str(tokenizer))
    report = run_ranks(PROBE.with_name("finite_probe.py"), 2, tiny, tokenizer)
    kinds = ["weights", "moments", "objective", "objective moments", "objective buffers"]
    expected = {
        "applied": [True, False, False, True],
        "changed": [[], [], kinds],
        "finite": True,
        "steps": 2,
    }
    assert report == {zero: [expected, expected] for zero in ("0", "1", "2", "3")}
