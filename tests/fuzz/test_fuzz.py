"""Random hostile inputs through the real decoding, reading and parsing: no traceback, no hang.

About 40 s on one quiet core. The seeds are fixed, so a failure repeats.
"""

from __future__ import annotations

import random
from pathlib import Path

import hostile
import pytest
import torch
import yaml
from guard import Guard
from support import TINY
from tarfiles import write_tar

from gigabatch.data.decode.audio import AudioSettings
from gigabatch.data.decode.fields import Fields
from gigabatch.data.decode.images import ImageSettings
from gigabatch.data.decode.vectors import VectorSettings, VectorsSettings
from gigabatch.data.errors import GigabatchError
from gigabatch.data.order.assignment import EvalPlans
from gigabatch.data.shards.index import Index
from gigabatch.data.shards.indexing import open_index
from gigabatch.data.stream import open_stream
from gigabatch.data.text.captions import CaptionSettings, ExtraText
from gigabatch.data.text.tokenizer import TextSettings, train_bpe
from gigabatch.trainer.config import Config
from gigabatch.trainer.config.keys import known_keys
from gigabatch.trainer.config.load import parse_config, resolve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def index(shards: Path) -> Index:
    """A set whose samples have a json member, and no indexed columns."""
    return open_index(shards / "train")


def test_json_of_any_shape_is_a_value_or_a_bad_sample(index: Index) -> None:
    rng, guard = random.Random(1), Guard()
    more = {
        "vector": VectorSettings(size=2, member="json", fields=("id", "label")),
        "query": ExtraText(member="json", field="label"),
    }
    fields = [
        Fields(
            text=CaptionSettings(member="json", field=field, choose=choose),
            more=more, columns=("id",), numbers=("label",), allow_missing=allow_missing,
        )
        for field in ("caption", "a.b", "caption.a", "0")
        for choose in ("first", "random", "all")
        for allow_missing in (False, True)
    ]  # fmt: skip
    for number in range(3000):
        raw = {"json": hostile.json_bytes(rng)}
        chosen = fields[number % len(fields)]
        guard.run("decode", chosen.decode, raw, "a.tar: sample 's'", number)
        guard.run("columns", lambda raw, f: f.column_values(0, index, 3, raw, "s"), raw, chosen)
    guard.check(values=300, errors=300)


def test_captions_of_any_bytes_are_texts_or_bad_samples() -> None:
    rng, guard = random.Random(2), Guard()
    choices = [(lines, choose) for lines in (False, True) for choose in ("all", "first")]
    settings = [CaptionSettings(lines=lines, choose=choose) for lines, choose in choices]
    tokenizer = train_bpe(["a red square", "two"], TextSettings(vocab_size=300, length=12))
    for number in range(4000):
        raw = {"txt": hostile.text_bytes(rng)}
        fields = Fields(text=settings[number % len(settings)])
        value = guard.run("caption", fields.decode, raw, "s", number)
        if value:
            texts = value["text"] if isinstance(value["text"], list) else [value["text"]]
            guard.run("tokens", tokenizer.encode_batch, texts)
    guard.check(values=300, errors=300)


def test_images_of_any_bytes_are_pixels_or_bad_samples() -> None:
    rng, guard, bases = random.Random(3), Guard(), hostile.base_images()
    fields = [Fields(ImageSettings(size=16, channels=channels)) for channels in (1, 3)]
    for number in range(6000):
        raw = {rng.choice(["png", "jpg", "webp"]): hostile.image_bytes(rng, bases)}
        value = guard.run("image", fields[number % 2].decode, raw, "s", None)
        if value:
            assert value["image"].shape == (1 + number % 2 * 2, 16, 16)
            assert value["image"].dtype == torch.uint8
    guard.check(values=300, errors=300)


def test_arrays_and_audio_of_any_bytes_are_tensors_or_bad_samples() -> None:
    rng, guard = random.Random(4), Guard()
    arrays = [
        Fields(arrays=("npy",)),
        Fields(more={"v": VectorSettings(size=8)}),
        Fields(more={"v": VectorsSettings(size=8, length=4)}),
    ]
    audio = Fields(more={"sound": AudioSettings(rate=8000, seconds=0.1)})
    for number in range(4000):
        raw = {"npy": hostile.array_bytes(rng)}
        guard.run("array", arrays[number % len(arrays)].decode, raw, "s", None)
        raw = {rng.choice(["wav", "flac", "mp3", "ogg"]): hostile.wav_bytes(rng)}
        guard.run("audio", audio.decode, raw, "s", None)
    guard.check(values=300, errors=300)


def test_shards_of_hostile_samples_are_read_or_refused(tmp_path: Path) -> None:
    """The whole path: tar, index, reader, decoding, substitution and collation."""
    rng, guard, bases = random.Random(5), Guard(), hostile.base_images()
    for number in range(12):
        members: dict[str, bytes] = {}
        for sample in range(40):
            good = sample % 4 == 0
            members[f"s{sample}.png"] = bases[0] if good else hostile.image_bytes(rng, bases)
            members[f"s{sample}.json"] = (
                b'{"caption": "a text", "id": 3}' if good else hostile.json_bytes(rng)
            )
        folder = tmp_path / f"set{number}"
        write_tar(folder / "a.tar", members)
        if number % 2:
            shard = folder / "a.tar"
            shard.write_bytes(hostile.mutated(rng, shard.read_bytes()))
        guard.run("shards", read_all, folder)
    guard.check(values=3, errors=1)


def read_all(folder: Path) -> int:
    index = open_index(folder)
    tokenizer = folder / "tokenizer.json"
    train_bpe(["a text"], TextSettings(vocab_size=300, length=12)).save(str(tokenizer))
    fields = Fields(
        ImageSettings(size=8), CaptionSettings(member="json", field="caption"), columns=("id",)
    )
    plans = EvalPlans(len(index), 8, 1, 0)
    stream = open_stream(
        [index], plans, fields=fields, tokenizer=tokenizer, seed=1, workers=0, prefetch=1
    )
    return sum(len(batch.keys) for batch in stream)


def test_configs_of_any_content_are_read_or_refused(tmp_path: Path) -> None:
    rng, guard = random.Random(6), Guard()
    keys = sorted(set(known_keys(Config)))
    tree = yaml.safe_load(TINY.format(root=tmp_path))
    for number in range(800):
        overrides = [override(rng, keys) for _ in range(rng.choice([1, 1, 2, 4]))]
        text = config_text(rng, tree) if number % 3 == 0 else yaml.safe_dump(tree)
        guard.run("config", read_config, text, overrides if number % 3 else [])
    guard.check(values=20, errors=300)


def read_config(text: str, overrides: list[str]) -> Config:
    return resolve(parse_config(text, "my.yaml", overrides))


VALUES = (
    "null", "true", "0", "-1", "1e400", ".nan", ".inf", "9" * 30, "''", "[]", "{}", "[1, 2]",
    "{a: 1}", "{kind: conv}", "{kind: nothing}", "{name: sum}", "a text", "2026-01-01", "12:30:00",
    "*a", "&a [*a]", "!!python/object:os.system x", "{", "[1", ": :", "\x00", "0x10", "1_000", "~",
    "[image, text]", "[[[[]]]]", "{? [1]: 2}", "!!binary aGk=", "<<", "64", "8", "0.5", "image",
)  # fmt: skip


def override(rng: random.Random, keys: list[str]) -> str:
    key = rng.choice(keys).replace("NAME", rng.choice(["sound", "a b", "", "0", "image"]))
    if rng.random() < 0.1:
        key = hostile.mutated(rng, key.encode()).decode("utf-8", "replace")
    sign = rng.choice(["="] * 8 + ["", "==", ":"])
    return f"{key}{sign}{rng.choice(VALUES)}"


def config_text(rng: random.Random, tree: dict[str, object]) -> str:
    text = yaml.safe_dump(tree)
    lines = text.splitlines()
    for _ in range(rng.choice([1, 2, 4])):
        at = rng.randrange(len(lines))
        match rng.randrange(4):
            case 0:
                lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(VALUES)
            case 1:
                lines[at] = " " * rng.randrange(4) + lines[at]
            case 2:
                lines[at:at] = [rng.choice(VALUES)]
            case _:
                lines = lines[:at] or [""]
    text = "\n".join(lines)
    return (
        hostile.mutated(rng, text.encode()).decode("utf-8", "replace")
        if rng.random() < 0.3
        else text
    )


def test_guard_reports_tracebacks_hangs_and_long_messages() -> None:
    guard = Guard()
    guard.run("bug", lambda x: x.missing, 1)
    guard.run("long", _raise, GigabatchError("x" * 3000))
    with pytest.raises(AssertionError, match="2 failures"):
        guard.check(0, 0)


def _raise(error: Exception) -> None:
    raise error
