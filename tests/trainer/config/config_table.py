"""Table of config keys: another value, the probe whose result it changes, and common overrides."""

from __future__ import annotations

VIT = (
    "{model_type: vit, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 8, image_size: 16, patch_size: 8}"
)

BERT = VIT.replace("vit", "bert").replace("image_size: 16, patch_size: 8", "vocab_size: 300")

PHASE = "[{from_sample: 10000, weights: [9, 1]}]"


def with_sensor(tower: str, tap: str = "image") -> list[str]:
    """Return overrides that add the tower `sensor`."""
    return [f"towers.more={{sensor: {tower}}}", f"objective={{taps: [{tap}, sensor]}}"]


VECTOR = with_sensor("{kind: vector, size: 1, fields: [concept], width: 8, layers: 1}")
SET = with_sensor("{kind: set, size: 2, length: 2, fields: [pair], width: 8, heads: 2}")
AUDIO = with_sensor("{kind: audio, rate: 2000, seconds: 0.1, mels: 4, widths: [4], depths: [1]}")
USER_MODULE = "{kind: module, module: 'support_towers:Statistics', args: {width: 6}, reads: %s}"
USER_VECTOR = with_sensor(USER_MODULE % "{kind: vector, size: 1, fields: [concept]}")
USER_SET = with_sensor(USER_MODULE % "{kind: set, size: 2, length: 2, fields: [pair]}")
TEXT = with_sensor("{kind: text, field: colour, tower: {width: 8}}")
TEXT_HUGGINGFACE = "{kind: text, field: colour, tower: {kind: huggingface}}"
TEXT_BERT = TEXT_HUGGINGFACE.replace("huggingface", f"huggingface, config: {BERT}")
TEXT_MODULE = "{kind: text, field: colour, tower: {kind: module, module: 'support_towers:Tokens'}}"
USER_AUDIO = with_sensor(USER_MODULE % "{kind: audio, rate: 2000, seconds: 0.1}")
# Keys of a tower in `towers.more`, in the form of KEYS below.
MORE: dict[str, tuple[str, str, list[str]]] = {
    "kind": ("set", "towers", VECTOR),
    "width": ("16", "towers", VECTOR),
    "layers": ("2", "towers", VECTOR),
    "heads": ("4", "sensors", SET),
    "pool": ("attention", "sensors", SET),
    "dropout": ("0.5", "towers", VECTOR),
    "mean": ("5.0", "towers", VECTOR),
    "std": ("7.0", "towers", VECTOR),
    "size": ("2", "towers", VECTOR),
    "length": ("1", "sensors", SET),
    "member": ("npz", "towers", with_sensor("{kind: vector, size: 1}")),
    "fields": ("[colour]", "towers", VECTOR),
    "rate": ("4000", "sensors", AUDIO),
    "seconds": ("0.05", "sensors", AUDIO),
    "mels": ("8", "sensors", AUDIO),
    "window_ms": ("40.0", "sensors", AUDIO),
    "hop_ms": ("20.0", "sensors", AUDIO),
    "widths": ("[8]", "sensors", AUDIO),
    "depths": ("[2]", "sensors", AUDIO),
    "freeze": ("true", "towers", VECTOR),
    "checkpoint_activations": ("true", "activations", VECTOR),
    "head.layers": ("2", "towers", VECTOR),
    "head.hidden": ("7", "towers", [*VECTOR, "towers.more.sensor.head.layers=2"]),
    "module": ("torch.nn:Linear", "towers", USER_VECTOR),
    "args": ("{width: 3}", "towers", USER_VECTOR),
    "share": (
        "text",
        "towers",
        ["towers.more={sensor: {kind: text, field: colour}}", "objective={taps: [text, sensor]}"],
    ),
    "field": ("lost", "batch", TEXT),
    "lines": ("true", "lines", with_sensor("{kind: text, member: txt, tower: {width: 8}}")),
    "prefix": ("'query: '", "batch", TEXT),
    "tower.kind": ("module", "towers", TEXT),
    "tower.width": ("16", "towers", TEXT),
    "tower.layers": ("2", "towers", TEXT),
    "tower.dropout": ("0.5", "towers", TEXT),
    "tower.freeze": ("true", "towers", TEXT),
    "tower.checkpoint_activations": ("true", "activations", TEXT),
    "tower.head.layers": ("2", "towers", TEXT),
    "tower.head.hidden": ("7", "towers", [*TEXT, "towers.more.sensor.tower.head.layers=2"]),
    "tower.name": ("no/such-model", "towers", with_sensor(TEXT_HUGGINGFACE)),
    "tower.config": ("{model_type: nonsense}", "towers", with_sensor(TEXT_HUGGINGFACE)),
    "tower.attend_padding": ("true", "towers", with_sensor(TEXT_BERT)),
    "tower.pool": ("first", "towers", with_sensor(TEXT_BERT)),
    "tower.module": ("torch.nn:Linear", "towers", with_sensor(TEXT_MODULE)),
    "tower.args": ("{width: 6}", "towers", with_sensor(TEXT_MODULE)),
    "reads.kind": ("sequence", "towers", USER_VECTOR),
    "reads.size": ("2", "towers", USER_VECTOR),
    "reads.fields": ("[colour]", "towers", USER_VECTOR),
    "reads.member": ("npz", "towers", with_sensor(USER_MODULE % "{kind: vector, size: 1}")),
    "reads.length": ("1", "sensors", USER_SET),
    "reads.rate": ("4000", "sensors", USER_AUDIO),
    "reads.seconds": ("0.05", "sensors", USER_AUDIO),
}

# The tower kinds whose keys the table lists. A new kind needs no rows: test_kinds.py tests it.
KINDS: dict[str, set[str]] = {
    "image": {"conv", "huggingface", "module"},
    "text": {"conv", "huggingface", "module"},
    "more": {"audio", "module", "sequence", "set", "vector"},
}

# key: (value, probe, overrides of both sides). A value that starts with `data.` is a full override.
KEYS: dict[str, tuple[str, str, list[str]]] = {
    "run.name": ("other", "run", []),
    "run.dir": ("elsewhere", "paths", []),
    "run.seed": ("1", "batch", []),
    "data.root": ("/missing", "paths", []),
    "data.train.path": ("val", "batch", []),
    "data.train.weight": (
        "data.train=[train, {path: val, weight: 3}]", "batch", ["data.train=[train, val]"],
    ),
    "data.curriculum.from_sample": (
        f"data.curriculum={PHASE.replace('10000', '20000')}", "mixture",
        ["data.train=[train, val]", f"data.curriculum={PHASE}"],
    ),
    "data.curriculum.weights": (
        f"data.curriculum={PHASE.replace('9, 1', '1, 9')}", "mixture",
        ["data.train=[train, val]", f"data.curriculum={PHASE}"],
    ),
    "data.group": ("concept", "batch", []),
    "data.cache_gib": ("3", "cache", []),
    "data.missing": ("mask", "batch", []),
    "data.missing_ids": ("unique", "ids", []),
    "data.fields_version": ("1", "ids", []),
    "data.max_damaged": ("0", "damage", ["data.max_damaged=0.5"]),
    "data.stages": ("['support_towers:darken']", "batch", []),
    "data.captions.member": ("json", "batch", []),
    "data.captions.field": ("colour", "batch", ["data.captions.member=json"]),
    "data.captions.prefix": ("'a photo of '", "batch", []),
    "data.captions.choose": ("all", "batch", []),
    "data.captions.most": ("2", "batch", ["data.captions.choose=all"]),
    "data.captions.lines": ("true", "lines", []),
    "data.window": ("1", "batch", []),
    "data.workers": ("2", "loaders", []),
    "data.prefetch": ("3", "loaders", []),
    "data.image.member": ("webp", "batch", []),
    "data.image.size": ("24", "batch", []),
    "data.image.channels": ("1", "batch", []),
    "data.image.mean": ("0.3", "inputs", []),
    "data.image.std": ("0.3", "inputs", []),
    "data.image.resize": ("squash", "pixels", []),
    "data.image.interpolation": ("bilinear", "pixels", []),
    "data.image.crop": ("huggingface", "pixels", []),
    "data.image.fill": ("[1, 2, 3]", "pixels", ["data.image.resize=pad"]),
    "data.image.draft": ("false", "pixels", []),
    "data.image.max_decoded_mib": ("0.001", "pixels", []),
    "data.image.version": ("1", "pixels", []),
    "data.text.tokenizer": ("no/such-name", "batch", []),
    "data.text.vocab_size": ("310", "batch", []),
    "data.text.length": ("5", "batch", []),
    **{
        f"data.augment.{name}": ("0.4", "inputs", [])
        for name in (
            "zoom", "aspect", "rotate", "shear", "shift", "flip", "brightness", "contrast",
            "saturation", "hue", "noise", "crop", "grey", "blur", "erase",
        )
    },
    "batch.global_size": ("64", "batch", []),
    "batch.micro_size": ("16", "batch", []),
    "towers.width": ("8", "towers", []),
    "towers.image.kind": ("module", "towers", []),
    "towers.image.widths": ("[4, 8]", "towers", []),
    "towers.image.depths": ("[1, 2]", "towers", []),
    "towers.image.dropout": ("0.5", "towers", []),
    "towers.image.freeze": ("true", "towers", []),
    "towers.image.checkpoint_activations": ("true", "activations", []),
    "towers.image.head.layers": ("2", "towers", []),
    "towers.image.head.hidden": ("7", "towers", ["towers.image.head.layers=2"]),
    "towers.image.name": ("no/such-model", "towers", ["towers.image={kind: huggingface}"]),
    "towers.image.config": (VIT, "towers", ["towers.image={kind: huggingface}"]),
    "towers.image.pool": (
        "mean", "towers", [f"towers.image={{kind: huggingface, config: {VIT}}}"],
    ),
    "towers.image.attend_padding": (
        "true", "towers", [f"towers.image={{kind: huggingface, config: {VIT}}}"],
    ),
    "towers.image.module": ("torch.nn:Linear", "towers", ["towers.image={kind: module}"]),
    "towers.image.args": (
        "{width: 6}", "towers",
        ["towers.image={kind: module, module: 'support_towers:Pixels'}"],
    ),
    "towers.text.kind": ("module", "towers", []),
    "towers.text.width": ("8", "towers", []),
    "towers.text.layers": ("2", "towers", []),
    "towers.text.dropout": ("0.5", "towers", []),
    "towers.text.freeze": ("true", "towers", []),
    "towers.text.checkpoint_activations": ("true", "activations", []),
    "towers.text.head.layers": ("2", "towers", []),
    "towers.text.head.hidden": ("7", "towers", ["towers.text.head.layers=2"]),
    "towers.text.name": ("no/such-model", "towers", ["towers.text={kind: huggingface}"]),
    "towers.text.config": ("{model_type: nonsense}", "towers", ["towers.text={kind: huggingface}"]),
    "towers.text.pool": (
        "mean", "towers", [f"towers.text={{kind: huggingface, config: {BERT}}}"],
    ),
    "towers.text.attend_padding": (
        "true", "towers", [f"towers.text={{kind: huggingface, config: {BERT}}}"],
    ),
    "towers.text.module": ("torch.nn:Linear", "towers", ["towers.text={kind: module}"]),
    "towers.text.args": (
        "{width: 6}", "towers",
        ["towers.text={kind: module, module: 'support_towers:Tokens'}"],
    ),
    **{f"towers.more.NAME.{name}": row for name, row in MORE.items()},
    "objective.name": ("siglip", "objective", []),
    "objective.momentum": ("0.5", "run", ["objective={name: queue, size: 40}"]),
    "train.steps": ("5", "run", []),
    "train.epochs": ("0.16", "length", ["train.steps=null"]),
    "train.precision": ("bf16", "towers", []),
    "train.ema": ("0.5", "run", []),
    "train.zero_stage": ("2", "deepspeed", []),
    "train.max_grad_norm": ("0.001", "run", []),
    "train.hang_timeout_s": ("2000", "run", []),
    "train.max_bad_steps": (
        "2", "run", ["towers.image={kind: module, module: 'support_towers:Broken'}"],
    ),
    "train.rehearse": (
        "false", "prepared", ["towers.image={kind: module, module: 'support_towers:Crashing'}"],
    ),
    "train.init_from": ("source", "initial", []),
    "train.init_parts": ("[image]", "initial", ["train.init_from=source"]),
    "train.init_weights": ("last", "initial", ["train.init_from=source"]),
    "train.on_bad_steps": (
        "rewind", "run",
        ["train.max_bad_steps=2", "towers.image={kind: module, module: 'support_towers:Broken'}"],
    ),
    "train.max_rewinds": (
        "1", "run",
        [
            "train.max_bad_steps=1", "train.on_bad_steps=rewind", "train.steps=4",
            "towers.image={kind: module, module: 'support_towers:Broken'}",
        ],
    ),
    "optimizer.lr": ("0.1", "optimizer", []),
    "optimizer.beta1": ("0.5", "optimizer", []),
    "optimizer.beta2": ("0.5", "optimizer", []),
    "optimizer.eps": ("0.1", "optimizer", []),
    "optimizer.weight_decay": ("0.5", "optimizer", []),
    "optimizer.objective_lr": ("0.5", "run", []),
    "schedule.name": ("constant", "schedule", []),
    "schedule.warmup_steps": ("3", "schedule", []),
    "schedule.decay_steps": ("5", "schedule", ["schedule.name=wsd"]),
    "schedule.floor": ("0.5", "schedule", []),
    "checkpoint.every_steps": ("2", "run", []),
    "checkpoint.every_minutes": ("0.00001", "run", ["checkpoint.every_steps=0"]),
    "checkpoint.keep": ("1", "run", ["checkpoint.every_steps=1"]),
    "checkpoint.keep_every": ("2", "run", []),
    "checkpoint.best": (
        "eval/val/mean_recall@10", "run", ["eval.sets=[val]", "eval.every_steps=1"],
    ),
    "checkpoint.asynchronous": ("false", "saver", []),
    "checkpoint.copy_to": ("null", "copies", ["checkpoint.copy_to=file:///FOLDER"]),
    "monitor.every_steps": ("2", "run", []),
    "monitor.record_samples": ("true", "run", []),
    "eval.sets": ("[val]", "run", []),
    "eval.every_steps": ("1", "run", ["eval.sets=[val]"]),
    "cluster.launcher": ("torchrun", "command", []),
    "cluster.workers": ("2", "command", ["cluster.launcher=torchrun"]),
    "cluster.threads": ("2", "run", []),
    "cluster.cpus_per_worker": ("2", "ray", []),
    "cluster.gpus_per_worker": ("1", "ray", []),
    "cluster.placement": ("one_per_node", "ray", []),
    "cluster.env": ("{NCCL_DEBUG: INFO}", "ray", []),
    "cluster.start_timeout_s": ("5", "ray", []),
    "cluster.resize_every_s": ("5", "ray", []),
    "cluster.grace_s": ("7", "grace", []),
    "cluster.max_restarts": (
        "1", "command",
        [
            "cluster.launcher=torchrun", "cluster.max_restarts=0",
            "towers.image={kind: module, module: 'support_towers:FailingLater', args: "
            "{batches: 2}}",
        ],
    ),
}  # fmt: skip
