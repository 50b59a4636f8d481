from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from gigabatch.data.errors import GigabatchError
from gigabatch.data.text.tokenizer import (
    END,
    PAD,
    TextSettings,
    encode,
    load_tokenizer,
    named_tokenizer,
    train_bpe,
)

WORDS = ["greek", "small", "letter", "capital", "alpha", "beta", "gamma", "with", "tonos", "sign"]
CAPTIONS = [
    " ".join(random.Random(i).choices(WORDS, k=1 + i % 6)) + ("é" if i % 7 == 0 else "")
    for i in range(200)
]
SETTINGS = TextSettings(vocab_size=320, length=8)


def test_training_is_deterministic_in_any_order() -> None:
    first = train_bpe(CAPTIONS, SETTINGS).to_str()
    assert train_bpe(CAPTIONS, SETTINGS).to_str() == first
    for seed in range(3):
        shuffled = random.Random(seed).sample(CAPTIONS, len(CAPTIONS))
        assert train_bpe(iter(shuffled), SETTINGS).to_str() == first
    assert train_bpe(CAPTIONS[:50], SETTINGS).to_str() != first


def test_training_uses_caption_counts() -> None:
    rare = ["ab"] * 3 + ["cd"] * 2
    frequent = ["ab"] * 2 + ["cd"] * 3
    settings = TextSettings(vocab_size=300, length=8)
    one, two = train_bpe(rare, settings), train_bpe(frequent, settings)
    first, second = one.get_vocab(), two.get_vocab()
    assert first["Ġab"] < first["Ġcd"]
    assert second["Ġcd"] < second["Ġab"]


def test_vocabulary_is_limited_and_starts_with_special_tokens() -> None:
    tokenizer = train_bpe(CAPTIONS, SETTINGS)
    assert tokenizer.get_vocab_size() <= 320
    assert [tokenizer.id_to_token(i) for i in (0, 1)] == [PAD, END]


def test_captions_end_with_end_token_and_padding() -> None:
    tokenizer = train_bpe(CAPTIONS, SETTINGS)
    tokens, mask = encode(tokenizer, ["greek", "", "alpha beta"])
    assert tokens.shape == mask.shape == (3, 8)
    assert tokens.dtype == torch.int64
    assert mask.dtype == torch.bool
    for row, real in zip(tokens, mask, strict=True):
        length = int(real.sum())
        assert real.tolist() == [True] * length + [False] * (8 - length)
        assert row[length - 1] == 1  # END
        assert (row[: length - 1] > 1).all()
        assert (row[length:] == 0).all()  # PAD
    assert mask[1].sum() == 1


def test_long_captions_are_truncated_and_keep_end_token() -> None:
    tokenizer = train_bpe(CAPTIONS, SETTINGS)
    tokens, mask = encode(tokenizer, ["qwertz uiop asdf", "greek " * 50])
    assert tokens.shape == (2, 8)
    assert mask.all()
    assert (tokens[:, -1] == 1).all()
    assert (tokens[:, :-1] > 1).all()


def test_tokens_do_not_depend_on_other_captions() -> None:
    tokenizer = train_bpe(CAPTIONS, SETTINGS)
    single = encode(tokenizer, ["greek small"])[0]
    assert torch.equal(encode(tokenizer, ["x", "greek small", "y" * 99])[0][1:2], single)


def test_case_and_compatibility_forms_are_ignored() -> None:
    tokenizer = train_bpe(CAPTIONS, SETTINGS)
    tokens = encode(tokenizer, ["Greek ﬁ", "greek fi"])[0]  # the first has the ligature "fi"
    assert torch.equal(tokens[0], tokens[1])


def test_any_text_is_encoded_and_decoded() -> None:
    tokenizer = train_bpe(CAPTIONS, TextSettings(vocab_size=320, length=64))
    for text in ("häuser", "猫と犬", "emoji 🦊!", "tab\tand\nline"):
        tokens, mask = encode(tokenizer, [text])
        assert tokenizer.decode(tokens[0][mask[0]].tolist()).strip() == text


def test_saving_keeps_truncation_and_padding(tmp_path: Path) -> None:
    tokenizer = train_bpe(CAPTIONS, SETTINGS)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.to_str() == tokenizer.to_str()
    texts = ["greek " * 50, "", "alpha é"]
    for one, two in zip(encode(loaded, texts), encode(tokenizer, texts), strict=True):
        assert torch.equal(one, two)


def test_local_folder_is_loaded_by_path(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    trained = train_bpe(CAPTIONS, SETTINGS)
    PreTrainedTokenizerFast(tokenizer_object=trained, pad_token=PAD, eos_token=END).save_pretrained(
        str(tmp_path)
    )
    loaded = named_tokenizer(TextSettings(tokenizer=str(tmp_path), length=6))
    tokens, mask = encode(loaded, ["greek small letter alpha with", "beta"])
    assert tokens.shape == (2, 6)
    assert torch.equal(tokens[1][mask[1]], encode(trained, ["beta"])[0][0][: mask[1].sum()])


def test_unknown_tokenizer_name_raises(tmp_path: Path) -> None:
    with pytest.raises(GigabatchError, match=r"text\.tokenizer: .*cannot be loaded") as error:
        named_tokenizer(TextSettings(tokenizer=str(tmp_path / "nothing")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_invalid_tokenizer_file_raises(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(GigabatchError, match="not a tokenizer"):
        load_tokenizer(path)
