from typing import Literal, TypedDict, final, type_check_only

__all__ = [
    "HEADER_BYTES",
    "MAX_BATCH",
    "MAX_BODY_BYTES",
    "PAGE_BYTES",
    "PORT",
    "VERSION",
    "Engine",
    "EngineError",
    "Store",
    "decode_header",
    "decode_hello_answer",
    "decode_hello_request",
    "decode_notice",
    "decode_stats",
    "encode_header",
    "encode_hello_answer",
    "encode_hello_request",
    "encode_notice",
    "encode_report",
    "latency_bounds",
    "log_to_stderr",
    "run_keeper",
]

HEADER_BYTES: int
MAX_BATCH: int
MAX_BODY_BYTES: int
PAGE_BYTES: int
PORT: int
VERSION: int

_PoolCreateKind = Literal["persistent", "ephemeral", "exclusive"]
_PutStatus = Literal["stored", "over_quota", "frozen", "incompressible", "no_memory", "corrupt"]
_GetStatus = Literal["hit", "miss", "lost"]
_Encoding = Literal["none", "raw", "same_filled", "lz4"]
_NoticeKind = Literal["reclaim", "quota", "frozen", "shutdown"]

@type_check_only
class RecoveryDict(TypedDict):
    formatted: bool
    vms: int
    pools: int
    persistent_pages: int
    ephemeral_pages: int
    reclaimed_slots: int
    elapsed_us: int

@type_check_only
class ReportDict(TypedDict):
    age_s: float
    psi_some_avg10: float
    psi_full_avg10: float
    mem_total_bytes: int
    mem_available_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int
    swap_in_pages: int
    swap_out_pages: int
    shim_host_pages: int
    shim_file_pages: int
    cache_hit_pages: int
    cache_miss_pages: int

@type_check_only
class VmStatsDict(TypedDict):
    frozen: bool
    stored_bytes: int
    raw_bytes: int
    ephemeral_pages: int
    persistent_pages: int
    persistent_bytes: int
    puts_accepted: int
    puts_refused: int
    gets_hit: int
    gets_missed: int
    pages_flushed: int
    pages_evicted: int

@type_check_only
class VmDict(VmStatsDict):
    name: str
    quota_bytes: int
    min_bytes: int
    weight: int
    connections: int
    connections_opened: int
    connections_refused: int
    protocol_errors: int
    timeouts: int
    throttled: int
    gave_way: int
    frames: dict[str, int]
    boot_id: str | None
    report: ReportDict | None

@type_check_only
class PoolDict(TypedDict):
    id: int
    vm: str
    name: str
    kind: Literal["ephemeral", "persistent"]
    exclusive: bool
    shared: str | None
    pages: int
    stored_bytes: int
    puts_accepted: int
    puts_refused: int
    gets_hit: int
    gets_missed: int
    pages_flushed: int
    pages_evicted: int

@type_check_only
class StoreUsageDict(TypedDict):
    capacity_bytes: int
    backed_bytes: int
    used_bytes: int
    payload_bytes: int
    metadata_bytes: int
    pages: int
    raw_bytes: int
    same_filled_pages: int
    raw_pages: int
    pages_evicted: int
    pages_moved: int
    pages_lost: int

@type_check_only
class UsageDict(StoreUsageDict):
    connections: int
    in_flight_bytes: int

@type_check_only
class LatenciesDict(TypedDict):
    get: tuple[list[int], float]
    put: tuple[list[int], float]

@type_check_only
class HelloRequestDict(TypedDict):
    version_min: int
    version_max: int
    role: int
    page_bytes: int
    features: int
    boot_id: bytes
    max_frame_bytes: int
    client: str

@type_check_only
class HelloAnswerDict(TypedDict):
    version: int
    page_bytes: int
    features: int
    max_frame_bytes: int
    max_batch: int
    max_in_flight: int
    keep_alive_ms: int
    quota_bytes: int

@type_check_only
class StatsDict(TypedDict):
    quota_bytes: int
    used_bytes: int
    ephemeral_pages: int
    persistent_pages: int
    puts_accepted: int
    puts_refused: int
    gets_hit: int
    gets_missed: int
    pages_flushed: int
    pages_evicted: int
    frozen: int

class EngineError(Exception):
    """`args` are a message and its kind."""

@final
class Engine:
    def __new__(
        cls,
        *,
        capacity_bytes: int,
        arena: str | None = None,
        store_incompressible: bool = True,
        socket_mode: int = ...,
        socket_gid: int | None = None,
        connections: int = ...,
        connections_per_s: int = ...,
        in_flight_bytes: int = ...,
        in_flight_bytes_total: int = ...,
        pages_per_s: int = ...,
        max_in_flight: int = ...,
        hello_timeout_s: float = ...,
        frame_timeout_s: float = ...,
        stall_timeout_s: float = ...,
        keep_alive_s: float = ...,
        busy_poll_us: int = ...,
    ) -> Engine: ...
    @property
    def recovery(self) -> RecoveryDict: ...
    def add_vm(
        self,
        name: str,
        *,
        quota_bytes: int,
        min_bytes: int = 0,
        weight: int = 100,
        persistent_max_bytes: int | None = None,
        cid: int | None = None,
        hybrid_socket: str | None = None,
        vhost_user_socket: str | None = None,
        guest_cid: int | None = None,
    ) -> None: ...
    def use_keeper(self, path: str) -> None: ...
    def endpoint_counters(self, name: str) -> dict[str, int]: ...
    def remove_vm(self, name: str) -> int: ...
    def forget_vm(self, name: str) -> int: ...
    def vms(self) -> list[str]: ...
    def stored_vms(self) -> list[str]: ...
    def set_limits(
        self,
        name: str,
        *,
        quota_bytes: int,
        min_bytes: int,
        weight: int,
        persistent_max_bytes: int | None = None,
    ) -> None: ...
    def set_frozen(self, name: str, frozen: bool) -> None: ...
    def vm(self, name: str) -> VmDict: ...
    def pools(self, name: str) -> list[PoolDict]: ...
    def destroy_pool(self, name: str, pool: int) -> int: ...
    def flush_ephemeral(self, name: str) -> int: ...
    def reclaim(self, name: str, pages: int) -> int: ...
    def grant_shared(self, uuid: bytes, name: str) -> None: ...
    def revoke_shared(self, uuid: bytes, name: str) -> None: ...
    def usage(self) -> UsageDict: ...
    def set_compression(self, on: bool) -> None: ...
    def set_capacity(self, capacity_bytes: int) -> int: ...
    def free_memory(self, size_bytes: int) -> int: ...
    def listen_vsock(self, port: int) -> None: ...
    def drain(self, patience_s: float) -> bool: ...
    def latencies(self, name: str) -> LatenciesDict: ...

@final
class Store:
    def __new__(
        cls, capacity_bytes: int, *, arena: str | None = None, store_incompressible: bool = True
    ) -> Store: ...
    def add_vm(
        self,
        name: str,
        *,
        quota_bytes: int = ...,
        min_bytes: int = 0,
        weight: int = 100,
        persistent_max_bytes: int = ...,
    ) -> int: ...
    def remove_vm(self, vm: int) -> int: ...
    def find_vm(self, name: str) -> int | None: ...
    def set_limits(
        self,
        vm: int,
        *,
        quota_bytes: int = ...,
        min_bytes: int = 0,
        weight: int = 100,
        persistent_max_bytes: int = ...,
    ) -> None: ...
    def set_frozen(self, vm: int, frozen: bool) -> None: ...
    def attach_boot(self, vm: int, boot_id: bytes) -> tuple[int, int] | None: ...
    def create_pool(
        self, vm: int, name: str, kind: _PoolCreateKind, *, shared: bytes | None = None
    ) -> int: ...
    def destroy_pool(self, vm: int, pool: int) -> int: ...
    def put(
        self,
        vm: int,
        pool: int,
        object: bytes,  # noqa: A002
        index: int,
        payload: bytes,
        *,
        encoding: _Encoding = "raw",
        checksum: int | None = None,
    ) -> _PutStatus: ...
    def get(
        self,
        vm: int,
        pool: int,
        object: bytes,  # noqa: A002
        index: int,
        *,
        accept_lz4: bool = False,
    ) -> tuple[_GetStatus, _Encoding, bytes, int]: ...
    def flush_page(self, vm: int, pool: int, object: bytes, index: int) -> bool: ...  # noqa: A002
    def flush_object(self, vm: int, pool: int, object: bytes) -> int: ...  # noqa: A002
    def flush_pool(self, vm: int, pool: int) -> int: ...
    def flush_ephemeral(self, vm: int) -> int: ...
    def grant_shared(self, uuid: bytes, vm: int) -> None: ...
    def revoke_shared(self, uuid: bytes, vm: int) -> None: ...
    def set_compression(self, on: bool) -> None: ...
    def set_capacity(self, capacity_bytes: int) -> int: ...
    def free_memory(self, size_bytes: int) -> int: ...
    def usage(self) -> StoreUsageDict: ...
    def vm_stats(self, vm: int) -> VmStatsDict | None: ...

def log_to_stderr(level: str) -> None: ...
def run_keeper(path: str, *, linger_s: float = 5.0) -> None: ...
def latency_bounds() -> list[float]: ...
def encode_header(
    op: int,
    *,
    flags: int = 0,
    tag: int = 0,
    pool: int = 0,
    length: int = 0,
    count: int = 0,
    status: int = 0,
) -> bytes: ...
def decode_header(bytes: bytes) -> tuple[int, int, int, int, int, int, int]: ...  # noqa: A002
def encode_hello_request(
    *,
    role: int,
    boot_id: bytes,
    client: str,
    features: int,
    max_frame_bytes: int,
    page_bytes: int = 4096,
    version_min: int = 1,
    version_max: int = 1,
) -> bytes: ...
def decode_hello_request(body: bytes) -> HelloRequestDict: ...
def encode_hello_answer(
    *,
    features: int,
    max_frame_bytes: int,
    max_batch: int,
    max_in_flight: int,
    keep_alive_ms: int,
    quota_bytes: int,
    page_bytes: int = 4096,
    version: int = 1,
) -> bytes: ...
def decode_hello_answer(body: bytes) -> HelloAnswerDict: ...
def encode_notice(kind: _NoticeKind, first: int = 0, second: int = 0) -> bytes: ...
def decode_notice(op: int, body: bytes) -> tuple[_NoticeKind, int, int]: ...
def encode_report(
    *,
    psi_some_avg10: int,
    psi_full_avg10: int,
    mem_total_bytes: int,
    mem_available_bytes: int,
    swap_total_bytes: int,
    swap_free_bytes: int,
    swap_in_pages: int,
    swap_out_pages: int,
    shim_host_pages: int,
    shim_file_pages: int,
    cache_hit_pages: int,
    cache_miss_pages: int,
) -> bytes: ...
def decode_stats(body: bytes) -> StatsDict: ...
