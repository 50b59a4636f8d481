"""Building towers: every kind, heads, checks, pretrained models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.load import parse_config
from gigabatch.trainer.towers import Towers, build_towers

# Importing transformers takes seconds, so a single worker runs these tests.
pytestmark = pytest.mark.xdist_group("transformers")

BASE = """
data: {image: {size: 16}, text: {length: 8}}
towers: {width: 12, image: {widths: [8, 8], depths: [1, 1]}, text: {width: 16}}
"""
VIT = (
    "{model_type: vit, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 16, image_size: 16, patch_size: 8}"
)
BERT = (
    "{model_type: bert, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 16, vocab_size: 100}"
)

SIGLIP_TEXT = BERT.replace("bert", "siglip_text_model")


def config(*overrides: str) -> Config:
    return parse_config(BASE, "towers", overrides)


def inputs(batch: int = 3) -> dict[str, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 100, (batch, 8), generator=generator)
    mask = torch.arange(8) < torch.tensor([3, 8, 5]).repeat(batch)[:batch].unsqueeze(1)
    return {"image": (torch.randn(batch, 3, 16, 16, generator=generator),), "text": (tokens, mask)}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["towers.image.head={layers: 3, hidden: 5}"],
        [f"towers.image={{kind: huggingface, config: {VIT}}}"],
        [f"towers.text={{kind: huggingface, config: {BERT}}}"],
        [f"towers.text={{kind: huggingface, config: {SIGLIP_TEXT}}}"],
        ["towers.image={kind: module, module: 'support_towers:Pixels', args: {width: 6}}"],
        ["towers.text={kind: module, module: 'support_towers:Tokens'}"],
        ["train.precision=bf16"],
    ],
)
def test_towers_return_unit_float32_vectors_with_gradients(overrides: list[str]) -> None:
    towers = build_towers(config(*overrides), 100)
    outputs = towers(inputs(), 1)
    for vectors in outputs.values():
        assert vectors.dtype == torch.float32
        assert vectors.shape == (3, 12)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    (outputs["image"] * outputs["text"]).sum().backward()
    assert all(p.grad is not None for n, p in towers.named_parameters() if "pooler" not in n)


def test_initial_weights_depend_on_the_seed_only() -> None:
    first, second, other = (
        build_towers(config(f"run.seed={seed}"), 100).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["heads.image.0.weight"], other["heads.image.0.weight"])


def test_dropout_repeats_for_the_same_key_only() -> None:
    towers = build_towers(config("towers.image.dropout=0.5", "towers.text.dropout=0.5"), 100)
    first, second, other = towers(inputs(), 5), towers(inputs(), 5), towers(inputs(), 6)
    for tap in ("image", "text"):
        assert torch.equal(first[tap], second[tap])
        assert not torch.equal(first[tap], other[tap])


def test_embedding_does_not_depend_on_its_micro_batch() -> None:
    towers = build_towers(config(), 100).eval()
    three = towers(inputs(3))
    one = towers({name: tuple(t[:1] for t in args) for name, args in inputs(3).items()})
    for tap, vectors in three.items():
        torch.testing.assert_close(vectors[:1], one[tap], rtol=1e-5, atol=1e-6)


def test_padding_does_not_change_a_text_embedding() -> None:
    towers = build_towers(config(), 100).eval()
    tokens, mask = inputs()["text"]
    changed = torch.where(mask, tokens, 7)
    before = towers({"text": (tokens, mask)})["text"]
    torch.testing.assert_close(before, towers({"text": (changed, mask)})["text"])


@pytest.mark.parametrize(
    "image",
    ["", f"towers.image={{kind: huggingface, config: {VIT}, checkpoint_activations: true}}"],
)
def test_activation_checkpointing_keeps_gradients(image: str) -> None:
    on = [image] if image else ["towers.image.checkpoint_activations=true"]
    off = [image.replace("true", "false")] if image else []
    grads = []
    for overrides in (off, on):
        towers = build_towers(config(*overrides), 100)
        towers(inputs(), 3)["image"].square().sum().backward()
        vectors = towers(inputs(), 3)["image"]
        (vectors * torch.arange(12)).sum().backward()
        grads.append({n: p.grad for n, p in towers.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-6)


def test_frozen_tower_trains_its_head_only() -> None:
    towers = build_towers(config("towers.image.freeze=true", "towers.image.dropout=0.9"), 100)
    trained = {name for name, p in towers.named_parameters() if p.requires_grad}
    assert "heads.image.0.weight" in trained
    assert not any(name.startswith("encoders.image") for name in trained)
    assert not towers.train().encoders["image"].training
    assert towers.encoders["text"].training


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ("support_towers:Normed", "batch norm"),
        ("support_towers:Scaled", "temperature is 0-dimensional"),
        ("support_towers:Missing", "cannot be imported"),
        ("no_such_package:Thing", "cannot be imported"),
        ("torch.nn:Identity", "integer attribute `width`"),
        ("torch.nn:Linear", "failed"),
    ],
)
def test_unsuitable_module_raises_with_its_key(tower: str, message: str) -> None:
    with pytest.raises(GigabatchError, match=message) as error:
        build_towers(config(f"towers.image={{kind: module, module: '{tower}'}}"), 100)
    assert "towers.image" in str(error.value)


def test_frozen_batch_norm_is_accepted() -> None:
    tower = "towers.image={kind: module, module: 'support_towers:Normed', freeze: true}"
    towers = build_towers(config(tower), 100).train()
    before = towers.encoders["image"].norm.running_mean.clone()
    towers(inputs(), 1)
    assert torch.equal(before, towers.encoders["image"].norm.running_mean)


def test_checkpointing_a_module_without_blocks_raises() -> None:
    tower = "{kind: module, module: 'support_towers:Pixels', checkpoint_activations: true}"
    with pytest.raises(GigabatchError, match="checkpoint_activations"):
        build_towers(config(f"towers.image={tower}"), 100)


def test_pretrained_clip_is_loaded_half_per_tower(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    half = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    half |= {"num_attention_heads": 2, "projection_dim": 8}
    saved = CLIPModel(
        CLIPConfig(
            text_config={**half, "vocab_size": 100, "max_position_embeddings": 8},
            vision_config={**half, "image_size": 16, "patch_size": 8},
        )
    )
    saved.save_pretrained(tmp_path / "clip")
    name = f"name: {tmp_path / 'clip'}"
    towers = build_towers(
        config(
            f"towers.image={{kind: huggingface, {name}}}",
            f"towers.text={{kind: huggingface, {name}}}",
        ),
        100,
    )
    assert_loaded(towers, "image", saved.vision_model)
    assert_loaded(towers, "text", saved.text_model)
    towers(inputs(), 1)


def assert_loaded(towers: Towers, name: str, saved: torch.nn.Module) -> None:
    loaded = dict(towers.encoders[name].named_parameters())
    for path, weight in saved.named_parameters():
        match = [p for n, p in loaded.items() if n.endswith(path)]
        assert len(match) == 1, path
        assert torch.equal(match[0], weight)


def test_pretrained_text_model_is_loaded_from_a_folder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    saved = BertModel(
        BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            vocab_size=100,
        )
    )  # fmt: skip
    saved.save_pretrained(tmp_path / "bert")
    towers = build_towers(
        config(f"towers.text={{kind: huggingface, name: {tmp_path / 'bert'}}}"), 100
    )
    assert_loaded(towers, "text", saved)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"towers.image={{kind: huggingface, config: {VIT}}}", "data.image.size=32"],
         "towers.image: the model's image_size is 16, but data.image.size is 32"),
        ([f"towers.image={{kind: huggingface, config: {VIT}}}", "data.image.channels=1"],
         "towers.image: the model's num_channels is 3, but data.image.channels is 1"),
        ([f"towers.text={{kind: huggingface, config: {BERT.replace('100', '99')}}}"],
         "towers.text: the model's vocab_size is 99, but the tokenizer has 100"),
        ([f"towers.text={{kind: huggingface, config: {BERT}}}", "data.text.length=600"],
         "towers.text: the model's max_position_embeddings is 512, but data.text.length is 600"),
    ],
)  # fmt: skip
def test_model_that_does_not_fit_the_data_raises(overrides: list[str], message: str) -> None:
    with pytest.raises(GigabatchError, match=message):
        build_towers(config(*overrides), 100)


def test_missing_pretrained_model_raises_with_its_name() -> None:
    with pytest.raises(
        GigabatchError, match=r"towers\.text\.name: cannot build the model 'no/such'"
    ):
        build_towers(config("towers.text={kind: huggingface, name: no/such}"), 100)


@pytest.mark.parametrize("overrides", [
    [],
    [f"towers.image={{kind: huggingface, config: {VIT}}}",
     "towers.text={kind: huggingface, config: {model_type: bert, hidden_size: 8, "
     "num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8, vocab_size: 400}}"],
])  # fmt: skip
def test_taps_return_tokens_and_encoder_outputs(overrides: list[str]) -> None:
    late = "objective={name: late_interaction}"
    towers = build_towers(config(late, *overrides), 100).eval()
    default = towers(inputs())
    taps = ("image.tokens", "text.tokens", "image.encoder")
    outputs = towers(inputs(), None, taps)
    assert set(default) == {"image", "text"}
    assert set(outputs) == {"image", "text", *taps}
    for name, vectors in outputs.items():
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]))
        assert name in taps or torch.equal(vectors, default[name])
    (tokens, _), width = inputs()["text"], outputs["text"].shape[1]
    assert outputs["text.tokens"].shape == (*tokens.shape, width)
    assert outputs["image.tokens"].ndim == 3
    assert outputs["image.encoder"].shape[1] == towers.encoders["image"].width


def test_second_head_does_not_change_the_first() -> None:
    views = "{name: supcon, taps: [image.projection, image.projection@1]}"
    one_head = build_towers(config(), 100).eval()
    towers = build_towers(config(f"objective={{name: sum, terms: [{{}}, {views}]}}"), 100).eval()
    assert towers.heads.keys() - one_head.heads.keys() == {"image-projection"}
    before, outputs = one_head(inputs()), towers(inputs(), None, ("image.projection",))
    assert set(outputs) == {"image", "text", "image.projection"}
    assert all(torch.equal(outputs[name], before[name]) for name in before)
    assert outputs["image.projection"].shape == outputs["image"].shape
    assert not torch.allclose(outputs["image.projection"], outputs["image"], atol=0.1)


def test_tokens_tap_of_an_encoder_without_tokens_raises() -> None:
    tower = "towers.image={kind: module, module: 'support_towers:Pixels'}"
    with pytest.raises(GigabatchError, match="token_width"):
        build_towers(config(tower, "objective={name: late_interaction}"), 100)
