"""Read YAML as `yaml.safe_load` does, but reject a key that a mapping sets twice."""

from __future__ import annotations

from typing import Any

import yaml


class DuplicateKeyError(yaml.YAMLError):
    """Raised for a mapping that sets a key twice; the message has the key and both lines."""


class _Loader(yaml.SafeLoader):
    # Not `construct_mapping`: it may see a mapping after another was merged into it by `<<`.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            # Each `<<` merges a mapping, so several are valid.
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise DuplicateKeyError(
                    f"line {line}: the key {key.value} is already set on line {lines[name]}; keep "
                    "one of them."
                )
            lines[name] = line
        return node


def load_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        DuplicateKeyError: if a mapping sets a key twice.
        yaml.YAMLError: if the text is not valid YAML.
    """
    return yaml.load(text, _Loader)
