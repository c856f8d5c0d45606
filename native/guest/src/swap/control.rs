//! The local control socket: one JSON object a line, one answer a line (docs/swap.md).

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use super::lane::Post;
use super::protect::Protection;
use super::shared::Shared;
use super::table::Place;
use crate::memory::resident_bytes;

/// Longest request line, bytes.
const LINE_BYTES: u64 = 1024;
/// A client that says nothing for so long is dropped: there is one thread for all.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the control socket can tell and do.
pub(super) struct Control {
    pub(super) shared: Shared,
    pub(super) posts: Vec<Arc<Post>>,
    pub(super) device: String,
    pub(super) missing: Vec<Protection>,
    pub(super) endpoint: String,
}

/// Listen on `path`, for root only. A socket that nobody listens on any more is replaced.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    let explain = |error: io::Error| {
        io::Error::new(error.kind(), format!("control socket {}: {error}", path.display()))
    };
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(explain)?;
    }
    if UnixStream::connect(path).is_ok() {
        return Err(explain(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another tmem-guest swap listens there",
        )));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(explain(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(explain)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(explain)?;
    Ok(listener)
}

/// What a client wants.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    Status,
    Reclaim(u64),
    Drain,
    Resume,
}

impl Control {
    /// Serve clients, one after the other, for ever.
    pub(super) fn run(&self, listener: &UnixListener) {
        let mut answer = String::with_capacity(2048);
        let mut line = String::with_capacity(LINE_BYTES as usize);
        for stream in listener.incoming() {
            // A client that went away is no event.
            let _ = stream.and_then(|stream| self.converse(stream, &mut line, &mut answer));
        }
    }

    fn converse(&self, mut stream: UnixStream, line: &mut String, answer: &mut String) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut reader = BufReader::with_capacity(LINE_BYTES as usize, stream.try_clone()?);
        loop {
            line.clear();
            if reader.by_ref().take(LINE_BYTES).read_line(line)? == 0 {
                return Ok(());
            }
            answer.clear();
            match parse(line) {
                Ok(wish) => {
                    self.grant(&wish);
                    self.status(answer);
                }
                Err(error) => {
                    let _ = write!(answer, "{{\"ok\":false,\"error\":\"{error}\"}}");
                }
            }
            answer.push('\n');
            stream.write_all(answer.as_bytes())?;
        }
    }

    fn grant(&self, wish: &Wish) {
        let state = self.shared.state;
        let reclaim = |pages: u64| {
            let ([_, host, ..], _) = self.shared.table.census();
            let pages = pages.min(host);
            let _ = state.reclaim_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_add(pages).min(host))
            });
            state.reclaim_asked.fetch_add(pages, Ordering::Relaxed);
            for post in &self.posts {
                post.wake();
            }
        };
        match wish {
            Wish::Status => {}
            Wish::Reclaim(pages) => reclaim(*pages),
            Wish::Drain => {
                state.draining.store(true, Ordering::Relaxed);
                reclaim(u64::MAX);
            }
            Wish::Resume => {
                state.draining.store(false, Ordering::Relaxed);
                state.reclaim_left.store(0, Ordering::Relaxed);
            }
        }
    }

    fn status(&self, answer: &mut String) {
        let state = self.shared.state;
        let (places, stale) = self.shared.table.census();
        let place = |place: Place| places[place as usize];
        let connected = state.connected.load(Ordering::Relaxed).count_ones();
        // Writing to a string cannot fail.
        let _ = write!(
            answer,
            "{{\"ok\":true,\"device\":\"{}\",\"endpoint\":\"{}\",\"connected\":{},\"lanes\":{},\
             \"lanes_connected\":{connected},\"pages\":{},\"absent_pages\":{},\"host_pages\":{},\"file_pages\":{},\
             \"lost_pages\":{},\"stale_pages\":{stale},\"rss_bytes\":{},\"draining\":{},\"reclaim_left\":{},\
             \"reclaim_asked\":{}",
            self.device,
            self.endpoint,
            connected as usize == self.posts.len(),
            self.posts.len(),
            self.shared.table.pages(),
            place(Place::Absent),
            place(Place::Host),
            place(Place::File),
            place(Place::Lost),
            resident_bytes(),
            state.draining.load(Ordering::Relaxed),
            state.reclaim_left.load(Ordering::Relaxed),
            state.reclaim_asked.load(Ordering::Relaxed),
        );
        state.counters.each(|name, value| {
            let _ = write!(answer, ",\"{name}\":{value}");
        });
        answer.push_str(",\"protections\":{");
        for (i, protection) in Protection::ALL.into_iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            let _ =
                write!(answer, "{comma}\"{}\":{}", protection.name(), !self.missing.contains(&protection));
        }
        answer.push_str("}}");
    }
}

/// Read `{"op":"…","pages":N}`: a flat object of strings and whole numbers, which is all a client has to say.
fn parse(line: &str) -> Result<Wish, &'static str> {
    const SHAPE: &str = "expected one flat JSON object, like {'op':'status'} with double quotes";
    let inner = line.trim().strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).ok_or(SHAPE)?;
    let (mut op, mut pages) = (None, None);
    for member in inner.split(',') {
        let (key, value) = member.split_once(':').ok_or(SHAPE)?;
        match key.trim() {
            "\"op\"" => op = Some(value.trim()),
            "\"pages\"" => pages = Some(value.trim().parse().map_err(|_| "pages must be a whole number")?),
            _ => return Err("unknown member; op and pages are known"),
        }
    }
    match (op.ok_or("op is missing")?, pages) {
        ("\"status\"", None) => Ok(Wish::Status),
        ("\"reclaim\"", Some(pages)) => Ok(Wish::Reclaim(pages)),
        ("\"reclaim\"", None) => Err("reclaim needs pages"),
        ("\"drain\"", None) => Ok(Wish::Drain),
        ("\"resume\"", None) => Ok(Wish::Resume),
        (_, Some(_)) => Err("only reclaim takes pages"),
        _ => Err("unknown op; status, reclaim, drain and resume are known"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_strictly() {
        assert_eq!(parse("{\"op\":\"status\"}\n"), Ok(Wish::Status));
        assert_eq!(parse(" { \"pages\" : 12 , \"op\" : \"reclaim\" } "), Ok(Wish::Reclaim(12)));
        assert_eq!(parse("{\"op\":\"drain\"}"), Ok(Wish::Drain));
        for bad in [
            "",
            "{}",
            "[]",
            "{\"op\":\"reclaim\"}",
            "{\"op\":\"reclaim\",\"pages\":-1}",
            "{\"op\":\"status\",\"pages\":1}",
            "{\"op\":\"format\"}",
            "{\"op\":\"status\",\"x\":1}",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
