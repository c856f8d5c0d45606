//! Connects lanes to the host, again and again, on a thread of its own: a lane must never wait for that.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tmem_wire::pages::{decode_got, write_keys};
use tmem_wire::{GetStatus, Header, HelloRequest, Key, Op, PoolCreate, PoolKind, Role};

use super::core::Session;
use super::host::{Connection, FRAME_BYTES};
use super::lane::Post;
use super::shared::Shared;
use super::table::Place;
use crate::link::{hello, Backoff, Endpoint, Link, LinkError};

/// Bound of every single step of connecting.
const STEP: Duration = Duration::from_secs(5);
/// Host pages asked for after a reconnect to learn whether the host still has them.
const PROBES: usize = 8;
/// How often a host that stays away is mentioned.
const REMIND: Duration = Duration::from_secs(90);

/// The bell that lanes ring when they want a connection.
#[derive(Debug, Default)]
pub(super) struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    pub(super) fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.heard.notify_one();
    }

    /// Wait until it rings.
    fn wait(&self) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        *self.heard.wait_while(rung, |rung| !*rung).unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// Connects lanes.
pub(super) struct Connector {
    pub(super) shared: Shared,
    pub(super) endpoint: Endpoint,
    pub(super) pool_name: String,
    pub(super) posts: Vec<Arc<Post>>,
    pub(super) bell: Arc<Bell>,
}

impl Connector {
    /// Serve lanes for ever.
    pub(super) fn run(&self) {
        let mut backoff = Backoff::default();
        let mut away_since: Option<(Instant, Instant)> = None;
        loop {
            let Some(post) = self.posts.iter().find(|post| post.wants_connection.load(Ordering::Acquire))
            else {
                self.bell.wait();
                continue;
            };
            match self.connect() {
                Ok(connection) => {
                    if let Some((since, _)) = away_since.take() {
                        log::info!("the host at {} is back after {:.1?}", self.endpoint, since.elapsed());
                    }
                    backoff.reset();
                    post.deliver(connection);
                }
                Err(error) => {
                    let now = Instant::now();
                    let (since, told) = *away_since.get_or_insert((now, now));
                    if told == now || told.elapsed() > REMIND {
                        away_since = Some((since, Instant::now()));
                        log::warn!(
                            "host away: {error}. New pages go to the swap file; pages at the host wait"
                        );
                    }
                    std::thread::sleep(backoff.wait());
                }
            }
        }
    }

    fn connect(&self) -> Result<Connection, LinkError> {
        let request = HelloRequest {
            max_frame_bytes: FRAME_BYTES as u32,
            ..hello(Role::Swap, concat!("tmem-guest swap ", env!("CARGO_PKG_VERSION")))?
        };
        let mut link = Link::connect(&self.endpoint, &request, STEP)?;
        let pool = link.create_pool(&PoolCreate::private(PoolKind::Persistent, &self.pool_name))?;
        if self.shared.state.pool_clean.load(Ordering::Acquire) {
            self.probe(&mut link, pool)?;
        } else {
            // What an earlier device of this boot left behind has no owner any more.
            let flush = Header { pool, ..Header::request(Op::FlushPool, 0) };
            link.call(&flush, &[], "the answer to FLUSH_POOL")?;
            self.shared.state.pool_clean.store(true, Ordering::Release);
        }
        let session = Session::new(link.limits(), pool, self.endpoint.window_bytes)
            .map_err(|why| LinkError::Io { awaited: "limits that suffice", source: io::Error::other(why) })?;
        let keep_alive = Duration::from_millis(link.limits().keep_alive_ms.into());
        let (socket, low_water) = link.into_socket()?;
        Ok(Connection { socket, session, write_bytes: self.endpoint.write_bytes, low_water, keep_alive })
    }

    /// Does the host still have what it accepted? If not, say so now and not only when the first page is missed.
    fn probe(&self, link: &mut Link, pool: u32) -> Result<(), LinkError> {
        let table = self.shared.table;
        let mut probes: [(u32, Key); PROBES] = [(0, Key { object: [0; 16], index: 0 }); PROBES];
        let mut count = 0;
        let at_host = |index: u32| {
            let entry = table.peek(index);
            entry.place() == Place::Host && !entry.is_stale() && !entry.is_held()
        };
        for index in (0..table.pages()).filter(|index| at_host(*index)).take(PROBES) {
            probes[count] = (index, table.peek(index).key(index));
            count += 1;
        }
        if count == 0 {
            return Ok(());
        }
        let keys = probes.map(|(_, key)| key);
        let mut frame = Vec::new();
        write_keys(Op::Get, 0, pool, true, &keys[..count], &mut frame);
        let (header, body) = link.call_frame(&frame, Op::Get, "the answer to a get of pages put earlier")?;
        let missed = decode_got(&header, body)?
            .zip(&probes)
            // A page that another lane moved meanwhile is not missed.
            .filter(|(got, (index, key))| {
                got.status != GetStatus::Hit && at_host(*index) && table.peek(*index).key(*index) == *key
            })
            .count();
        if missed > 0 {
            self.shared.state.host_lost_pages.store(true, Ordering::Relaxed);
            let ([_, host, ..], _) = table.census();
            log::error!(
                "the host at {} lost swap pages: {missed} of {count} asked for are gone, {host} were there. It was \
                 probably rebooted, or the VM's pools were destroyed. Programs that need a lost page get an I/O \
                 error; restart them, or the VM",
                self.endpoint
            );
        }
        Ok(())
    }
}
