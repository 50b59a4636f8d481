"""`train.init_from`: a new run starts from another run's weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY, losses
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.start import prepare_run, resumed_config
from gigabatch.trainer.checkpoints.format import write_checkpoint
from gigabatch.trainer.config import CheckpointSettings, Config
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.init_from import (
    load_init_weights,
    pin_init_from,
    warn_of_other_pixels,
)
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers import build_towers

SINGLE = World(0, 1, torch.device("cpu"), None)
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


def initial_weights(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the towers' initial weights without and with `train.init_from`."""
    before = build_towers(config, VOCAB).state_dict()
    towers = build_towers(config, VOCAB)
    load_init_weights(towers, pin_init_from(config), SINGLE)
    return before, towers.state_dict()


@pytest.mark.parametrize("location", ["source", "checkpoints/step-00000002"])
@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        ("[image, text]", ("encoders.", "heads.")),
        ("image", ("encoders.image.", "heads.image.")),
        ("[text]", ("encoders.text.", "heads.text.")),
        ("image.encoder", ("encoders.image.",)),
    ],
)
def test_only_the_named_parts_are_loaded(
    location: str,
    parts: str,
    prefixes: tuple[str, ...],
    source: RunFolder,
    shards: Path,
    tmp_path: Path,
) -> None:
    path = source.path if location == "source" else source.path / location
    config = config_of(shards, tmp_path, f"train.init_from={path}", f"train.init_parts={parts}")
    before, after = initial_weights(config)
    source_weights = build_towers(source.config(), VOCAB).state_dict()
    for name, tensor in after.items():
        expected = source_weights[name] + 2 if name.startswith(prefixes) else before[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    ("override", "factor"),
    [([], 3), (["train.init_weights=ema"], 3), (["train.init_weights=last"], 1)],
)
def test_init_weights_selects_average_or_last_weights(
    override: list[str], factor: int, source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    config = config_of(shards, tmp_path, "train.init_from=source", *override)
    state = build_towers(source.config(), VOCAB).state_dict()
    files = {"towers": state, "ema": {name: 3 * tensor for name, tensor in state.items()}}
    write_checkpoint(source, 1, 3, files, {"step": 3}, CheckpointSettings())
    after = initial_weights(config)[1]
    for name, tensor in state.items():
        assert torch.equal(after[name], factor * tensor), name


def test_init_weights_ema_without_an_average_raises(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    settings = ["train.init_from=source", "train.init_weights=ema"]
    with pytest.raises(GigabatchError, match=r"no averaged weights.*train.init_weights=last"):
        initial_weights(config_of(shards, tmp_path, *settings))


def test_run_name_is_pinned_to_its_newest_checkpoint(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    config = pin_init_from(config_of(shards, tmp_path, "train.init_from=source"))
    assert config.train.init_from == source.checkpoints / "step-00000002"
    assert pin_init_from(config) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["towers.width=8"],
            r"2 of a different shape: heads.image.0.weight \(\[16, 128\] in the checkpoint, \[8,",
        ),
        (["towers.image.depths=[2, 1]"], r"missing in the checkpoint: encoders\.image\.\S+"),
        (["towers.image.depths=[0, 1]"], r"unknown to this run: encoders\.image\.\S+"),
    ],
)
def test_mismatched_weights_raise_and_load_nothing(
    overrides: list[str], message: str, source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    config = pin_init_from(config_of(shards, tmp_path, "train.init_from=source", *overrides))
    towers = build_towers(config, VOCAB)
    before = {name: t.clone() for name, t in towers.state_dict().items()}
    with pytest.raises(GigabatchError, match=message):
        load_init_weights(towers, config, SINGLE)
    assert all(torch.equal(t, before[name]) for name, t in towers.state_dict().items())


def test_encoder_is_loaded_if_the_head_has_another_width(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    initial_weights(
        config_of(
            shards, tmp_path, "train.init_from=source", "towers.width=8",
            "train.init_parts=[image.encoder, text.encoder]",
        )
    )  # fmt: skip


def test_damaged_checkpoint_raises_when_pinned_and_when_loaded(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    folder = source.checkpoints / "step-00000002"
    config = config_of(shards, tmp_path, f"train.init_from={folder}")
    pinned = pin_init_from(config)
    path = folder / "towers.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    for call in (lambda: pin_init_from(config), lambda: initial_weights(pinned)):
        with pytest.raises(GigabatchError, match=r"train.init_from: .*does not match its checksum"):
            call()
    # A run is pinned to its newest valid checkpoint.
    newest = pin_init_from(config_of(shards, tmp_path, "train.init_from=source")).train.init_from
    assert newest == source.checkpoints / "step-00000001"


@pytest.mark.parametrize("path", ["/missing", "empty"])
def test_path_without_a_checkpoint_raises(path: str, shards: Path, tmp_path: Path) -> None:
    create_run(config_of(shards, tmp_path, "run.name=empty"), "run")
    with pytest.raises(GigabatchError, match=r"train.init_from: .*(not a run|no checkpoint yet)"):
        pin_init_from(config_of(shards, tmp_path, f"train.init_from={path}"))


def test_tokenizer_is_loaded_with_the_text_tower(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    data = open_train(config_of(shards, tmp_path))
    other = config_of(shards, tmp_path, "data.text.vocab_size=310")
    make_tokenizer(other, data).save(str(source.tokenizer))

    def tokenizer(*overrides: str) -> str:
        config = pin_init_from(config_of(shards, tmp_path, *overrides))
        return make_tokenizer(config, data).to_str()

    source_tokenizer, new_tokenizer = tokenizer("train.init_from=source"), tokenizer()
    assert source_tokenizer != new_tokenizer
    assert tokenizer("train.init_from=source", "train.init_parts=image") == new_tokenizer
    with pytest.raises(GigabatchError, match=r"pads captions to 12 .* data.text.length is 9"):
        tokenizer("train.init_from=source", "data.text.length=9")
    source.tokenizer.unlink()
    with pytest.raises(GigabatchError, match="the text tower needs its tokenizer"):
        tokenizer("train.init_from=source")


@pytest.mark.slow
def test_resume_does_not_need_the_source_run(
    source: RunFolder, tiny: Path, tmp_path: Path, gigabatch: Any
) -> None:
    settings = ["train.steps=4", "eval.sets=[]", f"train.init_from={source.path}", "run.name=a"]
    first = gigabatch("train", tiny, *settings)
    assert first.returncode == 0, first.stdout + first.stderr
    pinned = source.checkpoints / "step-00000002"
    assert f"loaded the weights of image, text from {pinned}" in first.stdout
    run = RunFolder(tmp_path / "runs" / "a")
    assert run.config().train.init_from == pinned
    with pytest.raises(GigabatchError, match=r"train.init_from: .* -> .*elsewhere"):
        resumed_config(run, ["train.init_from=elsewhere"], [])
    shutil.rmtree(source.path)
    done = gigabatch("resume", run.path, "train.steps=6", "--allow", "train.steps")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loaded the weights" not in done.stdout
    assert sorted(losses(run.path)) == list(range(1, 7))


def test_second_head_is_loaded_if_the_source_has_one_else_random(
    source: RunFolder, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    views = "{name: barlow, taps: [image.projection, image.projection@1]}"
    two = f"objective={{name: sum, terms: [{{}}, {views}]}}"
    fresh = config_of(shards, tmp_path, two, f"train.init_from={source.path}")
    with caplog.at_level("INFO", logger="gigabatch"):
        before, after = initial_weights(fresh)
    assert "has no head image-projection: initializing it randomly" in caplog.text
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "projection" in name} == before.keys() - changed

    files = {"towers": {name: tensor + 1 for name, tensor in before.items()}}
    write_checkpoint(source, 1, 3, files, {"step": 3}, CheckpointSettings())
    for config in (fresh, config_of(shards, tmp_path, f"train.init_from={source.path}")):
        before, after = initial_weights(config)
        assert all(torch.equal(after[name], files["towers"][name]) for name in before)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image.mean=0.4", "(data.image.mean: 0.5 there, 0.4 here)"),
        ("data.image.interpolation=bilinear", "data.image.interpolation: bicubic there"),
        ("data.image.draft=false", ""),
        ("train.init_parts=[text]", ""),
    ],
)
def test_other_pixels_than_those_of_the_source_are_named(
    override: str, message: str, source: RunFolder, shards: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = config_of(shards, tmp_path, f"train.init_from={source.path}", override)
    warn_of_other_pixels(pin_init_from(config))
    assert message in caplog.text
    assert bool(message) == bool(caplog.records)


def test_weights_that_do_not_fit_leave_no_run_folder(
    source: RunFolder, shards: Path, tmp_path: Path
) -> None:
    settings = [f"train.init_from={source.path}", "towers.width=8", "run.name=b"]
    with pytest.raises(GigabatchError, match=r"train\.init_from: the weights .* do not fit"):
        prepare_run(config_of(shards, tmp_path, *settings), "b")
    assert not (tmp_path / "b").exists()
