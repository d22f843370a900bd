"""The interface as a page: what OpenAPI says of it, without a script from anywhere."""

import json
from html import escape
from typing import Any

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="stylesheet" href="/docs.css"></head><body><main>
<h1>{title}</h1><p>{about}</p>
<p>For programs: <a href="/openapi.json">openapi.json</a></p>
"""
STYLE = """:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
main{max-width:52rem;margin:2rem auto;padding:0 1rem}
h2{font:600 1.05rem ui-monospace,monospace;margin:2.5rem 0 .3rem}
h2 b{display:inline-block;min-width:3.5rem}
table{border-collapse:collapse;width:100%}
td{border-top:1px solid #8884;padding:.3rem .6rem .3rem 0;vertical-align:top}
pre{overflow-x:auto;background:#8881;padding:.8rem;border-radius:.4rem}
code{font:.9em ui-monospace,monospace}
"""


def docs_page(interface: dict[str, Any]) -> str:
    """A page of what an OpenAPI document describes."""
    info = interface["info"]
    parts = [_HEAD.format(title=escape(info["title"]), about=escape(info.get("description", "")))]
    schemas = interface.get("components", {}).get("schemas", {})
    for path, methods in interface["paths"].items():
        for method, said in methods.items():
            parts.append(f"<h2><b>{method.upper()}</b> {escape(path)}</h2>")
            parts.append(f"<p>{escape(said.get('description') or said.get('summary', ''))}</p>")
            parts.append(_table(_parameters(said)))
            for kind, content in said.get("requestBody", {}).get("content", {}).items():
                parts.append(f"<p>Body: <code>{escape(kind)}</code></p>")
                parts.append(_table(_properties(content.get("schema", {}), schemas)))
                if "example" in content:
                    example = json.dumps(content["example"], indent=1)
                    parts.append(f"<pre>{escape(example)}</pre>")
    return "".join([*parts, "</main></body></html>"])


def _parameters(said: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (one["name"], _kind(one.get("schema", {})), one.get("description", ""))
        for one in said.get("parameters", [])
    ]


def _properties(schema: dict[str, Any], schemas: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "$ref" in schema:
        schema = schemas.get(schema["$ref"].rpartition("/")[2], {})
    rows = []
    for name, one in schema.get("properties", {}).items():
        default = f" (default {json.dumps(one['default'])})" if "default" in one else ""
        rows.append((name, _kind(one), one.get("description", "") + default))
    return rows


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type") or schema.get("$ref", "").rpartition("/")[2])


def _table(rows: list[tuple[str, str, str]]) -> str:
    cells = [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td>"
        f"<td>{escape(said)}</td></tr>"
        for name, kind, said in rows
    ]
    return f"<table>{''.join(cells)}</table>" if cells else ""
