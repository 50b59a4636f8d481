"""MkDocs hooks: generated pages, and links out of docs/."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gigabatch.trainer.config.reference import config_reference
from gigabatch.trainer.objectives.documentation import with_generated_table

ROOT = Path(__file__).parent.parent
CONFIG_INTRO = """# Config reference

Every key of a run's YAML file. This page is generated from the settings. Set any key on the command
line, as in `train.steps=2000`. `gigabatch config CONFIG` prints a config with all its values, and
`gigabatch config CONFIG --explain KEY` explains a key.

"""
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"reference/config.md": CONFIG_INTRO + config_reference(), "recipes.md": recipes()}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def recipes() -> str:
    """Return a page with every config of configs/, under its file name."""
    lines = [
        "# Recipes",
        "",
        "The configs in `configs/`. Train one by its name, as in `gigabatch train clip`, or start",
        "a config of your own from it: `gigabatch config clip > my.yaml`.",
    ]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        lines += ["", f"## {path.stem}", "", "```yaml", path.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Generate the table of objectives, and rewrite links.

    Links to folders lead to their README.md. Of links out of docs/, those to a config lead to its
    recipe, and all others become plain text.
    """
    if page.file.src_uri == "objectives.md":
        markdown = with_generated_table(markdown)
    folder = posixpath.dirname(page.file.src_uri)

    def rewrite(match: re.Match[str]) -> str:
        text, link = match[1], match[2]
        target = posixpath.normpath(posixpath.join("docs", folder, link))
        if target.startswith("docs/"):
            is_folder = (ROOT / target).is_dir()
            return (
                match[0].replace(link, f"{link.rstrip('/')}/README.md") if is_folder else match[0]
            )
        if target.startswith("configs/") and target.endswith(".yaml"):
            recipe = posixpath.relpath("recipes.md", folder or ".")
            return f"[{text}]({recipe}#{Path(target).stem})"
        return text

    return LINK.sub(rewrite, markdown)
