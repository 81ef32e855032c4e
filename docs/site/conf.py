"""How `make docs` builds the documentation site (docs/adr/0021-documentation-site.md). Its source is the root."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HOME = "docs/index"

project = "lucid-compute"
copyright = "the lucid-compute maintainers"  # noqa: A001 - Sphinx reads this name
extensions = ["myst_parser"]
root_doc = HOME
include_patterns = ["*.md", "docs/*.md", "docs/adr/*.md", "clients/*/README.md"]
exclude_patterns = [".*", "build", "data*", "dist", "src", "tests"]
myst_heading_anchors = 4
# Code in languages that Pygments does not know, such as mermaid, or knows in part, is shown as it is.
suppress_warnings = ["misc.highlighting_failure"]
nitpicky = True

html_theme = "furo"
html_title = "lucid-compute"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False


def setup(app: Any) -> None:
    """Take the navigation from the lists of docs/index.md, and lead to that page from the site's root."""
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _lead_home)


def _add_navigation(_app: Any, page: str, source: list[str]) -> None:
    if page == HOME:
        for part in source[0].split("\n## ")[1:]:
            links = re.findall(r"^- \[(.+)\]\((.+)\.md\)$", part, re.MULTILINE)
            entries = "\n".join(f"{title} <{target}>" for title, target in links)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {part.partition(chr(10))[0]}\n\n{entries}\n```\n"
    elif page == "docs/adr/README":
        targets = re.findall(r"\((\d{4}-.+)\.md\)", source[0])
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(targets) + "\n```\n"


def _lead_home(app: Any, error: Exception | None) -> None:
    if error is None:
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={HOME}.html"><title>{project}</title>'
        Path(app.outdir, "index.html").write_text(page, encoding="utf-8")
