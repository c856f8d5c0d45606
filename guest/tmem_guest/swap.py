"""Swap: `tmem-guest swap` in front of a swap file, from mkswap to swapoff."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from tmem_guest import jsonline, log, mounts, pressure
from tmem_guest.config import MAX_SWAP_PRIORITY, SwapConfig
from tmem_guest.errors import AgentError, ExitCode
from tmem_guest.service import Service
from tmem_guest.units import format_size

CONTROL_TIMEOUT_S = 0.5
SWAPOFF_TIMEOUT_S = 3600.0
PROBE_TIMEOUT_S = 30.0
DEFAULT_PRIORITY = 100
_OWN_XATTR = "trusted.tmem"  # marks a file that may be overwritten: this agent had it made
_SWAPOFF_RETRY_S = 0.5
_DEVICE_PREFIXES = ("/dev/ublkb", "/dev/nbd")
_SHUTDOWN_TRIES = 60


def check(config: SwapConfig) -> None:
    """Raise AgentError unless this swap could be turned on."""
    file = Path(config.file)
    if not file.parent.is_dir():
        raise AgentError(
            f"{file.parent} is not a directory", hint=f"mkdir -p {file.parent}", code=ExitCode.NOT_FOUND
        )
    around = mounts.containing(os.path.realpath(file.parent), mounts.table())
    if around is not None and around.is_tmem:
        raise AgentError(
            f"{file} lies in {around.path}, which tmem serves: swapping would wait for itself",
            hint="a swap file on a disk",
            code=ExitCode.USAGE,
        )
    if any(area.path == str(file) for area in pressure.read_swaps()):
        raise AgentError(f"{file} itself is on as swap", hint=f"swapoff {file}", code=ExitCode.CONFLICT)
    try:
        found = file.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISBLK(found.st_mode):
        _check_disk(file)
        return
    if not stat.S_ISREG(found.st_mode):
        raise AgentError(
            f"{file} is neither a regular file nor a disk", hint="another --file", code=ExitCode.USAGE
        )
    if found.st_size and not is_own(file):
        raise AgentError(
            f"{file} exists and is not a swap file of tmem; it would be overwritten",
            hint=f"another --file, or rm {file}",
            code=ExitCode.CONFLICT,
        )


def _check_disk(disk: Path) -> None:
    """Raise AgentError unless nobody uses this block device and nothing is on it but, perhaps, swap."""
    try:
        os.close(os.open(disk, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        raise AgentError(
            f"{disk} cannot be had: {error.strerror}", hint="a disk that nobody uses", code=ExitCode.CONFLICT
        ) from error
    try:
        probe = ["blkid", "--probe", "--output=value", "--match-tag=TYPE", "--match-tag=PTTYPE", str(disk)]
        done = subprocess.run(probe, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AgentError(f"cannot see what is on {disk}: blkid: {error}", hint="a file") from error
    # 2: nothing that it knows.
    found = "something" if done.returncode not in (0, 2) else " ".join(done.stdout.split())
    if found not in ("", "swap"):
        raise AgentError(
            f"there is something on {disk} ({found}); it would be overwritten",
            hint=f"another --file, or wipefs --all {disk}",
            code=ExitCode.CONFLICT,
        )


def is_own(file: Path) -> bool:
    """Whether an agent made this file."""
    try:
        return os.getxattr(file, _OWN_XATTR) == b"swap"
    except OSError:
        return False


def claim(file: Path) -> None:
    """Make the swap file, still empty, and mark it as the agent's. Disks stay as is. Raises AgentError."""
    if file.is_block_device():
        return
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        os.setxattr(file, _OWN_XATTR, b"swap")
    except OSError as error:
        raise AgentError(
            f"cannot make the swap file {file}: {error.strerror}",
            hint="a file on ext4, xfs or btrfs",
            code=ExitCode.FAILED,
        ) from error


def remove(file: Path) -> None:
    """Remove the swap file if it is the agent's. Disks and other files stay."""
    if is_own(file):
        file.unlink(missing_ok=True)


def choose_priority(wanted: int | None, areas: list[pressure.SwapArea]) -> int:
    """`wanted`, or one above every area that is on."""
    if wanted is not None:
        return wanted
    highest = max((area.priority for area in areas), default=-1)
    return min(max(highest + 1, DEFAULT_PRIORITY), MAX_SWAP_PRIORITY)


def shortfall(used_bytes: int, memory: pressure.Memory, other_free_bytes: int) -> int:
    """Bytes that are missing to take `used_bytes` out of swap; 0 or less if they fit."""
    return used_bytes - memory.mem_available_bytes - other_free_bytes


class SwapService(Service):
    """`tmem-guest swap` for `[swap]`."""

    def __init__(
        self,
        config: SwapConfig,
        *,
        program: Path,
        endpoint: str,
        runtime_directory: Path,
        ready_timeout_s: float,
    ) -> None:
        """`config` is checked."""
        super().__init__("swap", runtime_directory, ready_timeout_s=ready_timeout_s)
        self.config = config
        self.control_socket = runtime_directory / "swap.sock"
        self.device = ""
        self._program = program
        self._endpoint = endpoint

    def command(self) -> list[str]:
        """See `tmem-guest swap --help`."""
        return [
            str(self._program),
            "swap",
            f"--file={self.config.file}",
            f"--size={self.config.size_bytes}",
            f"--endpoint={self._endpoint}",
            f"--device={self.config.device}",
            f"--control={self.control_socket}",
            *self.config.options,
        ]

    def ask(self, request: dict[str, object]) -> dict[str, object]:
        """Ask the shim something on its control socket (docs/swap.md). Raises OSError, also if it says no."""
        answer = jsonline.ask(self.control_socket, request, CONTROL_TIMEOUT_S)
        if not answer.get("ok"):
            raise OSError(f"the swap shim refused {request['op']}: {answer.get('error')}")
        return answer

    def reclaim(self, pages: int) -> None:
        """Have the shim move its coldest pages from the host to the swap file. Raises OSError."""
        self.ask({"op": "reclaim", "pages": pages})

    def counters(self) -> dict[str, object] | None:
        """What the control socket says; None if it does not answer."""
        try:
            return self.ask({"op": "status"})
        except OSError:
            return None

    def orphan(self) -> int:
        """The serving process, which listens on the control socket: it may outlive its keeper."""
        try:
            return jsonline.listener(self.control_socket)
        except OSError:
            return 0

    def is_vital(self) -> bool:
        """Whether the kernel swaps to the device: without its process every page there would be lost."""
        try:
            areas = pressure.read_swaps()
        except OSError:
            return True
        if self.device:
            return any(area.path == self.device for area in areas)
        return any(area.path.startswith(_DEVICE_PREFIXES) for area in areas)  # not known yet: any may be it

    def is_ready(self) -> bool:
        """The control socket names a device, and the device is there."""
        counters = self.counters()
        device = counters.get("device") if counters is not None else None
        if not isinstance(device, str) or not Path(device).is_block_device():
            return False
        if self.device not in ("", device) and self.area() is not None:
            log.error(
                f"the swap shim of {self.device} died and could not take it over: what was swapped there is "
                f"lost, processes that need it hang. Reboot the guest"
            )
        self.device = device
        return True

    def area(self) -> pressure.SwapArea | None:
        """The device's line in `/proc/swaps`, if it is on."""
        return next((area for area in pressure.read_swaps() if area.path == self.device), None)

    def activate(self) -> None:
        """mkswap and swapon, unless the device is on already: the process recovered it."""
        area = self.area()
        if area is not None:
            log.info(f"swap goes on on {self.device}, {format_size(area.used_bytes)} in use")
            return
        self._tool(["mkswap", "--label=tmem", self.device], "format")
        priority = choose_priority(self.config.priority, pressure.read_swaps())
        self._tool(["swapon", "--discard=pages", f"--priority={priority}", self.device], "turn on")
        log.info(f"swap is on: {self.device}, {format_size(self.config.size_bytes)}, priority {priority}")

    def _tool(self, argv: list[str], what: str) -> None:
        status, output = self.run_tool(argv)
        if status:
            raise AgentError(f"cannot {what} {self.device}: {output or f'{argv[0]} failed'}")

    def release(self, *, lazily: bool) -> bool:
        """swapoff, which brings every page back into memory. With too little memory it is refused.

        `lazily` (the guest shuts down): memory is about to become free, so try again for a while; in the end
        leave the process to its work, for without it the kernel could not reach what it swapped.
        """
        tries = _SHUTDOWN_TRIES if lazily else 1
        problem: AgentError | None = None
        for attempt in range(tries):
            if attempt:
                self._pump(_SWAPOFF_RETRY_S, heed_wake=False)
            problem = self._swapoff(check_first=not lazily)
            if problem is None:
                log.info(f"swap on {self.device} is off")
                return True
        if problem is not None and not lazily:
            raise problem
        log.error(f"{problem}; the swap shim is left running")
        return False

    def _swapoff(self, *, check_first: bool) -> AgentError | None:
        areas = pressure.read_swaps()
        own = next((area for area in areas if area.path == self.device), None)
        if own is None:
            return None
        others = sum(area.size_bytes - area.used_bytes for area in areas if area.path != self.device)
        missing = shortfall(own.used_bytes, pressure.read_memory(), others)
        refused = AgentError(
            f"{format_size(own.used_bytes)} are swapped to {self.device}, "
            f"{format_size(max(missing, 0))} more than fit into memory and other swap",
            hint="stop something, or turn on other swap first",
            code=ExitCode.NO_SPACE,
        )
        if check_first and missing > 0:
            return refused
        status, output = self.run_tool(["swapoff", self.device], SWAPOFF_TIMEOUT_S)
        if status == 0 or self.area() is None:
            return None
        return refused if missing > 0 else AgentError(f"swapoff {self.device} failed: {output}")

    def clean(self) -> None:
        """Remove a dead process's socket."""
        self.control_socket.unlink(missing_ok=True)
