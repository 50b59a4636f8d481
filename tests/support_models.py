"""Folders of tiny `transformers` models with random weights, tokenizers and image processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["small", "letter", "greek", "alpha", "beta", "colour", "a", "of", "photo", "cat"]
HALF = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2
}  # fmt: skip
SIZE = {"image_size": 16, "patch_size": 8}
CLIP_PIXELS = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 16},
    "resample": 3, "do_center_crop": True, "crop_size": {"height": 16, "width": 16},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
}  # fmt: skip
VIT_PIXELS = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 2,
    "size": {"height": 16, "width": 16}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def save_tokenizer(folder: Path, special: list[str], template: str, pad: str) -> None:
    """Save a tokenizer of words; `special` tokens have the first ids, in order."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in special]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token=special[0])
    fast.save_pretrained(str(folder))


def save_pixels(folder: Path, processor: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def save_models(root: Path) -> None:
    """Save clip, siglip, bert, roberta, t5, vit, resnet and efficientnet in folders of `root`."""
    import transformers as hf

    clip = {**HALF, "vocab_size": 20, "projection_dim": 8, "max_position_embeddings": 12}
    hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**clip, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2},
            vision_config={**HALF, **SIZE, "projection_dim": 8},
        )
    ).save_pretrained(root / "clip")
    # The end token has another id than 2, which would mean the largest id.
    text = json.loads((root / "clip/config.json").read_text())
    text["text_config"]["eos_token_id"] = 3
    (root / "clip/config.json").write_text(json.dumps(text))
    save_tokenizer(root / "clip", ["<unk>", "<bos>", "<x>", "<eos>"], "<bos> $A <eos>", "<eos>")
    save_pixels(root / "clip", CLIP_PIXELS)

    hf.SiglipModel(
        hf.SiglipConfig(
            text_config={**HALF, "vocab_size": 20, "max_position_embeddings": 10},
            vision_config={**HALF, **SIZE},
        )
    ).save_pretrained(root / "siglip")
    save_tokenizer(root / "siglip", ["<unk>", "</s>"], "$A </s>", "</s>")
    save_pixels(root / "siglip", VIT_PIXELS | {"resample": 3})

    bert = {**HALF, "vocab_size": 20, "max_position_embeddings": 16}
    hf.BertModel(hf.BertConfig(**bert)).save_pretrained(root / "bert")
    save_tokenizer(root / "bert", ["[PAD]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]", "[PAD]")
    roberta = {**bert, "pad_token_id": 1, "max_position_embeddings": 14}
    hf.RobertaModel(hf.RobertaConfig(**roberta)).save_pretrained(root / "roberta")
    save_tokenizer(root / "roberta", ["<s>", "<pad>", "</s>"], "<s> $A </s>", "<pad>")
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    hf.T5ForConditionalGeneration(hf.T5Config(**t5)).save_pretrained(root / "t5")
    save_tokenizer(root / "t5", ["<pad>", "</s>", "<unk>"], "$A </s>", "<pad>")

    hf.ViTModel(hf.ViTConfig(**HALF, **SIZE)).save_pretrained(root / "vit")
    save_pixels(root / "vit", VIT_PIXELS)
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}
    hf.ResNetModel(hf.ResNetConfig(**resnet)).save_pretrained(root / "resnet")
    save_pixels(root / "resnet", CLIP_PIXELS | {"size": {"shortest_edge": 20}, "crop_pct": 0.8})
