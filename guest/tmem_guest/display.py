"""Give the daemon a command and print what it answers."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import cast

import msgspec

from tmem_guest import jsonline
from tmem_guest.errors import AgentError, ExitCode
from tmem_guest.units import format_size

# The daemon sends progress every few seconds; silence for this long means that it hangs.
SILENCE_S = 180.0

Fields = dict[str, object]


def call(path: Path, request: Fields) -> Fields:
    """Send `request` to the daemon, print its progress to stderr, return its result. Raises AgentError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SILENCE_S)
        try:
            connection.connect(str(path))
            connection.sendall(msgspec.json.encode(request) + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    answer = msgspec.json.decode(line, type=Fields)
                    if "progress" in answer:
                        print(answer["progress"], file=sys.stderr)
                        continue
                    return _result(answer)
        except PermissionError:
            raise AgentError(
                "only root may talk to the agent", hint="sudo", code=ExitCode.PRIVILEGE
            ) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise AgentError(
                f"the agent is not running (nobody listens at {path})",
                hint="systemctl start tmem-agent",
                code=ExitCode.UNAVAILABLE,
            ) from None
        except TimeoutError:
            raise AgentError(
                f"the agent did not answer within {SILENCE_S:g} s",
                hint="journalctl -u tmem-agent",
                code=ExitCode.TIMEOUT,
            ) from None
        except (OSError, msgspec.MsgspecError) as error:
            raise AgentError(f"talking to the agent failed: {error}", code=ExitCode.UNAVAILABLE) from error
    raise AgentError("the agent ended before it answered", hint="its log", code=ExitCode.UNAVAILABLE)


def _result(answer: Fields) -> Fields:
    error = answer.get("error")
    if isinstance(error, dict):
        fields = cast("Fields", error)
        try:
            code = ExitCode(jsonline.integer(fields, "code"))
        except ValueError:
            code = ExitCode.FAILED
        raise AgentError(str(fields.get("message")), hint=str(fields.get("hint") or ""), code=code)
    return _fields(answer.get("result"))


def show(path: Path, request: Fields, *, swap_only: bool, as_json: bool) -> None:
    """Give a command and print its outcome. Raises AgentError."""
    result = call(path, request)
    if swap_only and request["command"] == "status":
        result = {"swap": result.get("swap")}
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(result)).decode())
        return
    for line in _lines(result):
        print(line)


def _fields(value: object) -> Fields:
    return cast("Fields", value) if isinstance(value, dict) else {}


def _lines(result: Fields) -> list[str]:
    lines = []
    if "host" in result:
        lines += _host(_fields(result["host"]))
    mounts = result.get("mounts", [result["mount"]] if "mount" in result else None)
    if isinstance(mounts, list):
        lines += [line for mount in mounts for line in _mount(_fields(mount))] or ["mounts  none"]
    if "swap" in result:
        swap = _fields(result["swap"])
        lines += _swap(swap) if swap else ["swap    off"]
    if "unmounted" in result:
        lines.append(f"{result['unmounted']} is unmounted")
    return lines


def _host(host: Fields) -> list[str]:
    if not host.get("connected"):
        why = f": {host['last_error']}" if host.get("last_error") else ""
        return [f"host    {host.get('endpoint')} is not connected{why}"]
    stats = _fields(host.get("stats"))
    quota = format_size(jsonline.integer(host, "quota_bytes"))
    used = format_size(jsonline.integer(stats, "used_bytes"))
    frozen = ", frozen" if host.get("frozen") else ""
    lines = [f"host    {host.get('endpoint')} connected, {used} of {quota} in use{frozen}"]
    if stats:
        figure = {name: jsonline.integer(stats, name) for name in stats}
        lines.append(
            f"        puts {figure['puts_accepted']} accepted, {figure['puts_refused']} refused; "
            f"gets {figure['gets_hit']} hit, {figure['gets_missed']} missed; "
            f"pages {figure['pages_flushed']} flushed, {figure['pages_evicted']} evicted"
        )
    return lines


def _mount(mount: Fields) -> list[str]:
    counters = _fields(mount.get("counters"))
    hits, misses = jsonline.integer(counters, "hit_pages"), jsonline.integer(counters, "miss_pages")
    ratio = f", {100 * hits / (hits + misses):.1f} % hits" if hits + misses else ""
    where = str(mount.get("at"))
    if mount.get("directory") != where:
        where = f"{mount.get('directory')} at {where}"
    lines = [f"mount   {where}: {mount.get('state')}{ratio} ({hits} pages from tmem, {misses} from below)"]
    if mount.get("last_error"):
        lines.append(f"        {mount['last_error']}")
    return lines


def _swap(swap: Fields) -> list[str]:
    counters = _fields(swap.get("counters"))
    size, used = (format_size(jsonline.integer(swap, name)) for name in ("size_bytes", "used_bytes"))
    active = f", priority {swap.get('priority')}" if swap.get("active") else ", not active"
    lines = [
        f"swap    {swap.get('device') or 'no device'}: {swap.get('state')}{active}, {used} of {size} in use"
    ]
    if counters:
        host, file, lost = (
            jsonline.integer(counters, f"{place}_pages") for place in ("host", "file", "lost")
        )
        away = "" if counters.get("connected") else "; no host: pages go to the file"
        gone = f", {lost} lost with the host" if lost else ""
        lines.append(f"        {host} pages at the host, {file} in {swap.get('file')}{gone}{away}")
    if swap.get("last_error"):
        lines.append(f"        {swap['last_error']}")
    return lines
