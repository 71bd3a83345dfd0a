"""Pages that need nothing but themselves: one HTML file with its style, charts and pictures inside."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

HERE = Path(__file__).parent


def render_page(template: Path, **values: object) -> str:
    """Return a page; every value that is no chart is escaped.

    Args:
        template: Fills the blocks of base.html.
        values: That it shows.
    """
    loader = FileSystemLoader([template.parent, HERE])
    pages = Environment(loader=loader, autoescape=select_autoescape(default=True), trim_blocks=True)
    return pages.get_template(template.name).render(**values)
