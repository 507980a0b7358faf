"""The endpoint's routes: what is asked and what is answered. Knows nothing of Ray."""

import asyncio
import base64
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from mmray import __version__
from mmray.serve.limits import PAGE, Limits
from mmray.serve.schema import RETRY_AFTER_S, Item, Problem, Result, ScoreRequest, ScoreResponse
from mmray.serve.scorer import ItemScorer
from mmray.serve.settings import ServeConfig

MAX_FORM_TEXT_BYTES = 2**20
REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        400: "The body is neither JSON nor a form.",
        401: "The bearer token is missing or wrong.",
        408: "The body took too long to arrive.",
        413: "The body or the number of items is too large.",
        415: "The content type is another.",
        422: "A field is unknown, missing or of the wrong type.",
        503: "Busy; try again after `Retry-After` seconds.",
    }.items()
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_FORM = {"properties": {"text": {"type": "string"}, "image": {"type": "string", "format": "binary"}}}
_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": ScoreRequest.model_json_schema(ref_template="#/components/schemas/{model}")},
        "multipart/form-data": {"schema": {"type": "object", **_FORM}},
    },
}


def build_api(scorer: Callable[[], ItemScorer], settings: ServeConfig) -> FastAPI:
    """Returns the ASGI app.

    Args:
        scorer: gives the scorer that answers now; a request keeps the one it began with.
        settings: its bounds.
    """
    # The documentation pages would load scripts from elsewhere; the schema is at /openapi.json.
    api = FastAPI(title="mmray", version=__version__, docs_url=None, redoc_url=None)
    api.add_middleware(Limits, settings=settings)
    if settings.cors_origins:  # outside of the limits: a browser asks for leave without a token
        api.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["Retry-After"],
        )
    api.add_exception_handler(HTTPException, _refused)

    for path, (name, kind) in PAGE.items():
        api.add_api_route(path, _page_file(name, kind), include_in_schema=False)

    @api.get("/healthz", summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @api.get("/readyz", summary="Whether the model is loaded and its golden rows came out right")
    async def readyz() -> dict[str, str]:
        return {"status": "ready", "fingerprint": scorer().bundle.fingerprint}

    @api.get("/v1/model", summary="What answers: task, labels, settings, metrics, fingerprint")
    async def model() -> dict[str, Any]:
        return {**describe(scorer()), "max_items": settings.max_items}

    @api.post("/v1/score", response_model=ScoreResponse, responses=REFUSALS, openapi_extra={"requestBody": _BODY})
    async def score(request: Request) -> ScoreResponse:
        """Scores one item or several; each has a status and a reason of its own, as a row of a scored table has."""
        started, current = time.perf_counter(), scorer()
        items = (await read_request(request)).all_items()
        if len(items) > settings.max_items:
            raise HTTPException(413, f"a request may have {settings.max_items} items, got {len(items)}; split it")
        results = await _in_time(current, items, settings.request_timeout_s)
        milliseconds = round(1000 * (time.perf_counter() - started), 3)
        return ScoreResponse(
            results=results,
            fingerprint=current.bundle.fingerprint,
            request_id=request.scope["request_id"],
            milliseconds=milliseconds,
        )

    return api


def _page_file(name: str, kind: str) -> Callable[[], Response]:
    """Returns a route that gives one file of the page people try the model on."""
    content = files("mmray.serve").joinpath("page", name).read_bytes()

    def give() -> Response:
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    return give


def describe(scorer: ItemScorer) -> dict[str, Any]:
    """Returns what `/v1/model` says."""
    bundle = scorer.bundle
    return {
        "fingerprint": bundle.fingerprint,
        "task": bundle.config.task.kind,
        "labels": bundle.labels,
        "modalities": bundle.config.table.modalities,
        "config": bundle.config.model_dump(mode="json", include={"image", "text", "model", "task"}),
        "metrics": bundle.metrics.get("validation", {}),
        "version": __version__,
    }


async def read_request(request: Request) -> ScoreRequest:
    """Reads a JSON body, or a form with the fields `text` and `image`.

    Raises:
        HTTPException: 400, 415 or 422.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            return ScoreRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise _explained(error) from None
    if kind == "multipart/form-data":
        return await _read_form(request)
    raise HTTPException(415, "send application/json, or multipart/form-data with the fields text and image")


async def _read_form(request: Request) -> ScoreRequest:
    try:
        return await _form_fields(request)
    except UnicodeError:  # of a charset that the client names
        raise HTTPException(400, "the form's charset is not one that a form can have; send UTF-8") from None


async def _form_fields(request: Request) -> ScoreRequest:
    fields: dict[str, Any] = {}
    async with request.form(max_files=1, max_fields=1, max_part_size=MAX_FORM_TEXT_BYTES) as form:
        for name, value in form.multi_items():
            if name == "image" and isinstance(value, UploadFile):
                fields["image"] = {"base64": base64.b64encode(await value.read()).decode()}
            elif name == "text" and isinstance(value, str):
                fields["text"] = value
            else:
                raise HTTPException(422, "a form has the fields text and image (a file), and no other")
    return ScoreRequest.model_validate(fields)


async def _in_time(scorer: ItemScorer, items: tuple[Item, ...], seconds: float) -> list[Result]:
    try:
        async with asyncio.timeout(seconds):
            return await scorer.score(items)
    except TimeoutError:
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        raise HTTPException(503, f"not scored within {seconds:g} s; try again", headers=headers) from None


def _explained(error: ValidationError) -> HTTPException:
    item = error.errors(include_url=False, include_input=False)[0]
    if item["type"] == "json_invalid":
        return HTTPException(400, f"the body is not JSON: {item['msg'].removeprefix('Invalid JSON: ')}")
    where = ".".join(str(part) for part in item["loc"])
    return HTTPException(422, f"{where + ': ' if where else ''}{item['msg'].removeprefix('Value error, ')}")


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {400: "BAD_REQUEST", 413: "TOO_MANY_ITEMS", 415: "BAD_CONTENT_TYPE", 422: "INVALID_FIELD", 503: "TIMEOUT"}
    code = codes.get(error.status_code, str(error.detail).upper().replace(" ", "_"))
    problem = Problem(code=code, message=str(error.detail), request_id=request.scope["request_id"])
    return JSONResponse(problem.model_dump(), error.status_code, headers=error.headers)
