//! A session on a socket: one thread, which receives into one buffer, lets the session answer into another, and
//! sends. There is no other thread between a guest's request and the store.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{self, RecvFlags, SendFlags, Shutdown};
use tmem_wire::{Role, HEADER_BYTES};

use crate::engine::Engine;
use crate::limits::{Limits, Turn, MAX_FRAME_BYTES, OUT_HIGH_WATER, SMALL_FRAME_BYTES};
use crate::outbox::{Wake, Waker};
use crate::polling::Habit;
use crate::scheduling::{self, PIECE_BYTES};
use crate::session::{Progress, Session, SessionError, State};
use crate::vm::Vm;

/// Longest time between two looks at the deadlines.
const TICK: Duration = Duration::from_secs(10);
/// How long to wait for memory before looking whether the session is to end.
const MEMORY_PATIENCE: Duration = Duration::from_millis(200);
const STACK_BYTES: usize = 256 << 10;
/// Receiving takes longer only for a thread that has slept in it.
const AWAKE: Duration = Duration::from_micros(20);

/// What wakes the thread of a connection.
struct Signal {
    socket: OwnedFd,
    /// Readable when notices wait; control sessions sleep on it too.
    notices: OwnedFd,
}

struct SocketWaker(Arc<Signal>);

impl Waker for SocketWaker {
    fn wake(&self, why: Wake) {
        // Neither can fail in a way that matters: the counter is far from full, and a socket that is not connected
        // any more has woken its thread already.
        let _ = rustix::io::write(&self.0.notices, &1u64.to_ne_bytes());
        let _ = match why {
            Wake::Notices => Ok(()),
            Wake::Drain => net::shutdown(&self.0.socket, Shutdown::Read),
            Wake::Close => net::shutdown(&self.0.socket, Shutdown::Both),
        };
    }
}

/// Serve a connection of `vm` in a thread of its own. A VM with too many is turned away.
pub(crate) fn start(engine: &Arc<Engine>, vm: &Arc<Vm>, socket: OwnedFd, peer: String) -> io::Result<()> {
    let notices = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let signal = Arc::new(Signal { socket, notices });
    let Some(session) = Session::new(engine, vm, peer, Box::new(SocketWaker(signal.clone()))) else {
        return Ok(());
    };
    let engine = engine.clone();
    thread::Builder::new().name(format!("vm {}", vm.name)).stack_size(STACK_BYTES).spawn(move || {
        scheduling::serve(&engine.company, session.vm());
        let mut connection = Connection::new(&engine, &signal, session);
        if let End::TimedOut(what) = connection.run() {
            connection.session.timed_out(what);
        }
        // The waker may still hold the descriptor; the guest must not wait for that.
        let _ = net::shutdown(&signal.socket, Shutdown::Both);
    })?;
    Ok(())
}

/// Why a connection ended.
enum End {
    /// The guest closed, the session ended, or the connection broke.
    Closed,
    /// The guest was given up.
    TimedOut(&'static str),
}

struct Connection<'a> {
    engine: &'a Engine,
    signal: &'a Signal,
    session: Session,
    input: Input,
    out: Vec<u8>,
    habit: Habit,
    /// Whether other VMs were at work a short while ago.
    shared: bool,
    /// Deadline of HELLO, then of the frame that is half here.
    deadline: Option<(Instant, &'static str)>,
    heard: Instant,
}

impl<'a> Connection<'a> {
    fn new(engine: &'a Engine, signal: &'a Signal, session: Session) -> Connection<'a> {
        let now = Instant::now();
        let limits = engine.limits();
        Connection {
            engine,
            signal,
            session,
            input: Input::new(),
            out: Vec::with_capacity(OUT_HIGH_WATER),
            habit: Habit::new(limits.busy_poll),
            shared: false,
            deadline: Some((now + limits.hello_timeout, "no HELLO in time")),
            heard: now,
        }
    }

    fn run(&mut self) -> End {
        let limits = self.engine.limits();
        let vm = self.session.vm().clone();
        if let Err(error) = set_timeouts(&self.signal.socket, limits) {
            tracing::warn!(vm = %self.session.vm().name, %error, "setting socket timeouts failed");
            return End::Closed;
        }
        loop {
            let (fed, sent) = {
                let _turn = self.turn(&vm);
                scheduling::go_on(self.shared);
                let fed = self.feed();
                // Copying answers is work as well. What does not fit waits outside: a guest that does not read must
                // not keep its VM's other connections waiting.
                (fed, self.send_now())
            };
            let sent = sent.and_then(|sent| self.send_rest(sent));
            let Ok(progress) = fed else { return End::Closed };
            if let Err(end) = sent {
                return end;
            }
            match progress.state {
                State::OutputFull => {}
                State::Closed => return End::Closed,
                State::Throttled(wait) => thread::sleep(wait),
                State::NeedMemory => {
                    if self.session.grow(MEMORY_PATIENCE) {
                        self.input.make_room(MAX_FRAME_BYTES);
                    }
                }
                State::NeedInput(frame_bytes) => {
                    self.input.make_room(frame_bytes);
                    self.watch_frame(progress.consumed, limits);
                    if let Err(end) = self.receive(limits) {
                        return end;
                    }
                }
            }
        }
    }

    /// Wait for the VM's turn, if it is not alone.
    fn turn<'v>(&mut self, vm: &'v Vm) -> Option<Turn<'v>> {
        if self.input.is_empty() {
            return None;
        }
        self.shared = self.engine.company.is_at_work(vm.id.0);
        self.shared.then(|| vm.turnstile.enter())
    }

    /// Let the session consume what has arrived. Where other VMs are at work, the rest of a long frame is taken in here,
    /// as far as it is there: copying it is work like any other.
    fn feed(&mut self) -> Result<Progress, SessionError> {
        loop {
            let progress = self.session.feed(self.input.bytes(), &mut self.out)?;
            self.input.consume(progress.consumed);
            let State::NeedInput(frame_bytes) = progress.state else { return Ok(progress) };
            if !self.shared || self.input.bytes().len() < HEADER_BYTES || !self.out.is_empty() {
                return Ok(progress);
            }
            self.input.make_room(frame_bytes);
            match self.input.receive(&self.signal.socket, PIECE_BYTES, RecvFlags::DONTWAIT) {
                Ok(received) if received > 0 => self.heard = Instant::now(),
                // Whatever it is, it is met again by whoever waits for more.
                _ => return Ok(progress),
            }
            scheduling::give_way();
        }
    }

    /// Set or clear the deadline of the frame that is half here.
    fn watch_frame(&mut self, consumed: usize, limits: &Limits) {
        if self.session.role().is_none() {
            return;
        }
        if self.input.is_empty() {
            self.deadline = None;
        } else if consumed > 0 || self.deadline.is_none() {
            self.deadline =
                Some((Instant::now() + limits.frame_timeout, "a frame did not arrive whole in time"));
        }
    }

    /// Send what the socket takes at once; returns how much that was.
    fn send_now(&self) -> Result<usize, End> {
        let mut done = 0;
        while done < self.out.len() {
            let piece = &self.out[done..];
            let piece = if self.shared { &piece[..piece.len().min(PIECE_BYTES)] } else { piece };
            match net::send(&self.signal.socket, piece, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => done += sent,
                Err(Errno::INTR | Errno::AGAIN) => break,
                Err(_) => return Err(End::Closed),
            }
            scheduling::give_way();
        }
        Ok(done)
    }

    /// Send what comes after the first `sent` bytes, waiting for the guest to read.
    fn send_rest(&mut self, sent: usize) -> Result<(), End> {
        let mut rest = &self.out[sent..];
        let mut deadline = None;
        while !rest.is_empty() {
            let piece = if self.shared { &rest[..rest.len().min(PIECE_BYTES)] } else { rest };
            match net::send(&self.signal.socket, piece, SendFlags::NOSIGNAL) {
                Ok(sent) => rest = &rest[sent..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(End::TimedOut("answers were not read in time")),
                Err(_) => return Err(End::Closed),
            }
            if !rest.is_empty() {
                // A guest that reads byte by byte must not hold the answers forever either.
                let stall = self.engine.limits().stall_timeout;
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + stall);
                if Instant::now() > deadline {
                    return Err(End::TimedOut("answers were not read in time"));
                }
            }
        }
        self.out.clear();
        Ok(())
    }

    /// Receive something, or be woken for a notice.
    fn receive(&mut self, limits: &Limits) -> Result<(), End> {
        let began = Instant::now();
        if let Some((deadline, what)) = self.deadline {
            if began > deadline {
                return Err(End::TimedOut(what));
            }
        }
        let most = if self.shared { PIECE_BYTES } else { MAX_FRAME_BYTES };
        if let Some(until) = self.habit.deadline(began) {
            if let Some(_spinning) = self.engine.spinners.enter() {
                while Instant::now() < until {
                    match self.input.receive(&self.signal.socket, most, RecvFlags::DONTWAIT) {
                        Err(Errno::AGAIN | Errno::INTR) => std::hint::spin_loop(),
                        received => return self.received(received, began),
                    }
                }
            }
        }
        let control = self.session.role() == Some(Role::Control);
        let flags = if control { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
        if control && !self.sleep_for_either(limits)? {
            return Ok(());
        }
        match self.input.receive(&self.signal.socket, most, flags) {
            Err(Errno::INTR) => Ok(()),
            Err(Errno::AGAIN) => {
                self.tick(limits)?;
                Ok(())
            }
            received => self.received(received, began),
        }
    }

    fn received(&mut self, received: Result<usize, Errno>, began: Instant) -> Result<(), End> {
        match received {
            Ok(0) | Err(_) => Err(End::Closed),
            Ok(_) => {
                let now = Instant::now();
                self.heard = now;
                self.habit.waited(now - began);
                if now - began > AWAKE {
                    scheduling::begin_stretch(self.shared);
                }
                Ok(())
            }
        }
    }

    /// Sleep until the socket is readable (true) or a notice waits (false).
    fn sleep_for_either(&self, limits: &Limits) -> Result<bool, End> {
        let mut fds = [
            PollFd::new(&self.signal.socket, PollFlags::IN),
            PollFd::new(&self.signal.notices, PollFlags::IN),
        ];
        let timeout = Timespec::try_from(tick(limits)).map_err(|_| End::Closed)?;
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return Err(End::Closed),
        }
        if !fds[1].revents().is_empty() {
            let mut counter = [0; 8];
            // Resets it; it cannot be empty, and if it were, nothing would be lost.
            let _ = rustix::io::read(&self.signal.notices, &mut counter);
            return Ok(false);
        }
        Ok(true)
    }

    /// Nothing came for a while.
    fn tick(&mut self, limits: &Limits) -> Result<(), End> {
        if !limits.keep_alive.is_zero() && self.heard.elapsed() > limits.keep_alive * 3 {
            return Err(End::TimedOut("silent for three keep-alive periods"));
        }
        if self.session.is_large() && self.input.is_empty() {
            self.input = Input::new();
            self.out = Vec::with_capacity(OUT_HIGH_WATER);
            self.session.shrink();
        }
        Ok(())
    }
}

fn tick(limits: &Limits) -> Duration {
    let keep_alive = if limits.keep_alive.is_zero() { TICK } else { limits.keep_alive };
    let shortest = limits.hello_timeout.min(limits.frame_timeout).min(keep_alive) / 2;
    shortest.clamp(Duration::from_millis(20), TICK)
}

fn set_timeouts(socket: &OwnedFd, limits: &Limits) -> Result<(), Errno> {
    use net::sockopt::{set_socket_timeout, Timeout};
    set_socket_timeout(socket, Timeout::Recv, Some(tick(limits)))?;
    set_socket_timeout(socket, Timeout::Send, Some(limits.stall_timeout.max(Duration::from_millis(20))))
}

/// What has arrived and is not consumed, in one buffer that is filled straight from the socket.
struct Input {
    data: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn new() -> Input {
        Input { data: vec![0; SMALL_FRAME_BYTES + HEADER_BYTES], start: 0, end: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.data[self.start..self.end]
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Make sure that the frame at the start fits whole. Frames over the small size come here only after the session
    /// was granted memory for them.
    fn make_room(&mut self, frame_bytes: usize) {
        if self.data.len() < frame_bytes {
            self.data.resize(frame_bytes, 0);
        }
        if self.start + frame_bytes > self.data.len() {
            self.data.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Receive what is there, up to `most` bytes.
    fn receive(&mut self, socket: &OwnedFd, most: usize, flags: RecvFlags) -> Result<usize, Errno> {
        let end = self.data.len().min(self.end + most);
        let (received, _) = net::recv(socket, &mut self.data[self.end..end], flags)?;
        self.end += received;
        Ok(received)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use tmem_store::{Store, StoreConfig, VmLimits};
    use tmem_wire::pages::PutWriter;
    use tmem_wire::{Encoding, Header, HelloRequest, Key, Op, PoolCreate, PoolKind, PAGE_BYTES};

    use super::*;
    use crate::listener::SocketOptions;
    use crate::VmSpec;

    const PAGES: u16 = 32;

    /// What of a long frame, all of which has arrived, is consumed without waiting once its start was received.
    fn consumed_at_once(shared: bool) -> usize {
        let (store, _) = Store::open(&StoreConfig::memfd(16 << 20)).unwrap();
        let sockets = SocketOptions { mode: 0o600, gid: None };
        let engine = Engine::new(Arc::new(store), Limits::default(), sockets).unwrap();
        let vm = engine.add_vm("vm", &VmSpec::default(), &VmLimits::default()).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let notices = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let signal = Arc::new(Signal { socket: ours.into(), notices });
        let waker = Box::new(SocketWaker(signal.clone()));
        let session = Session::new(&engine, &vm, String::new(), waker).unwrap();
        let mut connection = Connection::new(&engine, &signal, session);
        let hello = HelloRequest::new(Role::FileCache, [9; 16]);
        let mut frames = Vec::new();
        Header::request(Op::Hello, 1).write_frame(&hello.encode(), &mut frames);
        let pool = PoolCreate::private(PoolKind::Ephemeral { exclusive: false }, "p").encode();
        Header::request(Op::PoolCreate, 2).write_frame(&pool, &mut frames);
        connection.session.feed(&frames, &mut connection.out).unwrap();
        connection.out.clear();
        frames.clear();
        let mut writer = PutWriter::begin(&mut frames, 3, 1, PAGES, false);
        for index in 0..PAGES.into() {
            writer.page(&Key { object: [1; 16], index }, Encoding::Raw, &[7; PAGE_BYTES], 0);
        }
        writer.end();
        assert!(frames.len() > 2 * PIECE_BYTES);
        assert_eq!((&theirs).write(&frames).unwrap(), frames.len(), "the socket does not hold it all");
        connection.shared = shared;
        connection.input.receive(&signal.socket, PIECE_BYTES, RecvFlags::empty()).unwrap();
        let consumed = connection.feed().unwrap().consumed;
        assert!(consumed == 0 || consumed == frames.len());
        consumed
    }

    #[test]
    fn a_long_frame_is_taken_in_during_the_turn_where_others_are_at_work() {
        assert!(consumed_at_once(true) > 0);
        assert_eq!(consumed_at_once(false), 0, "who is alone takes it in at one go, elsewhere");
    }
}
