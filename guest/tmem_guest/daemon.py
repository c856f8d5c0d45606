"""`tmem-agent run`: the daemon that owns mounts, swap and the connection to the host.

Threads: one for each `tmem-guest` process (service.py), one for the host (link.py), one for commands
(commands.py). The main thread starts them, tells systemd when they are up, and waits for a signal.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from tmem_guest import jsonline, log, mount, pressure, state, swap, wire
from tmem_guest.commands import CommandServer, Progress
from tmem_guest.config import AgentConfig, MountConfig, SwapConfig
from tmem_guest.errors import AgentError, ExitCode
from tmem_guest.link import HostLink
from tmem_guest.mount import MountService
from tmem_guest.notify import notify
from tmem_guest.service import Service, State
from tmem_guest.swap import SwapService
from tmem_guest.units import format_size

HOST_PATIENCE_S = 3.0  # how long start-up waits for the host before it reports ready without it
SHUTDOWN_TIMEOUT_S = 80.0  # the unit's TimeoutStopSec is longer
PROGRESS_S = 2.0
_STACK_BYTES = 256 << 10

_Asked = TypeVar("_Asked", MountConfig, SwapConfig)


def find_program(configured: str) -> Path:
    """The `tmem-guest` program: as configured, beside this program, or on the PATH. Raises AgentError."""
    name = configured or "tmem-guest"
    places = [Path(directory) for directory in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    if not configured:
        places = [Path(sys.argv[0]).parent, Path(sys.executable).parent, *places]
    # An absolute name stays itself when joined. (Importing shutil for `which` is a tenth of the start-up.)
    for candidate in (place / name for place in places):
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate.absolute()
    raise AgentError(
        f"the program {name} is not there",
        hint="install it, or set tmem_guest in agent.toml",
        code=ExitCode.UNAVAILABLE,
    )


class Agent:
    """What the daemon serves. Methods named `do_…` are the commands of its socket."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.mounts: dict[str, MountService] = {}
        self.swap: SwapService | None = None
        self._program = find_program(config.tmem_guest)
        self._runtime = Path(config.runtime_directory)
        self._state_path = self._runtime / "agent-state.json"
        self._mount_lock = threading.Lock()
        self._swap_lock = threading.Lock()
        self._state_lock = threading.Lock()
        self._closing = False
        self._began = time.monotonic()
        self._link = HostLink(
            config.endpoint,
            interval_s=config.report_interval_s,
            make_report=self._report,
            on_notice=self._on_notice,
        )
        self._server: CommandServer | None = None

    # Life.

    def start(self) -> None:
        """Bring up what the configuration and the previous daemon's state ask for; problems are logged."""
        self._link.start()
        for served in state.load(self._state_path):
            self._take_over(served)
        for asked in self.config.mount:
            try:
                self._add_mount(asked)
            except AgentError as error:
                log.error(f"cannot serve {asked.directory}: {error}")
        if self.config.swap is not None:
            try:
                self._add_swap(self.config.swap)
            except AgentError as error:
                log.error(f"cannot serve swap: {error}")
        self._server = CommandServer(
            self.config.socket_path,
            {
                "status": self.do_status,
                "mount": self.do_mount,
                "umount": self.do_umount,
                "swap on": self.do_swap_on,
                "swap off": self.do_swap_off,
            },
        )
        self._server.start()
        deadline = time.monotonic() + self.config.ready_timeout_s
        for service in self._services():
            try:
                service.wait_settled(max(0.0, deadline - time.monotonic()))
            except AgentError:
                continue  # its thread has logged it and tries again
        self._link.settled.wait(HOST_PATIENCE_S)

    def stop(self) -> None:
        """Release and end everything, in parallel, with a deadline; swap that must stay on is left on."""
        self._closing = True
        if self._server is not None:
            self._server.stop()
        services = self._services()
        for service in services:
            service.request_stop(lazily=True)
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
        left = False
        for service in services:
            try:
                ended = service.wait_stopped(max(0.0, deadline - time.monotonic()))
            except AgentError as error:
                log.error(str(error))
                ended = False
            left |= not ended
        self._link.stop()
        self._closing = False
        if left or (self.swap is not None and self.swap.area() is not None):
            self._save()
        else:
            self._state_path.unlink(missing_ok=True)

    def summary(self) -> str:
        """One line for `systemctl status`."""
        up = [point for point, service in self.mounts.items() if service.state is State.UP]
        parts = [f"host {'connected' if self._link.connected.is_set() else 'away'}"]
        parts.append(f"mounts {', '.join(up) or 'none'}")
        parts.append(f"swap {self.swap.state.value if self.swap is not None else 'off'}")
        return "; ".join(parts)

    def _services(self) -> list[Service]:
        services: list[Service] = list(self.mounts.values())
        return [*services, self.swap] if self.swap is not None else services

    def _take_over(self, served: state.Served) -> None:
        """Go on with what an agent that died was serving."""
        try:
            if served.mount is not None:
                service: Service = self._new_mount(served.mount)
            elif served.swap is not None:
                service = self._new_swap(served.swap)
            else:
                return
            if served.pid and service.adopt(served.pid, served.began):
                log.info(f"{service.name}: taken over from an earlier agent, pid {served.pid}")
            service.start()
        except AgentError as error:
            log.error(f"cannot go on with what an earlier agent served: {error}")

    def _save(self) -> None:
        if self._closing:
            return
        served = [
            state.Served(pid=mounted.pid, began=mounted.began, mount=mounted.config)
            for mounted in list(self.mounts.values())
            if mounted.state is not State.ENDED
        ]
        if self.swap is not None:
            served.append(state.Served(pid=self.swap.pid, began=self.swap.began, swap=self.swap.config))
        with self._state_lock:
            try:
                state.save(self._state_path, served)
            except OSError as error:
                log.error(f"cannot write {self._state_path}: {error}")

    # Services.

    def _new_mount(self, config: MountConfig) -> MountService:
        service = MountService(
            config,
            program=self._program,
            endpoint=self.config.endpoint,
            runtime_directory=self._runtime,
            ready_timeout_s=self.config.ready_timeout_s,
        )
        service.on_change = self._save
        self.mounts[config.mount_point] = service
        return service

    def _new_swap(self, config: SwapConfig) -> SwapService:
        self.swap = SwapService(
            config,
            program=self._program,
            endpoint=self.config.endpoint,
            runtime_directory=self._runtime,
            ready_timeout_s=self.config.ready_timeout_s,
        )
        self.swap.on_change = self._save
        return self.swap

    def _add_mount(self, asked: MountConfig) -> MountService:
        config = mount.resolve(asked)
        with self._mount_lock:
            known = self.mounts.get(config.mount_point)
            if known is not None and known.state is State.ENDED:
                del self.mounts[config.mount_point]
            elif known is not None and known.config == config and self._server is None:
                return known  # configured, and taken over from an earlier agent
            mount.check(config, [service.config for service in self.mounts.values()])
            service = self._new_mount(config)
            service.start()
            return service

    def _add_swap(self, asked: SwapConfig) -> SwapService:
        if self.swap is not None:
            if self._server is None:
                if self.swap.config != asked:
                    log.warning("the configuration's swap differs from the one that is on, which stays")
                return self.swap
            raise AgentError("swap is already on", hint="tmem-agent swap off", code=ExitCode.CONFLICT)
        swap.check(asked)
        swap.claim(Path(asked.file))
        service = self._new_swap(asked)
        service.start()
        return service

    def _settle(self, service: Service) -> None:
        """Wait for the first start; what fails then is taken back. Raises AgentError."""
        try:
            service.wait_settled(self.config.ready_timeout_s + PROGRESS_S)
        except AgentError:
            service.request_stop(lazily=True)
            service.wait_stopped(SHUTDOWN_TIMEOUT_S)
            raise

    def _end(self, service: Service, progress: Progress, *, lazily: bool) -> None:
        service.request_stop(lazily=lazily)
        while not service.wait_stopped(PROGRESS_S):
            progress(self._describe(service))

    @staticmethod
    def _describe(service: Service) -> str:
        if isinstance(service, SwapService) and (area := service.area()) is not None:
            return f"{area.used_bytes >> 20} MiB still swapped"
        return f"{service.name} is {service.state.value}"

    # Commands.

    def do_mount(self, request: dict[str, object], _progress: Progress) -> dict[str, object]:
        """`{directory, at?, options?}`: serve a directory."""
        service = self._add_mount(_checked(request, MountConfig))
        try:
            self._settle(service)
        except AgentError:
            self.mounts.pop(service.config.mount_point, None)
            self._save()
            raise
        return {"mount": self._mount_status(service)}

    def do_umount(self, request: dict[str, object], progress: Progress) -> dict[str, object]:
        """`{directory, lazy?}`: give a mount up; `directory` is the mount point or the lower directory."""
        path = os.path.realpath(str(request.get("directory", "")))
        for point, service in list(self.mounts.items()):
            if path in (point, service.config.directory):
                self._end(service, progress, lazily=bool(request.get("lazy")))
                self.mounts.pop(point, None)
                self._save()
                return {"unmounted": point}
        raise AgentError(f"{path} is not mounted by tmem", hint="tmem-agent status", code=ExitCode.NOT_FOUND)

    def do_swap_on(self, request: dict[str, object], _progress: Progress) -> dict[str, object]:
        """`{size, file?, device?, priority?, options?}`: turn swap on."""
        asked = _checked(request, SwapConfig)
        with self._swap_lock:
            service = self._add_swap(asked)
            try:
                self._settle(service)
            except AgentError:
                self.swap = None
                swap.remove(Path(asked.file))
                self._save()
                raise
        return {"swap": self._swap_status()}

    def do_swap_off(self, request: dict[str, object], progress: Progress) -> dict[str, object]:
        """`{keep_file?}`: bring every page back, end the shim, remove the swap file."""
        with self._swap_lock:
            service = self.swap
            if service is None:
                raise AgentError("swap is not on", hint="tmem-agent swap on", code=ExitCode.NOT_FOUND)
            self._end(service, progress, lazily=False)
            self.swap = None
            self._save()
            file = Path(service.config.file)
            if not request.get("keep_file"):
                swap.remove(file)
        return {"swap": None}

    def do_status(self, _request: dict[str, object], _progress: Progress) -> dict[str, object]:
        """Everything `tmem-agent status` shows."""
        link = self._link
        return {
            "uptime_s": round(time.monotonic() - self._began, 1),
            "host": {
                "endpoint": link.endpoint,
                "connected": link.connected.is_set(),
                "last_error": link.last_error,
                "connections": link.connections,
                "reports": link.reports,
                "round_trip_us": round(link.round_trip_s * 1e6),
                "quota_bytes": link.quota_bytes,
                "frozen": link.frozen,
                "stats": link.stats._asdict() if link.stats is not None else None,
            },
            "mounts": [self._mount_status(service) for service in self.mounts.values()],
            "swap": self._swap_status(),
            "memory": pressure.read_memory()._asdict(),
        }

    @staticmethod
    def _service_status(service: Service) -> dict[str, object]:
        return {
            "state": service.state.value,
            "pid": service.pid,
            "starts": service.starts,
            "last_error": service.last_error,
        }

    def _mount_status(self, service: MountService) -> dict[str, object]:
        return {
            "directory": service.config.directory,
            "at": service.config.mount_point,
            **self._service_status(service),
            "counters": service.counters() if service.state is State.UP else None,
        }

    def _swap_status(self) -> dict[str, object] | None:
        service = self.swap
        if service is None:
            return None
        area = service.area()
        return {
            "file": service.config.file,
            "size_bytes": service.config.size_bytes,
            "device": service.device,
            "active": area is not None,
            "used_bytes": area.used_bytes if area is not None else 0,
            "priority": area.priority if area is not None else None,
            **self._service_status(service),
            "counters": service.counters() if service.pid else None,
        }

    # The host.

    def _report(self) -> wire.Report:
        hits = misses = 0
        for service in list(self.mounts.values()):
            counters = service.counters() if service.state is State.UP else None
            if counters is not None:
                hits += jsonline.integer(counters, "hit_pages")
                misses += jsonline.integer(counters, "miss_pages")
        shim = self.swap.counters() if self.swap is not None and self.swap.state is State.UP else None
        host_pages = jsonline.integer(shim, "host_pages") if shim is not None else 0
        file_pages = jsonline.integer(shim, "file_pages") if shim is not None else 0
        return wire.Report(*pressure.read_memory(), host_pages, file_pages, hits, misses)

    def _on_notice(self, notice: wire.Notice) -> None:
        match notice.op:
            case wire.Op.RECLAIM:
                self._reclaim(notice.first)
            case wire.Op.QUOTA:
                quota, used = format_size(notice.first), format_size(notice.second)
                log.info(f"the host's quota is now {quota}, {used} in use")
            case wire.Op.FROZEN:
                log.info("the host takes no pages: frozen" if notice.first else "the host takes pages again")
            case _:
                log.info("the host shuts down")

    def _reclaim(self, pages: int) -> None:
        service = self.swap
        if service is None or service.state is not State.UP:
            log.warning(f"the host asks for {pages} swapped pages back, but there is no swap through tmem")
            return
        try:
            service.reclaim(pages)
        except OSError as error:
            log.error(f"cannot hand the host's request for {pages} pages to the swap shim: {error}")
        else:
            log.info(f"the host asks for {pages} swapped pages back")


def _checked(request: dict[str, object], kind: type[_Asked]) -> _Asked:
    try:
        return msgspec.convert(request, kind)
    except msgspec.ValidationError as error:
        raise AgentError(str(error), code=ExitCode.USAGE) from error


def run(config: AgentConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises AgentError if it cannot start."""
    if os.geteuid() != 0:
        raise AgentError(
            "the agent must run as root", hint="systemctl start tmem-agent", code=ExitCode.PRIVILEGE
        )
    threading.stack_size(_STACK_BYTES)
    runtime = Path(config.runtime_directory)
    runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (runtime / "agent.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AgentError(
                f"another agent runs with {runtime}",
                hint="systemctl status tmem-agent",
                code=ExitCode.CONFLICT,
            ) from None
        signals = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(
            signal.SIG_BLOCK, signals
        )  # inherited by the threads: only this one takes them
        agent = Agent(config)
        agent.start()
        notify("READY=1", f"STATUS={agent.summary()}")
        log.info(f"ready: {agent.summary()}")
        shown = ""
        while signal.sigtimedwait(signals, 5.0) is None:
            if (line := agent.summary()) != shown:
                notify(f"STATUS={line}")
                shown = line
        notify("STOPPING=1")
        agent.stop()
