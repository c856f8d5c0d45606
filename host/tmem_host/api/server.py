"""The admin API's HTTP server (docs/architecture.md, Admin API)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar

import msgspec
from aiohttp import web

from tmem_host.api import metrics
from tmem_host.api.types import (
    Capacity,
    ErrorBody,
    ErrorDetail,
    Flushed,
    Freed,
    FreeRequest,
    Policy,
    PoolId,
    ReclaimRequest,
    VmChange,
    VmSpec,
)
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.service.lender import Lender
from tmem_host.service.sockets import is_administrator, peer_uid

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MAX_BODY_BYTES = 64 << 10
_STATUSES = {
    ExitCode.USAGE: HTTPStatus.BAD_REQUEST,
    ExitCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    ExitCode.CONFLICT: HTTPStatus.CONFLICT,
    ExitCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    ExitCode.TIMEOUT: HTTPStatus.GATEWAY_TIMEOUT,
    ExitCode.PRIVILEGE: HTTPStatus.FORBIDDEN,
    ExitCode.NO_SPACE: HTTPStatus.INSUFFICIENT_STORAGE,
}


def application(lender: Lender) -> web.Application:
    """The admin API on a lender."""
    app = web.Application(middlewares=[_guard], client_max_size=_MAX_BODY_BYTES)
    api = _Api(lender)
    app.add_routes(
        [
            web.get("/v1/status", api.status),
            web.put("/v1/capacity", api.set_capacity),
            web.post("/v1/free", api.free),
            web.get("/v1/vms", api.vms),
            web.put("/v1/vms/{vm}", api.add_vm),
            web.get("/v1/vms/{vm}", api.vm),
            web.patch("/v1/vms/{vm}", api.change_vm),
            web.delete("/v1/vms/{vm}", api.remove_vm),
            web.post("/v1/vms/{vm}/flush", api.flush),
            web.post("/v1/vms/{vm}/reclaim", api.reclaim),
            web.get("/v1/vms/{vm}/pools", api.pools),
            web.delete("/v1/vms/{vm}/pools/{pool}", api.destroy_pool),
            web.put("/v1/shared-pools/{uuid}/grants/{vm}", api.grant_shared),
            web.delete("/v1/shared-pools/{uuid}/grants/{vm}", api.revoke_shared),
            web.get("/v1/policy", api.policy),
            web.put("/v1/policy", api.set_policy),
            web.get("/metrics", api.metrics),
        ]
    )
    return app


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let administrators in only, and turn failures into error bodies."""
    connection = request.get_extra_info("socket")
    uid = peer_uid(connection) if connection is not None else None
    if uid is None or not is_administrator(uid):
        log.warning("admin request refused", extra={"uid": uid, "path": request.path})
        return _failure(
            OperatorError("only root and tmemd's own user may administer it", code=ExitCode.PRIVILEGE)
        )
    try:
        return await handler(request)
    except OperatorError as error:
        return _failure(error)
    except web.HTTPException as error:
        code = ExitCode.NOT_FOUND if error.status == HTTPStatus.NOT_FOUND else ExitCode.USAGE
        refusal = OperatorError(f"{request.method} {request.path}: {error.reason}", code=code)
        return _failure(refusal, HTTPStatus(error.status))
    except Exception:
        log.exception("admin request failed", extra={"method": request.method, "path": request.path})
        return _failure(OperatorError("tmemd failed; its log says why", hint="journalctl -u tmemd"))


def _failure(error: OperatorError, status: HTTPStatus | None = None) -> web.Response:
    detail = ErrorDetail(message=error.message, hint=error.hint, vm=error.vm, code=int(error.code))
    chosen = status or _STATUSES.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
    return _answer(ErrorBody(error=detail), chosen)


def _answer(body: object, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def _done() -> web.Response:
    return web.Response(status=HTTPStatus.NO_CONTENT)


async def _body(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise OperatorError(f"the request's body is not right: {error}", code=ExitCode.USAGE) from error


class _Api:
    """One method a route."""

    def __init__(self, lender: Lender) -> None:
        self._lender = lender
        self._metrics = metrics.exposition(lender)

    async def status(self, _: web.Request) -> web.Response:
        return _answer(self._lender.status())

    async def set_capacity(self, request: web.Request) -> web.Response:
        wanted = await _body(request, Capacity)
        return _answer(await self._lender.set_capacity(wanted.capacity_bytes))

    async def free(self, request: web.Request) -> web.Response:
        wanted = await _body(request, FreeRequest)
        return _answer(Freed(freed_bytes=await self._lender.free(wanted.bytes)))

    async def vms(self, _: web.Request) -> web.Response:
        return _answer(self._lender.vms())

    async def vm(self, request: web.Request) -> web.Response:
        return _answer(self._lender.vm(request.match_info["vm"]))

    async def add_vm(self, request: web.Request) -> web.Response:
        spec = await _body(request, VmSpec)
        return _answer(await self._lender.add_vm(request.match_info["vm"], spec))

    async def change_vm(self, request: web.Request) -> web.Response:
        change = await _body(request, VmChange)
        return _answer(await self._lender.change_vm(request.match_info["vm"], change))

    async def remove_vm(self, request: web.Request) -> web.Response:
        await self._lender.remove_vm(request.match_info["vm"])
        return _done()

    async def flush(self, request: web.Request) -> web.Response:
        return _answer(Flushed(pages=await self._lender.flush(request.match_info["vm"])))

    async def reclaim(self, request: web.Request) -> web.Response:
        wanted = await _body(request, ReclaimRequest)
        self._lender.reclaim(request.match_info["vm"], wanted.pages)
        return web.Response(status=HTTPStatus.ACCEPTED)

    async def pools(self, request: web.Request) -> web.Response:
        return _answer(self._lender.pools(request.match_info["vm"]))

    async def destroy_pool(self, request: web.Request) -> web.Response:
        pool = request.match_info["pool"]
        if not pool.isdigit() or int(pool) >= 1 << 32:
            raise OperatorError(f"{pool!r} is not the number of a pool", code=ExitCode.USAGE)
        await self._lender.destroy_pool(request.match_info["vm"], PoolId(int(pool)))
        return _done()

    async def grant_shared(self, request: web.Request) -> web.Response:
        await self._lender.grant_shared(request.match_info["uuid"], request.match_info["vm"])
        return _done()

    async def revoke_shared(self, request: web.Request) -> web.Response:
        await self._lender.revoke_shared(request.match_info["uuid"], request.match_info["vm"])
        return _done()

    async def policy(self, _: web.Request) -> web.Response:
        return _answer(self._lender.registry.policy)

    async def set_policy(self, request: web.Request) -> web.Response:
        return _answer(self._lender.set_policy(await _body(request, Policy)))

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), headers={"content-type": metrics.CONTENT_TYPE})
