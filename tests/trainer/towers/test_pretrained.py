"""Pretrained towers bring their pixels, tokenizer and mask; what disagrees is refused or named."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import losses
from support_models import CLIP_PIXELS, VIT_PIXELS, save_models, save_pixels

from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.tokenizer import TextSettings, encode, named_tokenizer, with_length
from gigabatch.launcher.start import prepare_run, resumed_config
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.folder import RunFolder
from gigabatch.trainer.towers.pretrained import adopt_pretrained, processor_settings

# Importing transformers takes seconds, so a single worker runs these tests.
pytestmark = pytest.mark.xdist_group("transformers")
UNSET = """
data: {{root: {root}, workers: 0, text: {{vocab_size: 300}}}}
run: {{dir: {runs}}}
batch: {{global_size: 8, micro_size: 8}}
towers: {{width: 8, image: {{widths: [4], depths: [0]}}, text: {{width: 8}}}}
train: {{steps: 1}}
eval: {{sets: [val]}}
cluster: {{launcher: inline, workers: 1, threads: 1}}
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of saved models."""
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


@pytest.fixture
def unset(shards: Path, tmp_path: Path) -> Path:
    """A config that sets neither the size of images nor a tokenizer."""
    path = tmp_path / "unset.yaml"
    path.write_text(UNSET.format(root=shards, runs=tmp_path / "runs"))
    return path


def prepared(config: Path, models: Path, overrides: list[str]) -> RunFolder:
    settings = [override.replace("MODELS", str(models)) for override in overrides]
    return prepare_run(load_config(config, settings), "run")


def named(modality: str, model: str, more: str = "") -> str:
    return f"towers.{modality}={{kind: huggingface, name: MODELS/{model}{more}}}"


SMALL = "data.image.size=16"
SHORT = "data.text.length=12"
AGREEING = {
    "clip": [named("image", "clip"), named("text", "clip"), SHORT],
    "siglip": [named("image", "siglip"), named("text", "siglip")],
    "vit and bert": [named("image", "vit"), named("text", "bert"), SHORT],
    "roberta": [SMALL, named("text", "roberta"), SHORT],
    "t5": [SMALL, named("text", "t5")],
    "resnet": [named("image", "resnet", ", freeze: true")],
}


@pytest.mark.parametrize("label", AGREEING)
def test_agreeing_parts_train(label: str, unset: Path, models: Path) -> None:
    run = prepared(unset, models, AGREEING[label])
    assert run_training(run)
    assert len(losses(run.path)) == 1


def test_pixels_and_tokenizer_are_adopted_and_pinned(
    unset: Path, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    copy = shutil.copytree(models / "clip", tmp_path / "clip")
    overrides = [named("image", "clip"), named("text", "clip"), SHORT]
    run = prepared(unset, tmp_path, overrides)
    image, text = run.config().data.image, run.config().data.text
    assert (image.size, image.resize, image.crop) == (16, "shortest", "huggingface")
    assert (image.interpolation, image.draft) == ("bicubic", False)
    assert (image.mean, image.std) == ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    assert text.tokenizer == str(copy)
    assert f"data.image: adopted from {copy}: draft=False, crop=huggingface, size=16" in caplog.text
    assert f"data.text: adopted from {copy}: tokenizer={copy}" in caplog.text
    # The model's files change later; the run does not.
    save_pixels(copy, VIT_PIXELS)
    assert resumed_config(run, [], []).data.image == image


def test_siglip_attends_to_padding_of_its_full_length(unset: Path, models: Path) -> None:
    run = prepared(unset, models, [named("image", "siglip"), named("text", "siglip")])
    config = run.config()
    assert config.towers.text.attend_padding is True  # type: ignore[attr-defined]
    assert config.data.text.length == 10
    assert config.data.image.resize == "squash"


def test_mask_reaches_the_model_unless_it_attends_to_padding(models: Path) -> None:
    from transformers import SiglipTextModel

    from gigabatch.trainer.towers.huggingface import HuggingFaceEncoder

    model = SiglipTextModel.from_pretrained(models / "siglip").eval()
    tokens = torch.tensor([[4, 5, 1, 1], [4, 5, 6, 1]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    bare = model(input_ids=tokens).pooler_output
    masked, attending = (
        HuggingFaceEncoder(model, "text", 16, "own", attend)(tokens, mask)
        for attend in (False, True)
    )
    torch.testing.assert_close(attending, bare)
    assert not torch.allclose(masked[0], bare[0], atol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (CLIP_PIXELS, {"size": 16, "resize": "shortest", "interpolation": "bicubic"}),
        (VIT_PIXELS, {"size": 16, "resize": "squash", "interpolation": "bilinear", "mean": 0.5}),
        ({"size": 64, "resample": 2, "do_normalize": False}, {"size": 64, "resize": "squash",
                                                              "mean": 0.0, "std": 1.0}),
        # EfficientNet's rescaling to [-1, 1] before the normalization.
        ({"size": {"height": 8, "width": 8}, "resample": 0, "rescale_factor": 1 / 127.5,
          "rescale_offset": True, "image_mean": [0.0], "image_std": [1.0]},
         {"mean": 0.5, "std": 0.5, "interpolation": "nearest"}),
        ({"do_resize": False, "image_mean": [0.1], "image_std": [0.2]}, {"mean": 0.1, "std": 0.2}),
    ],
)  # fmt: skip
def test_processor_is_converted_to_keys(
    processor: dict[str, Any], expected: dict[str, Any]
) -> None:
    values = processor_settings(processor, "m")
    actual = {name: values[name] for name in expected}
    assert actual == pytest.approx(expected) if "mean" in expected else actual == expected
    assert (values["draft"], values["crop"]) == (False, "huggingface")


SIZE = {"height": 8, "width": 8}


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"size": SIZE, "resample": 2, "image_std": [0.5]}, "names no mean and standard deviation"),
        ({"size": SIZE, "resample": 2, "image_mean": [0.1, 0.2], "image_std": [1.0]},
         r"image_mean: \[0.1, 0.2\]"),
        ({"size": {"longest_edge": 384}, "resample": 2, "image_mean": [0.1], "image_std": [1.0]},
         r"size \({'longest_edge': 384}\) is not adopted"),
        ({"size": [8, 8], "resample": 2, "image_mean": [0.1], "image_std": [1.0]},
         r"size \(\[8, 8\]\) is not adopted"),
        ({"size": {"shortest_edge": 8, "longest_edge": 13}, "resample": 2, "image_mean": [0.1],
          "image_std": [1.0]}, "limits the longer side to 13 pixels"),
        ({"do_resize": False, "image_mean": [0.1], "image_std": [0.2]}, "resizes no image"),
    ],
)  # fmt: skip
def test_part_of_a_processor_that_is_not_adopted_is_named(
    processor: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = processor_settings(processor, "m")
    assert re.search(message, caplog.text)
    assert ("mean" in values) == (processor.get("image_mean") == [0.1])
    assert ("size" in values) == ("resizes no" not in message and "not adopted" not in message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_factor": "x"}, "malformed value: could not convert"),
        ({"image_mean": "abc"}, "malformed value"),
        ({"size": {"shortest_edge": "a"}}, "malformed value: invalid literal"),
        ({"do_flip_channel_order": True}, "flips the channels to BGR"),
    ],
)
def test_processor_that_cannot_be_followed_raises(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GigabatchError, match=message):
        processor_settings({**CLIP_PIXELS, **changes}, "m")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([named("image", "clip"), "data.image={size: 16, mean: 0.5}"],
         "data.image.mean=0.5 is kept, but MODELS/clip was trained with [0.48, 0.46, 0.41]"),
        ([named("image", "vit"), "data.image.interpolation=lanczos"],
         "data.image.interpolation=lanczos is kept, but MODELS/vit was trained with bilinear"),
        ([named("image", "resnet", ", freeze: true")],
         "resizes to 20 pixels and crops 16"),
        ([SMALL, named("text", "bert"), SHORT, "data.text.tokenizer=MODELS/t5"],
         "data.text.tokenizer=MODELS/t5 is kept, but 3 of its 13 tokens have other ids"),
        ([SMALL, named("text", "bert"), "data.text={tokenizer: bpe, length: 12}"],
         "data.text.tokenizer=bpe is kept, but its ids mean other tokens"),
        ([SMALL, named("text", "siglip"), "data.text.length=6"],
         "was trained on texts padded to 10 tokens, but these have 6"),
    ],
)  # fmt: skip
def test_key_that_is_set_to_another_value_is_kept_and_named(
    overrides: list[str], message: str, unset: Path, models: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = [override.replace("MODELS", str(models)) for override in overrides]
    adopt_pretrained(load_config(unset, settings))
    assert message.replace("MODELS", str(models)) in caplog.text


BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def configured(modality: str, **keys: Any) -> str:
    values = {**BERT, "intermediate_size": 16, "vocab_size": 400} | keys
    return f"towers.{modality}={{kind: huggingface, config: {values}}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # End of text: CLIP pools there.
        ([SMALL, configured("text", model_type="clip_text_model")],
         "towers.text: CLIPTextModel pools at the token eos_token_id=49407, but texts of the run's "
         "tokenizer end with '[END]' (1; the largest id is 299)"),
        ([SMALL, configured("text", model_type="clip_text_model", eos_token_id=2)],
         "pools at the largest token id of a text (eos_token_id=2"),
        ([SMALL, named("text", "clip"), SHORT, "data.text.tokenizer=MODELS/bert"],
         "Set data.text.tokenizer=MODELS/clip, the model's own."),
        ([SMALL, configured("text", model_type="clipseg_text_model", eos_token_id=7)],
         "Set towers.text.config.eos_token_id=1."),
        # Padding.
        ([SMALL, configured("text", model_type="roberta", pad_token_id=1)],
         "takes token 1 (pad_token_id) for padding, but the run's tokenizer pads with 0. "
         "Set towers.text.config.pad_token_id=0."),
        ([SMALL, configured("text", pad_token_id=5)], "Set towers.text.config.pad_token_id=0."),
        ([SMALL, named("text", "roberta"), SHORT, "data.text.tokenizer=MODELS/bert"],
         "Set data.text.tokenizer=MODELS/roberta"),
        # Positions.
        ([SMALL, named("text", "roberta"), "data.text.length=13"],
         "RobertaModel has 14 positions (max_position_embeddings), of which 2 are reserved for "
         "padding, but data.text.length is 13. Set data.text.length=12."),
        ([SMALL, named("text", "bert"), "data.text.length=17"], "lower data.text.length"),
        ([SMALL, configured("text", model_type="camembert", pad_token_id=0,
                            max_position_embeddings=32)], "Set data.text.length=31."),
        # Vocabulary and tokenizer.
        ([SMALL, configured("text", vocab_size=99)], "the model's vocab_size is 99"),
        ([SMALL, named("text", "bare")], "towers.text.name: MODELS/bare brings no tokenizer"),
        ([SMALL, named("text", "bert"), SHORT, "towers.more={query: {kind: text, field: colour, "
          "tower: {kind: huggingface, name: MODELS/roberta}}}",
          "objective.taps=[query, text]"],
         "towers.text.name=MODELS/bert and towers.more.query.tower.name=MODELS/roberta have "
         "different tokenizers"),
        # Images.
        ([named("image", "vit"), "data.image.size=32"], "the model's image_size is 16"),
        ([named("image", "wide")], "its images have 16 x 32 pixels"),
        ([named("image", "torn")], "cannot read preprocessor_config.json: JSONDecodeError"),
        # Libraries.
        ([SMALL, configured("image", model_type="vit", image_size=16, patch_size=8,
                            intermediate_size=-1)],
         "towers.image.config: cannot build the model 'vit': building"),
        ([SMALL, configured("text", model_type="gpt_neo")], "towers.text.config: cannot build"),
        ([SMALL, named("text", "missing")],
         "towers.text.name: cannot build the model 'MODELS/missing': loading its config failed"),
        ([SMALL, configured("text", model_type="no_such")],
         "towers.text.config: cannot build the model 'no_such': loading its config failed"),
        ([named("image", "resnet")], "is a batch norm with running statistics"),
    ],
)  # fmt: skip
def test_disagreeing_parts_are_refused_before_a_run_folder_exists(
    overrides: list[str], message: str, unset: Path, models: Path, tmp_path: Path
) -> None:
    for name, source in (("bare", "bert"), ("wide", "vit"), ("torn", "vit")):
        if any(f"MODELS/{name}" in override for override in overrides):
            shutil.copytree(models / source, tmp_path / name)
            overrides = [o.replace(f"MODELS/{name}", str(tmp_path / name)) for o in overrides]
            message = message.replace(f"MODELS/{name}", str(tmp_path / name))
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    if (tmp_path / "wide").exists():
        save_pixels(tmp_path / "wide", VIT_PIXELS | {"size": {"height": 16, "width": 32}})
    if (tmp_path / "torn").exists():
        (tmp_path / "torn/preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(GigabatchError) as error:
        prepared(unset, models, overrides)
    assert message.replace("MODELS", str(models)) in str(error.value)
    assert "\n" not in str(error.value)
    assert not [*(tmp_path / "runs").glob("*")]


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]},
         12),
        ({"model_type": "regnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
          "groups_width": 8}, 16),
        ({"model_type": "mobilenet_v2", "depth_multiplier": 0.25}, 1280),
    ],
)  # fmt: skip
def test_convolutional_tower_reads_its_width(
    keys: dict[str, Any], width: int, unset: Path, models: Path
) -> None:
    from gigabatch.trainer.towers import build_towers

    tower = f"towers.image={{kind: huggingface, config: {keys}, freeze: true}}"
    towers = build_towers(load_config(unset, ["data.image.size=32", tower]), 300)
    encoder = towers.encoders["image"]
    assert encoder.width == width
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, width)


def test_encoder_of_an_encoder_decoder_is_used(unset: Path, models: Path) -> None:
    from gigabatch.trainer.towers import build_towers

    bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
    for keys in ({"model_type": "bart", "max_position_embeddings": 40, **bart},
                 {"model_type": "mt5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1,
                  "num_heads": 2}):  # fmt: skip
        tower = f"towers.text={{kind: huggingface, config: {keys | {'vocab_size': 300}}}}"
        encoder = build_towers(load_config(unset, [SMALL, tower]), 300).encoders["text"]
        tokens = torch.tensor([[4, 5, 1, 0]])
        assert encoder(tokens, tokens > 0).shape == (1, 16)
        assert not any("decoder" in name for name, _ in encoder.named_parameters())


def test_broken_dependency_of_the_library_is_one_message(
    unset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "transformers.models.poolformer.modeling_poolformer"
    monkeypatch.setitem(sys.modules, module, None)  # what an import of it then raises is real
    keys = {"model_type": "poolformer"}
    with pytest.raises(GigabatchError) as error:
        prepared(unset, tmp_path, [SMALL, f"towers.image={{kind: huggingface, config: {keys}}}"])
    assert "towers.image.config: cannot build the model 'poolformer'" in str(error.value)
    assert "ModuleNotFoundError" in str(error.value)
    assert not [*(tmp_path / "runs").glob("*")]


def test_tokenizer_pads_on_its_own_side(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "siglip", tmp_path / "left")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    tokenizer = named_tokenizer(TextSettings(tokenizer=str(folder), length=5))
    for length in (5, 4):
        _, mask = encode(with_length(tokenizer, length), ["small cat"])
        assert mask[0].tolist() == [False] * (length - 3) + [True] * 3
