"""Reading towers at a tap: after the head, before it, or after any module on the way.

`head` is what is trained on: unit vectors. `encoder` is what the head is given, as it is,
`projection` what comes out of a second head where there is one. Any other is the path of a module,
`encoder.blocks.2` or `head.0`; a map [B, C, H, W] is averaged over its places, states [B, L, W]
over their real tokens. Where vectors are compared across modalities, `tokens` are what late
interaction is trained on: unit vectors too, one a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config, taps_of
from gigabatch.trainer.evaluation.embedding import Embed, Inputs
from gigabatch.trainer.taps import parse_tap
from gigabatch.trainer.towers import Towers, further_head

HEAD, TOKENS = "head", "tokens"


def place_compared(config: Config, modalities: Sequence[str], wanted: str | None = None) -> str:
    """`head` or `tokens`: where modalities are read that are compared with each other. Unless
    `wanted`, tokens where the objective reads those of all, and not the pooled vectors of all,
    which are then not trained. Raises GigabatchError for tokens that the run has not."""
    read = {(tap.modality, tap.output) for tap in map(parse_tap, taps_of(config.objective))}
    pooled, tokens = ({m for m in modalities if (m, place) in read} for place in (HEAD, TOKENS))
    if wanted == TOKENS and (without := [m for m in modalities if m not in tokens]):
        raise GigabatchError(
            f"tap=tokens: the run has no tokens of {', '.join(without)}: its objective reads "
            f"{', '.join(taps_of(config.objective))}. Leave tap unset, or compare "
            "modalities whose tokens it reads."
        )
    trained_on_tokens = len(tokens) == len(modalities) > len(pooled)
    return wanted or (TOKENS if trained_on_tokens else HEAD)


def compared(towers: Callable[..., Mapping[str, Tensor]], place: str) -> Embed:
    """The towers read at `head` or `tokens`: {modality: float32 [B, D] or [B, T, D]}."""
    if place == HEAD:
        return towers

    def embed(inputs: Inputs) -> dict[str, Tensor]:
        taps = {name: f"{name}.{TOKENS}" for name in inputs}
        found = towers(inputs, None, tuple(taps.values()))
        return {name: found[tap] for name, tap in taps.items()}

    return embed


def tapped(towers: Towers, tap: str) -> Embed:
    """The towers read at `tap`: {modality: float32 [B, W]}."""
    if tap == HEAD:
        return towers

    def embed(inputs: Inputs) -> dict[str, Tensor]:
        return {name: _read(towers, name, tap, arguments) for name, arguments in inputs.items()}

    return embed


def _read(towers: Towers, name: str, tap: str, arguments: tuple[Tensor, ...]) -> Tensor:
    owner = towers.owner(name)
    encoder, head = towers.encoders[owner], towers.heads[owner]
    roots = {"head": head, "encoder": encoder}
    if (second := further_head(owner, "projection")) in towers.heads:
        roots["projection"] = towers.heads[second]
    seen: list[Any] = []
    module = _module(roots, tap, name)
    hook = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    kind = towers.autocast
    try:
        with torch.autocast(arguments[0].device.type, kind, enabled=kind is not None):
            vectors = encoder(*arguments)
            if (root := tap.partition(".")[0]) != "encoder":
                roots[root](vectors)
    finally:
        hook.remove()
    if not seen:
        raise GigabatchError(f"tap={tap}: the {name} tower did not pass through it.")
    return _pooled(seen[-1], arguments, tap)


def _module(roots: Mapping[str, nn.Module], tap: str, name: str) -> nn.Module:
    root, _, path = tap.partition(".")
    known = dict(roots[root].named_modules()) if root in roots else {}
    if path in known:
        return known[path]
    inner = {r: [f"{r}.{path}" for path, _ in m.named_modules() if path] for r, m in roots.items()}
    some = [*(each for r in inner if r != "encoder" for each in inner[r]), *inner["encoder"][:12]]
    raise GigabatchError(
        f"tap={tap}: the {name} tower has no such module. Take {', '.join(roots)}, or one of "
        f"{', '.join(some)}, ..."
    )


def _pooled(output: Any, arguments: tuple[Tensor, ...], tap: str) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]  # of tuples and of transformers' outputs, the states
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
    raise GigabatchError(f"tap={tap}: gives {list(states.shape)}, which is no vector a sample.")
