//! The serving process: lanes, connector and control socket around one device.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tmem_wire::{Header, Op, PoolCreate, PoolKind, Role, PAGE_BYTES};

use super::connector::{Bell, Connector};
use super::control::{listen, Control};
use super::core::Options;
use super::front::nbd::{handshake, Nbd};
use super::front::ublk::Queue;
use super::front::{nbd, ublk, Front};
use super::lane::{Lane, Post, Setup};
use super::protect::{is_io_flusher, Protection};
use super::shared::Shared;
use super::signals::{send, Signals};
use super::Args;
use crate::link::{hello, Link};

/// Threads need little; whatever they have is locked into memory.
const STACK_BYTES: usize = 56 * 1024;

/// What the parts of the serving process share.
pub(super) struct Service<'a> {
    pub(super) args: &'a Args,
    pub(super) shared: Shared,
    pub(super) file: &'a File,
    pub(super) missing: Vec<Protection>,
    posts: Vec<Arc<Post>>,
    bell: Arc<Bell>,
    /// The device is being removed; lanes that end do so as they should.
    ending: Arc<AtomicBool>,
}

impl<'a> Service<'a> {
    pub(super) fn new(
        args: &'a Args,
        shared: Shared,
        file: &'a File,
        missing: Vec<Protection>,
    ) -> io::Result<Service<'a>> {
        let posts = (0..args.queues).map(|_| Post::new()).collect::<io::Result<_>>()?;
        Ok(Service { args, shared, file, missing, posts, bell: Arc::default(), ending: Arc::default() })
    }

    /// Start the connector and the control socket.
    pub(super) fn start(&self, device: String) -> io::Result<()> {
        let connector = Connector {
            shared: self.shared,
            endpoint: self.args.endpoint(),
            pool_name: self.args.pool_name.clone(),
            posts: self.posts.clone(),
            bell: self.bell.clone(),
        };
        spawn("connector", &self.missing, move || connector.run())?;
        let control = Control {
            shared: self.shared,
            posts: self.posts.clone(),
            device,
            missing: self.missing.clone(),
            endpoint: self.args.endpoint.to_string(),
        };
        let listener = listen(&self.args.control)?;
        spawn("control", &self.missing, move || control.run(&listener))?;
        Ok(())
    }

    fn setup(&self, number: usize) -> Setup {
        let bell = self.bell.clone();
        Setup {
            shared: self.shared,
            number,
            depth: self.args.depth.into(),
            options: Options {
                compress: self.args.compress,
                accept_lz4: self.args.accept_lz4,
                reclaim_pages_per_s: self.args.reclaim_rate,
                hedge: Duration::from_millis(self.args.hedge_ms.into()),
            },
            patience: Duration::from_millis(self.args.answer_timeout_ms.into()),
            file: self.file.as_raw_fd(),
            post: self.posts[number].clone(),
            connector: Arc::new(move || bell.ring()),
        }
    }

    /// Start a lane with this front end.
    pub(super) fn lane<F: Front + Send + 'static>(
        &self,
        number: usize,
        front: impl FnOnce() -> io::Result<F> + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let setup = self.setup(number);
        let ending = self.ending.clone();
        spawn(&format!("lane{number}"), &self.missing, move || {
            let served = front().and_then(|front| Lane::new(setup, front)).and_then(Lane::run);
            if let Err(error) = served {
                // The kernel would wait for this lane for ever; a new process can take its place.
                log::error!("lane {number} failed: {error}");
                std::process::exit(1);
            }
            if ending.load(Ordering::Acquire) {
                return;
            }
            send(rustix::process::getpid().as_raw_pid(), libc::SIGUSR1);
        })
    }

    /// Be an NBD server on a unix socket, for clients other than this guest's kernel.
    pub(super) fn serve_socket(&self, path: &Path) -> Result<(), Box<dyn Error>> {
        let _ = std::fs::remove_file(path);
        let listener = Arc::new(UnixListener::bind(path)?);
        self.start(format!("nbd:{}", path.display()))?;
        super::ready(&format!("nbd:{}", path.display()));
        let mut lanes = Vec::new();
        for number in 0..self.posts.len() {
            let (listener, post, bell) = (listener.clone(), self.posts[number].clone(), self.bell.clone());
            let bytes = u64::from(self.shared.table.pages()) * PAGE_BYTES as u64;
            let (shared, args_depth) = (self.shared, usize::from(self.args.depth));
            let template = self.setup(number);
            lanes.push(spawn(&format!("lane{number}"), &self.missing, move || loop {
                let Ok((mut client, _)) = listener.accept() else { return };
                if let Err(error) = handshake::serve(&mut client, bytes) {
                    log::warn!("nbd: no handshake: {error}");
                    continue;
                }
                let setup = Setup {
                    shared,
                    number,
                    depth: args_depth,
                    options: template.options,
                    patience: template.patience,
                    file: template.file,
                    post: post.clone(),
                    connector: template.connector.clone(),
                };
                post.want_connection();
                bell.ring();
                let front = Nbd::new(OwnedFd::from(client), args_depth);
                if let Err(error) = Lane::new(setup, front).and_then(Lane::run) {
                    log::error!("lane {number} failed: {error}");
                }
            })?);
        }
        Ok(join(lanes)?)
    }

    /// Serve a ublk device: a new one, or the one whose server died.
    pub(super) fn serve_ublk(&self, driver: &mut ublk::device::Driver) -> Result<(), Box<dyn Error>> {
        let signals = Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGUSR1])?;
        let Args { pages, queues, depth, .. } = *self.args;
        let recovered = self.take_over();
        let device = match recovered {
            Some(number) => driver.recover(number)?,
            None => driver.add(pages, queues, depth)?,
        };
        self.shared.state.device.store(device.number() + 1, Ordering::Release);
        let path = device.path().display().to_string();
        let lanes = self.ublk_lanes(device).and_then(|lanes| {
            self.start(path.clone())?;
            driver.start(device, recovered.is_some())?;
            if recovered.is_none() {
                device.tune();
            }
            Ok(lanes)
        });
        let lanes = match lanes {
            Err(error) if recovered.is_none() => {
                // Nobody uses it yet: leave nothing behind. The first error is the one to tell.
                self.shared.state.device.store(0, Ordering::Release);
                let _ = driver.stop(device);
                return Err(error.into());
            }
            lanes => lanes?,
        };
        if recovered.is_none() {
            super::ready(&path);
        }
        let claimed = self.wait_for_the_end(&signals, &path, || device.claim())?;
        if claimed.is_some() {
            driver.stop(device)?;
        }
        drop(claimed);
        join(lanes)?;
        driver.delete(device)?;
        self.forget();
        log::info!("{path} is removed");
        Ok(())
    }

    /// Serve an NBD device: a new one, or the one whose server died.
    pub(super) fn serve_nbd(&self, driver: &mut nbd::device::Driver) -> Result<(), Box<dyn Error>> {
        let signals = Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGUSR1])?;
        let Args { pages, queues, depth, .. } = *self.args;
        let recovered = self.take_over();
        let (device, sockets) = match recovered {
            Some(number) => driver.recover(number, queues)?,
            None => driver.add(pages, queues)?,
        };
        self.shared.state.device.store(device.number() + 1, Ordering::Release);
        let path = device.path().display().to_string();
        let lanes: Vec<JoinHandle<()>> = sockets
            .into_iter()
            .enumerate()
            .map(|(number, socket)| self.lane(number, move || Ok(Nbd::new(socket, depth.into()))))
            .collect::<io::Result<_>>()?;
        self.start(path.clone())?;
        if recovered.is_none() {
            device.tune()?;
            super::ready(&path);
        }
        let claimed = self.wait_for_the_end(&signals, &path, || device.claim())?;
        if claimed.is_none() {
            // The kernel gave a connection up. A new process makes new ones; the kernel repeats what it asked.
            return Err(format!("{path}: the kernel dropped a connection").into());
        }
        driver.remove(device)?;
        drop(claimed);
        join(lanes)?;
        self.forget();
        log::info!("{path} is removed");
        Ok(())
    }

    /// Wait until the device is to go and may go, or (`None`) a lane ended by itself. Nobody can begin to use the device
    /// while its claim is open.
    fn wait_for_the_end(
        &self,
        signals: &Signals,
        path: &str,
        claim: impl Fn() -> io::Result<Option<File>>,
    ) -> io::Result<Option<File>> {
        loop {
            if signals.wait() == libc::SIGUSR1 {
                return Ok(None);
            }
            if let Some(claimed) = claim()? {
                self.ending.store(true, Ordering::Release);
                return Ok(Some(claimed));
            }
            self.shared.state.end_wanted.store(false, Ordering::Release);
            log::error!("{path} is in use, so it stays: swapoff {path} first, then stop this again");
        }
    }

    /// The device is gone: have the host drop what is left of its pages, if it can be reached.
    fn forget(&self) {
        let endpoint = self.args.endpoint();
        let gone = hello(Role::Swap, "tmem-guest swap")
            .and_then(|request| Link::connect(&endpoint, &request, Duration::from_secs(2)))
            .and_then(|mut link| {
                let pool =
                    link.create_pool(&PoolCreate::private(PoolKind::Persistent, &self.args.pool_name))?;
                let destroy = Header { pool, ..Header::request(Op::PoolDestroy, 0) };
                link.call(&destroy, &[], "the answer to POOL_DESTROY").map(|_| ())
            });
        if let Err(error) = gone {
            log::warn!(
                "the host keeps the pages of pool {} until the guest reboots: {error}",
                self.args.pool_name
            );
        }
    }

    fn ublk_lanes(&self, device: ublk::device::Ublk) -> io::Result<Vec<JoinHandle<()>>> {
        let (node, depth) = (Arc::new(device.open()?), self.args.depth);
        (0..self.args.queues)
            .map(|number| {
                let node = node.clone();
                self.lane(number.into(), move || Queue::new(node, number, depth))
            })
            .collect()
    }

    /// If there is a device whose server died: bring the table in order and tell the device's number.
    fn take_over(&self) -> Option<u32> {
        let number = self.shared.state.device.load(Ordering::Acquire).checked_sub(1)?;
        let held = self.shared.table.release_all();
        // What the dead process sent may still arrive; its keys are not used again.
        self.shared.next_epoch();
        self.shared.state.sweep_wanted.store(true, Ordering::Release);
        self.shared.state.connected.store(0, Ordering::Relaxed);
        log::info!("taking over a device whose server died; {held} pages were being moved");
        Some(number)
    }
}

fn join(lanes: Vec<JoinHandle<()>>) -> io::Result<()> {
    for lane in lanes {
        lane.join().map_err(|_| io::Error::other("a lane panicked"))?;
    }
    Ok(())
}

/// Start a thread with a small stack that has what threads of this process must have.
fn spawn(
    name: &str,
    missing: &[Protection],
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let must = !missing.contains(&Protection::IoFlusher);
    thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(move || {
        // Inherited from the thread that started this one; checked because everything depends on it.
        if must && !is_io_flusher() {
            log::error!("a thread is not an I/O flusher although its process is");
            std::process::exit(1);
        }
        work();
    })
}
