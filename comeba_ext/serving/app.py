"""The server: OpenAI's completions and chats from an :class:`~comeba_ext.serving.service.EditingService`, and its edits.

Every text is generated in one of a few threads, by the model of the last complete state; requests beyond that wait in line. No request is
ever put together with another one's, so what a client gets is what ``generate`` gives for its prompts alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from comeba_ext.errors import ComebaError, StorageError
from comeba_ext.serving.answers import ChatAnswer, Refused, TextAnswer, problem, shown_prompts
from comeba_ext.serving.completion import Cancelled, Sampling
from comeba_ext.serving.requests import FORMS, ChatRequest, CompletionRequest, Limits
from comeba_ext.serving.routes import edits_router, tokenizer_router
from comeba_ext.serving.service import EditingService

log = logging.getLogger(__name__)
Result = TypeVar("Result")
UNEDITED = "-unedited"  # behind the model's name: the model without its edits


class Line:
    """The threads that generate, and who waits for one.

    Args:
        threads: texts that are generated at once.
        waiting: requests that may wait beyond those.
    """

    def __init__(self, threads: int, waiting: int):
        self.pool, self.room, self.inside = ThreadPoolExecutor(threads, "generate"), threads + waiting, 0

    def enter(self, work: Callable, cancel: threading.Event) -> asyncio.Future:
        """Raises :class:`Refused` where the line is full."""
        if self.inside >= self.room:
            raise Refused(429, f"{self.inside} requests are being answered or wait already; try again later", code="rate_limit_exceeded")

        def run():
            if cancel.is_set():
                raise Cancelled
            return work(cancel=cancel)

        def left(future: asyncio.Future) -> None:
            self.inside -= 1
            future.cancelled() or future.exception()  # looked at, where nobody waits for it any more

        self.inside += 1
        future = asyncio.get_running_loop().run_in_executor(self.pool, run)
        future.add_done_callback(left)
        return future


def create_app(
    service: EditingService, name: str, *, edit_token: str | None = None, limits: Limits | None = None, threads: int = 1, waiting: int = 256
) -> FastAPI:
    """The application.

    Args:
        name: the model is asked under; with ``-unedited`` behind it, without its edits.
        edit_token: what who changes the edits must know; ``None``: nobody can, nor see them.
        threads, waiting: as of :class:`Line`.
    """
    app = FastAPI(title="comeba_ext", docs_url=None, redoc_url=None, openapi_url=None)
    limits, line, started = limits or Limits(), Line(threads, waiting), int(time.time())
    names = (name, name + UNEDITED)
    app.add_middleware(_Bounded, limit=limits.body)
    for kind, handler in (
        (Refused, lambda _, error: JSONResponse(error.content, error.status)),
        (StorageError, lambda _, error: JSONResponse(problem(str(error), kind="server_error"), 500)),
        (ComebaError, lambda _, error: JSONResponse(problem(str(error)), 400)),
        (RequestValidationError, lambda _, error: JSONResponse(_malformed(error), 400)),
        (HTTPException, lambda request, error: JSONResponse(problem(_said(request, error)), error.status_code, error.headers)),
        (Exception, lambda _, error: JSONResponse(problem(f"{type(error).__name__} in the server", kind="server_error"), 500)),
    ):
        app.add_exception_handler(kind, handler)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "model": name, "step": service.step, "edits": service.live, "requests": line.inside}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model(own, started) for own in names]}

    @app.get("/v1/models/{asked:path}")
    async def model(asked: str) -> dict:
        _known(asked, names)
        return _model(asked, started)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest):
        sampling = body.checked(limits)
        shown = partial(shown_prompts, service.tokenizer, body.prompts(), sampling.n) if sampling.echo else None
        return await answer(request, body, sampling, TextAnswer(body.model, service.tokenizer, shown))

    @app.post("/v1/chat/completions")
    async def chats(request: Request, body: ChatRequest):
        return await answer(request, body, body.checked(limits), ChatAnswer(body.model, service.tokenizer))

    async def answer(request: Request, body: CompletionRequest | ChatRequest, sampling: Sampling, form: TextAnswer):
        _known(body.model, names)
        prompts, cancel = body.prompts(), threading.Event()
        work = partial(service.complete, prompts, sampling, edited=body.model == name)
        if not body.stream:
            return form.complete(await _waited(request, line.enter(work, cancel), cancel), sampling.n)
        arrived: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def stream(index: int, text: str) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, (index, text))

        future = line.enter(partial(work, stream=stream), cancel)
        future.add_done_callback(lambda _: arrived.put_nowait(None))
        # Before anything is sent, an error is one with a status.
        first = await _waited(request, asyncio.ensure_future(arrived.get()), cancel)
        if first is None:
            future.result()
        count = bool((body.stream_options or {}).get("include_usage"))
        chunks = _chunks(form, arrived, first, future, len(prompts) * sampling.n, sampling.n if count else 0)
        return _Stream(chunks, cancel)

    app.include_router(edits_router(service, edit_token, limits))
    app.include_router(tokenizer_router(service))
    return app


def _said(request: Request, error: HTTPException) -> str:
    if error.status_code == 400:
        return "the body is not JSON"
    return f"there is no {request.method} {request.url.path} here" if error.status_code in (404, 405) else str(error.detail)


def _known(asked: str, names: tuple[str, ...]) -> None:
    if asked not in names:
        raise Refused(404, f"the model {asked!r} is not here; there are {' and '.join(map(repr, names))}", "model", "model_not_found")


def _model(name: str, created: int) -> dict:
    return {"id": name, "object": "model", "created": created, "owned_by": "comeba_ext"}


def _malformed(error: RequestValidationError) -> dict:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    where = next((str(part) for part in first["loc"][1:]), None)
    if first["type"] == "json_invalid":
        return problem("the body is not JSON")
    if where is None:
        return problem("send a JSON object, as Content-Type: application/json")
    return problem(f"{where}: {FORMS.get(where, first['msg'])}", where)


async def _waited(request: Request, future: asyncio.Future[Result], cancel: threading.Event) -> Result:
    """What a thread found, or the first of it; if the client goes away, it is told to stop."""
    try:
        while not future.done():
            await asyncio.wait([future], timeout=1)
            if not future.done() and await request.is_disconnected():
                cancel.set()
                raise Refused(499, "the client went away")
        return future.result()
    except asyncio.CancelledError:
        cancel.set()
        raise Refused(503, "the server was stopped") from None


async def _chunks(
    form: TextAnswer, arrived: asyncio.Queue, item: tuple[int, str] | None, future: asyncio.Future, count: int, n: int
) -> AsyncIterator[str]:
    """Server-sent events; ``n``: usage is asked for, of so many texts a prompt."""
    for chunk in form.begun(count):
        yield _event(chunk)
    while item is not None:
        yield _event(form.more(*item))
        item = await arrived.get()
    try:
        found = future.result()
    except Exception as error:
        log.exception("a stream ended early")
        yield _event(problem(str(error), kind="server_error"))
        return
    for chunk in form.ended(found):
        yield _event(chunk)
    if n:
        yield _event(form.counted(found, n))
    yield "data: [DONE]\n\n"


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class _Stream(StreamingResponse):
    """Events; however the response ends, nobody writes on for it."""

    def __init__(self, chunks: AsyncIterator[str], cancel: threading.Event):
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.cancel = cancel

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.cancel.set()


class _Bounded:
    """Refuses bodies that are too large, by what they say of themselves or by what comes."""

    def __init__(self, app, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = HTTPException(413, f"the body is too large; at most {self.limit} bytes")
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self.limit:
            await JSONResponse(problem(error.detail), 413, {"Connection": "close"})(scope, receive, send)
            return
        size = 0

        async def bounded():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit:
                raise error
            return message

        await self.app(scope, bounded, send)
