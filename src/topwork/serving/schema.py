"""The OpenAPI document: FastAPI's, with the bodies that are read by hand, and the faults as they really are."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

_REF = "#/components/schemas/"
_BODY = "x-body"
"""Where a body's schema waits: as a requestBody FastAPI would make floats of its bounds, and 2^63 - 1 is none."""
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

SCHEMAS: dict[str, dict[str, str]] = {
    "application/json": {"type": "object"},
    "text/event-stream": {"description": "Events whose data is a chunk, OpenAI's; the last one's is [DONE]."},
}
"""Of answers, by their media type; the others are strings."""


def takes(kind: type[BaseModel], *answers: str) -> dict[str, Any]:
    """For a FastAPI route: its body, and the media types of its answer."""
    return {**gives(*answers), "openapi_extra": {_BODY: kind.model_json_schema(by_alias=True)}}


def gives(*answers: str) -> dict[str, Any]:
    """For a FastAPI route: the media types of its answer."""
    content = {kind: {"schema": dict(SCHEMAS.get(kind, {"type": "string"}))} for kind in answers}
    return {"responses": {200: {"description": "It is done.", "content": content}}, "response_class": Response}


def described(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        schemas.clear()  # FastAPI's own, of its 422
        schemas["Error"] = ERROR
        for path in found["paths"].values():
            for operation in path.values():
                _add_faults(operation)
                if (schema := operation.pop(_BODY, None)) is not None:
                    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
                _hoist(operation.get("requestBody", {}), schemas)
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}, {}]
        app.openapi_schema = found
    return app.openapi_schema


def _add_faults(operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    content = {"application/json": {"schema": {"$ref": _REF + "Error"}}}
    for status, told in (("4XX", "The request is wrong, or not for this caller."), ("5XX", "The server is at fault.")):
        responses[status] = {"description": told, "content": content}


def _hoist(value: Any, schemas: dict[str, Any]) -> None:
    """Definitions of a body's schema to where the whole document has them."""
    if isinstance(value, list):
        for item in value:
            _hoist(item, schemas)
    if not isinstance(value, dict):
        return
    definitions = value.pop("$defs", {})
    if isinstance(ref := value.get("$ref"), str):
        value["$ref"] = ref.replace("#/$defs/", _REF)
    mapping = value.get("discriminator", {})
    if isinstance(mapping, dict) and isinstance(names := mapping.get("mapping"), dict):
        mapping["mapping"] = {name: ref.replace("#/$defs/", _REF) for name, ref in names.items()}
    for item in value.values():
        _hoist(item, schemas)
    for name, schema in definitions.items():
        _hoist(schema, schemas)
        schemas[name] = schema
