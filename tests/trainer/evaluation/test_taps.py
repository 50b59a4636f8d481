from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.evaluation.taps import tapped
from gigabatch.trainer.towers import build_towers

INPUTS = {
    "image": (torch.rand(3, 3, 16, 16),),
    "text": (torch.tensor([[5, 6, 1, 0], [7, 1, 0, 0], [8, 9, 2, 1]]).repeat(1, 3),),
}


@torch.no_grad()
def test_each_tap_is_what_the_tower_computes_there(tiny: Path) -> None:
    config = load_config(tiny, ["towers.image.head={layers: 2, hidden: 8}"])
    towers = build_towers(config, 300).eval()
    tokens = INPUTS["text"][0]
    inputs = {"image": INPUTS["image"], "text": (tokens, tokens > 0)}
    encoded = {name: towers.encoders[name](*inputs[name]) for name in inputs}
    found = tapped(towers, "encoder")(inputs)
    assert torch.equal(found["image"], encoded["image"])
    assert torch.equal(found["text"], encoded["text"])
    assert torch.equal(tapped(towers, "head")(inputs)["text"], towers(inputs)["text"])
    hidden = tapped(towers, "head.0")({"image": inputs["image"]})["image"]
    assert torch.equal(hidden, towers.heads["image"][0](encoded["image"]))
    states = towers.encoders["text"].embedding(tokens)
    real = (tokens > 0).unsqueeze(-1)
    mean = (states * real).sum(1) / real.sum(1)
    assert torch.allclose(
        tapped(towers, "encoder.embedding")({"text": inputs["text"]})["text"], mean
    )
    maps = towers.encoders["image"].stem(inputs["image"][0]).mean((2, 3))
    assert torch.allclose(tapped(towers, "encoder.stem")({"image": inputs["image"]})["image"], maps)


@torch.no_grad()
def test_a_second_head_is_a_tap_where_there_is_one(tiny: Path) -> None:
    views = "{name: barlow, taps: [image.projection, image.projection@1]}"
    settings = [f"objective={{name: sum, terms: [{{}}, {views}]}}"]
    towers = build_towers(load_config(tiny, settings), 300).eval()
    image = {"image": INPUTS["image"]}
    found = tapped(towers, "projection")(image)["image"]
    second = towers.heads["image-projection"]
    assert torch.equal(found, second(towers.encoders["image"](*INPUTS["image"])))
    assert torch.equal(tapped(towers, "projection.0")(image)["image"], found)
    with pytest.raises(GigabatchError, match=r"Take head, encoder, or one of"):
        tapped(towers, "projection")({"text": INPUTS["text"]})


def test_a_tap_that_is_not_there_is_refused_with_those_that_are(tiny: Path) -> None:
    towers = build_towers(load_config(tiny), 300).eval()
    for tap in ("encoder.layers.9", "neck", ""):
        with pytest.raises(GigabatchError, match=r"no such module\. Take head, encoder, or one of"):
            tapped(towers, tap)({"image": INPUTS["image"]})
