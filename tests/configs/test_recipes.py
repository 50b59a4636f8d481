"""Recipes: short training with tiny towers and shards, and a comment for every key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset as wds
import yaml
from PIL import Image
from support import losses

import gigabatch.configs
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import create_run
from gigabatch.trainer.towers import build_towers

FOLDER = Path(gigabatch.configs.__file__).parent
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SMALL = [
    "train.steps=6", "batch.global_size=16", "batch.micro_size=8", "towers.width=16",
    "data.workers=0", "data.image.size=16", "data.text.length=12", "data.text.tokenizer=bpe",
    "data.text.vocab_size=300", "train.precision=fp32", "schedule.warmup_steps=2",
    "optimizer.lr=2.0e-3", "monitor.every_steps=1", "eval.every_steps=3",
    "cluster.launcher=inline", "cluster.workers=1", "cluster.threads=1",
]  # fmt: skip
"""Settings that shrink any recipe; tiny towers need fp32 and a larger learning rate."""
SIZES = "hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2"
VISION = "{model_type: %s, patch_size: 8, image_size: 16, " + SIZES + "}"
CLIP_VISION, SIGLIP_VISION = VISION % "clip_vision_model", VISION % "siglip_vision_model"
VIT, BERT = VISION % "vit", f"{{model_type: bert, vocab_size: 300, {SIZES}}}"
CLIP_TEXT = f"{{model_type: clip_text_model, vocab_size: 300, eos_token_id: 1, {SIZES}}}"
SIGLIP_TEXT = CLIP_TEXT.replace("clip", "siglip")
CLIP = [f"towers.image.config={CLIP_VISION}", f"towers.text.config={CLIP_TEXT}"]
NO_NAMES = ["towers.image.name=null", "towers.text.name=null"]
SHRUNK: dict[str, list[str]] = {
    "clip.yaml": CLIP,
    "siglip.yaml": [f"towers.image.config={SIGLIP_VISION}", f"towers.text.config={SIGLIP_TEXT}"],
    "lit.yaml": [*NO_NAMES, f"towers.image.config={VIT}", f"towers.text.config={BERT}"],
    "three-modalities.yaml": [
        *NO_NAMES, *CLIP, "towers.more.sound.rate=4000", "towers.more.sound.seconds=0.1",
        "towers.more.sound.mels=16", "towers.more.sound.widths=[8]", "towers.more.sound.depths=[1]",
    ],
    "multilingual.yaml": [
        *NO_NAMES, f"towers.image.config={CLIP_VISION}", f"towers.text.config={BERT}",
    ],
    "noisy.yaml": [*CLIP, "train.steps=10"],  # past the first split of its samples
    "long-tail.yaml": CLIP,
    "text-pairs.yaml": [
        "towers.text.name=null", f"towers.text.config={BERT}", "towers.more.query.length=8",
    ],
    "colbert.yaml": [
        "towers.text.name=null", f"towers.text.config={BERT}", "towers.more.query.length=8",
    ],
    "small-gpu.yaml": [*CLIP, "objective.size=8", "train.steps=12"],
}  # fmt: skip
"""Additional settings of a recipe; pretrained models become tiny ones of the same type."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with every member that a recipe reads: `train` of 48 samples, `val` of 24."""
    root = tmp_path_factory.mktemp("pairs")
    for name, count in (("train", 48), ("val", 24)):
        (root / name).mkdir()
        with wds.TarWriter(str(root / name / f"{name}-000.tar"), mtime=0) as writer:
            for number in range(count):
                writer.write({"__key__": f"p{number:03d}", **sample(number)})
    return root


def sample(number: int) -> dict[str, bytes | str]:
    color = np.random.default_rng(number % 12).integers(0, 256, 3)
    png, wav = BytesIO(), BytesIO()
    Image.fromarray((color * np.ones((16, 16, 1))).astype(np.uint8)).save(png, "png")
    tone = np.sin(np.arange(400) * (0.1 + 0.1 * (number % 12)))
    soundfile.write(wav, tone, 4000, format="WAV")
    names = {lang: f"{lang} thing {number % 12}" for lang in ("de", "en", "fr")}
    passages = [f"passage of {number % 12}", f"no {number % 12}", f"not {number % 12}"]
    fields = {"names": names, "query": f"question {number % 12}", "passage": passages[0]}
    fields["passages"] = passages[: 1 + number % 3]
    return {
        "png": png.getvalue(), "wav": wav.getvalue(), "txt": names["en"], "json": json.dumps(fields)
    }  # fmt: skip


def test_every_recipe_is_tested() -> None:
    assert {*SHRUNK, "quickstart.yaml", "emoji.yaml"} == set(RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SHRUNK)
def test_recipe_reduces_its_loss(recipe: str, pairs: Path, tmp_path: Path) -> None:
    overrides = [f"data.root={pairs}", f"run.dir={tmp_path}", *SMALL, *SHRUNK[recipe]]
    config = load_config(FOLDER / recipe, overrides)
    run = create_run(config, "run")
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    assert run_training(run)
    values = losses(run.path)
    assert len(values) == config.train.steps
    assert all(map(math.isfinite, values.values()))
    first = 2 if config.objective.name == "queue" else 1  # the queue is empty in the first step
    assert min(values[step] for step in values if step > first) < values[first]
    assert run.steps_evaluated() == sorted({*range(3, config.train.steps, 3), config.train.steps})
    assert any(name.endswith("recall@10") for name in run.evaluation(config.train.steps))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SHRUNK)
def test_full_size_towers_match_modalities(recipe: str) -> None:
    """Build towers with random weights; pretrained towers would need a download."""
    config = load_config(FOLDER / recipe)
    model_config = getattr(config.towers.text, "config", None)
    if model_config is not None:
        with torch.device("meta"):
            towers = build_towers(config, model_config["vocab_size"])
        assert set(towers.encoders) == set(config.modalities)


@pytest.mark.parametrize("recipe", SHRUNK)
def test_every_key_has_a_comment(recipe: str) -> None:
    text = (FOLDER / recipe).read_text()
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    for key, number in keys(yaml.compose(text)):
        previous_line = lines[number - 1].lstrip() if number else ""
        assert " # " in lines[number] or previous_line.startswith("# "), (
            f"{recipe}: {key}: {lines[number]}"
        )


def keys(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield each key that needs a comment, with its line number.

    Keys of nested blocks need separate comments; keys inside braces share that of the outer key.
    """
    assert isinstance(node, yaml.MappingNode)
    for name, value in node.value:
        items = [value] if isinstance(value, yaml.MappingNode) else value.value
        nested = [n for n in items if isinstance(n, yaml.MappingNode) and not n.flow_style]
        for inner in nested:
            yield from keys(inner, f"{prefix}{name.value}.")
        if not nested or isinstance(value, yaml.SequenceNode):
            yield f"{prefix}{name.value}", name.start_mark.line
