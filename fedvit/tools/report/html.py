"""Self-contained HTML pages from the Jinja2 templates of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from fedvit.atomic_write import write_atomically


def write_html(path: Path, template: str, **context: Any) -> None:
    """Render a template with its style sheet inlined and write it to ``path``, whole or not at all. Text is escaped."""
    environment = Environment(loader=PackageLoader("fedvit.tools.report"), autoescape=True)
    write_atomically(path, environment.get_template(template).render(context))
