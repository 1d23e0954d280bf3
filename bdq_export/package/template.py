"""Render a Jinja template that lies in a package's `templates` folder."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def megabytes(size: int) -> str:
    """Bytes as people read them: "86.3 MB"."""
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def render(package: str, name: str, **values: Any) -> str:
    """Text of template `templates/<name>` of `package`; HTML templates escape what is put into them.

    Raises:
        jinja2.UndefinedError: the template uses a value that was not given.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["megabytes"] = megabytes
    source = files(package).joinpath("templates", name).read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)
