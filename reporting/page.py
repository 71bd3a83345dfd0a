"""Pages that need nothing but themselves: one HTML file with its style, charts and pictures inside."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

HERE = Path(__file__).parent


def render_page(template: Path, **values: object) -> str:
    """Return a page; every value that is no chart is escaped.

    Args:
        template: Fills the blocks of base.html.
        values: That it shows.
    """
    return _pages(template.parent).get_template(template.name).render(**values)


@cache  # with what it has compiled: a run writes its page after each evaluation
def _pages(folder: Path) -> Environment:
    """Return the templates of a folder, and base.html."""
    loader = FileSystemLoader([folder, HERE])
    return Environment(loader=loader, autoescape=select_autoescape(default=True), trim_blocks=True)
