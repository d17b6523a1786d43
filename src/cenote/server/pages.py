"""The page that shows the API's description: HTML alone, which loads nothing, so that it works without internet."""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
"""Headers of the page: a browser loads and runs nothing for it, whatever the description holds."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
summary { cursor: pointer; padding: .3rem 0; }
summary b { display: inline-block; width: 3.5rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; width: 100%; }
td, th { border-top: 1px solid #8884; padding: .25rem .5rem; text-align: left; vertical-align: top; }
details p { white-space: pre-line; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } a { color: #8bf; } }
"""
PLACE = "#/components/schemas/"


def page(description: Mapping[str, Any], address: str) -> str:
    """Return the page of an OpenAPI description.

    Args:
        description: of routes, with the schemas of their bodies.
        address: of the description itself.
    """
    info, schemas = description["info"], description["components"]["schemas"]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(info['title'])}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>",
        f'<p>As OpenAPI: <a href="{escape(address)}">{escape(address)}</a></p>',
    ]
    for tag, operations in groupby(_operations(description), lambda entry: entry[2]["tags"][0]):
        parts.append(f"<h2>{escape(tag)}</h2>")
        parts += [_operation(method, path, operation, schemas) for method, path, operation in operations]
    parts.append("<h2>Objects in bodies</h2>")
    parts += [_schema(name, schema) for name, schema in sorted(schemas.items())]
    return "\n".join([*parts, "</body></html>"])


def _operations(description: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return method, path and description of each route, those of a dialect together."""
    entries = [
        (method, path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    tags = list(dict.fromkeys(operation["tags"][0] for _, _, operation in entries))
    return sorted(entries, key=lambda entry: tags.index(entry[2]["tags"][0]))


def _operation(method: str, path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    head = f"<summary><b>{method.upper()}</b> <code>{escape(path)}</code> {escape(operation['summary'])}</summary>"
    text = f"<p>{escape(operation['description'])}</p>"
    body = operation.get("requestBody")
    if body is None:
        return f"<details>{head}{text}</details>"
    name = body["content"]["application/json"]["schema"]["$ref"].removeprefix(PLACE)
    return f"<details>{head}{text}{_fields(schemas[name])}</details>"


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    name, text = escape(name), escape(schema.get("description", ""))
    head = f"<summary><code>{name}</code></summary><p>{text}</p>"
    return f'<details id="{name}">{head}{_fields(schema)}</details>'


def _fields(schema: Mapping[str, Any]) -> str:
    """Return the table of an object's fields."""
    required = schema.get("required", ())
    rows = [_field(name, field, name in required) for name, field in schema.get("properties", {}).items()]
    if not rows:
        return f"<p>{_type(schema)}</p>"
    return f"<table><tr><th>field</th><th>type</th><th>default</th><th></th></tr>{''.join(rows)}</table>"


def _field(name: str, field: Mapping[str, Any], is_required: bool) -> str:
    default = "required" if is_required else str(field.get("default", ""))
    cells = [f"<code>{escape(name)}</code>", _type(field), escape(default), escape(field.get("description", ""))]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _type(schema: Mapping[str, Any]) -> str:
    """Return the type of values in words; objects lead to their tables."""
    return " | ".join(dict.fromkeys(_types([schema])))


def _types(schemas: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for schema in schemas:
        if "$ref" in schema:
            name = escape(schema["$ref"].removeprefix(PLACE))
            yield f'<a href="#{name}">{name}</a>'
        elif "anyOf" in schema:
            yield from _types(schema["anyOf"])
        elif "enum" in schema:
            yield from (escape(repr(value)) for value in schema["enum"])
        elif schema.get("type") == "array":
            yield f"list[{_type(schema.get('items', {}))}]"
        else:
            yield escape(str(schema.get("const", schema.get("type", "any"))))
