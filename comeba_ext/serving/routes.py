"""What a server does beside answering: its edits, and its tokenizer (as vLLM's servers offer theirs; lm-evaluation-harness asks for it)."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from comeba_ext.serving.answers import Refused, finite
from comeba_ext.serving.requests import Limits, Tokens
from comeba_ext.serving.service import EditingService


def edits_router(service: EditingService, edit_token: str | None, limits: Limits) -> APIRouter:
    """List, add, retract, for who knows the token; ``None``: for nobody."""
    router = APIRouter()
    # Not those of the event loop, which would be waited for however it is ended. (The edits themselves have their own line.)
    threads = ThreadPoolExecutor(16, "wait for edits")

    async def beside(change: Callable, *args):
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, change, *args)
        except asyncio.CancelledError:
            raise Refused(503, "the server was stopped; whether the edits were made is seen when it is back") from None

    def allowed(request: Request) -> None:
        if edit_token is None:
            raise Refused(403, "edits cannot be seen or changed here: the server was started without an edit token")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), edit_token.encode()):
            raise HTTPException(401, "the edit token is missing or wrong: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    def listed() -> dict:
        return {"object": "list", "step": service.step, "data": [edit.to_dict() for edit in service.edits()]}

    @router.get("/v1/edits")
    async def edits(request: Request) -> dict:
        allowed(request)
        return listed()

    @router.post("/v1/edits")
    async def add(request: Request) -> dict:
        allowed(request)
        asked = await _json(request)
        requests = asked.get("requests", [asked]) if isinstance(asked, dict) else asked
        if not isinstance(requests, list) or not all(isinstance(own, dict) for own in requests):
            raise Refused(400, 'send one edit, a list of them, or {"requests": [...]}, each with prompt, subject and target_new')
        if not 0 < len(requests) <= limits.edits:
            raise Refused(400, f"{len(requests)} edits; 1 to {limits.edits} a batch")
        report = await beside(service.add, requests)
        return {"object": "edit_report", **finite(report.to_dict())}

    @router.delete("/v1/edits")
    async def retract_several(request: Request) -> dict:
        allowed(request)
        asked = await _json(request)
        ids = asked.get("ids") if isinstance(asked, dict) else None
        if not isinstance(ids, list) or not ids or not all(isinstance(own, str) for own in ids):
            raise Refused(400, 'send {"ids": [...]}, the ids of edits to take back', "ids")
        return await taken_back(ids)

    @router.delete("/v1/edits/{edit_id:path}")
    async def retract(request: Request, edit_id: str) -> dict:
        allowed(request)
        return await taken_back([edit_id])

    async def taken_back(ids: list[str]) -> dict:
        live = {edit.id for edit in service.edits() if edit.superseded is None}
        for own in ids:
            if own not in live:
                raise Refused(404, f"there is no edit {own!r} that could be taken back", "id")
        await beside(service.retract, ids)
        return {"object": "edits.retracted", "ids": ids, "step": service.step}

    return router


class _Text(BaseModel):
    prompt: str
    add_special_tokens: bool = True


class _Numbers(BaseModel):
    tokens: Tokens


def tokenizer_router(service: EditingService) -> APIRouter:
    router = APIRouter()

    @router.get("/tokenizer_info")
    async def about() -> dict:
        own = service.tokenizer
        words = {name: getattr(own, name, None) for name in ("bos_token", "eos_token", "pad_token")}
        return {"tokenizer_class": type(own).__name__, **words, "chat_template": getattr(own, "chat_template", None)}

    # Not in the event loop: a long text takes a second.
    @router.post("/tokenize")
    def tokenize(body: _Text) -> dict:
        tokens = service.tokens(body.prompt, add_special_tokens=body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens)}

    @router.post("/detokenize")
    def detokenize(body: _Numbers) -> dict:
        if body.tokens and max(body.tokens) >= len(service.tokenizer):
            raise Refused(400, f"the tokenizer has {len(service.tokenizer)} tokens, from 0 on", "tokens")
        return {"prompt": service.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)}

    return router


async def _json(request: Request):
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
