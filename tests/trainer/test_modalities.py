"""Training and evaluation of modalities other than image and text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import losses, run_ranks, write_modalities

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.preflight.data import examine_data
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import dump_config, load_config, parse_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.init_from import load_init_weights, pin_init_from
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers import Towers, build_towers

SMALL = """
data: {{root: {root}, workers: 0, image: {{size: 16}}, text: {{vocab_size: 300, length: 10}}}}
batch: {{global_size: 40, micro_size: 20}}
train: {{steps: 10}}
optimizer: {{lr: 2.0e-2}}
checkpoint: {{every_steps: 0}}
monitor: {{every_steps: 1}}
eval: {{sets: [val]}}
run: {{dir: {runs}}}
cluster: {{launcher: inline, workers: 1, threads: 1}}
towers:
  width: 16
  image: {{widths: [8, 8], depths: [1, 1], dropout: 0.1}}
  text: {{width: 16, dropout: 0.1}}
"""
NUMBERS = "towers.more.numbers={kind: vector, size: 6, width: 16, layers: 1, dropout: 0.1}"
PATH = (
    "towers.more.path={kind: sequence, size: 2, length: 4, fields: [path], width: 16, heads: 2, "
    "pool: attention, dropout: 0.1}"
)
TONE = (
    "towers.more.tone={kind: audio, rate: 8000, seconds: 0.1, mels: 16, widths: [8, 8], "
    "depths: [1, 1], dropout: 0.1}"
)
PROBE = Path(__file__).with_name("modalities_probe.py")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config_in(folder: Path, **options: Any) -> Path:
    """Write sets `train` and `val` of 80 and 40 samples, and a config file for them."""
    for name, count, seed in (("train", 80, 1), ("val", 40, 2)):
        write_modalities(folder / name, count, seed, **options)
    path = folder / "c.yaml"
    path.write_text(SMALL.format(root=folder, runs=folder / "runs"))
    return path


def new_run(path: Path, settings: Sequence[str], name: str = "r") -> RunFolder:
    config = load_config(path, [*settings, f"run.name={name}"])
    run = create_run(config, name)
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    return run


def last_evaluation(run: RunFolder) -> dict[str, float]:
    (path,) = (run.path / "eval").glob("step-*.json")
    return dict(json.loads(path.read_text()))


@pytest.mark.slow
def test_vectors_and_text_train_without_images(tmp_path: Path) -> None:
    """The run learns, is evaluated in both directions, and resumes exactly."""
    path = config_in(tmp_path, images=False)
    settings = [NUMBERS, "objective={taps: [numbers, text], positives: concept}", "train.steps=30"]
    full, resumed = new_run(path, settings), new_run(path, settings, "resumed")
    assert run_training(full)
    calls = iter(range(100))
    assert not run_training(resumed, lambda: next(calls) == 9)
    assert run_training(resumed)
    assert losses(resumed.path) == losses(full.path)
    assert losses(full.path)[30] < losses(full.path)[1] - 1
    metrics = last_evaluation(full)
    assert metrics["eval/val/text2numbers_recall@10"] > 0.9
    assert metrics["eval/val/numbers2text_mrr"] > 0.5
    _, towers = load_newest_towers(full)
    assert set(towers.encoders) == {"numbers", "text"}
    init = [f"train.init_from={full.path}", "train.init_parts=[numbers]"]
    assert_numbers_are_initialized(towers, load_config(path, [*settings, *init]))


@pytest.mark.slow
def test_teacher_vectors_change_the_loss(tmp_path: Path) -> None:
    """The six numbers are similar within a concept, so the teacher masks false negatives."""
    path, loss = config_in(tmp_path), {}
    for name, teacher in (
        ("baseline", "null"),
        ("teacher", "{member: npy, size: 6}"),
        ("lenient", "{member: npy, size: 6, threshold: 1.0}"),
    ):
        run = new_run(path, [f"objective.teacher={teacher}", "train.steps=2", "eval.sets=[]"], name)
        assert run_training(run)
        loss[name] = losses(run.path)
    assert loss["teacher"][1] < loss["baseline"][1] - 0.01
    assert loss["lenient"] == loss["baseline"]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{fields: [embedding], size: 6}", "its json has no embedding"),
        ("{member: npy, size: 7}", "contains 6 numbers, not 7"),
        ("{member: gaze.npy, size: 7}", r"no sample has a \.gaze\.npy member"),
    ],
)
def test_missing_teacher_vectors_raise_before_workers_start(
    tmp_path: Path, teacher: str, message: str
) -> None:
    config = load_config(config_in(tmp_path), [f"objective.teacher={teacher}"])
    with pytest.raises(GigabatchError, match=message):
        examine_data(config)


def test_teacher_with_label_smoothing_raises(tmp_path: Path) -> None:
    settings = ["objective={teacher: {size: 6}, label_smoothing: 0.1}"]
    with pytest.raises(GigabatchError, match="some of which `teacher` leaves out"):
        load_config(config_in(tmp_path), settings)


def assert_numbers_are_initialized(towers: Towers, config: Config) -> None:
    """Check that a new run loads the weights of the tower `numbers`, and no others."""
    config = pin_init_from(config)
    fresh = build_towers(config, 300)
    load_init_weights(fresh, config, World(0, 1, torch.device("cpu"), None))
    for name, value in fresh.state_dict().items():
        same = torch.equal(value, towers.state_dict()[name])
        assert same or ".numbers." not in name
        assert not same or ".numbers." in name or "norm" in name


@pytest.mark.slow
def test_symile_trains_three_modalities_without_text(tmp_path: Path) -> None:
    run = new_run(
        config_in(tmp_path),
        [
            NUMBERS,
            PATH,
            TONE,
            "objective={name: symile, taps: [numbers, path, tone], init_logit_scale: 50.0}",
        ],
    )
    assert run_training(run)
    loss = losses(run.path)
    assert loss[10] < loss[1]
    _, towers = load_newest_towers(run)
    assert set(towers.encoders) == {"numbers", "path", "tone"}
    metrics = run.evaluation(max(loss))
    directions = ("path+tone2numbers", "numbers+tone2path", "numbers+path2tone")
    recalls = [metrics[f"eval/val/{direction}_recall@10"] for direction in directions]
    assert metrics["eval/val/mean_recall@10"] == pytest.approx(sum(recalls) / 3)


@pytest.mark.slow
def test_missing_modalities_raise_or_are_masked(tmp_path: Path) -> None:
    path = config_in(tmp_path, incomplete=True)
    pair = [NUMBERS, "objective.taps=[numbers, image]", "eval.sets=[]", "train.steps=3"]
    with pytest.raises(GigabatchError, match=r"\(12 of 80 samples lack one\).*data.missing=mask"):
        run_training(new_run(path, pair))
    for name, objective in {
        "pairs": "objective={name: infonce, taps: [numbers, image]}",
        "siglip": "objective={name: siglip, taps: [numbers, image]}",
    }.items():
        run = new_run(path, [*pair, objective, "data.missing=mask"], name)
        assert run_training(run)
        assert all(map(math.isfinite, losses(run.path).values()))


@pytest.mark.slow
def test_exact_step_of_three_modalities_with_missing_rows(tmp_path: Path) -> None:
    path = config_in(tmp_path, incomplete=True)
    common = ["data.missing=mask", "batch.micro_size=8", "eval.sets=[]", NUMBERS, PATH, TONE]
    symile = "objective={name: symile, taps: [text, path, tone, numbers], init_logit_scale: 50.0}"
    terms = (
        "objective={name: sum, terms: [{taps: [image, tone]}, {taps: [numbers, path@1]}, "
        "{name: late_interaction, taps: [path.tokens, text.tokens]}]}"
    )
    tokenizer = tmp_path / "tokenizer.json"
    config = load_config(path, [*common, symile])
    make_tokenizer(config, open_train(config)).save(str(tokenizer))
    for objective, zero in ((symile, 0), (terms, 3)):
        report = run_ranks(
            PROBE, 2, path, tokenizer, *common, objective, f"train.zero_stage={zero}"
        )
        assert report["gap"] < 1e-5, report
        assert report["rows"] > 0


def test_invalid_extra_towers_raise(tmp_path: Path) -> None:
    path = config_in(tmp_path)
    taps = "objective.taps=[numbers, text]"
    for settings, message in (
        ([NUMBERS], "towers.more.numbers: the objective does not read it"),
        ([taps], "there is no tower 'numbers'; the towers are image, text"),
        (["towers.more.sample={kind: vector, size: 2}"], "'sample' is a reserved name"),
        (["towers.more.Loud={kind: vector, size: 2}"], "towers.more.Loud"),
        (["towers.more.numbers={kind: vector}", taps], "towers.more.numbers.size: is missing"),
        ([NUMBERS, "towers.more.numbers.siez=4", taps], "towers.more.numbers.siez"),
        ([NUMBERS, "towers.more.numbers.std=[1, 2]", taps], "std: 2 numbers for a vector of size"),
        ([NUMBERS, taps, "objective.positives=numbers"], "rename the tower"),
        ([PATH, "towers.more.path.heads=3", "objective.taps=[path, text]"], "multiple of heads"),
        (
            ["objective.name=supcon", "eval.every_steps=1", "checkpoint.best=eval/val/x"],
            "reads only image",
        ),
    ):
        with pytest.raises(GigabatchError) as error:
            load_config(path, settings)
        assert message in str(error.value)
    config = load_config(path, [NUMBERS, PATH, "objective={name: symile, taps: [numbers, path]}"])
    assert parse_config(dump_config(config), "again") == config


@pytest.mark.slow
def test_eval_measures_any_two_modalities(tmp_path: Path, gigabatch: Any) -> None:
    objective = "objective={name: sum, terms: [{taps: [numbers, tone]}, {taps: [text, path]}]}"
    run = new_run(config_in(tmp_path), [NUMBERS, TONE, PATH, objective, "train.steps=4"])
    assert run_training(run)
    tags = [tag for tag in run.evaluation(4) if tag.endswith("_mrr")]
    directions = {tag.split("/")[2].removesuffix("_mrr") for tag in tags}
    assert directions == {"numbers2tone", "tone2numbers", "text2path", "path2text"}

    def evaluate(*arguments: str) -> Any:
        return gigabatch("eval", run.path, "--on", "val", *arguments)

    done = evaluate("--task", "retrieval", "between=[tone, path]", "positives=concept", "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert {"eval/val/tone2path_recall@1", "eval/val/path2tone_mrr"} < set(metrics)
    done = evaluate("--task", "knn", "label=concept", "modality=path", "k=5", "--json")
    assert done.returncode == 0, done.stderr
    failed = evaluate("--task", "zero-shot", "label=concept", "modality=image")
    assert failed.returncode != 0
    assert "the run has no tower 'image'" in failed.stderr
