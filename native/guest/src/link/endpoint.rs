//! Where tmemd listens, as an operator writes it: `vsock:CID:PORT` or `unix:/path`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::LinkError;

/// Most bytes handed to one `send()` on a vsock. `vhost-device-vsock` 0.3.0 loses packets of more than 32 KiB.
pub const VSOCK_WRITE_BYTES: usize = 28 * 1024;
/// Most bytes of requests left unanswered on a vsock; the same program stalls on long one-way streams.
pub const VSOCK_WINDOW_BYTES: usize = 192 * 1024;

/// The transport and address of a tmemd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A vsock address; the host is CID 2.
    Vsock {
        /// Context id.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// A unix stream socket.
    Unix(PathBuf),
}

/// An address and how to treat the transport behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where to connect.
    pub address: Address,
    /// Most bytes for one `send()`; `None` leaves it to the kernel.
    pub write_bytes: Option<usize>,
    /// Most bytes of requests that should be unanswered at a time; `None` for no bound but the host's.
    pub window_bytes: Option<usize>,
}

impl Endpoint {
    /// An endpoint with the defaults for its transport: writes are split on vsock and nowhere else.
    pub fn new(address: Address) -> Endpoint {
        let vsock = matches!(address, Address::Vsock { .. });
        Endpoint {
            address,
            write_bytes: vsock.then_some(VSOCK_WRITE_BYTES),
            window_bytes: vsock.then_some(VSOCK_WINDOW_BYTES),
        }
    }

    /// The same endpoint without the limits that only some vsock devices need.
    #[must_use]
    pub fn unsplit(self) -> Endpoint {
        Endpoint { write_bytes: None, window_bytes: None, ..self }
    }
}

impl FromStr for Endpoint {
    type Err = LinkError;

    fn from_str(text: &str) -> Result<Endpoint, LinkError> {
        let bad = || LinkError::BadEndpoint(text.to_owned());
        let (scheme, rest) = text.split_once(':').ok_or_else(bad)?;
        let address = match scheme {
            "unix" if rest.starts_with('/') => Address::Unix(rest.into()),
            "vsock" => {
                let (cid, port) = rest.split_once(':').ok_or_else(bad)?;
                Address::Vsock {
                    cid: cid.parse().map_err(|_| bad())?,
                    port: port.parse().map_err(|_| bad())?,
                }
            }
            _ => return Err(bad()),
        };
        Ok(Endpoint::new(address))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Vsock { cid, port } => write!(to, "vsock:{cid}:{port}"),
            Address::Unix(path) => write!(to, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_written_back() {
        for text in ["vsock:2:29805", "unix:/run/tmem/x.sock"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!("vsock:2:29805".parse::<Endpoint>().unwrap().write_bytes, Some(VSOCK_WRITE_BYTES));
        assert_eq!("unix:/a".parse::<Endpoint>().unwrap().write_bytes, None);
    }

    #[test]
    fn nonsense_is_named_in_the_error() {
        for text in ["", "vsock", "vsock:2", "vsock:a:1", "vsock:2:-1", "unix:relative", "tcp:1.2.3.4:5"] {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }
}
