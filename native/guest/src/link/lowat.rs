//! Waking up once for an answer that comes in several packets.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

use super::Address;

/// What comes in one packet: the driver of virtio-vsock has buffers of a page.
const PACKET_BYTES: usize = 4096;

/// How many bytes must be there before a receiver on vsock is woken (`SO_RCVLOWAT`, heeded by vsock since Linux 6.2).
///
/// The driver wakes the receiver for each packet. An answer of eight pages comes in five or more, and a receiver that
/// takes each by itself also has the kernel tell the host of free space each time.
#[derive(Debug)]
pub struct LowWater {
    heeded: bool,
    bytes: usize,
}

impl LowWater {
    /// For a new socket connected to `address`.
    pub fn new(address: &Address) -> LowWater {
        LowWater { heeded: matches!(address, Address::Vsock { .. }), bytes: 1 }
    }

    /// Before receiving: have the receiver woken when this many bytes are there, or any if they fit into a packet.
    pub fn set(&mut self, socket: impl AsFd, lacking: usize) -> Result<(), Errno> {
        let bytes = if lacking > PACKET_BYTES { lacking } else { 1 };
        if !self.heeded || bytes == self.bytes {
            return Ok(());
        }
        let value = libc::c_int::try_from(bytes).map_err(|_| Errno::INVAL)?;
        // SAFETY: the value outlives the call, and its length is told.
        let result = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        if result < 0 {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
        }
        self.bytes = bytes;
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    pub(crate) fn asked_of(socket: &impl AsRawFd) -> libc::c_int {
        let mut value: libc::c_int = 0;
        let mut length = size_of_val(&value) as libc::socklen_t;
        // SAFETY: both outlive the call, which writes an int.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        value
    }

    #[test]
    fn the_rest_of_an_answer_is_waited_for_and_the_next_is_not() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let mut low_water = LowWater::new(&Address::Vsock { cid: 2, port: 1 });
        for (lacking, asked) in [(0, 1), (PACKET_BYTES, 1), (20_000, 20_000), (9_000, 9_000), (0, 1)] {
            low_water.set(&socket, lacking).unwrap();
            assert_eq!(asked_of(&socket), asked);
        }
    }

    #[test]
    fn other_sockets_are_left_alone() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let mut low_water = LowWater::new(&Address::Unix("/run/a".into()));
        low_water.set(&socket, 20_000).unwrap();
        assert_eq!(asked_of(&socket), 1);
    }
}
