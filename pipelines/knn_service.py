"""clip-retrieval's HTTP interface over our indexes, so that its clients work with our server.

    POST /knn-service     hits for a text, a picture or an embedding
    POST /metadata        the metadata of rows
    GET /indices-list     names of the indexes

What differs from there: `id` is a row's stable id and not its place; an embedding may have any
length, so `similarity` is always a cosine; lists that `deduplicate` thins are filled up again;
`image_url` is refused, since no URL is fetched on a client's word, and so is `use_mclip`, since
texts have one encoder. `use_safety_model`, `use_violence_detector`, `aesthetic_score` and
`aesthetic_weight` do nothing, as there without such a model. Where rows have pictures but no `url`,
theirs is one of this server.
"""

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from pipelines.config import ConfigError
from pipelines.queries import Query, Term
from pipelines.serve.answers import Service
from pipelines.serve.asking import base64_bytes, json_bytes, picture_of, read_json, rows_of
from pipelines.serve.indexes import ServedIndex
from pipelines.serve.limits import Limits, Refused

DUPLICATE = 0.94
"""Rows with this cosine are one to `deduplicate`; clip-retrieval's own figure."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class KnnAsked(BaseModel):
    """The body of `/knn-service`; what it does not know is ignored."""

    text: str | None = Field(default=None, description="What to look for, in words.")
    image: str | None = Field(default=None, description="A picture's file, in base64.")
    image_url: str | None = Field(default=None, description="Refused: no URL is fetched.")
    embedding_input: list[Number] | None = Field(default=None, description="An embedding.")
    modality: Literal["image", "text"] = Field(default="image", description="What to find.")
    num_images: int = Field(default=40, ge=1, description="Hits that come with metadata.")
    num_result_ids: int | None = Field(
        default=None, ge=1, description="Hits in all; as many as may be asked for, at most."
    )
    indice_name: str | None = Field(default=None, description="The index; null if it is the one.")
    deduplicate: bool = Field(default=False, description="Leave near-duplicates out.")
    use_mclip: bool = Field(default=False, description="Refused: texts have one encoder.")


class MetadataAsked(BaseModel):
    """The body of `/metadata`."""

    ids: list[int] = Field(description="Ids of rows.")
    indice_name: str | None = Field(default=None, description="The index; null if it is the one.")


def knn_router(service: Service) -> APIRouter:
    """The three routes over a service; they answer as clip-retrieval's backend does."""
    router = APIRouter(tags=["clip-retrieval"])

    @router.post("/knn-service", response_model=None, openapi_extra=_body(KnnAsked))
    async def knn(request: Request) -> Response:
        """Rows that are most like a text, a picture or an embedding."""
        asked = read_json(KnnAsked, await request.body(), service.limits)
        return _answer(await _hits(service, asked, str(request.base_url)))

    @router.post("/metadata", response_model=None, openapi_extra=_body(MetadataAsked))
    async def metadata(request: Request) -> Response:
        """The metadata of rows."""
        asked = read_json(MetadataAsked, await request.body(), service.limits)
        if len(asked.ids) > service.limits.k:
            raise Refused(400, f"ids: at most {service.limits.k}, not {len(asked.ids)}")
        served = service.index(asked.indice_name)
        found = rows_of(asked.ids, served)
        rows = await service.apart(served.searcher.rows.metadata, found)
        url = str(request.base_url)
        return _answer([{"id": row["id"], "metadata": _metadata(row, served, url)} for row in rows])

    @router.get("/indices-list", response_model=None)
    async def indices() -> Response:
        """Names of the indexes."""
        return _answer(list(service.indexes))

    return router


async def _hits(service: Service, asked: KnnAsked, url: str) -> list[dict[str, Any]]:
    """The answer of `/knn-service`; the first `num_images` hits have their metadata."""
    limits = service.limits
    if asked.num_images > limits.k:
        raise Refused(400, f"num_images: at most {limits.k}, not {asked.num_images}")
    count = min(asked.num_result_ids or asked.num_images, limits.k)
    served = _index(service, asked)
    query = await service.apart(_query, asked, served, limits)
    encoded = await service.encode(served, query)
    options = {"collapse": DUPLICATE} if asked.deduplicate else {}
    hits, _ = await service.find(served, encoded.vector, count, **options)
    return [
        {
            **(_metadata(row, served, url) if place < asked.num_images else {}),
            "id": row["id"],
            "similarity": score,
        }
        for place, (row, score) in enumerate(
            zip(hits.rows[0], hits.scores[0].tolist(), strict=False)
        )
    ]


def _index(service: Service, asked: KnnAsked) -> ServedIndex:
    """The index of that name, or the other one of its data that holds the modality asked for.

    There, pictures and texts are two indexes under one name; here every index has a name.
    """
    if asked.indice_name is None and len(service.indexes) > 1:
        named = next(iter(service.indexes.values()))
    else:
        named = service.index(asked.indice_name)
    data = named.searcher.card.sources[0].data
    for one in (named, *service.indexes.values()):
        card = one.searcher.card
        if card.modality == asked.modality and card.sources[0].data == data:
            return one
    if named.searcher.card.modality == "fused":
        return named
    raise Refused(
        400,
        f"modality: index {named.name} holds {named.searcher.card.modality} embeddings, and no "
        f"index of the same data holds {asked.modality} embeddings",
    )


def _query(asked: KnnAsked, served: ServedIndex, limits: Limits) -> Query:
    """The query of a request; text comes first and embedding last, as there."""
    if asked.use_mclip:
        raise Refused(400, "use_mclip: this server has one text encoder, that of its model")
    if asked.text:
        if len(asked.text) > limits.text:
            raise Refused(400, f"text: at most {limits.text} characters, not {len(asked.text)}")
        term = Term(asked.text)
    elif asked.image:
        term = Term(picture_of(base64_bytes(asked.image, "image"), limits))
    elif asked.image_url:
        raise Refused(400, "image_url: this server fetches no URLs; send the picture as `image`")
    elif asked.embedding_input:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
            term = Term(np.array(asked.embedding_input, np.float32))
    else:
        raise Refused(400, "give one of text, image and embedding_input")
    query = Query((term,))
    try:
        served.encoder.encoder.check(query)
    except ConfigError as error:
        raise Refused(400, str(error)) from None
    return query


def _metadata(row: dict[str, Any], served: ServedIndex, url: str) -> dict[str, Any]:
    """A row's columns, and where its picture is."""
    found = {name: value for name, value in row.items() if name != "id"}
    if served.has_pictures and not found.get("url"):
        found["url"] = url.rstrip("/") + served.picture(row["id"])
    return found


def _body(schema: type[BaseModel]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _answer(value: list[Any]) -> Response:
    return Response(json_bytes(value), media_type="application/json")
