"""What the admin API sends and answers.

Structs are frozen and refuse unknown fields. Sizes are bytes of host memory, pages are 4096-byte guest pages,
and counters count from the VM's registration or tmemd's start, whichever was later.
"""

from __future__ import annotations

from typing import Literal, NewType

from msgspec import Struct

Cid = NewType("Cid", int)
"""A vsock context id, which names a VM on an AF_VSOCK host."""
PoolId = NewType("PoolId", int)
"""Names a pool among all pools of the daemon."""

PoolKind = Literal["ephemeral", "persistent"]


class VmSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a VM is registered: where its guest connects, and the limits it starts with.

    At least one of `cid`, `hybrid_socket` and `vhost_user_socket` is usual; with none, the hybrid socket is
    `/run/tmem/vm/NAME/vsock.sock`. A repeated PUT is idempotent as long as those and `persistent_max_bytes`
    are the same; the other limits are only those it starts with, and are changed by PATCH.
    """

    cid: Cid | None = None
    """vsock CID on a host with /dev/vhost-vsock."""
    hybrid_socket: str | None = None
    """Path of the VM's hybrid vsock socket, without the `_29805` that tmemd's own socket has behind it."""
    vhost_user_socket: str | None = None
    """Path of the socket on which QEMU reaches tmemd's own vsock device."""
    guest_cid: Cid | None = None
    """The CID that tmemd's own vsock device shows to its guest; required with `vhost_user_socket`."""
    quota_bytes: int | None = None
    """The cap; `None`: the daemon's default."""
    min_bytes: int = 0
    """Guaranteed minimum."""
    weight: int = 100
    """Share in what is not guaranteed, relative to other VMs; 1 to 10000."""
    persistent_max_bytes: int | None = None
    """Most the persistent pages may count, in guest bytes (the VM's configured maximum memory less its RAM);
    `None`: limited by the quota alone."""
    pinned: bool = False
    """The controller leaves the quota alone."""


class VmChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A change to a registered VM. What is left out stays as it is."""

    quota_bytes: int | None = None
    min_bytes: int | None = None
    weight: int | None = None
    frozen: bool | None = None
    pinned: bool | None = None
    unless_pinned: bool = False
    """Leave a pinned VM as it is (the answer says `pinned`): how the controller never undoes an
    administrator's quota, whenever it was set."""


class GuestReport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a guest last said about itself. A hint: it is not measured by the host."""

    age_s: float
    """Seconds since it arrived."""
    psi_some_avg10: float
    """PSI memory "some" over 10 s, percent."""
    psi_full_avg10: float
    """PSI memory "full" over 10 s, percent."""
    mem_total_bytes: int
    mem_available_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int
    swap_in_pages: int
    """Since the guest booted."""
    swap_out_pages: int
    """Since the guest booted."""
    shim_host_pages: int
    """Pages its swap shim has at the host."""
    shim_file_pages: int
    """Pages its swap shim has in the guest's own swap file."""
    cache_hit_pages: int
    """Pages its file cache read from tmem."""
    cache_miss_pages: int
    """Pages its file cache had to read from the lower file system."""


class Vm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A registered VM, its limits and its counters."""

    name: str
    spec: VmSpec
    """As registered."""

    quota_bytes: int
    min_bytes: int
    weight: int
    pinned: bool
    frozen: bool

    stored_bytes: int
    """Host memory its pages use, overhead included: what counts against the quota."""
    raw_bytes: int
    """The same pages before compression: pages times 4096."""
    ephemeral_pages: int
    persistent_pages: int
    persistent_bytes: int
    """The part of `stored_bytes` that is persistent and cannot be evicted."""

    puts_accepted: int
    puts_refused: int
    gets_hit: int
    gets_missed: int
    pages_flushed: int
    pages_evicted: int
    quota_changes: int

    connections: int
    """Open now."""
    connections_refused: int
    """Turned away by a limit."""
    protocol_errors: int
    """Connections closed because the guest broke the protocol."""
    reclaim_pending_pages: int
    """Persistent pages the guest was asked to take back and has not yet."""
    boot_id: str | None
    """Of the guest that is or was last connected; 32 hexadecimal digits."""
    report: GuestReport | None
    """Its last report."""


class Pool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pool of a VM."""

    id: PoolId
    vm: str
    name: str
    kind: PoolKind
    exclusive: bool
    """A get of an ephemeral page removes it."""
    shared: str | None
    """UUID of the shared pool (32 hexadecimal digits), or `None` for a private one."""
    pages: int
    stored_bytes: int
    puts_accepted: int
    puts_refused: int
    gets_hit: int
    gets_missed: int
    pages_flushed: int
    pages_evicted: int


class Recovery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What tmemd found in the arena when it started."""

    pages: int
    """Persistent pages taken over from the daemon before."""
    discarded: int
    """Half-written, ephemeral or unreadable slots that were reclaimed."""
    seconds: float


class Status(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The daemon and its memory."""

    version: str
    pid: int
    uptime_s: float
    draining: bool
    arena: str
    """Path of the arena, or `memfd`."""
    capacity_bytes: int
    used_bytes: int
    free_bytes: int
    payload_bytes: int
    metadata_bytes: int
    raw_bytes: int
    """Stored pages times 4096."""
    pages: int
    same_filled_pages: int
    host_memory_bytes: int
    host_available_bytes: int
    vms: int
    connections: int
    recovery: Recovery


class Policy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which policy the controller follows. tmemd only keeps it."""

    name: str = "static"
    parameters: dict[str, bool | int | float | str] = {}


class Capacity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `PUT /v1/capacity`."""

    capacity_bytes: int


class FreeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/free`: give this much memory back to the host."""

    bytes: int


class Freed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answer of `POST /v1/free`."""

    freed_bytes: int


class Flushed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answer of `POST /v1/vms/{vm}/flush`."""

    pages: int


class ReclaimRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/vms/{vm}/reclaim`: ask for this many persistent pages back."""

    pages: int


class ErrorDetail(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a request failed."""

    message: str
    hint: str = ""
    vm: str | None = None
    code: int = 1
    """Exit code of `tmemctl` (`tmem_host.errors.ExitCode`)."""


class ErrorBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of every answer that is not a success."""

    error: ErrorDetail
