"""Every task of `gigabatch eval` on a real run of images and texts: metrics, files, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import TINY, Command, write_rich

from gigabatch.data.errors import GigabatchError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("evaluations")]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("evaluations")
    config = home / "tiny.yaml"
    config.write_text(TINY.format(root=shards) + f"run: {{dir: {home}, name: a}}\n")
    settings = ["train.steps=40", "optimizer.lr=5e-3", "eval.every_steps=20"]
    done = Command(["train", config, *settings]).wait()
    assert done.returncode == 0, done.stderr
    return home / "a"


@pytest.fixture
def measure(run: Path) -> Any:
    """Run `gigabatch eval` in this process and return the metrics."""
    from typer.testing import CliRunner

    from gigabatch.launcher.cli.app import app

    def invoke(*arguments: str | Path) -> dict[str, float]:
        done = CliRunner().invoke(app, ["eval", str(run), *map(str, arguments), "--json"])
        if done.exception is not None:
            raise done.exception
        return json.loads(done.stdout)

    return invoke


def test_retrieval_reports_slices_and_intervals(run: Path, shards: Path, measure: Any) -> None:
    metrics = measure("--on", "val")
    sliced = measure("--on", "val", "--slice", "concept")
    with_intervals = measure("--on", "val", "--intervals")
    assert {name: sliced[name] for name in metrics} == metrics
    assert (run / "eval" / "val-retrieval-step-00000040.json").exists()
    low, high = (with_intervals[f"eval/val/t2i_recall@10/{end}"] for end in ("low", "high"))
    assert low <= metrics["eval/val/t2i_recall@10"] <= high
    assert low < high
    counts = [sliced[f"eval/val/concept={c}/count"] for c in range(50)]
    assert counts == [2.0] * 10 + [1.0] * 40
    recalls = [sliced[f"eval/val/concept={c}/i2t_recall@10"] for c in range(50)]
    mean = float(np.average(recalls, weights=counts))
    assert mean == pytest.approx(metrics["eval/val/i2t_recall@10"])
    assert measure("--on", shards / "val") == metrics


def test_intervals_by_field_draw_the_queries_of_a_value_together(measure: Any) -> None:
    ungrouped = measure("--on", "val", "--intervals")
    grouped = measure("--on", "val", "--intervals-by", "concept", "--slice", "concept")
    assert grouped["eval/val/t2i_recall@10/low"] <= grouped["eval/val/t2i_recall@10"]
    assert grouped.keys() > ungrouped.keys()
    assert grouped["eval/val/t2i_recall@10/low"] != ungrouped["eval/val/t2i_recall@10/low"]
    ends = [grouped[f"eval/val/concept=3/t2i_mean_rank{end}"] for end in ("", "/low", "/high")]
    assert ends == [ends[0]] * 3  # both queries of a concept are in every resample


def test_knn_probe_and_zero_shot_beat_chance(run: Path, measure: Any) -> None:
    knn = measure("--on", "val", "--task", "knn", "label=concept", "k=5")
    probe = measure("--on", "val", "--task", "probe", "label=concept", "tap=encoder")
    templates = "templates=['{}', 'colour {}']"
    zero_shot = measure("--on", "val", "--task", "zero-shot", "label=colour", templates)
    assert knn["eval/val/knn/top1"] > 0.1
    assert probe["eval/val/probe/top5"] > 0.3
    assert probe["eval/val/probe/l2"] > 0
    assert zero_shot["eval/val/zero-shot/classes"] == 50
    assert zero_shot["eval/val/zero-shot/templates"] == 2
    same_set = measure("--on", "train", "--task", "knn", "label=concept", "k=1")
    assert same_set["eval/train/knn/top1"] < 1  # a sample is not its own neighbor
    file = run / "eval" / "val-knn-k=5-label=concept-step-00000040.json"
    written = json.loads(file.read_text())
    assert written.pop("settings") == ["label=concept", "k=5"]
    assert written == knn


def test_geometry_omits_gaps_between_different_widths(measure: Any) -> None:
    metrics = measure("--on", "val", "--task", "geometry", "label=concept")
    assert metrics["eval/val/geometry/image_uniformity"] < 0
    assert 1 < metrics["eval/val/geometry/text_effective_rank"] <= 16
    assert 0 < metrics["eval/val/geometry/modality_gap"] < 2
    assert 0.5 < metrics["eval/val/geometry/domain_auc"] <= 1
    encoder = measure("--on", "val", "--task", "geometry", "tap=encoder")
    assert "eval/val/geometry/modality_gap" not in encoder


def test_history_compares_best_with_last_step(measure: Any) -> None:
    history = measure("--task", "history")
    assert history["eval/val/mean_recall@10/last_step"] == 40
    best, last = (history[f"eval/val/mean_recall@10/{step}"] for step in ("best", "last"))
    assert best >= last


def test_batch_bias_defaults_to_the_batch_and_temperature_of_the_run(
    run: Path, measure: Any
) -> None:
    from safetensors.torch import load_file

    metrics = measure("--on", "train", "--task", "batch-bias")
    prefix = "eval/train/batch-bias/"
    assert metrics[f"{prefix}batch"] == 32
    assert metrics[f"{prefix}samples"] == 192
    newest = run / "checkpoints" / "step-00000040" / "objective.safetensors"
    scale = float(load_file(newest)["log_scale"].exp())
    assert metrics[f"{prefix}temperature"] == pytest.approx(1 / scale)
    assert 0 < metrics[f"{prefix}relative_error"] < 1


def test_text_retrieval_reports_tfidf_and_the_tower(tmp_path: Path, measure: Any) -> None:
    pairs = [
        {"anchor": f"greek letter {n}", "positive": f"letter {n} of greek", "negative": "latin"}
        for n in range(20)
    ]
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    with pytest.raises(GigabatchError, match=r"--intervals-by topic: .* are not samples"):
        measure("--on", path, "--task", "text-retrieval", "--intervals-by", "topic")
    metrics = measure("--on", path, "--task", "text-retrieval", "--intervals")
    prefix = "eval/letters/text-retrieval/"
    assert metrics[f"{prefix}tfidf_hit@1"] == 1
    assert metrics[f"{prefix}documents"] == 21
    assert metrics[f"{prefix}tfidf_mrr/low"] == 1
    assert 0 <= metrics[f"{prefix}order_accuracy"] <= 1
    assert 0 < metrics[f"{prefix}ndcg@10"] < 1


def test_languages_compare_ranks_and_order_counts_ties_as_wrong(
    tmp_path: Path, measure: Any
) -> None:
    folder = tmp_path / "rich"
    write_named(folder)
    languages = ["--on", folder, "--task", "languages", "--positives", "none"]
    metrics = measure(*languages, "captions=[names.en, names.de]")
    prefix = "eval/rich/languages/"
    assert metrics[f"{prefix}languages"] == 2
    assert metrics[f"{prefix}t2i_mrv"] >= metrics[f"{prefix}t2i_mrv_std"] ** 2 >= 0
    recalls = [metrics[f"{prefix}names.{language}/i2t_recall@10"] for language in ("en", "de")]
    assert metrics[f"{prefix}i2t_recall@10"] == pytest.approx(sum(recalls) / 2)
    same = measure(*languages, "captions=[names.en, names.en]")
    assert same[f"{prefix}i2t_mrv"] == same[f"{prefix}t2i_mrv_std"] == 0
    order = ["--on", folder, "--task", "order", "captions=names.en"]
    assert 0 < measure(*order, "against=names.de")["eval/rich/order/order_accuracy"] < 1
    assert measure(*order, "against=names.en")["eval/rich/order/order_accuracy"] == 0


def write_named(folder: Path) -> None:
    """Write 30 samples of one image, with random names in two languages."""
    import webdataset as wds

    write_rich(folder, 40, seed=3)
    (shard,) = folder.glob("*.tar")
    png = next(s["png"] for s in wds.WebDataset(str(shard), shardshuffle=False) if "png" in s)
    shard.unlink()
    random = np.random.default_rng(0)
    with wds.TarWriter(str(folder / "named.tar")) as writer:
        for number in range(30):
            message = {lang: f"{lang} {random.integers(1000)}" for lang in ("en", "de")}
            sample = {"__key__": f"n{number:03d}", "png": png, "json": {"names": message}}
            writer.write(sample)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "knn", "label=concept"], "--on: knn needs a set"),
        (
            ["--on", "val", "--task", "knn", "label=lang"],
            "60 of 60 samples have no field 'lang' in",
        ),
        (["--on", "val", "--task", "knn", "label=lang"], "its fields: colour, concept"),
        (["--on", "val", "--task", "probe", "label=concept", "tap=neck"], "no such module"),
        (["--on", "train", "--task", "probe", "label=concept"], "also the training set"),
        (["--on", "val", "--task", "zero-shot", "label=colour", "templates=a"], "has no {}"),
        (["--on", "val", "--task", "geometry", "--slice", "concept"], "no metric of single"),
        (["--on", "none.jsonl", "--task", "text-retrieval"], "none.jsonl: does not exist"),
        (["--on", "val", "--task", "order", "against=wrong"], "wrong"),
        (["--on", "train", "--task", "sample-state"], "has no state per sample"),
        (["--on", "val", "label=concept"], "label: unknown key of retrieval"),
    ],
)
def test_invalid_arguments_raise(measure: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(GigabatchError) as error:
        measure(*arguments)
    assert message in str(error.value)


def test_read_only_run_is_measured_with_a_warning(
    run: Path, tmp_path: Path, shards: Path, gigabatch: Any
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "eval")
    (copy / "eval").write_text("a file instead of the folder")
    done = gigabatch("eval", copy, "--on", shards / "val")
    assert done.returncode == 0, done.stderr
    assert "cannot write evaluation results" in done.stderr
    assert done.stdout.startswith("step 40, val: recall@10 ")
