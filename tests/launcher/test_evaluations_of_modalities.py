"""`gigabatch eval` on runs of vectors, sequences and text.

Covers joint retrieval, tokens, captions of sequences, and several ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config.load import load_config
from gigabatch.trainer.inputs import make_tokenizer, open_train
from gigabatch.trainer.loop import run_training
from gigabatch.trainer.run.create import create_run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("evaluations_of_modalities")]

CONFIG = """
data: {{root: {root}, workers: 0, text: {{vocab_size: 300, length: 12}}}}
batch: {{global_size: 40, micro_size: 20}}
optimizer: {{lr: 2.0e-2}}
checkpoint: {{every_steps: 0}}
eval: {{sets: [val]}}
run: {{dir: {root}/runs}}
cluster: {{launcher: inline, workers: 1, threads: 1}}
towers: {{width: 16, text: {{width: 16, dropout: 0}}}}
"""
BITS = [
    "towers.more={a: {kind: vector, size: 2, fields: [a], width: 16, layers: 1}, "
    "b: {kind: vector, size: 2, fields: [b], width: 16, layers: 1}, "
    "c: {kind: vector, size: 2, fields: [c], width: 16, layers: 1}}",
    "objective={name: symile, taps: [a, b, c], init_logit_scale: 50.0}",
]
WALKS = [
    "towers.more={walk: {kind: sequence, size: 6, length: 4, fields: [walk], width: 16, heads: 2}}",
    "objective={name: late_interaction, taps: [walk.tokens, text.tokens]}",
]


def write_set(folder: Path, count: int, seed: int) -> None:
    """Write samples of bits and walks.

    Bits are a, b and c = a xor b, which are independent in pairs. A walk visits two to four of six
    rooms; its captions are in two languages, and in the wrong order.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    with wds.TarWriter(str(folder / "all.tar"), mtime=0) as writer:
        for number in range(count):
            a, b = random.integers(0, 2, 2).tolist()
            rooms = random.permutation(6)[: random.integers(2, 5)].tolist()
            record = {
                **{name: [bit, 1 - bit] for name, bit in {"a": a, "b": b, "c": a ^ b}.items()},
                "bit": b,
                "walk": np.eye(6)[rooms].tolist(),
                "rooms": len(rooms),
                "names": {
                    "en": " then ".join(f"room {'abcdef'[room]}" for room in rooms),
                    "de": " dann ".join(f"raum {'abcdef'[room]}" for room in rooms),
                },
                "wrong": " then ".join(f"room {'abcdef'[room]}" for room in rooms[::-1]),
            }
            caption = record["names"]["en"]
            writer.write({"__key__": f"s{number:05d}", "json": record, "txt": caption})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modalities")
    write_set(root / "train", 200, seed=1)
    write_set(root / "val", 60, seed=2)
    (root / "c.yaml").write_text(CONFIG.format(root=root))
    return root


def train_run(home: Path, name: str, settings: list[str]) -> Path:
    config = load_config(home / "c.yaml", [*settings, f"run.name={name}"])
    run = create_run(config, name)
    make_tokenizer(config, open_train(config)).save(str(run.tokenizer))
    assert run_training(run)
    return run.path


@pytest.fixture(scope="module")
def bits(home: Path) -> Path:
    return train_run(home, "bits", [*BITS, "train.steps=60"])


@pytest.fixture(scope="module")
def walks(home: Path) -> Path:
    return train_run(home, "walks", [*WALKS, "train.steps=60"])


def measure(run: Path, *arguments: str) -> dict[str, float]:
    """Run `gigabatch eval` in this process and return the metrics."""
    from typer.testing import CliRunner

    from gigabatch.launcher.cli.app import app

    done = CliRunner().invoke(app, ["eval", str(run), "--on", "val", *arguments, "--json"])
    if done.exception is not None:
        raise done.exception
    return dict(json.loads(done.stdout))


def test_product_score_retrieves_exclusive_or_but_sum_does_not(bits: Path) -> None:
    arguments = ["given=[a, c]", "find=b", "positives=bit"]
    metrics = measure(bits, *arguments)
    assert metrics["eval/val/a+c2b_recall@1"] == metrics["eval/val/a+c2b_mrr"] == 1
    assert metrics["eval/val/a+c2b_r_precision"] == metrics["eval/val/a+c2b_ndcg@10"] == 1
    assert metrics == measure(bits, *arguments, "score=product")
    (path,) = (bits / "eval").glob("val-retrieval-*score=product-step-00000060.json")
    written = json.loads(path.read_text())
    assert written.pop("settings") == [*arguments, "score=product"]
    assert written == metrics
    # A sum of dot products is wrong on at least one of the four combinations of bits.
    assert measure(bits, *arguments, "score=sum")["eval/val/a+c2b_recall@1"] < 0.9
    between = measure(bits, "between=[a, b]", "positives=bit")
    assert {"eval/val/a2b_recall@1", "eval/val/b2a_r_precision"} < set(between)
    sliced = measure(bits, *arguments, "--slice", "bit", "--intervals")
    assert sliced["eval/val/bit=0/a+c2b_recall@1"] == sliced["eval/val/a+c2b_mrr/low"] == 1


def test_late_interaction_run_is_measured_by_tokens(walks: Path) -> None:
    tokens, pooled = measure(walks), measure(walks, "tap=head")
    last = json.loads((walks / "eval" / "step-00000060.json").read_text())
    assert tokens == measure(walks, "tap=tokens") == pytest.approx(last)
    for way in ("text2walk", "walk2text"):
        mrr = f"eval/val/{way}_mrr"
        assert tokens[mrr] > pooled[mrr] + 0.5


def test_languages_and_order_work_for_captions_of_sequences(walks: Path) -> None:
    prefix = "eval/val/languages/"
    captions = "captions=[names.en, names.de]"
    metrics = measure(walks, "--task", "languages", captions)
    assert metrics[f"{prefix}languages"] == 2
    recall = measure(walks)["eval/val/text2walk_recall@10"]
    assert metrics[f"{prefix}names.en/text2walk_recall@10"] == recall
    assert metrics[f"{prefix}text2walk_mrv"] >= metrics[f"{prefix}text2walk_mrv_std"] ** 2 > 0
    assert metrics == measure(walks, "--task", "languages", captions, "modality=walk")
    same = measure(walks, "--task", "languages", "captions=[names.en, names.en]")
    assert same[f"{prefix}walk2text_mrv"] == 0
    order = measure(walks, "--task", "order", "against=wrong", "--slice", "rooms")
    assert order["eval/val/order/order_accuracy"] > 0.9
    assert sum(order[f"eval/val/order/rooms={n}/count"] for n in (2, 3, 4)) == 60
    tied = measure(walks, "--task", "order", "against=txt")
    assert tied["eval/val/order/order_accuracy"] == 0


def test_two_ranks_report_the_metrics_of_one(walks: Path, start: Any) -> None:
    arguments = ["eval", walks, "--on", "val", "--slice", "rooms", "--intervals", "--json"]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "gigabatch.launcher",
    ]  # fmt: skip
    done = start(*arguments, command=torchrun).wait()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == measure(walks, "--slice", "rooms", "--intervals")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["given=[a, c]"], "retrieval: given and find go together"),
        (["find=b"], "retrieval: given and find go together"),
        (["given=[a, c]", "find=b", "between=[a, b]"], "between is for two modalities"),
        (["given=[a, c]", "find=b", "tap=tokens"], "tap is for two modalities"),
        (["given=[a, b]", "find=b"], "name a modality twice: a, b, b"),
        (["between=[a, a]"], "between needs two modalities, not a twice"),
        (["score=sum"], "score needs given=[A,B] find=C"),
        (["given=[a, c]", "find=d"], "the run has no tower 'd'"),
        (["given=a", "find=b", "score=mean"], "score: Input should be 'product' or 'sum'"),
        (["tap=tokens"], "tap=tokens: the run has no tokens of a, b"),
        (["--task", "order", "against=wrong"], "the run has no tower 'text'"),
        (["--task", "order", "against=wrong", "modality=text"], "a modality other than text"),
    ],
)
def test_incompatible_settings_raise(bits: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(GigabatchError) as error:
        measure(bits, *arguments)
    assert message in str(error.value)
