"""Base classes of request and response models."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator

# What every reader of JSON keeps exactly (RFC 8259, section 6).
MAX_INTEGER = 2**53 - 1


class View(BaseModel):
    """A frozen part of a response. A client ignores fields that a newer server adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True, protected_namespaces=())

    @classmethod
    def of(cls, source: object, **fields: object) -> Self:
        """The view of an object: its attributes by the names of the view's fields, and ``fields`` instead of some."""
        attributes = {name: getattr(source, name) for name in cls.model_fields if hasattr(source, name)}
        return cls.model_validate(attributes | fields)


def etag_of(revision: int) -> str:
    """The ETag of a revision of settings."""
    return f'"{revision}"'


class RequestBody(BaseModel):
    """A request body. Unknown fields and values of another JSON type are refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _is_of_the_documented_types(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        body = handler(value)
        for name, given in value.items() if isinstance(value, dict) else ():
            expected, actual = _json_type(getattr(body, name)), _json_type(given)
            if expected and actual and expected != actual:
                raise ValueError(f"{name} is {expected}, and was sent as {actual}")
        return body


def _json_type(value: Any) -> str | None:
    """The JSON type of a value that pydantic would convert: true to 1, and "1" to either."""
    match value:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
    return None
