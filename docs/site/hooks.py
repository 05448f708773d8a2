"""What mkdocs is told of the site: its pages are those of `pages`, and anchors are GitHub's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mkdocs loads this file by its path alone

from docs.site import pages, reference
from raytower.commands import COMMANDS


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation gets the pages of the commands."""
    (section,) = (item["Reference"] for item in config.nav or [] if "Reference" in item)
    commands: list[Any] = [{name: reference.page_name(name)} for name in COMMANDS]
    section.append({"Commands": commands})
    config.mdx_configs.setdefault("toc", {})["slugify"] = lambda text, separator: reference.slug(text)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages in place of the files of docs/, whose images and configs go along."""
    for file in list(files.documentation_pages()):
        files.remove(file)
    for path, text in pages.pages().items():
        files.append(File.generated(config, path, content=text))
    return files
