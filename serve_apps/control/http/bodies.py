"""JSON in request bodies, whatever their content type says, explained where it is none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from fastapi import Request
from pydantic import BaseModel

from fedvit.errors import InvalidJsonError, InvalidRequestError

# What documentation writes where a value belongs.
_PLACEHOLDER = re.compile(r"\{\s*(\.\.\.|…)\s*\}|\[\s*(\.\.\.|…)\s*\]|:\s*(\.\.\.|…)")


def parse_json(content: bytes, max_depth: int, example: Callable[[], Any]) -> Any:
    """The JSON value in a body.

    Raises:
        InvalidJsonError: it is none, or nests too deeply; ``example`` is then asked for what would be right.
    """

    def refuse(why: str) -> NoReturn:
        shown = example()
        raise InvalidJsonError(why, **({} if shown is None else {"example": shown}))

    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_unique)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        refuse(f"The body is not UTF-8 at byte {error.start}; send JSON in UTF-8.")
    except UnicodeEncodeError:
        refuse("A text in the body holds half of a surrogate pair, which is no character.")
    except RecursionError:
        refuse(f"The body nests too deeply; {max_depth} levels are allowed.")
    except ValueError as error:
        _refuse_text(text, error, refuse)
    if _is_deeper(value, max_depth):
        refuse(f"The body nests too deeply; {max_depth} levels are allowed.")
    return value


def check_no_fields(value: Any) -> None:
    """A route that takes no body admits ``{}``.

    Raises:
        InvalidRequestError: there are fields, which are named, or there is something else (422).
    """
    if value == {}:
        return
    content = f"the unknown fields {', '.join(map(repr, list(value)[:10]))}" if isinstance(value, dict) else "no object"
    raise InvalidRequestError(f"This route takes no body and was sent {content}.")


def with_body(request: Request, content: bytes) -> Request:
    """The same request with ``content`` as its JSON body, unread."""
    replaced = (b"content-type", b"content-length")
    headers = [(name, value) for name, value in request.scope["headers"] if name not in replaced]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    return Request({**request.scope, "headers": headers}, receive)


def example_of(model: type[BaseModel]) -> Any:
    """A body that the model admits: its fields' ``examples``, else their defaults, else the simplest value."""
    schema = model.model_json_schema()
    return _example(schema, schema.get("$defs", {}))


def _refuse_text(text: str, error: ValueError, refuse: Callable[[str], NoReturn]) -> NoReturn:
    if not text.strip():
        refuse("The body is empty; send a JSON object.")
    if _PLACEHOLDER.search(text):
        refuse("The body has a placeholder ('...') where a value belongs; put your own value there.")
    where = (
        f"line {error.lineno}, column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
    )
    refuse(f"The body is not JSON ({where}).")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Which of two equal names counts differs between parsers, and so between what is audited and what is done.
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field appears twice")
    return fields


def _is_deeper(value: Any, max_depth: int) -> bool:
    level = [value]
    for _ in range(max_depth + 1):
        level = [child for node in level for child in _children(node)]
        if not level:
            return False
    return True


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _example(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    if schema.get("examples"):
        return schema["examples"][0]
    for key in ("default", "const"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return _example(schema[key][0], definitions)
    if "$ref" in schema:
        return _example(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return _simplest(schema, definitions)


def _simplest(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    match schema.get("type"):
        case "object":
            return {name: _example(field, definitions) for name, field in schema.get("properties", {}).items()}
        case "array":
            return [_example(schema.get("items", {}), definitions)]
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
    return "text"
