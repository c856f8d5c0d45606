//! What the kernel's `ublk_drv` and its servers say to each other: `linux/ublk_cmd.h`, as of Linux 6.5.

/// Bytes of a control command.
const CONTROL_BYTES: u32 = 32;
/// Bytes of an I/O command.
const IO_BYTES: u32 = 16;

const fn ioctl(direction: u32, bytes: u32, number: u32) -> u32 {
    direction << 30 | bytes << 16 | (b'u' as u32) << 8 | number
}

const READ: u32 = 2;
const READ_WRITE: u32 = 3;

pub(super) const ADD_DEV: u32 = ioctl(READ_WRITE, CONTROL_BYTES, 0x04);
pub(super) const DEL_DEV: u32 = ioctl(READ_WRITE, CONTROL_BYTES, 0x05);
pub(super) const START_DEV: u32 = ioctl(READ_WRITE, CONTROL_BYTES, 0x06);
pub(super) const STOP_DEV: u32 = ioctl(READ_WRITE, CONTROL_BYTES, 0x07);
pub(super) const SET_PARAMS: u32 = ioctl(READ_WRITE, CONTROL_BYTES, 0x08);
pub(super) const START_USER_RECOVERY: u32 = ioctl(READ_WRITE, CONTROL_BYTES, 0x10);
pub(super) const END_USER_RECOVERY: u32 = ioctl(READ_WRITE, CONTROL_BYTES, 0x11);
pub(super) const GET_FEATURES: u32 = ioctl(READ, CONTROL_BYTES, 0x13);
pub(super) const FETCH: u32 = ioctl(READ_WRITE, IO_BYTES, 0x20);
pub(super) const COMMIT_AND_FETCH: u32 = ioctl(READ_WRITE, IO_BYTES, 0x21);

/// The device survives its server and waits for another.
pub(super) const F_USER_RECOVERY: u64 = 1 << 3;
/// The next server gets the requests that the last one did not answer.
pub(super) const F_USER_RECOVERY_REISSUE: u64 = 1 << 4;
/// Commands are numbered as above.
pub(super) const F_CMD_IOCTL_ENCODE: u64 = 1 << 6;

pub(super) const PARAM_BASIC: u32 = 1;
pub(super) const PARAM_DISCARD: u32 = 1 << 1;

pub(super) const OP_READ: u8 = 0;
pub(super) const OP_WRITE: u8 = 1;
pub(super) const OP_FLUSH: u8 = 2;
pub(super) const OP_DISCARD: u8 = 3;
pub(super) const OP_WRITE_ZEROES: u8 = 5;

/// Result of a fetch that brings a request.
pub(super) const RES_OK: i32 = 0;

/// Requests of a queue stand in shared memory, queue after queue, with space for this many each.
pub(super) const MAX_QUEUE_DEPTH: usize = 4096;

/// A control command, in the last 80 bytes of a large submission entry.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Control {
    pub(super) device: u32,
    pub(super) queue: u16,
    pub(super) length: u16,
    pub(super) address: u64,
    pub(super) data: u64,
    pub(super) reserved: u64,
}

/// What a device is.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct DeviceInfo {
    pub(super) queues: u16,
    pub(super) depth: u16,
    pub(super) state: u16,
    pub(super) pad0: u16,
    pub(super) max_io_bytes: u32,
    pub(super) device: u32,
    pub(super) server_pid: i32,
    pub(super) pad1: u32,
    pub(super) flags: u64,
    pub(super) server_flags: u64,
    pub(super) owner: [u32; 2],
    pub(super) reserved: [u64; 2],
}

/// How the block layer shall treat it.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Params {
    pub(super) length: u32,
    pub(super) types: u32,
    // basic
    pub(super) attributes: u32,
    pub(super) logical_block_shift: u8,
    pub(super) physical_block_shift: u8,
    pub(super) io_opt_shift: u8,
    pub(super) io_min_shift: u8,
    pub(super) max_sectors: u32,
    pub(super) chunk_sectors: u32,
    pub(super) device_sectors: u64,
    pub(super) virt_boundary_mask: u64,
    // discard
    pub(super) discard_alignment: u32,
    pub(super) discard_granularity: u32,
    pub(super) max_discard_sectors: u32,
    pub(super) max_write_zeroes_sectors: u32,
    pub(super) max_discard_segments: u16,
    pub(super) reserved: u16,
}

/// A request, written by the kernel.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Descriptor {
    pub(super) op_flags: u32,
    pub(super) sectors: u32,
    pub(super) start_sector: u64,
    pub(super) address: u64,
}

/// Fetch a request into `address`, or commit one with `result` and fetch the next.
pub(super) fn io_command(queue: u16, tag: u16, result: i32, address: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..].copy_from_slice(&address.to_ne_bytes());
    bytes
}

const _: () = {
    assert!(size_of::<Control>() == CONTROL_BYTES as usize);
    assert!(size_of::<DeviceInfo>() == 64);
    assert!(size_of::<Params>() == 64);
    assert!(size_of::<Descriptor>() == 24);
};
