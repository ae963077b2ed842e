"""The pages that need no service: health, readiness, metrics, the OpenAPI document and its reader."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from collections.abc import Awaitable, Callable, Collection

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from gateway import openapi
from gateway.backends import READY, Backends
from gateway.comments import Comments
from gateway.encode import dumps
from gateway.exchange import SCOPE_KEY
from gateway.reply import json_reply, text_reply
from gateway.routes import Table
from services.kit.errors import LensmeshError

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class Pages:
    """Answers the fixed paths; none of them needs a token."""

    def __init__(self, table: Table, comments: Comments, backends: Backends, metrics: CollectorRegistry) -> None:
        """Write the documents once.

        Args:
            table: the routes that the document describes.
            comments: its descriptions.
            backends: asked for their readiness.
            metrics: shown at /metrics.
        """
        self._backends, self._metrics = backends, metrics
        self._document = dumps(openapi.document(table, comments))
        self._reader = importlib.resources.files("gateway").joinpath("docs.html").read_text(encoding="utf-8")
        self._pages: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._show_metrics,
            "/openapi.json": self._openapi,
            "/docs": self._docs,
        }

    @property
    def paths(self) -> Collection[str]:
        """The fixed paths."""
        return self._pages.keys()

    async def answer(self, request: Request) -> Response | None:
        """The reply when the path is one of ours.

        Raises:
            LensmeshError: METHOD_NOT_ALLOWED.
        """
        page = self._pages.get(request.scope["path"])
        if page is None:
            return None
        request.scope[SCOPE_KEY].route = request.scope["path"]
        if request.method not in ("GET", "HEAD"):
            raise LensmeshError("this path takes GET", reason="METHOD_NOT_ALLOWED", metadata={"allow": "GET"})
        return await page(request)

    async def _healthz(self, request: Request) -> Response:
        return await json_reply(request.headers, {"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        backends = await self._backends.readiness()
        ready = all(state == READY for state in backends.values())
        value = {"status": "ready" if ready else "not ready", "backends": backends}
        return await json_reply(request.headers, value, 200 if ready else 503, {} if ready else {"retry-after": "1"})

    async def _show_metrics(self, request: Request) -> Response:
        return await text_reply(request.headers, generate_latest(self._metrics), CONTENT_TYPE_LATEST)

    async def _openapi(self, request: Request) -> Response:
        return await text_reply(request.headers, self._document, "application/json")

    async def _docs(self, request: Request) -> Response:
        policy = f"default-src 'none'; connect-src 'self'; {_inline_sources(self._reader)}; base-uri 'none'"
        headers = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
        return await text_reply(request.headers, self._reader.encode(), "text/html; charset=utf-8", extra=headers)


def _inline_sources(page: str) -> str:
    """The only script and style that the page may run: its own, by digest."""
    made = []
    for kind, content in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        made.append(f"{kind}-src 'sha256-{digest}'")
    return "; ".join(made)
