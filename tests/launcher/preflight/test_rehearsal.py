"""Mistakes that a rehearsal finds before the workers start, without leaving a run folder."""

from __future__ import annotations

import random
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from support import losses

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.start import prepare_run, reopen_run, resumed_config
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.folder import RunFolder


@pytest.fixture(scope="session")
def sets(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards, and evaluation sets that are broken in several ways."""
    root = tmp_path_factory.mktemp("sets")
    for name in ("train", "val"):
        shutil.copytree(shards / name, root / name)
    png, good = bytes(12), BytesIO()
    Image.new("RGB", (16, 16)).save(good, "png")
    for name, sample in {
        "torn": {"png": png, "txt": "alpha", "json": {"concept": 1}},
        "captionless": {"png": png, "json": {"concept": 1}},
        "textless": {"png": good.getvalue(), "json": {"concept": 1, "title": "alpha"}},
        "fieldless": {"png": png, "txt": "alpha", "json": {"title": "alpha"}},
    }.items():
        (root / name).mkdir()
        with wds.TarWriter(str(root / name / "0.tar"), mtime=0) as writer:
            for number in range(4):
                writer.write({"__key__": f"s{number}", **sample})
    return root


@pytest.fixture
def rehearsed(tiny: Path, sets: Path, shards: Path) -> Path:
    """The config of a small run on `sets`."""
    tiny.write_text(tiny.read_text().replace(str(shards), str(sets)))
    return tiny


def prepared(config: Path, *overrides: str) -> RunFolder:
    return prepare_run(load_config(config, overrides), "run")


def module(name: str, slot: str = "image", **args: object) -> str:
    return f"towers.{slot}={{kind: module, module: 'support_towers:{name}', args: {args}}}"


def extra(name: str, reads: str, **args: object) -> list[str]:
    tower = f"{{kind: module, module: 'support_towers:{name}', args: {args}, reads: {reads}}}"
    return [f"towers.more={{extra: {tower}}}", "objective.taps=[extra, text]"]


def objective(name: str) -> str:
    return f"objective={{name: module, module: 'support_objectives:{name}'}}"


VECTOR = "{kind: vector, fields: [concept], size: 1}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # What an encoder returns.
        ([module("Returns", what="narrow")],
         "towers.image: Returns.forward returned float32 [2, 3], but one vector per sample, floats "
         "[2, 4], is expected; the last size is the encoder's attribute `width`"),
        ([module("Returns", what="integers")], "returned int64 [2, 4]"),
        ([module("Returns", what="complex")], "returned complex64 [2, 4]"),
        ([module("Returns", what="one")], "returned float32 [1, 4]"),
        ([module("Returns", what="map")], "returned float32 [2, 4, 1, 1]"),
        ([module("Returns", what="dict")], "returned dict"),
        ([module("Returns", what="none")], "returned NoneType"),
        ([module("Returns", what="detached")],
         "returned vectors without a gradient, so none of its 2 weights would be trained"),
        ([module("Returns", what="no_grad")], "towers.image: Returns.forward returned vectors"),
        ([module("NarrowTokens"), "objective={name: late_interaction}"],
         "NarrowTokens.forward returned float32 [2, 3, 4], but tokens, floats [2, T, 5]"),
        ([module("Crashing")],
         "towers.image: calling Crashing.forward(float32 [2, 3, 16, 16]) failed: RuntimeError: "
         "this tower cannot see"),
        ([module("Pixels", width=-1)], "towers.image.module: Pixels(width=-1) failed"),
        ([module("Exiting")], "towers.image.module: Exiting() failed: ZeroDivisionError"),
        (extra("Returns", VECTOR, what="vector narrow"),
         "towers.more.extra: Returns.forward returned float32 [2, 3]"),
        (extra("Returns", VECTOR, what="vector tokens"), "towers.more.extra: Returns.forward"),
        # Fields and sets.
        (["objective.positives=prodct"], "json field 'prodct'"),
        (["objective.positives=prodct"], "The json fields are: concept, colour."),
        (["data.captions={member: json, field: captoin}"],
         "The json fields are: concept, colour."),
        (["eval.sets=[val, textless]", "data.captions={member: json, field: colour}"],
         "The json fields are: concept, title."),
        (["eval.sets=[val, captionless]"], "captionless"),
        (["eval.sets=[val, torn]"], "eval.sets: torn: "),
        (["eval.sets=[val, fieldless]"], "The json fields are: title."),
        (["eval.every_steps=2", "checkpoint.best=eval/val/i2t_recall@7"],
         "checkpoint.best: there is no metric eval/val/i2t_recall@7"),
        (["data.train=[train, torn]"], "data.train: "),
        (["data.stages=['support_towers:failing_stage']"],
         "data.train: reading 2 samples failed: KeyError: 'depth'"),
        # Objectives.
        ([objective("Unreduced")], "objective: Unreduced.forward must return a Loss"),
        ([objective("Detached")], "objective: Detached.forward must return a Loss"),
        ([objective("Failing")],
         "objective: Failing.forward failed on 2 samples: KeyError: 'queue'. Fix it"),
    ],
)  # fmt: skip
def test_mistake_is_found_and_leaves_no_run_folder(
    overrides: list[str], message: str, rehearsed: Path, tmp_path: Path
) -> None:
    with pytest.raises(GigabatchError) as error:
        prepared(rehearsed, *overrides)
    assert message in str(error.value)
    assert not [*(tmp_path / "runs").glob("*")]


def test_rehearsal_does_not_change_the_run(rehearsed: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    values = []
    for flag in ("true", "false"):
        run = prepared(rehearsed, f"train.rehearse={flag}", "train.steps=3", "data.workers=0")
        if flag == "true":
            after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
            assert torch.equal(before[0], after[0])
            assert before[1:] == after[1:]
        assert run_training(run)
        values.append((losses(run.path), run.evaluation(3)))
    assert values[0] == values[1]


def test_unset_rehearsal_lets_a_tower_pass_that_runs_elsewhere_only(rehearsed: Path) -> None:
    assert prepared(rehearsed, module("Crashing"), "train.rehearse=false").path.exists()


def test_every_bad_sample_of_a_pair_is_replaced(rehearsed: Path, sets: Path) -> None:
    """Two bad samples among many are no reason to refuse a run."""
    mixed = sets / "mixed"
    shutil.copytree(sets / "val", mixed)
    with wds.TarWriter(str(mixed / "000.tar"), mtime=0) as writer:
        for number in range(2):
            fields = {"concept": number, "colour": "x"}
            writer.write({"__key__": f"bad{number}", "png": b"x", "txt": "a", "json": fields})
    assert prepared(rehearsed, "eval.sets=[mixed]").config().eval.sets == ("mixed",)


def test_refusal_after_the_folder_was_made_removes_it(
    rehearsed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while the first files are written."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "write_data_digest", full)
    with pytest.raises(OSError, match="No space"):
        prepared(rehearsed)
    assert not [*(tmp_path / "runs").glob("*")]


def test_resume_rehearses_new_evaluation_sets_only(rehearsed: Path) -> None:
    run = prepared(rehearsed)
    same = resumed_config(run, [], [])
    reopen_run(run, same, [])
    broken = resumed_config(run, ["eval.sets=[val, torn]"], [])
    with pytest.raises(GigabatchError, match=r"eval\.sets: torn: "):
        reopen_run(run, broken, [])
    assert run.config().eval.sets == ("val",)
    reopen_run(run, resumed_config(run, ["eval.sets=[val, torn]", "train.rehearse=false"], []), [])
    reopen_run(run, resumed_config(run, ["eval.sets=[train]", "train.rehearse=true"], []), [])
