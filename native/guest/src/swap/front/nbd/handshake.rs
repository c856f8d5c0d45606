//! The fixed newstyle handshake, for NBD clients other than the kernel: qemu-img, nbdinfo, tests.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use tmem_wire::PAGE_BYTES;

use super::FLAGS;
use crate::swap::core::MAX_PAGES;

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 1 << 31 | 1;
/// Client flag and server flag: no 124 zeroes after `OPT_EXPORT_NAME`.
const NO_ZEROES: u16 = 2;
const FIXED_NEWSTYLE: u16 = 1;
/// Longest option a client may send, bytes; export names are at most 4096.
const OPTION_BYTES: u32 = 8192;

fn be32(stream: &mut UnixStream) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn reply(stream: &mut UnixStream, option: u32, kind: u32, body: &[u8]) -> io::Result<()> {
    let mut message = Vec::with_capacity(20 + body.len());
    message.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
    message.extend_from_slice(&option.to_be_bytes());
    message.extend_from_slice(&kind.to_be_bytes());
    message.extend_from_slice(&(body.len() as u32).to_be_bytes());
    message.extend_from_slice(body);
    stream.write_all(&message)
}

/// Bring the client to the transmission phase. Any export name will do.
pub(in crate::swap) fn serve(stream: &mut UnixStream, bytes: u64) -> io::Result<()> {
    stream.write_all(b"NBDMAGIC")?;
    stream.write_all(OPTION_MAGIC)?;
    stream.write_all(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes())?;
    let client_flags = be32(stream)?;
    loop {
        let mut magic = [0; 8];
        stream.read_exact(&mut magic)?;
        let (option, length) = (be32(stream)?, be32(stream)?);
        if &magic != OPTION_MAGIC || length > OPTION_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer is no NBD client"));
        }
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body)?;
        match option {
            OPT_EXPORT_NAME => {
                stream.write_all(&bytes.to_be_bytes())?;
                stream.write_all(&FLAGS.to_be_bytes())?;
                if client_flags & u32::from(NO_ZEROES) == 0 {
                    stream.write_all(&[0; 124])?;
                }
                return Ok(());
            }
            OPT_INFO | OPT_GO => {
                let mut export = [0; 12];
                export[2..10].copy_from_slice(&bytes.to_be_bytes());
                export[10..].copy_from_slice(&FLAGS.to_be_bytes());
                reply(stream, option, REP_INFO, &export)?;
                let mut sizes = [0; 14];
                sizes[1] = 3; // NBD_INFO_BLOCK_SIZE: minimum, preferred, largest payload
                for (at, size) in [(2, PAGE_BYTES), (6, PAGE_BYTES), (10, MAX_PAGES * PAGE_BYTES)] {
                    sizes[at..at + 4].copy_from_slice(&(size as u32).to_be_bytes());
                }
                reply(stream, option, REP_INFO, &sizes)?;
                reply(stream, option, REP_ACK, &[])?;
                if option == OPT_GO {
                    return Ok(());
                }
            }
            OPT_ABORT => {
                reply(stream, option, REP_ACK, &[])?;
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the client went away"));
            }
            _ => reply(stream, option, REP_ERR_UNSUP, &[])?,
        }
    }
}
