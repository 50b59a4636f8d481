from __future__ import annotations

from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.evaluation.comparisons import choose_output, comparisons, joint_score

THREE = (
    "towers.more={a: {kind: vector, size: 2}, b: {kind: vector, size: 2}, c: {kind: vector, "
    "size: 2}}"
)


@pytest.mark.parametrize(
    ("objective", "output"),
    [
        ("{name: infonce}", "head"),
        ("{name: late_interaction}", "tokens"),
        ("{name: late_interaction, taps: [text.tokens, image.tokens]}", "tokens"),
        ("{name: late_interaction, taps: [image, text.tokens]}", "head"),
        ("{name: sum, terms: [{name: late_interaction}, {name: infonce}]}", "head"),
        (
            "{name: sum, terms: [{name: late_interaction}, "
            "{name: supcon, taps: [image, image@1]}]}",
            "tokens",
        ),
    ],
)
def test_output_follows_the_objective(tiny: Path, objective: str, output: str) -> None:
    config = load_config(tiny, [f"objective={objective}"])
    assert choose_output(config, ["image", "text"]) == output
    assert choose_output(config, ["image", "text"], "head") == "head"


def test_tokens_that_the_objective_does_not_read_raise(tiny: Path) -> None:
    with pytest.raises(GigabatchError, match="tap=tokens: the run has no tokens of image, text"):
        choose_output(load_config(tiny), ["image", "text"], "tokens")


@pytest.mark.parametrize(
    ("objective", "groups", "score"),
    [
        ("{name: symile, taps: [a, b, c]}", [("a", "b", "c")], "product"),
        (
            "{name: sum, terms: [{name: infonce, taps: [a, b]}, {name: infonce, taps: [c, b]}]}",
            [("a", "b"), ("b", "c")],
            "sum",
        ),
        (
            "{name: sum, terms: [{name: symile, taps: [a, b]}, {name: infonce, taps: [c, b]}]}",
            [("a", "b"), ("b", "c")],
            "sum",
        ),
    ],
)
def test_comparisons_follow_the_objective(
    tiny: Path, objective: str, groups: list[tuple[str, ...]], score: str
) -> None:
    config = load_config(tiny, [THREE, f"objective={objective}"])
    assert comparisons(config) == groups
    assert joint_score(config, ["a", "b", "c"]) == score
