//! Making, recovering and removing an NBD device of this guest's kernel, over generic netlink
//! (`linux/nbd-netlink.h`). The kernel gets one end of a socket pair for each queue.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tmem_wire::PAGE_BYTES;

use crate::swap::core::MAX_PAGES;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_CMD_RECONFIGURE: u8 = 3;
const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_TIMEOUT: u16 = 4;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = !(NLA_F_NESTED | 1 << 14);

/// After so many seconds the kernel gives a connection up and sends its requests again over the next one. It is the
/// only thing that brings back requests whose server died; see docs/swap.md.
const REQUEST_TIMEOUT_S: u64 = 30;
/// How long the kernel keeps requests for a device without a server.
const DEAD_TIMEOUT_S: u64 = 7 * 24 * 3600;
/// How long the kernel may take to notice that the last server died.
const RECOVERY: Duration = Duration::from_secs(20);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// What the kernel may send: trims, over several connections. It need not flush: nothing is held back.
const SERVER_FLAGS: u64 = 1 | 1 << 5 | 1 << 8;

/// The kernel's NBD client.
pub(in crate::swap) struct Driver {
    socket: OwnedFd,
    family: u16,
}

/// An NBD device.
#[derive(Debug, Clone, Copy)]
pub(in crate::swap) struct NbdDevice {
    number: u32,
}

/// Append an attribute.
fn attribute(message: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    message.extend_from_slice(&((4 + payload.len()) as u16).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(payload);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// The payload of the first attribute of this kind.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    while let Some((head, _)) = attributes.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let payload = attributes.get(4..length)?;
        if u16::from_ne_bytes([head[2], head[3]]) & NLA_TYPE_MASK == kind {
            return Some(payload);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// Whether the other end of a connection is closed.
fn is_closed(socket: &OwnedFd) -> bool {
    let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
    matches!(rustix::net::recv(socket, &mut [0; 1], flags), Ok((0, _)))
}

impl Driver {
    /// Open the client, if this kernel has it.
    pub(in crate::swap) fn open() -> io::Result<Driver> {
        // SAFETY: names no memory; the descriptor is taken over below.
        let socket = unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_GENERIC)
        };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made and has no other owner.
        let mut driver = Driver { socket: unsafe { OwnedFd::from_raw_fd(socket) }, family: GENL_ID_CTRL };
        let mut ask = Vec::new();
        attribute(&mut ask, CTRL_ATTR_FAMILY_NAME, b"nbd\0");
        let answer = driver
            .call(CTRL_CMD_GETFAMILY, &ask)
            .or_else(|_| {
                // Only if it is missing: while a device has no server, no other program may be able to run.
                let _ = std::process::Command::new("modprobe").args(["nbd", "nbds_max=0"]).status();
                driver.call(CTRL_CMD_GETFAMILY, &ask)
            })
            .map_err(|error| {
                io::Error::new(error.kind(), format!("the kernel module nbd is needed: {error}"))
            })?;
        driver.family = match find(&answer, CTRL_ATTR_FAMILY_ID) {
            Some(&[low, high]) => u16::from_ne_bytes([low, high]),
            _ => return Err(io::Error::other("the kernel names no nbd netlink family")),
        };
        Ok(driver)
    }

    /// One request; the attributes of its answer.
    fn call(&mut self, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
        let mut message = Vec::with_capacity(20 + attributes.len());
        message.extend_from_slice(&((20 + attributes.len()) as u32).to_ne_bytes());
        message.extend_from_slice(&self.family.to_ne_bytes());
        message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&[command, 1, 0, 0]);
        message.extend_from_slice(attributes);
        rustix::net::send(&self.socket, &message, rustix::net::SendFlags::empty())?;
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let (got, _) = rustix::net::recv(&self.socket, &mut buffer, rustix::net::RecvFlags::empty())?;
            let mut rest = &buffer[..got];
            while let Some(&[a, b, c, d, e, f]) = rest.first_chunk::<6>() {
                let length = u32::from_ne_bytes([a, b, c, d]) as usize;
                let Some(part) = rest.get(16..length) else {
                    return Err(io::Error::other("the kernel sent half a netlink message"));
                };
                if u16::from_ne_bytes([e, f]) == NLMSG_ERROR {
                    let errno = part.first_chunk::<4>().map_or(-libc::EPROTO, |e| i32::from_ne_bytes(*e));
                    return if errno == 0 { Ok(answer) } else { Err(io::Error::from_raw_os_error(-errno)) };
                }
                answer = part.get(4..).unwrap_or_default().to_vec();
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// A socket pair for each queue: ours, and the kernel's as the attribute that hands them over.
    fn sockets(queues: u16, message: &mut Vec<u8>) -> io::Result<(Vec<OwnedFd>, Vec<OwnedFd>)> {
        let (mut ours, mut theirs, mut items) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..queues {
            let (our, their) =
                rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            let mut item = Vec::new();
            attribute(&mut item, NBD_SOCK_FD, &their.as_raw_fd().to_ne_bytes());
            attribute(&mut items, NBD_SOCK_ITEM | NLA_F_NESTED, &item);
            ours.push(our);
            theirs.push(their);
        }
        attribute(message, NBD_ATTR_SOCKETS | NLA_F_NESTED, &items);
        Ok((ours, theirs))
    }

    /// Make a device; returns it and our ends of its connections, on which the kernel may ask at once.
    pub(in crate::swap) fn add(&mut self, pages: u32, queues: u16) -> io::Result<(NbdDevice, Vec<OwnedFd>)> {
        let mut message = Vec::new();
        attribute(&mut message, NBD_ATTR_SIZE_BYTES, &(u64::from(pages) * PAGE_BYTES as u64).to_ne_bytes());
        attribute(&mut message, NBD_ATTR_BLOCK_SIZE_BYTES, &(PAGE_BYTES as u64).to_ne_bytes());
        attribute(&mut message, NBD_ATTR_TIMEOUT, &REQUEST_TIMEOUT_S.to_ne_bytes());
        attribute(&mut message, NBD_ATTR_SERVER_FLAGS, &SERVER_FLAGS.to_ne_bytes());
        attribute(&mut message, NBD_ATTR_DEAD_CONN_TIMEOUT, &DEAD_TIMEOUT_S.to_ne_bytes());
        let (ours, _theirs) = Driver::sockets(queues, &mut message)?;
        let answer = self
            .call(NBD_CMD_CONNECT, &message)
            .map_err(|error| io::Error::new(error.kind(), format!("nbd: cannot make a device: {error}")))?;
        let number = find(&answer, NBD_ATTR_INDEX)
            .and_then(|index| index.first_chunk::<4>())
            .map(|index| u32::from_ne_bytes(*index))
            .ok_or_else(|| io::Error::other("nbd: the kernel does not tell which device it made"))?;
        Ok((NbdDevice { number }, ours))
    }

    /// Give a device whose server died new connections, once the kernel has let go of the old ones.
    pub(in crate::swap) fn recover(
        &mut self,
        number: u32,
        queues: u16,
    ) -> io::Result<(NbdDevice, Vec<OwnedFd>)> {
        let deadline = Instant::now() + RECOVERY;
        // A receiver that has not come to a dead connection's end takes the next one in its place for its own: it
        // reads from it, beside the receiver that belongs there, or drops it.
        while has_receivers(number)? {
            if Instant::now() > deadline {
                return Err(io::Error::other("nbd: the kernel does not notice that its server died"));
            }
            std::thread::sleep(LOOK);
        }
        let mut message = Vec::new();
        attribute(&mut message, NBD_ATTR_INDEX, &number.to_ne_bytes());
        let (ours, theirs) = Driver::sockets(queues, &mut message)?;
        self.call(NBD_CMD_RECONFIGURE, &message)?;
        drop(theirs);
        // It closes what it does not take, and does not tell.
        if ours.iter().any(is_closed) {
            return Err(io::Error::other("nbd: the kernel takes no connection in a dead one's place"));
        }
        Ok((NbdDevice { number }, ours))
    }

    /// Remove the device. It must not be in use.
    pub(in crate::swap) fn remove(&mut self, device: NbdDevice) -> io::Result<()> {
        let mut message = Vec::new();
        attribute(&mut message, NBD_ATTR_INDEX, &device.number.to_ne_bytes());
        self.call(NBD_CMD_DISCONNECT, &message).map(|_| ())
    }
}

/// Whether any of the kernel's workers is at a receiver of this device's replies, as their names tell.
fn has_receivers(number: u32) -> io::Result<bool> {
    let busy = format!("+nbd{number}-recv");
    for entry in std::fs::read_dir("/proc")? {
        // Others than processes have no such file, and a process may end meanwhile.
        let name = std::fs::read(entry?.path().join("comm")).unwrap_or_default();
        if name.windows(busy.len()).any(|part| part == busy.as_bytes()) {
            return Ok(true);
        }
    }
    Ok(false)
}

impl NbdDevice {
    pub(in crate::swap) fn number(self) -> u32 {
        self.number
    }

    /// The block device.
    pub(in crate::swap) fn path(self) -> PathBuf {
        format!("/dev/nbd{}", self.number).into()
    }

    /// Settings of the block layer that the protocol cannot carry. Without the first, requests come that are too large
    /// to be served. Only for a device that nobody uses yet: the kernel waits for all requests under way, and a server
    /// killed while it waits for its own answers is never gone, so that no other can follow it.
    pub(in crate::swap) fn tune(self) -> io::Result<()> {
        let set = |setting: &str, value: &str| {
            let path = format!("/sys/block/nbd{}/queue/{setting}", self.number);
            std::fs::write(&path, value)
                .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
        };
        set("max_sectors_kb", &(MAX_PAGES * PAGE_BYTES / 1024).to_string())?;
        for (setting, value) in [("wbt_lat_usec", "0"), ("scheduler", "none"), ("rotational", "0")] {
            if let Err(error) = set(setting, value) {
                log::debug!("{error}");
            }
        }
        Ok(())
    }

    /// Claim the device so that nobody can begin to use it. `None` if somebody does.
    pub(in crate::swap) fn claim(self) -> io::Result<Option<File>> {
        match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(self.path()) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_connection_is_told_from_a_silent_one() {
        let (mut ours, mut theirs) = Driver::sockets(2, &mut Vec::new()).unwrap();
        drop(theirs.pop());
        assert!(is_closed(&ours.pop().unwrap()) && !is_closed(&ours[0]));
        rustix::net::send(&theirs[0], &[1], rustix::net::SendFlags::empty()).unwrap();
        assert!(!is_closed(&ours[0]));
    }

    #[test]
    fn attributes_are_found_again() {
        let (mut inner, mut message) = (Vec::new(), Vec::new());
        attribute(&mut inner, 1, &7_u32.to_ne_bytes());
        attribute(&mut message, 3, b"abc");
        attribute(&mut message, 7 | NLA_F_NESTED, &inner);
        assert_eq!(find(&message, 3), Some(&b"abc"[..]));
        assert_eq!(find(&message, 7).and_then(|inner| find(inner, 1)), Some(&7_u32.to_ne_bytes()[..]));
        assert_eq!(find(&message, 8), None);
        assert_eq!(find(&[9, 0, 1, 0], 1), None);
    }
}
