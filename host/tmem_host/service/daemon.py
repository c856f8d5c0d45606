"""The daemon's life: start, the work of every second, clean stop."""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import signal
from pathlib import Path

import psutil
from aiohttp import web
from tmem_native import PORT, Engine, EngineError, log_to_stderr

from tmem_host.api.server import application
from tmem_host.config import TmemdConfig, resolve_capacity
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.service import sockets
from tmem_host.service.lender import Lender, operator_error
from tmem_host.service.notify import notify, watchdog_s
from tmem_host.service.registry import Registry
from tmem_host.units import format_size, parse_size

log = logging.getLogger(__name__)

_TICK_S = 1.0


def open_engine(config: TmemdConfig) -> Engine:
    """Open the arena and start the engine. Raises OperatorError."""
    arena, limits = config.arena, config.limits
    memory = psutil.virtual_memory().total
    capacity = resolve_capacity(arena.capacity, memory)
    if capacity > memory:
        raise OperatorError(
            f"an arena of {format_size(capacity)} is over the host's memory, {format_size(memory)}",
            hint="set arena.capacity to a share such as '25%'",
            code=ExitCode.USAGE,
        )
    try:
        return Engine(
            arena=None if arena.path == "memfd" else arena.path,
            capacity_bytes=capacity,
            store_incompressible=arena.incompressible == "store",
            socket_mode=int(config.sockets.mode, 8),
            socket_gid=_gid(config.sockets.group),
            connections=limits.connections,
            connections_per_s=limits.connections_per_s,
            in_flight_bytes=parse_size(limits.in_flight),
            in_flight_bytes_total=parse_size(limits.in_flight_total),
            pages_per_s=limits.pages_per_s,
            max_in_flight=limits.max_in_flight,
            hello_timeout_s=limits.hello_timeout_s,
            frame_timeout_s=limits.frame_timeout_s,
            stall_timeout_s=limits.stall_timeout_s,
            keep_alive_s=limits.keep_alive_s,
            busy_poll_us=limits.busy_poll_us,
        )
    except EngineError as error:
        raise operator_error(error) from error


def _gid(group: str) -> int | None:
    if not group:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise OperatorError(f"sockets.group: no group '{group}'", code=ExitCode.USAGE) from None


async def run(config: TmemdConfig) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once. Raises OperatorError."""
    log_to_stderr({"warning": "warn"}.get(config.log.level, config.log.level))
    stop = asyncio.Event()
    _handle_signals(stop)
    # The admin socket first: it finds another tmemd before the arena is touched.
    listener = sockets.listen(Path(config.sockets.admin))
    try:
        registry = Registry(Path(config.state.directory))
        engine = await asyncio.to_thread(open_engine, config)
        lender = Lender(config, engine, registry)
        found = lender.status()
        log.info(
            "arena open",
            extra={
                "arena": found.arena,
                "capacity_bytes": found.capacity_bytes,
                "pages_recovered": found.recovery.pages,
                "seconds": f"{found.recovery.seconds:.3f}",
            },
        )
        await lender.restore()
        _listen_vsock(config, engine)
        runner = web.AppRunner(application(lender), access_log=None, shutdown_timeout=5.0)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            notify("READY=1")
            log.info(
                "ready", extra={"admin": config.sockets.admin, "vms": len(engine.vms()), "pid": os.getpid()}
            )
            await _serve(lender, stop)
            notify("STOPPING=1")
            lender.draining = True
            log.info("stopping", extra={"connections": found.connections})
            if not await asyncio.to_thread(engine.drain, config.limits.drain_timeout_s):
                log.warning("connections were cut off: their guests did not read their answers in time")
        finally:
            await runner.cleanup()
    finally:
        listener.close()
        Path(config.sockets.admin).unlink(missing_ok=True)
    log.info("stopped")


def _handle_signals(stop: asyncio.Event) -> None:
    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("second signal, exiting at once", extra={"signal": number.name})
            os._exit(ExitCode.FAILED)
        log.info("draining", extra={"signal": number.name})
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def _listen_vsock(config: TmemdConfig, engine: Engine) -> None:
    wish = config.sockets.vsock
    if wish == "off" or (wish == "auto" and not Path("/dev/vsock").exists()):
        return
    try:
        engine.listen_vsock(PORT)
    except EngineError as error:
        if wish == "on":
            raise operator_error(error, hint="modprobe vhost_vsock, or set sockets.vsock = 'off'") from error
        log.warning("not listening on AF_VSOCK: %s", error.args[0])
    else:
        log.info("listening on AF_VSOCK", extra={"port": PORT})


async def _serve(lender: Lender, stop: asyncio.Event) -> None:
    """Do every second's work until `stop`."""
    period = watchdog_s()
    tick_s = min(_TICK_S, period / 2) if period else _TICK_S
    while not stop.is_set():
        try:
            await lender.retry()
            lender.reclaim_excess()
        except (EngineError, OperatorError) as error:
            # A VM removed in this moment; nothing that the next second would not repair.
            log.debug("periodic work: %s", error)
        if period:
            notify("WATCHDOG=1")
        try:
            await asyncio.wait_for(stop.wait(), tick_s)
        except TimeoutError:
            continue
