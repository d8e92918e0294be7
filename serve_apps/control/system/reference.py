"""Routes of the API's own description: the OpenAPI document, and a page that lists the routes.

The page runs no script and loads nothing: it is one static table.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse

from serve_apps.control.http.access import VIEWER

_STYLE = "body{font:1rem sans-serif;margin:2rem}td,th{text-align:left;padding:.2rem 1rem .2rem 0;vertical-align:top}"
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def add_reference_routes(api: FastAPI) -> None:
    """Add ``GET /openapi.json`` and ``GET /docs``, which the document itself does not list."""

    @api.get("/openapi.json", dependencies=VIEWER, include_in_schema=False)
    def document() -> Response:
        return JSONResponse(api.openapi())

    @api.get("/docs", dependencies=VIEWER, include_in_schema=False)
    def page() -> Response:
        return HTMLResponse(_page(api.openapi()), headers=_HEADERS)


def _page(document: dict[str, Any]) -> str:
    title = escape(document["info"]["title"])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>Parameters, bodies and responses are in <a href=openapi.json>openapi.json</a>.</p>"
        f"<table><tr><th>request<th>any scope of<th>what it does{''.join(_rows(document))}</table>"
    )


def _rows(document: dict[str, Any]) -> Iterator[str]:
    for path, verbs in sorted(document["paths"].items()):
        for verb, facts in verbs.items():
            scopes = ", ".join(facts["x-scope"]) or "none needed"
            text = facts.get("description") or facts.get("summary", "")
            cells = f"{verb.upper()} {path}", scopes, text.split("\n\n")[0]
            yield "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells)
