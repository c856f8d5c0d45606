//! The first line on a hybrid socket: `CONNECT <port>`, from a program of the host that wants to reach the guest.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{recv, RecvFlags};

/// Longest line, its newline included: `CONNECT 4294967295\r\n`.
const MAX_LINE_BYTES: usize = 20;

/// A connection that has not said yet where it wants to go.
pub struct Greeting {
    socket: UnixStream,
    /// When it must have.
    pub deadline: Instant,
}

/// What has been heard.
pub enum Heard {
    /// Nothing, or part of the line.
    Part(Greeting),
    /// Anything else, or the end: close.
    Nonsense,
    /// The guest's port that is wanted. What follows the line is still in the socket.
    Connect(u32, UnixStream),
}

impl Greeting {
    /// A new connection.
    pub fn new(socket: UnixStream, deadline: Instant) -> Greeting {
        Greeting { socket, deadline }
    }

    /// Read the line if it is there; never beyond it. `ended`: nothing more will come.
    pub fn hear(self, ended: bool) -> Heard {
        let mut buffer = [0u8; MAX_LINE_BYTES];
        let bytes = match recv(&self.socket, &mut buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Heard::Nonsense,
            Ok((_, bytes)) => bytes.min(MAX_LINE_BYTES),
            Err(Errno::AGAIN | Errno::INTR) => return Heard::Part(self),
            Err(_) => return Heard::Nonsense,
        };
        let Some(length) = buffer[..bytes].iter().position(|&byte| byte == b'\n') else {
            return if bytes < MAX_LINE_BYTES && !ended { Heard::Part(self) } else { Heard::Nonsense };
        };
        let Some(port) = parse(&buffer[..length]) else { return Heard::Nonsense };
        match recv(&self.socket, &mut buffer[..=length], RecvFlags::DONTWAIT) {
            Ok((_, taken)) if taken == length + 1 => Heard::Connect(port, self.socket),
            _ => Heard::Nonsense,
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let (command, port) = line.split_once(' ')?;
    if !command.eq_ignore_ascii_case("connect") {
        return None;
    }
    port.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn hear(bytes: &[u8]) -> Heard {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(bytes).unwrap();
        Greeting::new(server, Instant::now()).hear(false)
    }

    #[test]
    fn a_line_is_heard_and_what_follows_is_left() {
        let Heard::Connect(22, mut socket) = hear(b"CONNECT 22\nSSH-2.0") else { panic!() };
        let mut rest = String::new();
        socket.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "SSH-2.0");
        assert!(matches!(hear(b"connect 4294967295\r\n"), Heard::Connect(u32::MAX, _)));
    }

    #[test]
    fn half_a_line_is_waited_for_and_nonsense_is_not() {
        assert!(matches!(hear(b"CONN"), Heard::Part(_)));
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(b"CONN").unwrap();
        assert!(matches!(Greeting::new(server, Instant::now()).hear(true), Heard::Nonsense));
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert!(matches!(Greeting::new(server, Instant::now()).hear(false), Heard::Nonsense));
        for nonsense in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"CONNECT -1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 000000000000000022\n",
            b"\n",
        ] {
            assert!(matches!(hear(nonsense), Heard::Nonsense), "{nonsense:?}");
        }
    }
}
