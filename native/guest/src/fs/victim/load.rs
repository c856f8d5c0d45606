//! Loading and attaching the program, by the bpf system call.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use zerocopy::{Immutable, IntoBytes};

use super::btf::Btf;
use super::direct_map::DirectMap;
use super::ring::{Ring, RING_BYTES};
use super::{program, VictimError};
use crate::fs::device::last_error;

const MAP_CREATE: libc::c_int = 0;
const PROG_LOAD: libc::c_int = 5;
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const MAP_TYPE_RINGBUF: u32 = 27;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_FENTRY: u32 = 24;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ProgramLoad {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    btf: u32,
    function_record: u32,
    functions: u64,
    function_count: u32,
    line_record: u32,
    lines: u64,
    line_count: u32,
    attach_to: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct RawTracepointOpen {
    name: u64,
    program: u32,
    padding: u32,
}

/// A bpf command that returns a descriptor.
fn bpf(command: libc::c_int, arguments: &(impl IntoBytes + Immutable)) -> Result<OwnedFd, VictimError> {
    let bytes = arguments.as_bytes();
    // SAFETY: the kernel reads the bytes of the arguments, and what they point to lives for the call; what these
    // commands return is a new descriptor that belongs to nobody else.
    unsafe {
        let fd = libc::syscall(libc::SYS_bpf, command, bytes.as_ptr(), bytes.len());
        if fd < 0 {
            return Err(VictimError::Refused(last_error()));
        }
        Ok(OwnedFd::from_raw_fd(fd as libc::c_int))
    }
}

/// The ring, and the link that keeps the program attached, for the mount with this device number.
pub(super) fn attach(mount: rustix::fs::Dev) -> Result<(Ring, OwnedFd), VictimError> {
    let btf = Btf::of_kernel()?;
    let map = DirectMap::of_kernel()?;
    let create =
        MapCreate { kind: MAP_TYPE_RINGBUF, key_bytes: 0, value_bytes: 0, entries: RING_BYTES as u32 };
    let ring = bpf(MAP_CREATE, &create)?;
    // The kernel's own encoding, not the one that stat tells.
    let device = rustix::fs::major(mount) << 20 | rustix::fs::minor(mount);
    let code = program::assemble(&btf, &map, device, ring.as_raw_fd())?;
    let mut name = [0; 16];
    name[..11].copy_from_slice(b"tmem_victim");
    let load = ProgramLoad {
        kind: PROG_TYPE_TRACING,
        instructions: (code.len() / 8) as u32,
        code: code.as_ptr() as u64,
        license: program::LICENSE.as_ptr() as u64,
        log_level: 0,
        log_bytes: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name,
        interface: 0,
        attach_type: TRACE_FENTRY,
        btf: 0,
        function_record: 0,
        functions: 0,
        function_count: 0,
        line_record: 0,
        lines: 0,
        line_count: 0,
        attach_to: btf.function(program::HOOK)?,
    };
    let loaded = bpf(PROG_LOAD, &load)?;
    let open = RawTracepointOpen { name: 0, program: loaded.as_raw_fd() as u32, padding: 0 };
    let link = bpf(RAW_TRACEPOINT_OPEN, &open)?;
    Ok((Ring::map(ring).map_err(VictimError::Refused)?, link))
}
