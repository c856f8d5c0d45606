//! The thread of one VM's device: it waits for the front end, the guest's kicks and the host's sockets, and serves them.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::counters::{add, Counters};
use super::device::Device;
use super::front::{
    Change, FrontError, MessageHeader, MAX_BODY_BYTES, MESSAGE_HEADER_BYTES, RINGS, TO_GUEST,
};
use super::greeting::{Greeting, Heard};
use super::keeper::{receive_with, send_with, Keeper};
use super::ledger::Ledger;
use super::packet::MAX_DATA_BYTES;
use super::peer::{Local, Peer, Stream};
use super::ring::clear;
use super::service::{DeviceWaker, SessionService};
use super::snapshot;
use super::streams::{Opened, Opener, Refused, Streams};
use super::DeviceConfig;
use crate::engine::Engine;
use crate::polling::Habit;
use crate::scheduling;
use crate::vm::Vm;

/// Marks the tokens of everything but streams.
const OURS: u64 = 1 << 63;
const FRONT_LISTENER: u64 = OURS;
const FRONT: u64 = OURS + 1;
const HYBRID_LISTENER: u64 = OURS + 2;
const WAKE: u64 = OURS + 3;
const KEEPER: u64 = OURS + 4;
const KICK: u64 = OURS + 16;
const GREETING: u64 = OURS + 256;
/// Connections to the hybrid socket that have not said yet where they want to go.
const MAX_GREETINGS: usize = 64;
/// How long they may take.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes a guest may have under way on a stream to tmem.
const LOCAL_BUF_ALLOC: u32 = 256 * 1024;
/// Bytes a guest may have under way on any other stream.
const STREAM_BUF_ALLOC: u32 = 2 * MAX_DATA_BYTES as u32;
/// Pause between attempts to reach the keeper.
const KEEPER_RETRY: Duration = Duration::from_secs(1);
/// Rounds between two looks at the sockets while there is work on the rings.
const ROUNDS: usize = 4;

/// Opens the host's ends of streams.
struct Doors {
    engine: Weak<Engine>,
    vm: Arc<Vm>,
    hybrid: Option<PathBuf>,
    epoll: OwnedFd,
    waker: Arc<DeviceWaker>,
}

impl Doors {
    fn watch(&self, descriptor: BorrowedFd<'_>, token: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, descriptor, EventData::new_u64(token), flags)?)
    }

    /// A peer of a connected socket, watched.
    fn stream(&self, socket: UnixStream, token: u64) -> io::Result<Box<dyn Peer>> {
        let stream = Stream::new(socket)?;
        if let Some(descriptor) = stream.descriptor() {
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            self.watch(descriptor, token, flags)?;
        }
        Ok(Box::new(stream))
    }
}

impl Opener for Doors {
    fn open(&mut self, port: u32, token: u64) -> Result<Opened, Refused> {
        if port == tmem_wire::PORT {
            let Some(engine) = self.engine.upgrade() else { return Err(Refused("shutting down".into())) };
            if self.vm.arrivals.take(1, Instant::now()).is_err() {
                return Err(Refused("too many connections in a short time".into()));
            }
            let service = SessionService::open(&engine, &self.vm, token, &self.waker)
                .ok_or_else(|| Refused("too many connections, or shutting down".into()))?;
            let peer = Box::new(Local::new(Box::new(service)));
            return Ok(Opened { peer, buf_alloc: LOCAL_BUF_ALLOC });
        }
        let hybrid = self.hybrid.as_ref().ok_or_else(|| Refused("the VM has no hybrid socket".into()))?;
        let mut path = hybrid.clone().into_os_string();
        path.push(format!("_{port}"));
        let connect = || -> io::Result<Box<dyn Peer>> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // Never waits: a full backlog is a refusal.
            net::connect(&socket, &SocketAddrUnix::new(path.as_os_str())?)?;
            self.stream(UnixStream::from(socket), token)
        };
        let peer = connect().map_err(|error| Refused(format!("{}: {error}", path.to_string_lossy())))?;
        Ok(Opened { peer, buf_alloc: STREAM_BUF_ALLOC })
    }
}

/// Everything the thread owns.
pub(crate) struct Worker {
    config: DeviceConfig,
    doors: Doors,
    front_listener: OwnedFd,
    hybrid_listener: Option<OwnedFd>,
    front: Option<OwnedFd>,
    device: Device,
    greetings: Vec<Option<Greeting>>,
    keeper: Option<Keeper>,
    keeper_retry: Option<Instant>,
    ledger_copy: Option<OwnedFd>,
    habit: Habit,
    counters: Arc<Counters>,
}

impl Worker {
    /// Listen, and take over from a process that died if the keeper has something.
    pub(crate) fn new(
        engine: &Arc<Engine>,
        vm: &Arc<Vm>,
        config: DeviceConfig,
        front_listener: OwnedFd,
        hybrid_listener: Option<OwnedFd>,
        waker: Arc<DeviceWaker>,
        counters: Arc<Counters>,
    ) -> io::Result<Worker> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;

        let doors = Doors {
            engine: Arc::downgrade(engine),
            vm: vm.clone(),
            hybrid: config.hybrid_socket.clone(),
            epoll,
            waker,
        };
        doors.watch(front_listener.as_fd(), FRONT_LISTENER, EventFlags::IN)?;
        if let Some(listener) = &hybrid_listener {
            doors.watch(listener.as_fd(), HYBRID_LISTENER, EventFlags::IN)?;
        }
        doors.watch(doors.waker.eventfd.as_fd(), WAKE, EventFlags::IN)?;
        let streams = Streams::new(u64::from(config.guest_cid), config.max_connections, counters.clone());
        let habit = Habit::new(config.busy_poll);
        let mut worker = Worker {
            device: Device::new(&vm.name, streams, counters.clone()),
            config,
            doors,
            front_listener,
            hybrid_listener,
            front: None,
            greetings: Vec::new(),
            keeper: None,
            keeper_retry: None,
            ledger_copy: None,
            habit,
            counters,
        };
        worker.reach_keeper();
        worker.resume();
        Ok(worker)
    }

    fn vm(&self) -> &str {
        &self.doors.vm.name
    }

    /// Connect to the keeper, if there is to be one.
    fn reach_keeper(&mut self) {
        self.keeper_retry = None;
        let Some(path) = &self.config.keeper else { return };
        let reached = Keeper::connect(path)
            .and_then(|keeper| self.doors.watch(keeper.as_fd(), KEEPER, EventFlags::IN).map(|()| keeper));
        match reached {
            Ok(keeper) => self.keeper = Some(keeper),
            Err(error) => {
                tracing::warn!(vm = self.vm(), %error, path = %path.display(),
                    "no keeper: should tmemd die, the VM's vsock device stays dead until the VM restarts");
                self.keeper_retry = Some(Instant::now() + KEEPER_RETRY);
            }
        }
    }

    /// Go on with the connection of a process that died.
    fn resume(&mut self) {
        let Some(keeper) = &self.keeper else { return };
        let (bytes, descriptors) = match keeper.take(self.vm()) {
            Ok(Some(taken)) => taken,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(vm = self.vm(), %error, "the keeper does not answer");
                return;
            }
        };
        let taken = snapshot::decode(&bytes, descriptors).map_err(io::Error::other).and_then(|taken| {
            self.device.front = taken.state;
            self.device.map_memory()?;
            let ledger = Ledger::adopt(taken.ledger, self.config.max_connections)?;
            self.ledger_copy = Some(OwnedFd::from(ledger.file().try_clone()?));
            self.device.streams.keep_ledger(ledger);
            self.watch_front(taken.front)
        });
        match taken {
            Ok(()) => {
                self.device.resume_rings();
                self.watch_kicks();
                for ring in 0..RINGS {
                    self.device.force_call(ring);
                }
                add(&self.counters.resumed, 1);
                tracing::info!(vm = self.vm(), "took over the VM's vsock device");
            }
            Err(error) => {
                tracing::warn!(vm = self.vm(), %error, "the VM's vsock device cannot be taken over; restart the VM");
                self.hang_up();
            }
        }
    }

    fn watch_front(&mut self, front: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&front, true)?;
        self.doors.watch(front.as_fd(), FRONT, EventFlags::IN | EventFlags::RDHUP)?;
        self.front = Some(front);
        add(&self.counters.front_ends, 1);
        Ok(())
    }

    fn watch_kicks(&self) {
        for (ring, kick) in self.device.kicks() {
            match self.doors.watch(kick.as_fd(), KICK + ring as u64, EventFlags::IN) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {}
                Err(error) => {
                    tracing::warn!(vm = self.vm(), ring, %error, "a ring's kicks cannot be watched");
                }
            }
        }
    }

    /// Serve until told to stop.
    pub(crate) fn run(mut self) {
        let mut began = Instant::now();
        while !self.doors.waker.stop.load(Ordering::Acquire) {
            let now = Instant::now();
            self.device.streams.tick(now);
            let mut moved = false;
            for _ in 0..ROUNDS {
                if !self.device.serve(&mut self.doors, now) {
                    break;
                }
                moved = true;
                scheduling::give_way();
            }
            if moved {
                self.handle_events(Some(Duration::ZERO));
                began = Instant::now();
                continue;
            }
            if self.poll_rings(began) {
                continue;
            }
            if self.device.arm() {
                continue;
            }
            let deadline = [
                self.device.streams.deadline(),
                self.device.deadline(),
                self.keeper_retry,
                self.greeting_deadline(),
            ];
            let timeout = deadline.into_iter().flatten().min().map(|at| at.saturating_duration_since(now));
            self.handle_events(timeout);
            scheduling::begin_stretch(scheduling::is_shared());
            self.habit.waited(began.elapsed());
            self.device.disarm();
            began = Instant::now();
        }
        self.finish();
    }

    /// Look for work without sleeping for a while, if recent waits were short. Returns whether there was some.
    fn poll_rings(&mut self, began: Instant) -> bool {
        let Some(until) = self.habit.deadline(began) else { return false };
        let Some(engine) = self.doors.engine.upgrade() else { return false };
        let Some(_spinning) = engine.spinners.enter() else { return false };
        loop {
            for _ in 0..32 {
                if self.device.has_work() {
                    add(&self.counters.polls_hit, 1);
                    self.habit.waited(began.elapsed());
                    return true;
                }
                std::hint::spin_loop();
            }
            if self.handle_events(Some(Duration::ZERO)) {
                return true;
            }
            if Instant::now() >= until {
                add(&self.counters.polls_missed, 1);
                return false;
            }
        }
    }

    /// Tell the guest that its streams are gone, and leave the rest to the keeper.
    fn finish(&mut self) {
        self.device.streams.abort_all();
        self.device.serve(&mut self.doors, Instant::now());
        if self.doors.waker.forget.load(Ordering::Acquire) {
            if let Some(keeper) = &self.keeper {
                let _ = keeper.drop_device(self.vm());
            }
        }
    }

    fn greeting_deadline(&self) -> Option<Instant> {
        self.greetings.iter().flatten().map(|greeting| greeting.deadline).min()
    }

    /// Wait for events and handle them. Returns whether there were any.
    fn handle_events(&mut self, timeout: Option<Duration>) -> bool {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 64];
        // Longer waits than a day need no precision.
        let timeout = timeout.and_then(|wait| Timespec::try_from(wait.min(Duration::from_secs(86_400))).ok());
        let ready = match epoll::wait(&self.doors.epoll, &mut events, timeout.as_ref()) {
            Ok((ready, _)) => &*ready,
            Err(_) => &[],
        };
        let now = Instant::now();
        for event in ready {
            let flags = event.flags;
            match event.data.u64() {
                WAKE => {
                    clear(&self.doors.waker.eventfd);
                    if self.doors.waker.services.swap(false, Ordering::AcqRel) {
                        self.device.streams.wake(now);
                    }
                }
                FRONT => self.front_ready(),
                FRONT_LISTENER => self.accept_front(),
                HYBRID_LISTENER => self.accept_greeting(now),
                KEEPER => {
                    tracing::warn!(vm = self.vm(), "the keeper has gone");
                    self.keeper = None;
                    self.keeper_retry = Some(now);
                }
                token if token >= GREETING => {
                    let ended = flags.intersects(EventFlags::RDHUP | EventFlags::HUP);
                    self.greeting_ready((token - GREETING) as usize, ended, now);
                }
                token if token >= KICK => {
                    add(&self.counters.kicks, 1);
                    if let Some((_, kick)) =
                        self.device.kicks().find(|(ring, _)| KICK + *ring as u64 == token)
                    {
                        clear(kick);
                    }
                }
                token => {
                    let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                    let readable = flags.intersects(EventFlags::IN | EventFlags::RDHUP) || hung_up;
                    let writable = flags.contains(EventFlags::OUT) || hung_up;
                    self.device.streams.ready(token, readable, writable, hung_up, now);
                }
            }
        }
        let any = !ready.is_empty();
        self.greetings.iter_mut().for_each(|slot| {
            if slot.as_ref().is_some_and(|greeting| greeting.deadline <= now) {
                *slot = None;
            }
        });
        if self.keeper_retry.is_some_and(|at| at <= now) {
            self.reach_keeper();
            self.keep();
        }
        any
    }

    fn accept_front(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(front) = net::accept_with(&self.front_listener, flags) else { return };
        if self.front.is_some() {
            tracing::warn!(vm = self.vm(), "a second QEMU connected to the VM's device and was turned away");
            return;
        }
        if let Err(error) = self.watch_front(front) {
            tracing::warn!(vm = self.vm(), %error, "watching a new QEMU failed");
        }
    }

    /// Handle the front end's messages, each only once it is whole.
    fn front_ready(&mut self) {
        loop {
            match self.next_message() {
                Ok(true) => {}
                Ok(false) => return,
                Err(None) => {
                    tracing::info!(vm = self.vm(), "QEMU has gone");
                    return self.hang_up();
                }
                Err(Some(error)) => {
                    add(&self.counters.bad_messages, 1);
                    tracing::warn!(vm = self.vm(), %error, "QEMU's connection ends: it broke the vhost-user protocol");
                    return self.hang_up();
                }
            }
        }
    }

    /// Returns whether there was a message; `Err(None)` at the end of the connection.
    ///
    /// A message is looked at first and removed from the socket only once it has been acted on, so that a successor of
    /// this process finds it again. Doing what it says twice does no harm.
    fn next_message(&mut self) -> Result<bool, Option<FrontError>> {
        let Some(front) = &self.front else { return Ok(false) };
        let gone = |_| None;
        let mut buffer = [0u8; MESSAGE_HEADER_BYTES + MAX_BODY_BYTES];
        let head = &mut buffer[..MESSAGE_HEADER_BYTES];
        match net::recv(front, &mut *head, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(None),
            Ok((_, bytes)) if bytes < MESSAGE_HEADER_BYTES => return Ok(false),
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(_) => return Err(None),
        }
        let mut bytes = [0u8; MESSAGE_HEADER_BYTES];
        bytes.copy_from_slice(head);
        let header = MessageHeader::decode(&bytes).map_err(Some)?;
        let whole = MESSAGE_HEADER_BYTES + header.size;
        let message = &mut buffer[..whole];
        let (bytes, descriptors) =
            receive_with(front.as_fd(), message, RecvFlags::PEEK | RecvFlags::DONTWAIT).map_err(gone)?;
        if bytes < whole {
            return Ok(false);
        }
        self.device.sync_bases();
        let config = u64::from(self.config.guest_cid).to_le_bytes();
        let body = &message[MESSAGE_HEADER_BYTES..];
        let handled = self.device.front.handle(header, body, descriptors, &config).map_err(Some)?;
        self.apply(handled.change).map_err(|error| {
            Some(FrontError {
                request: super::front::request_name(header.request),
                problem: error.to_string(),
            })
        })?;
        let Some(front) = &self.front else { return Ok(false) };
        receive_with(front.as_fd(), message, RecvFlags::DONTWAIT).map_err(gone)?;
        if !handled.reply.is_empty() {
            send_with(front.as_fd(), &[IoSlice::new(&handled.reply)], &[], SendFlags::DONTWAIT)
                .map_err(gone)?;
        }
        Ok(true)
    }

    fn apply(&mut self, change: Change) -> io::Result<()> {
        match change {
            Change::None => return Ok(()),
            Change::Rings => {}
            Change::Memory => self.device.map_memory()?,
            Change::Reset => self.device.reset(),
        }
        self.device.update_rings();
        self.watch_kicks();
        self.device.force_call(TO_GUEST);
        self.keep();
        Ok(())
    }

    /// Hand the keeper what a successor needs.
    fn keep(&mut self) {
        let (Some(keeper), Some(front)) = (&self.keeper, &self.front) else { return };
        if self.ledger_copy.is_none() {
            let made = Ledger::create(self.config.max_connections)
                .and_then(|ledger| Ok((OwnedFd::from(ledger.file().try_clone()?), ledger)));
            match made {
                Ok((copy, ledger)) => {
                    self.ledger_copy = Some(copy);
                    self.device.streams.keep_ledger(ledger);
                }
                Err(error) => {
                    tracing::warn!(vm = self.doors.vm.name, %error, "no table of streams for the keeper");
                    return;
                }
            }
        }
        let Some(ledger) = &self.ledger_copy else { return };
        let (bytes, descriptors) = snapshot::encode(&self.device.front, front.as_fd(), ledger.as_fd());
        if let Err(error) = keeper.put(&self.doors.vm.name, &bytes, &descriptors) {
            tracing::warn!(vm = self.doors.vm.name, %error, "the keeper does not listen");
            self.keeper = None;
            self.keeper_retry = Some(Instant::now() + KEEPER_RETRY);
        }
    }

    fn hang_up(&mut self) {
        self.front = None;
        self.device.disconnect();
        if let Some(keeper) = &self.keeper {
            let _ = keeper.drop_device(&self.doors.vm.name);
        }
    }

    fn accept_greeting(&mut self, now: Instant) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Some(listener) = &self.hybrid_listener else { return };
        let Ok(socket) = net::accept_with(listener, flags) else { return };
        let at = match self.greetings.iter().position(Option::is_none) {
            Some(at) => at,
            None if self.greetings.len() < MAX_GREETINGS => {
                self.greetings.push(None);
                self.greetings.len() - 1
            }
            None => return,
        };
        // Edges only: part of a line stays in the socket until the rest comes.
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        let watched = self.doors.watch(socket.as_fd(), GREETING + at as u64, flags);
        if watched.is_ok() {
            self.greetings[at] = Some(Greeting::new(UnixStream::from(socket), now + GREETING_TIMEOUT));
        }
    }

    fn greeting_ready(&mut self, at: usize, ended: bool, now: Instant) {
        let Some(slot) = self.greetings.get_mut(at) else { return };
        let Some(greeting) = slot.take() else { return };
        match greeting.hear(ended) {
            Heard::Part(greeting) => *slot = Some(greeting),
            Heard::Nonsense => {}
            Heard::Connect(port, socket) => {
                // From now on it is watched as a stream.
                let _ = epoll::delete(&self.doors.epoll, &socket);
                let doors = &self.doors;
                let opened = self
                    .device
                    .streams
                    .open(port, STREAM_BUF_ALLOC, now, |token| doors.stream(socket, token));
                if let Err(refused) = opened {
                    tracing::debug!(vm = doors.vm.name, port, %refused, "a stream of the host is refused");
                }
            }
        }
    }
}
