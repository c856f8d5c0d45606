"""The synchronous client of the admin API."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from tmem_host.api.types import (
    Capacity,
    ErrorBody,
    Flushed,
    Freed,
    FreeRequest,
    Policy,
    Pool,
    PoolId,
    ReclaimRequest,
    Status,
    Vm,
    VmChange,
    VmSpec,
)
from tmem_host.errors import ExitCode, OperatorError

ADMIN_SOCKET = Path("/run/tmem/admin.sock")
"""Where tmemd listens unless its configuration says otherwise."""
_TIMEOUT_S = 30.0

T = TypeVar("T")


class Client:
    """A connection to tmemd's admin API; use it as a context manager.

    Every method raises OperatorError: with tmemd's own message, hint and exit code if it refused, and with
    ExitCode.UNAVAILABLE, TIMEOUT or PRIVILEGE if it could not be asked. Not for use by several threads.
    """

    def __init__(self, socket: Path = ADMIN_SOCKET, *, timeout_s: float = _TIMEOUT_S) -> None:
        self.socket = socket
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket)),
            base_url="http://tmemd",
            timeout=timeout_s,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        """Return the client; connections are opened when needed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close idle connections."""
        self._http.close()

    def status(self) -> Status:
        """The daemon and its memory."""
        return self._call(Status, "GET", "/v1/status")

    def set_capacity(self, capacity_bytes: int) -> Status:
        """Change how much host memory may be lent; less evicts ephemeral pages."""
        return self._call(Status, "PUT", "/v1/capacity", Capacity(capacity_bytes=capacity_bytes))

    def free(self, size_bytes: int) -> int:
        """Give memory back to the host now; returns the bytes that were freed."""
        return self._call(Freed, "POST", "/v1/free", FreeRequest(bytes=size_bytes)).freed_bytes

    def vms(self) -> list[Vm]:
        """All registered VMs, by name."""
        return self._call(list[Vm], "GET", "/v1/vms")

    def vm(self, name: str) -> Vm:
        """One VM; ExitCode.NOT_FOUND if it is not registered."""
        return self._call(Vm, "GET", _vm_path(name))

    def add_vm(self, name: str, spec: VmSpec) -> Vm:
        """Register a VM; repeating it is harmless, ExitCode.CONFLICT if it or its CID or socket differs."""
        return self._call(Vm, "PUT", _vm_path(name), spec)

    def change_vm(self, name: str, change: VmChange) -> Vm:
        """Change quota, minimum, weight, frozen, pinned."""
        return self._call(Vm, "PATCH", _vm_path(name), change)

    def remove_vm(self, name: str) -> None:
        """Unregister a VM; its pools are destroyed and scrubbed."""
        self._call(None, "DELETE", _vm_path(name))

    def flush(self, name: str) -> int:
        """Drop the VM's ephemeral pages; returns how many."""
        return self._call(Flushed, "POST", _vm_path(name) + "/flush").pages

    def reclaim(self, name: str, pages: int) -> None:
        """Ask the guest to take persistent pages back; returns at once, the guest does it when it can."""
        self._call(None, "POST", _vm_path(name) + "/reclaim", ReclaimRequest(pages=pages))

    def pools(self, name: str) -> list[Pool]:
        """The VM's pools."""
        return self._call(list[Pool], "GET", _vm_path(name) + "/pools")

    def destroy_pool(self, name: str, pool: PoolId) -> None:
        """Destroy a pool and all that is in it."""
        self._call(None, "DELETE", f"{_vm_path(name)}/pools/{pool}")

    def grant_shared(self, uuid: str, vm: str) -> None:
        """Allow a VM to join the shared pool of this UUID."""
        self._call(None, "PUT", _grant_path(uuid, vm))

    def revoke_shared(self, uuid: str, vm: str) -> None:
        """Forbid a VM to join the shared pool of this UUID from now on."""
        self._call(None, "DELETE", _grant_path(uuid, vm))

    def policy(self) -> Policy:
        """The policy the controller is to follow."""
        return self._call(Policy, "GET", "/v1/policy")

    def set_policy(self, policy: Policy) -> Policy:
        """Change the policy the controller is to follow."""
        return self._call(Policy, "PUT", "/v1/policy", policy)

    def metrics(self) -> str:
        """All counters in Prometheus' text format."""
        return self._request("GET", "/metrics", None).text

    def _call(self, answer: type[T] | None, method: str, path: str, body: msgspec.Struct | None = None) -> T:
        response = self._request(method, path, body)
        if answer is None:
            return None  # type: ignore[return-value]  # the caller asked for no answer
        try:
            return msgspec.json.decode(response.content, type=answer)
        except msgspec.DecodeError as error:
            raise OperatorError(
                f"tmemd's answer to {method} {path} is not understood: {error}",
                hint="install the same version of tmemd and tmemctl, and restart tmemd",
            ) from error

    def _request(self, method: str, path: str, body: msgspec.Struct | None) -> httpx.Response:
        try:
            response = self._http.request(
                method,
                path,
                content=None if body is None else msgspec.json.encode(body),
                headers=None if body is None else {"content-type": "application/json"},
            )
        except httpx.TimeoutException as error:
            raise OperatorError(
                f"tmemd did not answer {method} {path} within {self._timeout_s:g} s",
                hint="journalctl -u tmemd",
                code=ExitCode.TIMEOUT,
            ) from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.is_success:
            return response
        raise _refusal(response, method, path)

    def _unreachable(self, error: httpx.TransportError) -> OperatorError:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, PermissionError):
            return OperatorError(
                f"not allowed to use tmemd's admin socket {self.socket}",
                hint="run this as root, or as the user tmemd runs as",
                code=ExitCode.PRIVILEGE,
            )
        return OperatorError(
            f"tmemd is not running: nothing answers on {self.socket}",
            hint="systemctl start tmemd, or name the socket of a running one",
            code=ExitCode.UNAVAILABLE,
        )


def _refusal(response: httpx.Response, method: str, path: str) -> OperatorError:
    try:
        error = msgspec.json.decode(response.content, type=ErrorBody).error
        code = ExitCode(error.code)
    except (msgspec.DecodeError, ValueError):
        return OperatorError(f"tmemd answered {method} {path} with status {response.status_code}")
    return OperatorError(error.message, hint=error.hint, vm=error.vm, code=code)


def _vm_path(name: str) -> str:
    return f"/v1/vms/{quote(name, safe='')}"


def _grant_path(uuid: str, vm: str) -> str:
    plain = uuid.replace("-", "").lower()
    if not re.fullmatch(r"[0-9a-f]{32}", plain):
        raise OperatorError(f"{uuid!r} is not a UUID", hint="uuidgen makes one", vm=vm, code=ExitCode.USAGE)
    return f"/v1/shared-pools/{plain}/grants/{quote(vm, safe='')}"
