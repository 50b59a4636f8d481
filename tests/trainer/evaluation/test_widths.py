"""Evaluation at a smaller width of a run trained at several widths (Matryoshka)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import losses, outcome

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.evaluation.embedding import EmbedSpec, embed_set
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.inputs import make_tokenizer, open_eval, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import create_run

SINGLE = World(0, 1, torch.device("cpu"), None)


@pytest.mark.slow
def test_width_keeps_only_the_first_coordinates(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny, ["objective.widths=[4, 16]", "train.steps=8", "optimizer.lr=5e-3"])
    run = create_run(config, "run")
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    threads = torch.get_num_threads()
    try:
        assert run_training(run)
    finally:
        torch.set_num_threads(threads)
    assert losses(run.path)[8] < losses(run.path)[1]
    capsys.readouterr()

    def measure(*settings: str) -> tuple[int, dict[str, Any], str]:
        arguments = ("eval", run.path, *settings, "--on", "val", "--json")
        code, out, err = outcome(monkeypatch, capsys, *arguments)
        return code, json.loads(out or "{}"), err

    _, towers = load_newest_towers(run)
    index = open_eval(config, "val")
    embedded = embed_set(towers, index, config, run, SINGLE, EmbedSpec(columns=["concept"]))
    assert embedded is not None
    image, text = (F.normalize(rows[:, :4], dim=1) for rows in embedded.outputs.values())
    ids = embedded.columns["concept"]
    nearest = (image.double() @ text.double().T).topk(10).indices
    expected = (ids[nearest] == ids[:, None]).any(1).double().mean()
    _, short, _ = measure("width=4")
    assert short["eval/val/i2t_recall@10"] == pytest.approx(float(expected))
    assert measure("width=16")[1] == measure()[1] != short
    code, _, err = measure("width=17")
    assert code == 2
    assert "the run's vectors have 16 coordinates" in err
    code, _, err = measure("--task", "knn", "label=concept", "tap=encoder", "width=4")
    assert code == 2
    assert "Remove tap=encoder" in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.widths=[4, 8]"], "the last must be towers.width=16, not 8"),
        (["objective.widths=[8, 4, 16]"], "widths must increase"),
        (["objective={widths: [4, 16], taps: [image.encoder, text]}"], "is read before the head"),
        (["objective={name: queue, widths: [4, 16]}"], "not a key of queue"),
    ],
)
def test_invalid_widths_raise(tiny: Path, settings: list[str], message: str) -> None:
    with pytest.raises(GigabatchError) as error:
        load_config(tiny, settings)
    assert message in str(error.value)
