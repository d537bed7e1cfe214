"""What the site adds to docs/: README, CONTRIBUTING and CHANGELOG as pages, and links to files of the checkout.

A link from a page to a file outside docs/ leads somewhere in a checkout, and nowhere on the site. There its text stays,
once the file has been found to exist.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^]\[]*)\]\((?P<path>[^)#: ]+)(?P<anchor>#[^) ]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that stand outside docs/, as if they stood in it."""
    for source, page in PAGES.items():
        text = _relinked((ROOT / source).read_text(encoding="utf-8"), source)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of a page of docs/, as the site has them."""
    return markdown if page.file.src_uri in PAGES.values() else _relinked(markdown, f"docs/{page.file.src_uri}")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Code in a table has its bars escaped, as GitHub wants it; Python-Markdown leaves the backslashes there."""
    return re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace(r"\|", "|"), html)


def _relinked(markdown: str, source: str) -> str:
    """``markdown`` of the file ``source`` with its links seen from docs/.

    Raises:
        PluginError: a link leads to no file.
    """

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["path"]))
        if not (ROOT / target).exists():
            raise PluginError(f"{source} links to {found['path']}, and there is no {target}")
        if target in PAGES or target.startswith("docs/"):
            path = PAGES.get(target, target.removeprefix("docs/"))
            return f"{found['image']}[{found['text']}]({path}{found['anchor'] or ''})"
        return found["text"]

    return _LINK.sub(link, markdown)
