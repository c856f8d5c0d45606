//! The status socket: each connection is told one line of JSON and closed.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use super::tree::Tree;
use crate::memory::resident_bytes;

/// What does not change while the file system is mounted.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    /// Where it is mounted.
    pub(crate) mount: PathBuf,
    /// What it shows.
    pub(crate) lower: PathBuf,
    /// The host's endpoint, if any.
    pub(crate) endpoint: String,
    /// How changes behind the mount are met.
    pub(crate) changes: &'static str,
}

/// A mount point as part of a file name, escaped as systemd does: `/srv/data` is `srv-data`.
pub(crate) fn escape(mount: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let bytes = mount.as_os_str().as_bytes();
    let start = bytes.iter().position(|&b| b != b'/').unwrap_or(bytes.len());
    let end = bytes.iter().rposition(|&b| b != b'/').map_or(start, |last| last + 1);
    let mut out = String::new();
    for &byte in &bytes[start..end] {
        match byte {
            b'/' => out.push('-'),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b':' => out.push(byte.into()),
            // A String always takes more.
            _ => {
                let _ = write!(out, "\\x{byte:02x}");
            }
        }
    }
    if out.is_empty() {
        out.push('-');
    }
    out
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if u32::from(c) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The line.
fn line(tree: &Tree, names: &Names) -> String {
    let mut out = String::from("{");
    for (name, text) in [
        ("mount", &*names.mount.to_string_lossy()),
        ("lower", &*names.lower.to_string_lossy()),
        ("endpoint", &names.endpoint),
        ("changes", names.changes),
    ] {
        let _ = write!(out, "\"{name}\":{},", quoted(text));
    }
    let _ = write!(out, "\"connected\":{},", tree.cache.connected.load(Ordering::Relaxed));
    let _ = write!(out, "\"cacheable\":{},", tree.cacheable);
    let _ = write!(out, "\"put\":\"{}\",", if tree.victims { "evicted" } else { "read" });
    for (name, value) in tree.cache.counters.values() {
        let _ = write!(out, "\"{name}\":{value},");
    }
    let _ = write!(out, "\"inodes\":{},", tree.inodes.len());
    let _ = writeln!(out, "\"rss_bytes\":{}}}", resident_bytes());
    out
}

/// Listen at `path`, replacing a socket that a dead process left.
pub(crate) fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

/// Answer connections until the process ends.
pub(crate) fn run(listener: &UnixListener, tree: &Arc<Tree>, names: &Names) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        // A reader that does not read must not stop the next one.
        let told = stream
            .set_write_timeout(Some(Duration::from_secs(1)))
            .and_then(|()| stream.write_all(line(tree, names).as_bytes()));
        if let Err(error) = told {
            log::debug!("status was not read: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_escaped_as_systemd_does() {
        for (path, name) in [("/srv/data", "srv-data"), ("/a-b/c d/", "a\\x2db-c\\x20d"), ("/", "-")] {
            assert_eq!(escape(Path::new(path)), name);
        }
    }

    #[test]
    fn text_is_quoted() {
        assert_eq!(quoted("a\"b\\c\n"), "\"a\\\"b\\\\c\\u000a\"");
    }
}
