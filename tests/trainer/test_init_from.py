"""A new run that begins with another's weights: what is taken, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, losses
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.start import resumed_config
from gigabatch.trainer.checkpoints.format import write_checkpoint
from gigabatch.trainer.config import CheckpointSettings, Config
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.init_from import load_init_weights, pin_init_from
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers import build_towers

ALONE = World(0, 1, torch.device("cpu"), None)
VOCAB = 300


def config_of(shards: Path, folder: Path, *overrides: str) -> Config:
    settings = [f"run.dir={folder}", "data.workers=0", *overrides]
    return parse_config(TINY.format(root=shards), "tiny", settings)


@pytest.fixture
def source(shards: Path, tmp_path: Path) -> RunFolder:
    """A run of seed 5 with checkpoints at steps 1 and 2, whose weights differ."""
    config = config_of(shards, tmp_path, "run.name=source", "run.seed=5")
    run = create_run(config, "run")
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    state = build_towers(config, VOCAB).state_dict()
    for step in (1, 2):
        files = {"towers": {name: t + step for name, t in state.items()}}
        write_checkpoint(run, 1, step, files, {"step": step}, CheckpointSettings())
    return run


def begun(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The towers' weights without and with `train.init_from`."""
    before = build_towers(config, VOCAB).state_dict()
    towers = build_towers(config, VOCAB)
    load_init_weights(towers, pin_init_from(config), ALONE)
    return before, towers.state_dict()


@pytest.mark.parametrize("where", ["source", "checkpoints/step-00000002"])
@pytest.mark.parametrize(
    ("parts", "taken"),
    [
        ("[image, text]", ("encoders.", "heads.")),
        ("image", ("encoders.image.", "heads.image.")),
        ("[text]", ("encoders.text.", "heads.text.")),
        ("image.encoder", ("encoders.image.",)),
    ],
)
def test_the_parts_asked_for_are_taken_and_no_others(
    where: str, parts: str, taken: tuple[str, ...], source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    path = source.path if where == "source" else source.path / where
    config = config_of(shards, tmp_path, f"train.init_from={path}", f"train.init_parts={parts}")
    before, after = begun(config)
    there = build_towers(source.config(), VOCAB).state_dict()
    for name, tensor in after.items():
        expected = there[name] + 2 if name.startswith(taken) else before[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    ("wanted", "factor"), [(None, 3), ("train.init_weights=ema", 3), ("train.init_weights=last", 1)]
)
def test_averaged_weights_are_taken_where_there_are_any(
    wanted: str | None, factor: int, source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    config = config_of(shards, tmp_path, "train.init_from=source", *([wanted] if wanted else []))
    state = build_towers(source.config(), VOCAB).state_dict()
    files = {"towers": state, "ema": {name: 3 * tensor for name, tensor in state.items()}}
    write_checkpoint(source, 1, 3, files, {"step": 3}, CheckpointSettings())
    after = begun(config)[1]
    for name, tensor in state.items():
        assert torch.equal(after[name], factor * tensor), name


def test_an_average_that_is_not_there_is_refused(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    settings = ["train.init_from=source", "train.init_weights=ema"]
    with pytest.raises(GigabatchError, match=r"no averaged weights.*train.init_weights=last"):
        begun(config_of(shards, tmp_path, *settings))


def test_a_run_is_found_by_name_and_pinned_to_its_newest_checkpoint(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    config = pin_init_from(config_of(shards, tmp_path, "train.init_from=source"))
    assert config.train.init_from == source.checkpoints / "step-00000002"
    assert pin_init_from(config) == config


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["towers.width=8"],
            r"2 of another shape: heads.image.0.weight \(\[16, 128\] there, \[8,",
        ),
        (["towers.image.depths=[2, 1]"], r"missing there: encoders\.image\.\S+"),
        (["towers.image.depths=[0, 1]"], r"unknown here: encoders\.image\.\S+"),
    ],
)
def test_towers_that_do_not_fit_are_named_and_nothing_is_loaded(
    overrides: list[str], says: str, source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    config = pin_init_from(config_of(shards, tmp_path, "train.init_from=source", *overrides))
    towers = build_towers(config, VOCAB)
    before = {name: t.clone() for name, t in towers.state_dict().items()}
    with pytest.raises(GigabatchError, match=says):
        load_init_weights(towers, config, ALONE)
    assert all(torch.equal(t, before[name]) for name, t in towers.state_dict().items())


def test_an_encoder_goes_under_a_head_of_another_width(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    begun(
        config_of(
            shards, tmp_path, "train.init_from=source", "towers.width=8",
            "train.init_parts=[image.encoder, text.encoder]",
        )
    )  # fmt: skip


def test_damage_is_found_before_the_run_is_made_and_when_it_begins(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    folder = source.checkpoints / "step-00000002"
    config = config_of(shards, tmp_path, f"train.init_from={folder}")
    pinned = pin_init_from(config)
    path = folder / "towers.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    for refused in (lambda: pin_init_from(config), lambda: begun(pinned)):
        with pytest.raises(GigabatchError, match=r"train.init_from: .*does not match its checksum"):
            refused()
    # Of a run, the newest sound one.
    newest = pin_init_from(config_of(shards, tmp_path, "train.init_from=source")).train.init_from
    assert newest == source.checkpoints / "step-00000001"


@pytest.mark.parametrize("path", ["/nowhere", "empty"])
def test_what_is_no_run_or_has_no_checkpoint_is_refused(
    path: str, shards: Path, tmp_path: Path
) -> None:
    create_run(config_of(shards, tmp_path, "run.name=empty"), "run")
    with pytest.raises(GigabatchError, match=r"train.init_from: .*(not a run|no checkpoint yet)"):
        pin_init_from(config_of(shards, tmp_path, f"train.init_from={path}"))


def test_a_text_tower_brings_its_tokeniser(source: RunFolder, shards: Path, tmp_path: Path) -> None:
    data = open_train(config_of(shards, tmp_path))
    other = config_of(shards, tmp_path, "data.text.vocab_size=310")
    make_tokenizer(other, data).save(str(source.tokenizer))

    def tokenizer(*overrides: str) -> str:
        config = pin_init_from(config_of(shards, tmp_path, *overrides))
        return make_tokenizer(config, data).to_str()

    theirs, own = tokenizer("train.init_from=source"), tokenizer()
    assert theirs != own
    assert tokenizer("train.init_from=source", "train.init_parts=image") == own
    with pytest.raises(GigabatchError, match=r"makes 12 tokens .* data.text.length is 9"):
        tokenizer("train.init_from=source", "data.text.length=9")
    source.tokenizer.unlink()
    with pytest.raises(GigabatchError, match="a text tower needs its tokeniser"):
        tokenizer("train.init_from=source")


@pytest.mark.slow
def test_a_run_that_began_so_goes_on_without_the_other(
    source: RunFolder, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    settings = ["train.steps=4", "eval.sets=[]", f"train.init_from={source.path}", "run.name=a"]
    first = gigabatch("train", tiny, *settings)
    assert first.returncode == 0, first.stdout + first.stderr
    pinned = source.checkpoints / "step-00000002"
    assert f"weights of image, text taken from {pinned}" in first.stdout
    run = RunFolder(tmp_path / "runs" / "a")
    assert run.config().train.init_from == pinned
    with pytest.raises(GigabatchError, match=r"train.init_from: .* -> .*elsewhere"):
        resumed_config(run, ["train.init_from=elsewhere"], [])
    shutil.rmtree(source.path)
    done = gigabatch("resume", run.path, "train.steps=6", "--allow", "train.steps")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "taken from" not in done.stdout
    assert sorted(losses(run.path)) == list(range(1, 7))


def test_a_second_head_is_taken_where_both_have_it_and_starts_anew_where_not(
    source: RunFolder, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    views = "{name: barlow, taps: [image.projection, image.projection@1]}"
    two = f"objective={{name: sum, terms: [{{}}, {views}]}}"
    fresh = config_of(shards, tmp_path, two, f"train.init_from={source.path}")
    with caplog.at_level("INFO", logger="gigabatch"):
        before, after = begun(fresh)
    assert "has no head image-projection: it starts anew" in caplog.text
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "projection" in name} == before.keys() - changed

    files = {"towers": {name: tensor + 1 for name, tensor in before.items()}}
    write_checkpoint(source, 1, 3, files, {"step": 3}, CheckpointSettings())
    for config in (fresh, config_of(shards, tmp_path, f"train.init_from={source.path}")):
        before, after = begun(config)
        assert all(torch.equal(after[name], files["towers"][name]) for name in before)
