"""What a release adds to the metadata: addresses, and a README that needs no checkout beside it.

The address of the repository is no part of the repository. A release names it:
``CONVSPECTRA_REPOSITORY=https://HOST/OWNER/NAME python -m build``. Links and images of README.md
that lead to files are then absolute, as the page of a package index needs them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAPER = "https://arxiv.org/abs/2102.04294"
"""The address of the paper."""
VARIABLE = "CONVSPECTRA_REPOSITORY"
"""The environment variable with the address of the repository."""
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:|#|mailto:)(?P<path>[^)\s]+)\)")
"""A link or an image of Markdown that leads to a file of the repository."""


def absolute(readme: str, repository: str) -> str:
    """The text with links to files as links into the repository, images to the files themselves."""

    def whole(match: re.Match[str]) -> str:
        kind = "raw" if match["image"] else "blob"
        return f"{match['image']}[{match['text']}]({repository}/{kind}/HEAD/{match['path']})"

    return LINK.sub(whole, readme)


class ReleaseMetadata(MetadataHookInterface):
    """Fills ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the table ``project``."""
        repository = os.environ.get(VARIABLE, "").rstrip("/")
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        urls = {"Paper": PAPER}
        if repository:
            readme = absolute(readme, repository)
            urls["Source"] = repository
            urls["Documentation"] = f"{repository}/blob/HEAD/docs/index.md"
            urls["Changelog"] = f"{repository}/blob/HEAD/CHANGELOG.md"
            urls["Issues"] = f"{repository}/issues"
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
        metadata["urls"] = urls
