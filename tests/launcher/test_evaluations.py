"""Every task of `gigabatch eval` on a real run: its figures, its files, its errors."""

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
def told(run: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Measure in this process: the commands differ only in what they ask for."""
    from typer.testing import CliRunner

    from gigabatch.launcher.cli.app import app

    def measure(*arguments: str | Path) -> dict[str, float]:
        done = CliRunner().invoke(app, ["eval", str(run), *map(str, arguments), "--json"])
        if done.exception is not None:
            raise done.exception
        return json.loads(done.stdout)

    return measure


def test_retrieval_with_slices_and_intervals(run: Path, shards: Path, told: Any) -> None:
    plain = told("--on", "val")
    whole = told("--on", "val", "--slice", "concept")
    sure = told("--on", "val", "--intervals")
    assert {name: whole[name] for name in plain} == plain
    assert (run / "eval" / "val-retrieval-step-00000040.json").exists()
    low, high = (sure[f"eval/val/t2i_recall@10/{end}"] for end in ("low", "high"))
    assert low <= plain["eval/val/t2i_recall@10"] <= high
    assert low < high
    together = told("--on", "val", "--intervals-by", "concept", "--slice", "concept")
    assert together["eval/val/t2i_recall@10/low"] <= together["eval/val/t2i_recall@10"]
    assert together.keys() > sure.keys()
    assert together["eval/val/t2i_recall@10/low"] != low
    one = [together[f"eval/val/concept=3/t2i_mean_rank{end}"] for end in ("", "/low", "/high")]
    assert one == [one[0]] * 3  # both queries of a concept in every draw
    counts = [whole[f"eval/val/concept={c}/count"] for c in range(50)]
    assert counts == [2.0] * 10 + [1.0] * 40
    parts = [whole[f"eval/val/concept={c}/i2t_recall@10"] for c in range(50)]
    mean = float(np.average(parts, weights=counts))
    assert mean == pytest.approx(plain["eval/val/i2t_recall@10"])
    assert told("--on", shards / "val") == plain


def test_classification_beats_chance_and_zero_shot_reads_templates(run: Path, told: Any) -> None:
    knn = told("--on", "val", "--task", "knn", "label=concept", "k=5")
    probe = told("--on", "val", "--task", "probe", "label=concept", "tap=encoder")
    shot = told(
        "--on", "val", "--task", "zero-shot", "label=colour", "templates=['{}', 'colour {}']"
    )
    assert knn["eval/val/knn/top1"] > 0.1
    assert probe["eval/val/probe/top5"] > 0.3
    assert probe["eval/val/probe/l2"] > 0
    assert shot["eval/val/zero-shot/classes"] == 50
    assert shot["eval/val/zero-shot/templates"] == 2
    own = told("--on", "train", "--task", "knn", "label=concept", "k=1")
    assert own["eval/train/knn/top1"] < 1  # a sample is not its own neighbour
    kept = json.loads((run / "eval" / "val-knn-k=5-label=concept-step-00000040.json").read_text())
    assert kept.pop("settings") == ["label=concept", "k=5"]
    assert kept == knn


def test_geometry_and_history(run: Path, told: Any) -> None:
    shape = told("--on", "val", "--task", "geometry", "label=concept")
    assert shape["eval/val/geometry/image_uniformity"] < 0
    assert 1 < shape["eval/val/geometry/text_effective_rank"] <= 16
    assert 0 < shape["eval/val/geometry/modality_gap"] < 2
    assert 0.5 < shape["eval/val/geometry/domain_auc"] <= 1
    before = told("--on", "val", "--task", "geometry", "tap=encoder")
    assert "eval/val/geometry/modality_gap" not in before  # widths differ
    history = told("--task", "history")
    assert history["eval/val/mean_recall@10/last_step"] == 40
    best, last = (history[f"eval/val/mean_recall@10/{which}"] for which in ("best", "last"))
    assert best >= last


def test_the_runs_own_batch_and_temperature_are_judged(run: Path, told: Any) -> None:
    from safetensors.torch import load_file

    found = told("--on", "train", "--task", "batch-bias")
    under = "eval/train/batch-bias/"
    assert found[f"{under}batch"] == 32
    assert found[f"{under}samples"] == 192
    newest = run / "checkpoints" / "step-00000040" / "objective.safetensors"
    scale = float(load_file(newest)["log_scale"].exp())
    assert found[f"{under}temperature"] == pytest.approx(1 / scale)
    assert 0 < found[f"{under}relative_error"] < 1


def test_text_retrieval_stands_beside_tfidf(tmp_path: Path, told: Any) -> None:
    pairs = [
        {"anchor": f"greek letter {n}", "positive": f"letter {n} of greek", "negative": "latin"}
        for n in range(20)
    ]
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    with pytest.raises(GigabatchError, match="intervals by topic: what asks here are no samples"):
        told("--on", path, "--task", "text-retrieval", "--intervals-by", "topic")
    found = told("--on", path, "--task", "text-retrieval", "--intervals")
    under = "eval/letters/text-retrieval/"
    assert found[f"{under}tfidf_hit@1"] == 1
    assert found[f"{under}documents"] == 21
    assert found[f"{under}tfidf_mrr/low"] == 1
    assert 0 <= found[f"{under}order_accuracy"] <= 1
    assert 0 < found[f"{under}ndcg@10"] < 1


def test_languages_and_order(tmp_path: Path, told: Any) -> None:
    rich = tmp_path / "rich"
    write_named(rich)
    found = told(
        "--on", rich, "--task", "languages", "captions=[names.en, names.de]", "--positives", "none"
    )
    under = "eval/rich/languages/"
    assert found[f"{under}languages"] == 2
    assert found[f"{under}t2i_mrv"] >= found[f"{under}t2i_mrv_std"] ** 2 >= 0
    each = [found[f"{under}names.{language}/i2t_recall@10"] for language in ("en", "de")]
    assert found[f"{under}i2t_recall@10"] == pytest.approx(sum(each) / 2)
    same = told(
        "--on", rich, "--task", "languages", "captions=[names.en, names.en]", "--positives", "none"
    )
    assert same[f"{under}i2t_mrv"] == same[f"{under}t2i_mrv_std"] == 0
    order = told("--on", rich, "--task", "order", "captions=names.en", "against=names.de")
    assert 0 < order["eval/rich/order/order_accuracy"] < 1
    tied = told("--on", rich, "--task", "order", "captions=names.en", "against=names.en")
    assert tied["eval/rich/order/order_accuracy"] == 0


def write_named(folder: Path) -> None:
    import webdataset as wds

    write_rich(folder, 40, seed=3)
    (old,) = folder.glob("*.tar")
    png = next(s["png"] for s in wds.WebDataset(str(old), shardshuffle=False) if "png" in s)
    old.unlink()
    random = np.random.default_rng(0)
    with wds.TarWriter(str(folder / "named.tar")) as writer:
        for number in range(30):
            words = {lang: f"{lang} {random.integers(1000)}" for lang in ("en", "de")}
            sample = {"__key__": f"n{number:03d}", "png": png, "json": {"names": words}}
            writer.write(sample)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "knn", "label=concept"], "--on: knn needs a set"),
        (["--on", "val", "--task", "knn", "label=lang"], "has no 'lang'; it has colour, concept"),
        (["--on", "val", "--task", "probe", "label=concept", "tap=neck"], "no such module"),
        (["--on", "train", "--task", "probe", "label=concept"], "also the set that"),
        (["--on", "val", "--task", "zero-shot", "label=colour", "templates=a"], "has no {}"),
        (["--on", "val", "--task", "geometry", "--slice", "concept"], "no figure of single"),
        (["--on", "none.jsonl", "--task", "text-retrieval"], "none.jsonl: does not exist"),
        (["--on", "val", "--task", "order", "against=wrong"], "wrong"),
        (["--on", "train", "--task", "table"], "keeps nothing of single samples"),
        (["--on", "val", "label=concept"], "label: retrieval has no such key"),
    ],
)
def test_what_is_missing_is_named(told: Any, arguments: list[str], words: str) -> None:
    with pytest.raises(GigabatchError) as caught:
        told(*arguments)
    assert words in str(caught.value)


def test_a_run_that_may_only_be_read_is_measured_all_the_same(
    run: Path, tmp_path: Path, shards: Path, gigabatch: Any
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "eval")
    (copy / "eval").write_text("in the way")
    done = gigabatch("eval", copy, "--on", shards / "val")
    assert done.returncode == 0, done.stderr
    assert "what was found is not kept" in done.stderr
    assert done.stdout.startswith("step 40, val: recall@10 ")
