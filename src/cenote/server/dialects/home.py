"""`GET /`: whether the server is healthy, and for a browser a small page of its models and routes."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from starlette.responses import HTMLResponse

import cenote
from cenote.server.dialects.operations import health

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.requests import Request
    from starlette.responses import Response

    from cenote.server.serving import Serving

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Cenote</title>
<style>body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}</style>
<h1>Cenote {version}</h1>
{models}
<h2>Routes</h2>
<ul>
{routes}
</ul>
{links}
</html>
"""
HIDDEN = "<p>The models are at <code>/v1/models</code>, with a key.</p>"
"""Stands for the models on a server that asks for keys, since this page does not."""
LINKS = (("docs", "the API"), ("openapi.json", "its description for programs"))
"""Pages of the description, and what they show."""


async def home(serving: Serving, request: Request, body: None) -> Response:
    """As `/health`; a page for clients that accept HTML."""
    if "text/html" not in request.headers.get("accept", ""):
        return await health(serving, request, body)
    return HTMLResponse(
        PAGE.format(
            version=escape(cenote.__version__), models=_models(serving), routes=_routes(serving), links=_links(serving)
        )
    )


def _models(serving: Serving) -> str:
    if serving.config.api_key:
        return HIDDEN
    views = serving.models.views
    return "<h2>Models</h2>\n" + _list(f"{', '.join(view.names)}: {', '.join(view.info.tasks)}" for view in views)


def _routes(serving: Serving) -> str:
    return "\n".join(
        f"<li>{escape(dialect)}: {', '.join(f'<code>{escape(path)}</code>' for path in paths)}</li>"
        for dialect, paths in serving.paths.items()
    )


def _links(serving: Serving) -> str:
    if serving.config.disable_fastapi_docs:
        return ""
    root = escape(serving.config.root_path)
    return "".join(f'<p><a href="{root}/{path}">{text}</a></p>\n' for path, text in LINKS)


def _list(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
