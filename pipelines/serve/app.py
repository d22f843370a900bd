"""The HTTP interface: routes over a :class:`Service`, and the page."""

import hashlib
import hmac
from collections.abc import Collection, Mapping
from importlib import metadata, resources
from typing import Any

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from pipelines.knn_service import knn_router
from pipelines.serve.answers import Service
from pipelines.serve.asking import Asked, AskedTerm, json_bytes, read_asked, read_json
from pipelines.serve.docs_page import STYLE, docs_page
from pipelines.serve.limits import COOKIE, FAULT, Gate, Limits, Refused, cookie_of
from pipelines.serve.thumbnails import SIDES, Thumbnails

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_EXAMPLE = {
    "terms": [{"text": "red car"}, {"text": "truck", "weight": -0.5}],
    "k": 12,
    "where": "width > 200",
}
_ASKED = "#/components/schemas/Asked"
_BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _ASKED}, "example": _EXAMPLE},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "query": {
                            "type": "string",
                            "description": 'The JSON; a term {"upload": 0} names the first file.',
                        },
                        "images": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "Files of pictures.",
                        },
                    },
                }
            },
        },
    }
}


class _Login(BaseModel):
    token: str = Field(description="What the server was started with.")


class _Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


def application(
    service: Service, *, token: str | None = None, hosts: Collection[str] | None = None
) -> Gate:
    """The whole server as an ASGI application.

    Args:
        service: What answers.
        token: What clients must know; None = it is open to all.
        hosts: Names that the server may be called by; None = any.
    """
    app = FastAPI(
        title="align serve",
        description="Search pictures by words, pictures, and both.",
        version=metadata.version("clip-align"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_errors(app)
    _add_search(app, service)
    _add_rows(app, service)
    _add_state(app, service)
    _add_login(app, token, service.limits)
    app.include_router(knn_router(service))
    pages = _add_pages(app)
    _describe(app)
    return Gate(
        app,
        limits=service.limits,
        metrics=service.metrics,
        token=token,
        open_paths={*pages, "/health", "/api/login"},
        hosts=hosts,
    )


def _add_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _Json({"error": error.line}, error.status, error.headers)

    async def not_so(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _Json({"error": str(error.detail)}, error.status_code, error.headers)

    async def unlike(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return _Json({"error": f"{place}: {first['msg']}"}, 422)

    async def ours(_: Request, __: Exception) -> Response:  # and the gate logs it
        return _Json({"error": FAULT}, 500)

    app.add_exception_handler(Exception, ours)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, not_so)
    app.add_exception_handler(RequestValidationError, unlike)


def _add_search(app: FastAPI, service: Service) -> None:
    @app.get("/api/indexes", response_model=None)
    async def indexes() -> Response:
        """The indexes that can be asked, with the fields of their rows."""
        found = [await service.apart(one.summary) for one in service.indexes.values()]
        return _Json(found)

    @app.post("/api/search", response_model=None, openapi_extra=_BODIES)
    async def search(request: Request) -> Response:
        """Rows that are most like what is asked for."""
        asked, files = await _read(request, service)
        return _Json(await service.answer(asked, files))


async def _read(request: Request, service: Service) -> tuple[Asked, list[bytes]]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return read_asked(await request.body(), service.limits), []
    if kind != "multipart/form-data":
        raise Refused(415, "send application/json or multipart/form-data")
    limits = service.limits
    try:
        async with request.form(
            max_files=limits.terms, max_fields=4, max_part_size=limits.body
        ) as form:
            query = form.get("query")
            if not isinstance(query, str):
                raise Refused(400, "the form has no field `query`")
            uploads = [one for one in form.getlist("images") if isinstance(one, UploadFile)]
            return read_asked(query, limits), [await one.read() for one in uploads]
    except (MultiPartException, HTTPException) as error:
        said = error.detail if isinstance(error, HTTPException) else error.message
        raise Refused(400, f"the form cannot be read: {said}") from None


def _add_rows(app: FastAPI, service: Service) -> None:
    thumbnails = Thumbnails()

    @app.get("/api/rows/{index}/{id}", response_model=None)
    async def row(index: str, row_id: int = Path(alias="id")) -> Response:
        """The metadata of a row."""
        return _Json(service.row(index, row_id))

    @app.get("/api/pictures/{index}/{id}", response_model=None)
    async def picture(
        request: Request,
        index: str,
        row_id: int = Path(alias="id"),
        side: int = Query(256, ge=SIDES[0], le=SIDES[1], description="Of its longer side."),
    ) -> Response:
        """The picture of a row, as WebP."""
        served = service.index(index)
        source = service.row_source(served, row_id)
        tag = hashlib.sha256(f"{source.data}/{row_id}/{side}".encode()).hexdigest()[:20]
        headers = {"etag": f'"{tag}"', "cache-control": "private, max-age=86400"}
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        data = thumbnails.kept(served, row_id, side)
        if data is None:
            data = await service.apart(thumbnails.made, served, row_id, side)
        return Response(data, headers=headers, media_type="image/webp")


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        """That models and indexes are loaded and questions are answered."""
        return _Json({"status": "ok", "indexes": list(service.indexes)})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_login(app: FastAPI, token: str | None, limits: Limits) -> None:
    body = {"schema": _Login.model_json_schema(), "example": {"token": "..."}}
    extra = {"requestBody": {"required": True, "content": {"application/json": body}}}

    @app.post("/api/login", response_model=None, openapi_extra=extra)
    async def login(request: Request) -> Response:
        """Sets the cookie that stands for the token."""
        given = read_json(_Login, await request.body(), limits).token
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise Refused(401, "this is not the token of this server")
        response = _Json({"status": "ok"})
        if token is not None:
            response.set_cookie(
                COOKIE,
                cookie_of(token),
                httponly=True,
                samesite="strict",
                secure=request.url.scheme == "https",
                max_age=30 * 86_400,
            )
        return response


def _add_pages(app: FastAPI) -> set[str]:
    """Serve the page's files from memory, and the page of the interface."""
    files = page_files()
    files["/docs.css"] = (STYLE.encode(), _TYPES[".css"])
    headers = {"cache-control": "no-cache"}

    def add(path: str, data: bytes, kind: str) -> None:
        tag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        told = {**headers, "etag": tag, "content-type": kind}

        async def file(request: Request) -> Response:
            same = tag in request.headers.get("if-none-match", "")
            return Response(status_code=304, headers=told) if same else Response(data, 200, told)

        app.add_api_route(
            path, file, methods=["GET", "HEAD"], include_in_schema=False, response_model=None
        )

    for path, (data, kind) in files.items():
        add(path, data, kind)

    @app.get("/docs", include_in_schema=False, response_model=None)
    async def docs() -> Response:
        return Response(docs_page(app.openapi()), headers=headers, media_type="text/html")

    return set(files)


def page_files() -> dict[str, tuple[bytes, str]]:
    """Content and type of each file of the page, by path."""
    folder = resources.files("pipelines.serve") / "page"
    found = {}
    for file in folder.iterdir():
        kind = _TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            path = "/" if file.name == "index.html" else f"/{file.name}"
            found[path] = (file.read_bytes(), kind)
    return found


def _describe(app: FastAPI) -> None:
    """Put the schema of a search into the OpenAPI document: it is read by hand, for speed."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
        asked: Mapping[str, Any] = Asked.model_json_schema(
            ref_template="#/components/schemas/{model}"
        )
        schemas["AskedTerm"] = AskedTerm.model_json_schema()
        schemas["Asked"] = {key: value for key, value in asked.items() if key != "$defs"}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
