"""Matryoshka: a run trained at several widths, measured at one of them."""

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
from gigabatch.trainer.evaluation.embedding import Reading, embed_set
from gigabatch.trainer.inference import load_newest_towers
from gigabatch.trainer.inputs import make_tokenizer, open_eval, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import create_run

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.mark.slow
def test_a_run_is_measured_at_each_of_its_widths(
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

    def measured(*settings: str) -> tuple[int, dict[str, Any], str]:
        arguments = ("eval", run.path, *settings, "--on", "val", "--json")
        code, out, err = outcome(monkeypatch, capsys, *arguments)
        return code, json.loads(out or "{}"), err

    _, towers = load_newest_towers(run)
    found = embed_set(
        towers, open_eval(config, "val"), config, run, ALONE, Reading(columns=["concept"])
    )
    assert found is not None
    image, text = (F.normalize(rows[:, :4], dim=1) for rows in found.taps.values())
    ids = found.columns["concept"]
    nearest = (image.double() @ text.double().T).topk(10).indices
    by_hand = (ids[nearest] == ids[:, None]).any(1).double().mean()
    _, short, _ = measured("width=4")
    assert short["eval/val/i2t_recall@10"] == pytest.approx(float(by_hand))
    assert measured("width=16")[1] == measured()[1] != short
    code, _, err = measured("width=17")
    assert code == 2
    assert "the run's vectors have 16 coordinates" in err
    code, _, err = measured("--task", "knn", "label=concept", "tap=encoder", "width=4")
    assert code == 2
    assert "leave out tap=" in err


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["objective.widths=[4, 8]"], "the last must be towers.width=16, not 8"),
        (["objective.widths=[8, 4, 16]"], "widths must rise"),
        (["objective={widths: [4, 16], taps: [image.encoder, text]}"], "is read before the head"),
        (["objective={name: queue, widths: [4, 16]}"], "not a key of queue"),
    ],
)
def test_widths_that_do_not_fit_are_refused(tiny: Path, settings: list[str], why: str) -> None:
    with pytest.raises(GigabatchError) as refused:
        load_config(tiny, settings)
    assert why in str(refused.value)
