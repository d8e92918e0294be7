"""Links in the OpenAPI document: an answer that names a client or an operation leads to every route about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

_NAMES = ("client_id", "operation_id")
_Document = dict[str, Any]


def link_answers(api: FastAPI) -> None:
    """Add the links, now and for routes that are added later."""
    generate = api.openapi

    def openapi() -> _Document:
        known = api.openapi_schema is not None
        document = generate()
        if not known:
            _link(document)
        return document

    api.openapi = openapi  # type: ignore[method-assign]


def _link(document: _Document) -> None:
    for name in _NAMES:
        links = dict(_links_to(document, name))
        for answer in _answers_with(document, name):
            answer.setdefault("links", {}).update(links)


def _links_to(document: _Document, name: str) -> Iterator[tuple[str, Any]]:
    for path, facts in _operations(document):
        if f"{{{name}}}" in path:
            parameters = {name: f"$response.body#/{name}"}
            yield facts["operationId"], {"operationId": facts["operationId"], "parameters": parameters}


def _answers_with(document: _Document, name: str) -> Iterator[_Document]:
    for _, facts in _operations(document):
        for status, answer in facts["responses"].items():
            schema = answer.get("content", {}).get("application/json", {}).get("schema", {})
            if status.startswith("2") and name in _properties(document, schema):
                yield answer


def _properties(document: _Document, schema: _Document) -> _Document:
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    properties: _Document = schema.get("properties", {})
    return properties


def _operations(document: _Document) -> Iterator[tuple[str, _Document]]:
    for path, verbs in document["paths"].items():
        for facts in verbs.values():
            yield path, facts
