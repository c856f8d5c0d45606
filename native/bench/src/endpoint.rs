//! Where to connect or listen.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;

/// An address: `unix:/path`, `hybrid:/path:PORT` (`CONNECT PORT` on a hybrid vsock socket) or `vsock:CID:PORT`.
#[derive(Debug, Clone)]
pub(crate) enum Endpoint {
    Unix(PathBuf),
    Hybrid(PathBuf, u32),
    Vsock(u32, u32),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Endpoint, String> {
        let bad = || format!("{text:?} is none of unix:/path, hybrid:/path:PORT, vsock:CID:PORT");
        let (kind, rest) = text.split_once(':').ok_or_else(bad)?;
        let port = |text: &str| text.parse().map_err(|_| bad());
        match kind {
            "unix" => Ok(Endpoint::Unix(rest.into())),
            "hybrid" => {
                let (path, number) = rest.rsplit_once(':').ok_or_else(bad)?;
                Ok(Endpoint::Hybrid(path.into(), port(number)?))
            }
            "vsock" => {
                let (cid, number) = rest.split_once(':').ok_or_else(bad)?;
                Ok(Endpoint::Vsock(port(cid)?, port(number)?))
            }
            _ => Err(bad()),
        }
    }
}

/// A connected byte stream.
pub(crate) trait Stream: Read + Write + Send {
    fn shut(&self, ends: Shutdown) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn shut(&self, ends: Shutdown) -> io::Result<()> {
        self.shutdown(ends)
    }
}

impl Stream for vsock::VsockStream {
    fn shut(&self, ends: Shutdown) -> io::Result<()> {
        self.shutdown(ends)
    }
}

impl Endpoint {
    /// Connect, waiting for whatever that takes.
    pub(crate) fn connect(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Endpoint::Unix(path) => Ok(Box::new(UnixStream::connect(path)?)),
            Endpoint::Hybrid(path, port) => {
                let mut stream = UnixStream::connect(path)?;
                stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
                let mut byte = [0];
                let mut line = Vec::new();
                while byte != *b"\n" {
                    stream.read_exact(&mut byte)?;
                    line.push(byte[0]);
                }
                if !line.starts_with(b"OK ") {
                    return Err(io::Error::other("the guest turned the connection down"));
                }
                Ok(Box::new(stream))
            }
            Endpoint::Vsock(cid, port) => {
                Ok(Box::new(vsock::VsockStream::connect_with_cid_port(*cid, *port)?))
            }
        }
    }

    /// Serve every connection in a thread of its own, for ever.
    pub(crate) fn serve(&self, serve: fn(Box<dyn Stream>)) -> io::Result<()> {
        let spawn = |stream: Box<dyn Stream>| std::thread::spawn(move || serve(stream));
        match self {
            Endpoint::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                loop {
                    spawn(Box::new(listener.accept()?.0));
                }
            }
            Endpoint::Hybrid(path, port) => {
                let mut path = path.clone().into_os_string();
                path.push(format!("_{port}"));
                Endpoint::Unix(path.into()).serve(serve)
            }
            Endpoint::Vsock(_, port) => {
                let listener = vsock::VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, *port)?;
                loop {
                    spawn(Box::new(listener.accept()?.0));
                }
            }
        }
    }
}
