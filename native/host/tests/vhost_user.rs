//! The whole device over its sockets, with a vhost-user front end that is not ours: QEMU comes and goes, the daemon
//! dies, programs of the host connect.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod driver;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use driver::{packet, Driver, DriverRing, GUEST_CID, MEMORY_BYTES, RING_ENTRIES, USER_ADDRESS};
use tmem_host::listener::SocketOptions;
use tmem_host::vhost_user::packet::{Header, Key, Op};
use tmem_host::{Engine, Limits, VmSpec};
use tmem_store::{Store, StoreConfig, VmLimits};
use tmem_wire::{HelloRequest, Role};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

const PATIENCE: Duration = Duration::from_secs(20);

/// A directory that is removed in the end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let path = std::env::temp_dir().join(format!("tmem-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Place(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn engine(place: &Path, keeper: Option<PathBuf>) -> Arc<Engine> {
    let (store, _) = Store::open(&StoreConfig::memfd(64 << 20)).unwrap();
    let limits = Limits { busy_poll: Duration::ZERO, ..Limits::default() };
    let engine = Engine::new(Arc::new(store), limits, SocketOptions { mode: 0o600, gid: None }).unwrap();
    if let Some(keeper) = keeper {
        engine.use_keeper(keeper);
    }
    let spec = VmSpec {
        cid: None,
        hybrid_socket: Some(place.join("vsock.sock")),
        vhost_user_socket: Some(place.join("vhost.sock")),
        guest_cid: Some(GUEST_CID as u32),
    };
    let limits =
        VmLimits { quota_bytes: 32 << 20, min_bytes: 0, weight: 100, persistent_max_bytes: 32 << 20 };
    engine.add_vm("vm", &spec, &limits).unwrap();
    engine
}

/// QEMU with a guest in it.
struct Machine {
    driver: Driver,
    front: Frontend,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    /// Packets that came and were not asked for yet.
    arrived: Vec<(Header, Vec<u8>)>,
}

impl Machine {
    fn boot(place: &Path) -> Machine {
        let mut front = Frontend::connect(place.join("vhost.sock"), 3).unwrap();
        front.set_owner().unwrap();
        let features = front.get_features().unwrap();
        assert_eq!(features & (1 << 32 | 1 << 30 | 1 << 29), 1 << 32 | 1 << 30 | 1 << 29);
        let protocol = front.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK));
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ;
        front.set_protocol_features(wanted).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let (_, config) = front.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
        assert_eq!(config, GUEST_CID.to_le_bytes());
        front.set_features(1 << 32 | 1 << 30 | 1 << 29).unwrap();
        let new = || EventFd::new(EFD_NONBLOCK).unwrap();
        let mut machine = Machine {
            driver: Driver::new(true),
            front,
            kicks: (0..3).map(|_| new()).collect(),
            calls: (0..3).map(|_| new()).collect(),
            arrived: Vec::new(),
        };
        machine.start([0; 3]);
        machine.driver.post(RING_ENTRIES as usize - 1);
        machine
    }

    fn start(&mut self, bases: [u16; 3]) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: USER_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.driver.file.as_raw_fd(),
        };
        self.front.set_mem_table(&[region]).unwrap();
        let rings: [&DriverRing; 3] = [&self.driver.to_guest, &self.driver.from_guest, &self.driver.events];
        for (index, ring) in rings.into_iter().enumerate() {
            let config = VringConfigData {
                queue_max_size: RING_ENTRIES,
                queue_size: RING_ENTRIES,
                flags: 0,
                desc_table_addr: USER_ADDRESS + ring.layout.descriptors,
                used_ring_addr: USER_ADDRESS + ring.layout.used,
                avail_ring_addr: USER_ADDRESS + ring.layout.avail,
                log_addr: None,
            };
            self.front.set_vring_num(index, RING_ENTRIES).unwrap();
            self.front.set_vring_base(index, bases[index]).unwrap();
            self.front.set_vring_addr(index, &config).unwrap();
            self.front.set_vring_call(index, &self.calls[index]).unwrap();
            self.front.set_vring_kick(index, &self.kicks[index]).unwrap();
            self.front.set_vring_enable(index, true).unwrap();
        }
    }

    fn stop(&mut self) -> [u16; 3] {
        [0, 1, 2].map(|index| self.front.get_vring_base(index).unwrap() as u16)
    }

    fn send(&mut self, header: &Header, data: &[u8]) {
        self.driver.send(header, data);
        self.kicks[1].write(1).unwrap();
    }

    /// The first packet that `wanted` is about, waiting for it.
    fn expect(&mut self, what: &str, wanted: impl Fn(&Header) -> bool) -> (Header, Vec<u8>) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let arrived = self.driver.receive();
            if !arrived.is_empty() {
                self.kicks[0].write(1).unwrap();
            }
            self.arrived.extend(arrived);
            if let Some(at) = self.arrived.iter().position(|(header, _)| wanted(header)) {
                return self.arrived.remove(at);
            }
            assert!(Instant::now() < deadline, "no {what}; there is {:?}", self.arrived);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn open(&mut self, key: Key) {
        self.send(&packet(key, Op::Request, 0), &[]);
        let (answer, _) = self.expect("answer to a request", |header| header.key_of_guest() == key);
        assert_eq!(answer.operation(), Some(Op::Response));
    }

    /// Say HELLO on a new stream to tmem and expect its answer.
    fn hello(&mut self, guest_port: u32) {
        let key = Key { host_port: tmem_wire::PORT, guest_port };
        self.open(key);
        let hello = HelloRequest::new(Role::FileCache, [9; 16]);
        let mut frame = Vec::new();
        tmem_wire::Header::request(tmem_wire::Op::Hello, 1).write_frame(&hello.encode(), &mut frame);
        self.send(&packet(key, Op::Data, frame.len()), &frame);
        let (_, data) = self.expect("answer to HELLO", |header| {
            header.key_of_guest() == key && header.operation() == Some(Op::Data)
        });
        let header = tmem_wire::Header::decode(data.first_chunk().unwrap()).unwrap();
        assert_eq!((header.op, header.status), (tmem_wire::Op::Hello, 0));
    }
}

/// Ports of a packet to the guest, seen as the key of its stream.
trait KeyOfGuest {
    fn key_of_guest(&self) -> Key;
}

impl KeyOfGuest for Header {
    fn key_of_guest(&self) -> Key {
        Key { host_port: self.src_port.get(), guest_port: self.dst_port.get() }
    }
}

#[test]
fn a_session_and_both_kinds_of_hybrid_connection() {
    let place = Place::new("hybrid");
    let engine = engine(&place.0, None);
    let listener = UnixListener::bind(place.0.join("vsock.sock_1234")).unwrap();
    let mut machine = Machine::boot(&place.0);
    machine.hello(5000);
    assert_eq!(engine.vm("vm").unwrap().connections(), 1);
    // The guest connects to a program of the host.
    let key = Key { host_port: 1234, guest_port: 6000 };
    machine.open(key);
    let (mut program, _) = listener.accept().unwrap();
    machine.send(&packet(key, Op::Data, 5), b"hello");
    let mut got = [0; 5];
    program.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    program.write_all(b"world").unwrap();
    let (_, data) = machine.expect("data", |header| header.operation() == Some(Op::Data));
    assert_eq!(data, b"world");
    drop(program);
    machine.expect("shutdown", |header| header.operation() == Some(Op::Shutdown));
    // A program of the host connects to the guest; its first bytes come with the greeting.
    let mut program = UnixStream::connect(place.0.join("vsock.sock")).unwrap();
    program.write_all(b"CONNECT 22\nSSH").unwrap();
    let (request, _) = machine.expect("request", |header| header.operation() == Some(Op::Request));
    let key = request.key_of_guest();
    assert_eq!(key.guest_port, 22);
    machine.send(&packet(key, Op::Response, 0), &[]);
    let (_, data) = machine.expect("data", |header| header.operation() == Some(Op::Data));
    assert_eq!(data, b"SSH");
    let mut line = String::new();
    BufReader::new(&program).read_line(&mut line).unwrap();
    assert_eq!(line, format!("OK {}\n", key.host_port));
    // Nobody listens there.
    machine.send(&packet(Key { host_port: 4321, guest_port: 1 }, Op::Request, 0), &[]);
    machine.expect("refusal", |header| header.operation() == Some(Op::Reset) && header.src_port == 4321);
    assert!(engine.drain(Duration::from_secs(5)));
    assert!(!place.0.join("vhost.sock").exists() && !place.0.join("vsock.sock").exists());
}

#[test]
fn pause_reset_and_another_qemu() {
    let place = Place::new("reset");
    let engine = engine(&place.0, None);
    let mut machine = Machine::boot(&place.0);
    machine.hello(5000);
    let bases = machine.stop();
    machine.start(bases);
    assert_eq!(engine.vm("vm").unwrap().connections(), 1, "a pause costs no stream");
    machine.hello(5001);
    machine.stop();
    machine.driver.restart(true);
    machine.start([0; 3]);
    machine.driver.post(64);
    machine.hello(5000);
    assert_eq!(engine.vm("vm").unwrap().connections(), 1, "a reboot costs them all");
    machine.front.reset_device().unwrap_err(); // not negotiated
    drop(machine);
    let deadline = Instant::now() + PATIENCE;
    while engine.vm("vm").unwrap().connections() > 0 {
        assert!(Instant::now() < deadline, "QEMU is gone, its guest's session is not");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut machine = Machine::boot(&place.0);
    machine.hello(5000);
    let counters = engine.endpoint_counters("vm").unwrap();
    let counter = |name| counters.iter().find(|(n, _)| *n == name).unwrap().1;
    assert_eq!((counter("front_ends"), counter("bad_messages")), (2, 0));
    assert!(engine.drain(Duration::from_secs(5)));
}

#[test]
fn a_front_end_that_talks_nonsense_is_hung_up_on() {
    let place = Place::new("nonsense");
    let engine = engine(&place.0, None);
    let word = |w: &[u32]| w.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
    let messages: &[Vec<u8>] = &[
        word(&[1, 9, 1_000_000]),
        word(&[1, 5, 0]),
        word(&[99, 1, 0]),
        word(&[5, 1, 8, 3, 0]),
        word(&[8, 1, 8, 77, 1]),
        word(&[8, 1, 8, 0, 3]),
        word(&[8, 1, 4, 0]),
        word(&[12, 1, 8, 0, 0]),
        word(&[2, 1, 8, u32::MAX, u32::MAX]),
        word(&[38, 1, 40, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0]),
        vec![0xff; 4096],
    ];
    for message in messages {
        let mut front = UnixStream::connect(place.0.join("vhost.sock")).unwrap();
        front.set_read_timeout(Some(PATIENCE)).unwrap();
        front.write_all(message).unwrap();
        let end = front.read(&mut [0; 64]);
        assert!(matches!(end, Ok(0)) || end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    }
    let mut machine = Machine::boot(&place.0);
    machine.hello(5000);
    assert!(engine.drain(Duration::from_secs(5)));
}

/// Not a test: the daemon that `the_daemon_dies_and_another_goes_on` kills.
#[test]
fn daemon() {
    let Some(place) = std::env::var_os("TMEM_TEST_DAEMON").map(PathBuf::from) else { return };
    let engine = engine(&place, Some(place.join("keeper.sock")));
    println!("\nserving");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    engine.drain(Duration::from_secs(5));
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_daemon(place: &Path) -> Killed {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "daemon", "--nocapture"])
        .env("TMEM_TEST_DAEMON", place)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "serving"), "the daemon did not start");
    Killed(child)
}

#[test]
fn the_daemon_dies_and_another_goes_on() {
    let place = Place::new("keeper");
    let keeper =
        Command::new(env!("CARGO_BIN_EXE_tmem-keeper")).arg(place.0.join("keeper.sock")).spawn().unwrap();
    let mut keeper = Killed(keeper);
    let deadline = Instant::now() + PATIENCE;
    while !place.0.join("keeper.sock").exists() {
        assert!(Instant::now() < deadline, "the keeper did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut daemon = start_daemon(&place.0);
    let mut machine = Machine::boot(&place.0);
    // The event ring is ours with this front end.
    machine.driver.events.add(&machine.driver.memory, &[4], true);
    for port in 5000..5005 {
        machine.hello(port);
    }
    for round in 0..3u32 {
        let ports = 5000 + 100 * round..5005 + 100 * round;
        daemon.0.kill().unwrap();
        daemon.0.wait().unwrap();
        // What the guest sends meanwhile is found, and belongs to a stream that is gone.
        let lost = Key { host_port: tmem_wire::PORT, guest_port: ports.start };
        machine.send(&packet(lost, Op::Data, 3), b"???");
        let began = Instant::now();
        daemon = start_daemon(&place.0);
        for port in ports {
            machine.expect("reset", |header| {
                header.operation() == Some(Op::Reset) && header.dst_port.get() == port
            });
        }
        assert!(began.elapsed() < Duration::from_secs(2), "guests wait: {:?}", began.elapsed());
        if round == 0 {
            let event = machine.driver.events.take_used(&machine.driver.memory);
            assert_eq!(event.map(|(_, length)| length), Some(4), "the transport reset is announced");
        }
        for port in 5100 + 100 * round..5105 + 100 * round {
            machine.hello(port);
        }
        // The front end has not noticed: its next messages are answered.
        let bases = machine.stop();
        machine.start(bases);
        machine.hello(6000 + round);
    }
    // A clean stop resets the streams itself, and the next daemon still goes on.
    drop(daemon.0.stdin.take());
    daemon.0.wait().unwrap();
    machine.expect("reset", |header| header.operation() == Some(Op::Reset) && header.dst_port == 6002);
    let daemon = start_daemon(&place.0);
    machine.hello(7000);
    // QEMU ends while no daemon is there: the keeper lets go of its memory, and ends when it holds nothing.
    drop(daemon);
    drop(machine);
    let deadline = Instant::now() + PATIENCE;
    while keeper.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the keeper stays for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!place.0.join("keeper.sock").exists());
}
