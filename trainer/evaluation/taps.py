"""Tower outputs that an evaluation reads: after the head, before it, or after any inner module.

head        unit vectors, the output that the objective reads
encoder     the input of the head
projection  the output of a second projection head, if there is one
tokens      unit vectors, one per token, for comparisons across modalities

Any other tap is the path of a module, such as `encoder.blocks.2` or `head.0`. A feature map
[B, C, H, W] is averaged over positions, token states [B, L, W] over real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.evaluation.embedding import Embed, Inputs
from gigabatch.trainer.towers import Towers, further_head

HEAD, TOKENS = "head", "tokens"


def comparison_reader(towers: Callable[..., Mapping[str, Tensor]], output: str) -> Embed:
    """Return a function from tower inputs to the outputs at `head` or `tokens`.

    The outputs are {modality: float32 [B, D], or tokens [B, T, D]}.
    """
    if output == HEAD:
        return towers

    def embed(inputs: Inputs) -> dict[str, Tensor]:
        taps = {name: f"{name}.{TOKENS}" for name in inputs}
        outputs = towers(inputs, None, tuple(taps.values()))
        return {name: outputs[tap] for name, tap in taps.items()}

    return embed


def tap_reader(towers: Towers, tap: str) -> Embed:
    """Return a function from tower inputs to the outputs at a tap: {modality: float32 [B, W]}."""
    if tap == HEAD:
        return towers

    def embed(inputs: Inputs) -> dict[str, Tensor]:
        return {name: _read(towers, name, tap, arguments) for name, arguments in inputs.items()}

    return embed


def _read(towers: Towers, name: str, tap: str, arguments: tuple[Tensor, ...]) -> Tensor:
    """Run a tower up to a tap and return one vector per sample."""
    owner = towers.owner(name)
    encoder, head = towers.encoders[owner], towers.heads[owner]
    roots = {"head": head, "encoder": encoder}
    if (second := further_head(owner, "projection")) in towers.heads:
        roots["projection"] = towers.heads[second]
    # A hook reads any inner module without a change to the tower's forward pass.
    outputs: list[Any] = []
    module = _module(roots, tap, name)
    hook = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    kind = towers.autocast
    try:
        with torch.autocast(arguments[0].device.type, kind, enabled=kind is not None):
            vectors = encoder(*arguments)
            if (root := tap.partition(".")[0]) != "encoder":
                roots[root](vectors)
    finally:
        hook.remove()
    if not outputs:
        raise GigabatchError(
            f"tap={tap}: the {name} tower did not call this module. Name one that it calls."
        )
    return _pool(outputs[-1], arguments, tap)


def _module(roots: Mapping[str, nn.Module], tap: str, name: str) -> nn.Module:
    """Return the module at a tap; the error names some that exist."""
    root, _, path = tap.partition(".")
    modules: dict[str, nn.Module] = dict(roots[root].named_modules()) if root in roots else {}
    if path in modules:
        return modules[path]
    inner = {r: [f"{r}.{path}" for path, _ in m.named_modules() if path] for r, m in roots.items()}
    heads = [path for r in inner if r != "encoder" for path in inner[r]]
    raise GigabatchError(
        f"tap={tap}: the {name} tower has no such module. Choose {', '.join(roots)}, or one of "
        f"{', '.join([*heads, *inner['encoder'][:12]])}, ..."
    )


def _pool(output: Any, arguments: tuple[Tensor, ...], tap: str) -> Tensor:
    """Average feature maps over positions and token states over real tokens."""
    while not isinstance(output, Tensor):
        output = output[0]  # tuples and transformers' outputs begin with the states
    states = output.float()
    mask = arguments[1] if len(arguments) > 1 else None
    if states.ndim == 4:
        return states.mean((2, 3))
    if states.ndim == 3 and mask is not None and mask.shape == states.shape[:2]:
        real = mask.unsqueeze(-1)
        return (states * real).sum(1) / real.sum(1).clamp(min=1)
    if states.ndim == 3:
        return states.mean(1)
    if states.ndim == 2 and len(states) == len(arguments[0]):
        return states
    raise GigabatchError(
        f"tap={tap}: the module's output has shape {list(states.shape)}, not one vector per "
        "sample. Name a different module."
    )
