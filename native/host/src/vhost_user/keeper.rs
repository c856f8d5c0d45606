//! The keeper: holds what a device needs to go on when the process that serves it dies.
//!
//! QEMU never reconnects a vhost-user-vsock device. So the connection has to outlive tmemd: tmemd hands a snapshot of
//! every device (see [`super::snapshot`]) to this tiny process whenever one changes, and takes it back when it starts.
//! It speaks over a `SOCK_SEQPACKET` unix socket, one datagram a message, descriptors attached:
//!
//! | message | answer |
//! |---|---|
//! | `P` name snapshot: put, replacing an earlier one | none |
//! | `T` name: take | `S` snapshot, or `N` for none; the keeper keeps its copy |
//! | `D` name: drop | none |
//!
//! A name is preceded by its length, one byte. A device whose front end hangs up is dropped, so that the memory of a VM
//! that has ended is not held. It ends by itself once it holds nothing and nobody is connected.

use std::collections::HashMap;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::snapshot::{MAX_BYTES, MAX_DESCRIPTORS};

const PUT: u8 = b'P';
const TAKE: u8 = b'T';
const DROP: u8 = b'D';
const SNAPSHOT: u8 = b'S';
const NONE: u8 = b'N';
const MAX_MESSAGE_BYTES: usize = 2 + 255 + MAX_BYTES;
/// How long an answer may take: the keeper does nothing that waits.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Devices kept; more than a host has VMs.
const MAX_DEVICES: usize = 4096;

fn control_space() -> Vec<MaybeUninit<u8>> {
    vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))]
}

/// Send bytes and descriptors as one message.
pub(super) fn send_with(
    socket: BorrowedFd<'_>,
    parts: &[IoSlice<'_>],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = control_space();
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    net::sendmsg(socket, parts, &mut control, flags | SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receive bytes and descriptors of one message; 0 bytes at the end.
pub(super) fn receive_with(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    flags: RecvFlags,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = control_space();
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok((received.bytes, descriptors))
}

fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    let no_time = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&no_time)).is_ok()
        && polled[0].revents().intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR)
}

/// tmemd's connection to the keeper.
pub struct Keeper {
    socket: OwnedFd,
}

impl Keeper {
    /// Connect to the keeper at `path`.
    ///
    /// # Errors
    /// None is running there.
    pub fn connect(path: &Path) -> io::Result<Keeper> {
        let socket =
            net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Send, Some(ANSWER_TIMEOUT))?;
        Ok(Keeper { socket })
    }

    fn send(&self, kind: u8, name: &str, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let length = u8::try_from(name.len()).map_err(|_| io::Error::other("a VM's name is too long"))?;
        let head = [kind, length];
        let parts = [IoSlice::new(&head), IoSlice::new(name.as_bytes()), IoSlice::new(bytes)];
        send_with(self.socket.as_fd(), &parts, descriptors, SendFlags::empty())
    }

    /// Hand over the snapshot of a device.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn put(&self, name: &str, snapshot: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send(PUT, name, snapshot, descriptors)
    }

    /// Ask for the snapshot of a device.
    ///
    /// # Errors
    /// The keeper is gone, or does not answer.
    pub fn take(&self, name: &str) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        self.send(TAKE, name, &[], &[])?;
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        let (bytes, descriptors) = receive_with(self.socket.as_fd(), &mut buffer, RecvFlags::empty())?;
        buffer.truncate(bytes);
        match buffer.first() {
            Some(&SNAPSHOT) => Ok(Some((buffer.split_off(1), descriptors))),
            Some(&NONE) => Ok(None),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Let go of a device.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn drop_device(&self, name: &str) -> io::Result<()> {
        self.send(DROP, name, &[], &[])
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

struct Kept {
    snapshot: Vec<u8>,
    /// The first is the front end's socket.
    descriptors: Vec<OwnedFd>,
}

struct Held {
    devices: HashMap<Vec<u8>, Kept>,
}

/// Run a keeper at `path` until it has held nothing and nobody has been connected for `linger`. A socket file nobody
/// listens on is replaced.
///
/// # Errors
/// Another keeper runs there, or the socket cannot be made.
pub fn run(path: &Path, linger: Duration) -> io::Result<()> {
    let listener = bind(path)?;
    let mut held = Held { devices: HashMap::new() };
    let mut clients: Vec<OwnedFd> = Vec::new();
    let mut idle_since = Instant::now();
    let outcome = loop {
        let busy = !clients.is_empty() || !held.devices.is_empty();
        if busy {
            idle_since = Instant::now();
        } else if idle_since.elapsed() >= linger {
            break Ok(());
        }
        let timeout = linger.saturating_sub(idle_since.elapsed());
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        let mut polled = vec![PollFd::new(&listener, PollFlags::IN)];
        polled.extend(clients.iter().map(|client| PollFd::new(client, PollFlags::IN)));
        let names: Vec<Vec<u8>> = held.devices.keys().cloned().collect();
        polled.extend(
            names.iter().map(|name| PollFd::new(&held.devices[name].descriptors[0], PollFlags::RDHUP)),
        );
        match poll(&mut polled, if busy { None } else { Some(&timeout) }) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => break Err(error.into()),
        }
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(polled);
        for (name, ready) in names.iter().zip(&ready[1 + clients.len()..]) {
            if *ready && is_hung_up(held.devices[name].descriptors[0].as_fd()) {
                held.devices.remove(name);
            }
        }
        let mut at = 0;
        clients.retain(|client| {
            at += 1;
            !ready[at] || held.serve(client.as_fd())
        });
        if ready[0] {
            if let Ok(client) = net::accept_with(&listener, SocketFlags::CLOEXEC) {
                if is_trusted(&client) {
                    clients.push(client);
                }
            }
        }
    };
    let _ = fs::remove_file(path);
    outcome
}

fn bind(path: &Path) -> io::Result<OwnedFd> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    if path.exists() {
        if Keeper::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        fs::remove_file(path)?;
    }
    let listener = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    net::bind(&listener, &SocketAddrUnix::new(path)?)?;
    // Whoever reaches this socket reaches the memory of all VMs.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    net::listen(&listener, 16)?;
    Ok(listener)
}

/// Whether the client is of our own user, or root.
fn is_trusted(client: &OwnedFd) -> bool {
    let ours = rustix::process::geteuid();
    net::sockopt::socket_peercred(client).is_ok_and(|peer| peer.uid == ours || peer.uid.is_root())
}

impl Held {
    /// Serve one message of a client. Returns whether it stays connected.
    fn serve(&mut self, client: BorrowedFd<'_>) -> bool {
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        let Ok((bytes, descriptors)) = receive_with(client, &mut buffer, RecvFlags::DONTWAIT) else {
            return false;
        };
        let [kind, length, rest @ ..] = &buffer[..bytes] else { return false };
        let Some((name, snapshot)) = rest.split_at_checked(usize::from(*length)) else { return false };
        match *kind {
            PUT => {
                let known = self.devices.contains_key(name);
                if descriptors.is_empty() || (!known && self.devices.len() == MAX_DEVICES) {
                    return false;
                }
                self.devices.insert(name.to_vec(), Kept { snapshot: snapshot.to_vec(), descriptors });
                true
            }
            TAKE => match self.devices.get(name) {
                Some(kept) => {
                    let descriptors: Vec<BorrowedFd<'_>> = kept.descriptors.iter().map(AsFd::as_fd).collect();
                    let parts = [IoSlice::new(&[SNAPSHOT]), IoSlice::new(&kept.snapshot)];
                    send_with(client, &parts, &descriptors, SendFlags::DONTWAIT).is_ok()
                }
                None => send_with(client, &[IoSlice::new(&[NONE])], &[], SendFlags::DONTWAIT).is_ok(),
            },
            DROP => {
                self.devices.remove(name);
                true
            }
            _ => false,
        }
    }
}
