from __future__ import annotations

from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.tasks.history import best_and_last
from gigabatch.trainer.run.folder import RunFolder


def test_best_and_last_compares_steps_evaluated_while_training(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(GigabatchError, match="no evaluation"):
        best_and_last(run)
    for step, recall, rank in ((2, 0.5, 9.0), (4, 0.9, 3.0), (6, 0.9, 2.0), (8, 0.4, 7.0)):
        metrics = {"eval/val/t2i_recall@1": recall, "eval/val/t2i_median_rank": rank}
        run.write_evaluation(step, metrics)
    run.write_measurement("val-knn", 8, {"eval/val/t2i_recall@1": 1.0})
    history = best_and_last(run)
    assert history["eval/val/t2i_recall@1/best"] == 0.9
    assert history["eval/val/t2i_recall@1/best_step"] == 4  # the first of equal values
    assert history["eval/val/t2i_recall@1/last"] == 0.4
    assert history["eval/val/t2i_median_rank/best_step"] == 6
    assert history["eval/val/t2i_median_rank/last_step"] == 8
    run.remove_evaluations_after(6)
    assert run.steps_evaluated() == [2, 4, 6]
    assert [p.name for p in (tmp_path / "eval").glob("val-*")] == []
