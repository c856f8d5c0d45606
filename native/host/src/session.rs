//! The protocol's state machine: a guest's bytes in, answers out, no I/O and no waiting.
//!
//! A transport keeps what has arrived and is not consumed, calls [`Session::feed`], sends what was appended to the
//! output, and does what [`Progress::state`] says. One session serves one connection, in order; different
//! connections of a VM are served in parallel.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tmem_store::Attach;
use tmem_wire::{
    ErrorCode, Features, Header, HelloAnswer, HelloRequest, Notice, Op, PoolCreate, Report, Role, Stats,
    WireError, HEADER_BYTES, MAX_BATCH, PAGE_BYTES, VERSION,
};

use crate::engine::Engine;
use crate::limits::{
    Permit, LARGE_BUFFERS_BYTES, MAX_FRAME_BYTES, MIN_GUEST_FRAME_BYTES, OUT_HIGH_WATER, SMALL_FRAME_BYTES,
};
use crate::operations;
use crate::outbox::{Outbox, Phase, Waker};
use crate::vm::Vm;

/// How a guest broke the protocol. The answer that says so is already in the output: send it, then close. The event
/// is counted and logged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The bytes are not a frame, or its body is not what its header says.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The first frame was not HELLO.
    #[error("the first frame is {0:?}, not HELLO")]
    NotHello(Op),
    /// HELLO came a second time.
    #[error("a second HELLO")]
    SecondHello,
    /// The frame is one only the host sends, or claims to be an answer.
    #[error("{0:?} is not a request a guest may send here")]
    NotARequest(Op),
}

/// What the transport is to do after it has sent the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Wait for more input. The next frame, at the start of what is not consumed, has this many bytes as far as is
    /// known.
    NeedInput(usize),
    /// Call again once the output is sent.
    OutputFull,
    /// The next frame, or its answer, is larger than [`SMALL_FRAME_BYTES`]: call [`Session::grow`], then again.
    NeedMemory,
    /// The VM is over its rate: call again after this time; until then take no more input.
    Throttled(Duration),
    /// Send the output and close.
    Closed,
}

/// What came of a call of [`Session::feed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes at the start of the input that are done with.
    pub consumed: usize,
    /// What to do next.
    pub state: State,
}

/// What HELLO settled.
#[derive(Debug, Clone, Copy)]
struct Agreement {
    role: Role,
    features: Features,
    /// Largest frame the guest takes.
    max_answer_bytes: usize,
    /// The boot this session belongs to.
    generation: u64,
}

/// A guest's connection, as far as the protocol goes.
pub struct Session {
    engine: Arc<Engine>,
    vm: Arc<Vm>,
    outbox: Arc<Outbox>,
    peer: String,
    agreement: Option<Agreement>,
    large: Option<Permit>,
}

impl Session {
    /// Begin a session of `vm`, which the transport has identified. `peer` describes the connection in logs. `None`
    /// if the VM has too many connections or the daemon drains: then close the connection.
    pub fn new(engine: &Arc<Engine>, vm: &Arc<Vm>, peer: String, waker: Box<dyn Waker>) -> Option<Session> {
        let outbox = Arc::new(Outbox::new(waker));
        if engine.is_draining() {
            return None;
        }
        if !vm.enter(&outbox) {
            if let Some(suppressed) = vm.may_log() {
                tracing::warn!(vm = %vm.name, %peer, suppressed, "too many connections, one refused");
            }
            return None;
        }
        engine.session_began();
        Some(Session { engine: engine.clone(), vm: vm.clone(), outbox, peer, agreement: None, large: None })
    }

    /// What the connection is for; `None` before HELLO.
    pub fn role(&self) -> Option<Role> {
        self.agreement.map(|agreement| agreement.role)
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Whether the session may hold large buffers now.
    pub fn is_large(&self) -> bool {
        self.large.is_some()
    }

    /// Take memory for frames over [`SMALL_FRAME_BYTES`] from the VM's share, waiting up to `patience` for its other
    /// connections to give some back. Returns whether there is memory now.
    pub fn grow(&mut self, patience: Duration) -> bool {
        if self.large.is_none() {
            self.large = self.vm.in_flight.take(LARGE_BUFFERS_BYTES, patience);
        }
        self.large.is_some()
    }

    /// Give that memory back; the transport has freed its large buffers.
    pub fn shrink(&mut self) {
        self.large = None;
    }

    /// Consume whole frames from `input` and append notices and answers to `out`.
    ///
    /// # Errors
    /// The guest broke the protocol. The last answer in `out` says how: send it and close.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, SessionError> {
        self.outbox.write(out);
        let mut consumed = 0;
        let state = loop {
            let rest = &input[consumed..];
            match self.next(rest, out) {
                Ok(Step::Served(bytes)) => consumed += bytes,
                Ok(Step::Stop(state)) => break state,
                Err(error) => {
                    self.protocol_error(rest, &error, out);
                    return Err(error);
                }
            }
        };
        Ok(Progress { consumed, state })
    }

    fn next(&mut self, rest: &[u8], out: &mut Vec<u8>) -> Result<Step, SessionError> {
        let phase = self.outbox.phase();
        if phase == Phase::Closing {
            return Ok(Step::Stop(State::Closed));
        }
        if out.len() >= OUT_HIGH_WATER {
            return Ok(Step::Stop(State::OutputFull));
        }
        let wait =
            |bytes| Step::Stop(if phase == Phase::Open { State::NeedInput(bytes) } else { State::Closed });
        let Some(bytes) = rest.first_chunk::<HEADER_BYTES>() else { return Ok(wait(HEADER_BYTES)) };
        let header = Header::decode(bytes)?;
        self.check(&header)?;
        let frame_bytes = HEADER_BYTES + header.length as usize;
        let answer_bytes =
            if header.op == Op::Get { operations::get_answer_bound(header.count) } else { HEADER_BYTES };
        if frame_bytes.max(answer_bytes) > SMALL_FRAME_BYTES && self.large.is_none() {
            return Ok(Step::Stop(State::NeedMemory));
        }
        let Some(body) = rest.get(HEADER_BYTES..frame_bytes) else { return Ok(wait(frame_bytes)) };
        if let Err(wait) = self.vm.bucket.take(header.count.into(), Instant::now()) {
            self.vm.counters.throttled.fetch_add(1, Ordering::Relaxed);
            return Ok(Step::Stop(State::Throttled(wait)));
        }
        self.vm.counters.count_frame(header.op);
        match self.agreement {
            None => {
                if !self.hello(&header, body, out)? {
                    return Ok(Step::Stop(State::Closed));
                }
            }
            Some(agreement) => self.serve(agreement, &header, body, out)?,
        }
        Ok(Step::Served(frame_bytes))
    }

    /// Whether this header may come now.
    fn check(&self, header: &Header) -> Result<(), SessionError> {
        if header.is_answer() || header.status != 0 {
            return Err(SessionError::NotARequest(header.op));
        }
        match (&self.agreement, header.op) {
            (None, Op::Hello) => Ok(()),
            (None, other) => Err(SessionError::NotHello(other)),
            (Some(_), Op::Hello) => Err(SessionError::SecondHello),
            (Some(_), Op::Reclaim | Op::Quota | Op::Frozen | Op::Shutdown) => {
                Err(SessionError::NotARequest(header.op))
            }
            (Some(agreement), Op::Report) if agreement.role != Role::Control => {
                Err(SessionError::NotARequest(header.op))
            }
            _ => Ok(()),
        }?;
        Ok(operations::check_length(header)?)
    }

    /// Settle version, features and limits. Returns whether the session goes on.
    fn hello(&mut self, header: &Header, body: &[u8], out: &mut Vec<u8>) -> Result<bool, SessionError> {
        let request = HelloRequest::decode(body)?;
        let refusal = if !(request.version_min..=request.version_max).contains(&VERSION) {
            Some((ErrorCode::Unsupported, format!("the host speaks protocol version {VERSION} only")))
        } else if request.page_bytes as usize != PAGE_BYTES {
            Some((ErrorCode::Unsupported, format!("the host stores pages of {PAGE_BYTES} bytes only")))
        } else if (request.max_frame_bytes as usize) < MIN_GUEST_FRAME_BYTES {
            let least = MIN_GUEST_FRAME_BYTES;
            Some((ErrorCode::Unsupported, format!("frames of at least {least} bytes must be accepted")))
        } else if self.engine.is_draining() {
            Some((ErrorCode::ShuttingDown, "the host is shutting down".to_owned()))
        } else {
            None
        };
        let generation = match refusal {
            None => self.attach(request.boot_id, request.role),
            Some(refusal) => Err(refusal),
        };
        let generation = match generation {
            Ok(generation) => generation,
            Err((code, reason)) => {
                if let Some(suppressed) = self.vm.may_log() {
                    tracing::warn!(vm = %self.vm.name, peer = %self.peer, suppressed, %reason, "HELLO refused");
                }
                operations::refuse(header, code, &reason, out);
                return Ok(false);
            }
        };
        let features = request.features.common(Features::ALL);
        self.agreement = Some(Agreement {
            role: request.role,
            features,
            max_answer_bytes: request.max_frame_bytes as usize,
            generation,
        });
        let stats = self.engine.store().vm_stats(self.vm.id);
        let limits = self.engine.limits();
        let answer = HelloAnswer {
            version: VERSION,
            page_bytes: PAGE_BYTES as u32,
            features,
            max_frame_bytes: MAX_FRAME_BYTES as u32,
            max_batch: MAX_BATCH as u32,
            max_in_flight: limits.max_in_flight,
            keep_alive_ms: limits.keep_alive.as_millis() as u32,
            quota_bytes: self.engine.store().limits(self.vm.id).map_or(0, |limits| limits.quota_bytes),
        };
        header.answer().write_frame(&answer.encode(), out);
        if request.role == Role::Control && stats.is_some_and(|stats| stats.frozen) {
            Notice::Frozen(true).write_frame(out);
        }
        if let Some(suppressed) = self.vm.may_log() {
            let client = String::from_utf8_lossy(&request.client);
            let client = client.trim_end_matches('\0');
            tracing::info!(vm = %self.vm.name, peer = %self.peer, role = ?request.role, client, suppressed,
                "guest connected");
        }
        Ok(true)
    }

    /// Enter the guest's boot: a new one ends the sessions of the old and destroys its pools.
    fn attach(&self, boot_id: [u8; 16], role: Role) -> Result<u64, (ErrorCode, String)> {
        let mut boot = self.vm.boot();
        if boot.id == Some(boot_id) {
            self.vm.said_hello(&self.outbox, role, boot.generation);
            return Ok(boot.generation);
        }
        if boot.is_superseded(boot_id) {
            return Err((ErrorCode::Denied, "this boot of the guest was followed by another".to_owned()));
        }
        boot.advance(boot_id);
        self.vm.close_before(boot.generation);
        self.vm.said_hello(&self.outbox, role, boot.generation);
        if let Attach::Fresh { pools_destroyed, pages } = self.engine.store().attach_boot(self.vm.id, boot_id)
        {
            tracing::info!(vm = %self.vm.name, pools_destroyed, pages, "the guest rebooted, its pools are gone");
        }
        Ok(boot.generation)
    }

    fn serve(
        &mut self,
        agreement: Agreement,
        header: &Header,
        body: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), SessionError> {
        let (store, vm, features) = (self.engine.store(), &*self.vm, agreement.features);
        let start = Instant::now();
        match header.op {
            Op::Get if operations::get_answer_bound(header.count) > agreement.max_answer_bytes => {
                let message = "the answer may not fit into the frames this guest accepts";
                operations::refuse(header, ErrorCode::Limit, message, out);
            }
            Op::Get => {
                operations::get(store, vm, features, header, body, out)?;
                vm.get_latency.record(start.elapsed() / header.count.into(), header.count.into());
            }
            Op::Put => {
                operations::put(store, vm, features, header, body, out)?;
                vm.put_latency.record(start.elapsed() / header.count.into(), header.count.into());
            }
            Op::FlushPage => operations::flush_page(store, vm, header, body, out)?,
            Op::FlushObject => operations::flush_object(store, vm, header, body, out)?,
            Op::FlushPool => operations::flush_pool(store, vm, header, out),
            Op::PoolCreate => self.create_pool(agreement, header, body, out)?,
            Op::PoolDestroy => operations::destroy_pool(store, vm, header, out),
            Op::Ping => header.answer().write_frame(&[], out),
            Op::Stats => {
                let stats = self.stats();
                header.answer().write_frame(zerocopy::IntoBytes::as_bytes(&stats), out);
            }
            Op::Report => {
                vm.set_report(Report::decode(body)?);
                header.answer().write_frame(&[], out);
            }
            // `check` lets none of these through.
            Op::Hello | Op::Reclaim | Op::Quota | Op::Frozen | Op::Shutdown => {
                return Err(SessionError::NotARequest(header.op));
            }
        }
        Ok(())
    }

    fn create_pool(
        &self,
        agreement: Agreement,
        header: &Header,
        body: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), SessionError> {
        let spec = PoolCreate::decode(body)?;
        // Held while the pool is made: a session whose boot is over must not leave a pool in the next one.
        let boot = self.vm.boot();
        if boot.generation != agreement.generation {
            operations::refuse(header, ErrorCode::Denied, "the guest has rebooted", out);
            return Ok(());
        }
        match self.engine.store().create_pool(self.vm.id, &spec) {
            Ok(pool) => Header { pool: pool.0, ..header.answer() }.write_frame(&[], out),
            Err(error) => {
                if let Some(suppressed) = self.vm.may_log() {
                    tracing::warn!(vm = %self.vm.name, peer = %self.peer, suppressed, %error, "pool refused");
                }
                operations::refuse(header, operations::error_code(error), &error.to_string(), out);
            }
        }
        Ok(())
    }

    fn stats(&self) -> Stats {
        let store = self.engine.store();
        let Some(stats) = store.vm_stats(self.vm.id) else { return Stats::default() };
        let quota_bytes = store.limits(self.vm.id).map_or(0, |limits| limits.quota_bytes);
        Stats {
            quota_bytes: quota_bytes.into(),
            used_bytes: stats.used_bytes.into(),
            ephemeral_pages: stats.ephemeral_pages.into(),
            persistent_pages: stats.persistent_pages.into(),
            puts_accepted: stats.puts_accepted.into(),
            puts_refused: stats.puts_refused.into(),
            gets_hit: stats.gets_hit.into(),
            gets_missed: stats.gets_missed.into(),
            pages_flushed: stats.pages_flushed.into(),
            pages_evicted: stats.pages_evicted.into(),
            frozen: u64::from(stats.frozen).into(),
        }
    }

    fn protocol_error(&self, rest: &[u8], error: &SessionError, out: &mut Vec<u8>) {
        self.vm.counters.protocol_errors.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.vm.may_log() {
            tracing::warn!(vm = %self.vm.name, peer = %self.peer, suppressed, %error,
                "protocol error, connection closed");
        }
        // A header that cannot be read has no tag to answer to: HELLO and 0 stand for it.
        let request = rest
            .first_chunk::<HEADER_BYTES>()
            .and_then(|bytes| Header::decode(bytes).ok())
            .unwrap_or(Header::request(Op::Hello, 0));
        operations::refuse(&request, ErrorCode::Protocol, &error.to_string(), out);
    }

    /// Count and log that the transport gives the connection up: the guest was silent, or did not read.
    pub fn timed_out(&self, what: &str) {
        self.vm.counters.timeouts.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.vm.may_log() {
            tracing::warn!(vm = %self.vm.name, peer = %self.peer, suppressed, what, "connection closed");
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.vm.leave(&self.outbox);
        self.engine.session_ended();
    }
}

enum Step {
    Served(usize),
    Stop(State),
}
