//! Making, recovering and removing a ublk device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use io_uring::{cqueue, opcode, squeue, types, IoUring};
use tmem_wire::PAGE_BYTES;

use super::abi::{
    Control, DeviceInfo, Params, ADD_DEV, DEL_DEV, END_USER_RECOVERY, F_CMD_IOCTL_ENCODE, F_USER_RECOVERY,
    F_USER_RECOVERY_REISSUE, GET_FEATURES, PARAM_BASIC, PARAM_DISCARD, SET_PARAMS, START_DEV,
    START_USER_RECOVERY, STOP_DEV,
};
use crate::swap::core::MAX_PAGES;

const CONTROL_PATH: &str = "/dev/ublk-control";
const SECTOR_BYTES: u64 = 512;
const PAGE_SECTORS: u32 = (PAGE_BYTES as u64 / SECTOR_BYTES) as u32;
/// How long the kernel may take to notice that the last server died.
const RECOVERY: Duration = Duration::from_secs(20);

/// The driver.
pub(in crate::swap) struct Driver {
    control: File,
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
}

/// A device.
#[derive(Debug, Clone, Copy)]
pub(in crate::swap) struct Ublk {
    number: u32,
}

impl Driver {
    /// Open the driver, if this kernel has it and it can do what is needed here.
    pub(in crate::swap) fn open() -> io::Result<Driver> {
        if !Path::new(CONTROL_PATH).exists() {
            // Not fatal: it may be built in, or not there at all, which opening it tells.
            let _ = std::process::Command::new("modprobe").arg("ublk_drv").status();
        }
        let control = OpenOptions::new().read(true).write(true).open(CONTROL_PATH).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("{CONTROL_PATH}: {error}; the kernel module ublk_drv is needed"),
            )
        })?;
        let mut driver = Driver { control, ring: IoUring::builder().build(4)? };
        let mut features = 0_u64;
        let ask = Control {
            device: u32::MAX,
            queue: u16::MAX,
            length: size_of::<u64>() as u16,
            address: &raw mut features as u64,
            ..Control::default()
        };
        driver.command(GET_FEATURES, &ask).map_err(|error| {
            io::Error::new(error.kind(), format!("ublk_drv is too old (Linux 6.5 is needed): {error}"))
        })?;
        let needed = F_CMD_IOCTL_ENCODE | F_USER_RECOVERY | F_USER_RECOVERY_REISSUE;
        if features & needed != needed {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("ublk_drv lacks features: has {features:#x}, needed are {needed:#x}"),
            ));
        }
        Ok(driver)
    }

    fn command(&mut self, op: u32, command: &Control) -> io::Result<()> {
        let mut bytes = [0; 80];
        // SAFETY: plain numbers without padding, of 32 bytes.
        bytes[..32].copy_from_slice(unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(command).cast::<u8>(), size_of::<Control>())
        });
        let entry = opcode::UringCmd80::new(types::Fd(self.control.as_raw_fd()), op).cmd(bytes).build();
        // SAFETY: what `address` names is the caller's, who waits here.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::other("the control ring is full"))?;
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            if let Some(done) = self.ring.completion().next() {
                return match done.result() {
                    result if result < 0 => Err(io::Error::from_raw_os_error(-result)),
                    _ => Ok(()),
                };
            }
        }
    }

    /// Make a device. It exists for the kernel once its queues fetch and [`Driver::start`] was called.
    pub(in crate::swap) fn add(&mut self, pages: u32, queues: u16, depth: u16) -> io::Result<Ublk> {
        let explain = |what: &'static str| {
            move |error: io::Error| io::Error::new(error.kind(), format!("ublk: cannot {what}: {error}"))
        };
        let mut info = DeviceInfo {
            queues,
            depth,
            max_io_bytes: (MAX_PAGES * PAGE_BYTES) as u32,
            device: u32::MAX,
            flags: F_USER_RECOVERY | F_USER_RECOVERY_REISSUE | F_CMD_IOCTL_ENCODE,
            ..DeviceInfo::default()
        };
        let add = Control {
            device: u32::MAX,
            queue: u16::MAX,
            length: size_of::<DeviceInfo>() as u16,
            address: &raw mut info as u64,
            ..Control::default()
        };
        self.command(ADD_DEV, &add).map_err(explain("add a device"))?;
        let device = Ublk { number: info.device };
        if info.queues != queues || info.depth != depth {
            self.delete(device)?;
            return Err(io::Error::other(format!(
                "ublk: this guest takes {} queues of {} requests at most; choose --queues and --depth accordingly",
                info.queues, info.depth
            )));
        }
        let page_shift = PAGE_BYTES.trailing_zeros() as u8;
        let sectors = u64::from(pages) * u64::from(PAGE_SECTORS);
        let most = u32::try_from(sectors).unwrap_or(u32::MAX / PAGE_SECTORS * PAGE_SECTORS);
        let mut params = Params {
            length: size_of::<Params>() as u32,
            types: PARAM_BASIC | PARAM_DISCARD,
            logical_block_shift: page_shift,
            physical_block_shift: page_shift,
            io_opt_shift: page_shift,
            io_min_shift: page_shift,
            max_sectors: MAX_PAGES as u32 * PAGE_SECTORS,
            device_sectors: sectors,
            discard_granularity: PAGE_BYTES as u32,
            max_discard_sectors: most,
            max_write_zeroes_sectors: most,
            max_discard_segments: 1,
            ..Params::default()
        };
        let set = Control {
            device: device.number,
            queue: u16::MAX,
            length: size_of::<Params>() as u16,
            address: &raw mut params as u64,
            ..Control::default()
        };
        if let Err(error) = self.command(SET_PARAMS, &set) {
            self.delete(device)?;
            return Err(explain("set the device's parameters")(error));
        }
        Ok(device)
    }

    fn simple(&mut self, op: u32, device: Ublk, data: u64) -> io::Result<()> {
        self.command(op, &Control { device: device.number, queue: u16::MAX, data, ..Control::default() })
    }

    /// The queues fetch: show the device to the kernel, or (`recovered`) let it go on.
    pub(in crate::swap) fn start(&mut self, device: Ublk, recovered: bool) -> io::Result<()> {
        let op = if recovered { END_USER_RECOVERY } else { START_DEV };
        self.simple(op, device, std::process::id().into())
    }

    /// Take over a device whose server died.
    pub(in crate::swap) fn recover(&mut self, number: u32) -> io::Result<Ublk> {
        let device = Ublk { number };
        let deadline = Instant::now() + RECOVERY;
        loop {
            match self.simple(START_USER_RECOVERY, device, 0) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                done => return done.map(|()| device),
            }
        }
    }

    /// Take the device from the kernel. It must not be in use.
    pub(in crate::swap) fn stop(&mut self, device: Ublk) -> io::Result<()> {
        self.simple(STOP_DEV, device, 0)
    }

    /// Remove what is left of it, after its queues ended.
    pub(in crate::swap) fn delete(&mut self, device: Ublk) -> io::Result<()> {
        self.simple(DEL_DEV, device, 0)
    }
}

impl Ublk {
    pub(in crate::swap) fn number(self) -> u32 {
        self.number
    }

    /// The block device.
    pub(in crate::swap) fn path(self) -> PathBuf {
        format!("/dev/ublkb{}", self.number).into()
    }

    /// Settings of the block layer that make swapping to a server in user space slow, or worse, taken back. Writeback
    /// throttling would have whoever frees memory wait for our answers, even those whose work our answers need. Only for
    /// a device that nobody uses yet: the kernel waits for all requests under way, and a server killed while it waits
    /// for its own answers is never gone, so that no other can follow it.
    pub(in crate::swap) fn tune(self) {
        for (setting, value) in [("wbt_lat_usec", "0"), ("scheduler", "none"), ("add_random", "0")] {
            let path = format!("/sys/block/ublkb{}/queue/{setting}", self.number);
            if let Err(error) = std::fs::write(&path, value) {
                log::debug!("{path}: {error}");
            }
        }
    }

    /// Claim the device so that nobody can begin to use it. `None` if somebody does.
    pub(in crate::swap) fn claim(self) -> io::Result<Option<File>> {
        match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(self.path()) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The device's end for its server. One process may have it open at a time.
    pub(in crate::swap) fn open(self) -> io::Result<File> {
        let path = format!("/dev/ublkc{}", self.number);
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match OpenOptions::new().read(true).write(true).open(&path) {
                // The node is made by devtmpfs, or by a udev that takes its time.
                Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(io::Error::new(error.kind(), format!("{path}: {error}"))),
                Ok(file) => return Ok(file),
            }
        }
    }
}
