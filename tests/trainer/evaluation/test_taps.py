from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.evaluation.taps import comparison_reader, tap_reader
from gigabatch.trainer.towers import build_towers

INPUTS = {
    "image": (torch.rand(3, 3, 16, 16),),
    "text": (torch.tensor([[5, 6, 1, 0], [7, 1, 0, 0], [8, 9, 2, 1]]).repeat(1, 3),),
}


@torch.no_grad()
def test_tap_reader_returns_the_output_of_the_module(tiny: Path) -> None:
    config = load_config(tiny, ["towers.image.head={layers: 2, hidden: 8}"])
    towers = build_towers(config, 300).eval()
    tokens = INPUTS["text"][0]
    inputs = {"image": INPUTS["image"], "text": (tokens, tokens > 0)}
    encoded = {name: towers.encoders[name](*inputs[name]) for name in inputs}
    outputs = tap_reader(towers, "encoder")(inputs)
    assert torch.equal(outputs["image"], encoded["image"])
    assert torch.equal(outputs["text"], encoded["text"])
    assert torch.equal(tap_reader(towers, "head")(inputs)["text"], towers(inputs)["text"])
    hidden = tap_reader(towers, "head.0")({"image": inputs["image"]})["image"]
    assert torch.equal(hidden, towers.heads["image"][0](encoded["image"]))
    states = towers.encoders["text"].embedding(tokens)
    real = (tokens > 0).unsqueeze(-1)
    mean = (states * real).sum(1) / real.sum(1)
    embedding = tap_reader(towers, "encoder.embedding")({"text": inputs["text"]})["text"]
    assert torch.allclose(embedding, mean)
    maps = towers.encoders["image"].stem(inputs["image"][0]).mean((2, 3))
    stem = tap_reader(towers, "encoder.stem")({"image": inputs["image"]})["image"]
    assert torch.allclose(stem, maps)


@torch.no_grad()
def test_projection_tap_reads_the_second_head(tiny: Path) -> None:
    views = "{name: barlow, taps: [image.projection, image.projection@1]}"
    settings = [f"objective={{name: sum, terms: [{{}}, {views}]}}"]
    towers = build_towers(load_config(tiny, settings), 300).eval()
    image = {"image": INPUTS["image"]}
    output = tap_reader(towers, "projection")(image)["image"]
    second = towers.heads["image-projection"]
    assert torch.equal(output, second(towers.encoders["image"](*INPUTS["image"])))
    assert torch.equal(tap_reader(towers, "projection.0")(image)["image"], output)
    with pytest.raises(GigabatchError, match=r"Choose head, encoder, or one of"):
        tap_reader(towers, "projection")({"text": INPUTS["text"]})


def test_unknown_tap_raises_with_existing_names(tiny: Path) -> None:
    towers = build_towers(load_config(tiny), 300).eval()
    for tap in ("encoder.layers.9", "neck", ""):
        with pytest.raises(
            GigabatchError, match=r"no such module\. Choose head, encoder, or one of"
        ):
            tap_reader(towers, tap)({"image": INPUTS["image"]})


def test_comparison_reader_returns_the_token_vectors_of_the_towers(tiny: Path) -> None:
    config = load_config(tiny, ["objective={name: late_interaction}"])
    towers = build_towers(config, 300).eval()
    text = torch.tensor([[5, 6, 1, 0], [7, 1, 0, 0]]).repeat(1, 3)
    inputs = {"image": (torch.rand(2, 3, 16, 16),), "text": (text, text > 0)}
    with torch.no_grad():
        outputs = comparison_reader(towers, "tokens")(inputs)
        expected = towers(inputs, None, ["image.tokens", "text.tokens"])
    assert outputs.keys() == {"image", "text"}
    for name, vectors in outputs.items():
        assert torch.equal(vectors, expected[f"{name}.tokens"])
