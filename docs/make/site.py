"""What `mkdocs` is told of this repository: pages and pictures that lie outside `docs/`, and links to them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Files elsewhere that are on the site, and where.
BROUGHT = {
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    **{path: path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "results").rglob("*.png"))},
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Brings the files from outside."""
    for path, uri in BROUGHT.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links, which lead through the repository, into links through the site."""
    source = Path(page.file.abs_src_path or "")

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"\w+:", path):
            return found[0]
        file = (source.parent / path).resolve()
        if file.is_relative_to(DOCS):
            uri = file.relative_to(DOCS).as_posix()
        elif file in BROUGHT:
            uri = BROUGHT[file]
        else:  # code and configs, which the site has not: their name is said
            return text
        there = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({there}{'#' + anchor if anchor else ''})"

    blocks = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(block if block.startswith("```") else LINK.sub(link, block) for block in blocks)
