"""MkDocs hooks: pages that stand outside docs/ in the repository, at the same place on the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/*", "notebooks/*.ipynb")


@event_priority(100)  # before the plugin that takes the notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that pages link to."""
    for pattern in OUTSIDE:
        for file in sorted(ROOT.glob(pattern)):
            place = str(file.relative_to(ROOT))
            files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`../` leads out of docs/ in the repository and nowhere else on the site, and `docs/` into it."""
    return re.sub(r"\]\((\.\./(?=benchmarks/|notebooks/|CHANGELOG|CONTRIBUTING)|docs/)", "](", markdown)
