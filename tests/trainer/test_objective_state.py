"""Tables of samples, the split of clean and noisy samples, and the momentum tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import losses

from gigabatch.data.order.mixture import SAMPLE_BITS
from gigabatch.trainer.checkpoints.format import checkpoint_at
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.distributed import World
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.objectives.gmm import clean_probability, fit_split
from gigabatch.trainer.objectives.tables import SampleTable
from gigabatch.trainer.run.create import create_run

SINGLE = World(0, 1, torch.device("cpu"), None)


def test_table_reads_and_writes_rows_by_sample_number() -> None:
    table = SampleTable([3, 2], [0.5, -torch.inf], SINGLE)
    numbers = torch.tensor([2, 1 << SAMPLE_BITS, 0])
    assert table.read(numbers).tolist() == [[0.5, -torch.inf]] * 3
    table.write(numbers, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert table.gather()[:, 0].tolist() == [5.0, 0.5, 1.0, 3.0, 0.5]
    assert table.read(torch.tensor([1 << SAMPLE_BITS | 1, 2])).tolist() == [
        [0.5, -torch.inf], [1.0, 2.0],
    ]  # fmt: skip


def test_table_keeps_the_last_row_of_a_repeated_sample() -> None:
    table = SampleTable([4], [0.0], SINGLE)
    numbers = torch.tensor([1, 3, 1, 3, 1])
    table.write(numbers, torch.arange(5.0).unsqueeze(1))
    assert table.gather().flatten().tolist() == [0.0, 4.0, 0.0, 3.0]


def test_table_is_sharded_over_any_number_of_ranks() -> None:
    rows = torch.arange(22.0).view(11, 2)
    for size in (1, 2, 3, 5, 13):
        sharded = torch.full_like(rows, torch.nan)
        for rank in range(size):
            world = World(rank, size, torch.device("cpu"), None)
            table = SampleTable([4, 7], [0.0, 0.0], world)
            shard_size = len(table.shard)
            table.load(rows)
            assert len(table.shard) == shard_size
            sharded[rank::size] = table.shard
        assert torch.equal(sharded, rows)


def test_split_recovers_two_gaussians() -> None:
    g = torch.Generator().manual_seed(0)
    clean, noisy = torch.randn(6000, generator=g) * 0.3 + 1, torch.randn(4000, generator=g) + 5
    split = fit_split(torch.cat([clean, noisy]), SINGLE)
    torch.testing.assert_close(
        split, torch.tensor([[1.0, 0.09, 0.6], [5.0, 1.0, 0.4]]).double(), rtol=0.05, atol=0.01
    )
    assert (clean_probability(clean, split) > 0.5).float().mean() > 0.99
    assert (clean_probability(noisy, split) < 0.5).float().mean() > 0.99


def test_loss_far_below_the_clean_mean_is_clean() -> None:
    """Its density is higher under the wider Gaussian of noisy samples."""
    split = torch.tensor([[1.0, 0.01, 0.5], [5.0, 4.0, 0.5]])
    low, far, high = clean_probability(torch.tensor([1.0, -9.0, 99.0]), split).tolist()
    assert low == far > 0.99
    assert high < 0.01


@pytest.mark.parametrize("values", [[], [2.0], [3.0, 3.0, 3.0]])
def test_equal_losses_give_no_split(values: list[float]) -> None:
    split = fit_split(torch.tensor(values), SINGLE)
    assert split.isfinite().all()
    assert not split[:, 1].any()


def test_momentum_tower_averages_the_weights_over_steps(tiny: Path) -> None:
    settings = [
        "objective={name: queue, size: 40, momentum: 0.9}", "train.steps=3", "eval.sets=[]",
        "checkpoint.every_steps=1", "checkpoint.keep=9",
    ]  # fmt: skip
    config = load_config(tiny, settings)
    run = create_run(config, "run")
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    threads = torch.get_num_threads()
    try:
        assert run_training(run)
    finally:
        torch.set_num_threads(threads)
    assert len(losses(run.path)) == 3
    for step in (2, 3):
        weights = checkpoint_at(run, step).tensors("towers")
        before, after = (checkpoint_at(run, s).tensors("objective") for s in (step - 1, step))
        for name, weight in weights.items():
            expected = before[f"teacher.{name}"].lerp(weight, 1 - 0.9)
            torch.testing.assert_close(after[f"teacher.{name}"], expected)
