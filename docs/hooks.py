"""MkDocs hooks: generated pages, and links out of docs/."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from gigabatch.trainer.config.reference import config_reference
from gigabatch.trainer.objectives.documentation import with_generated_table

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)")


def recipes() -> str:
    """Return every config of configs/, under its file name."""
    lines = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        lines += ["", f"## {path.stem}", "", "```yaml", path.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


GENERATED = {"recipes.md": recipes, "reference/config.md": config_reference}
"""Page -> function that returns its generated part, which replaces the part after MARK."""
MARK = "<!-- generated -->"
"""Line of a page; what follows is for readers of the files, as on GitHub."""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the generated parts of a page, and rewrite links.

    Links to folders lead to their README.md. Of links out of docs/, those to a config lead to its
    recipe, and all others become plain text.
    """
    if generate := GENERATED.get(page.file.src_uri):
        return markdown.partition(MARK)[0] + generate()
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
