//! The link against a peer that speaks the protocol, or fails to, over a socket pair.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use super::lowat::tests::asked_of;
use super::*;

const LIMITS: HelloAnswer = HelloAnswer {
    version: VERSION,
    page_bytes: tmem_wire::PAGE_BYTES as u32,
    features: Features::ALL,
    max_frame_bytes: 1 << 20,
    max_batch: 64,
    max_in_flight: 8,
    keep_alive_ms: 1000,
    quota_bytes: 1 << 30,
};

fn read_frame(peer: &mut UnixStream) -> (Header, Vec<u8>) {
    let mut header = [0; HEADER_BYTES];
    peer.read_exact(&mut header).unwrap();
    let header = Header::decode(&header).unwrap();
    let mut body = vec![0; header.length as usize];
    peer.read_exact(&mut body).unwrap();
    (header, body)
}

fn answer(peer: &mut UnixStream, header: Header, body: &[u8]) {
    let mut frame = Vec::new();
    header.write_frame(body, &mut frame);
    peer.write_all(&frame).unwrap();
}

fn connect(
    peer: impl FnOnce(UnixStream) + Send + 'static,
    timeout: Duration,
) -> (Result<Link, LinkError>, thread::JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = thread::spawn(move || peer(theirs));
    let endpoint = "unix:/test".parse().unwrap();
    let hello = hello(Role::Swap, "test").unwrap();
    (Link::over(OwnedFd::from(ours).into(), &endpoint, &hello, timeout), peer)
}

#[test]
fn hello_carries_the_boot_id_and_settles_limits() {
    let (link, peer) = connect(
        |mut peer| {
            let (header, body) = read_frame(&mut peer);
            assert_eq!(header.op, Op::Hello);
            assert_eq!(HelloRequest::decode(&body).unwrap().boot_id, boot_id().unwrap());
            answer(&mut peer, header.answer(), &LIMITS.encode());
            // A notice in between must not be taken for the answer.
            let (header, _) = read_frame(&mut peer);
            answer(&mut peer, Header::request(Op::Shutdown, 0), &[0; 16]);
            answer(&mut peer, header.answer(), &[]);
        },
        Duration::from_secs(5),
    );
    let mut link = link.unwrap();
    assert_eq!(link.limits(), &LIMITS);
    link.ping().unwrap();
    peer.join().unwrap();
}

#[test]
fn a_socket_is_handed_on_with_what_its_reader_waits_for() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let watched = ours.try_clone().unwrap();
    let peer = thread::spawn(move || {
        let (header, _) = read_frame(&mut theirs);
        answer(&mut theirs, header.answer(), &LIMITS.encode());
        let (header, _) = read_frame(&mut theirs);
        let mut frame = Vec::new();
        header.answer().write_frame(&vec![0; 20_000], &mut frame);
        let (head, body) = frame.split_at(HEADER_BYTES);
        theirs.write_all(head).unwrap();
        while asked_of(&watched) == 1 {
            thread::yield_now();
        }
        theirs.write_all(body).unwrap();
        theirs
    });
    // Only the address says that it is vsock; unix sockets have the option, too.
    let endpoint = "vsock:2:1".parse().unwrap();
    let hello = hello(Role::Swap, "test").unwrap();
    let mut link = Link::over(OwnedFd::from(ours).into(), &endpoint, &hello, Duration::from_secs(5)).unwrap();
    link.ping().unwrap();
    let (socket, mut low_water) = link.into_socket().unwrap();
    assert_eq!(asked_of(&socket), 20_000);
    low_water.set(&socket, 0).unwrap();
    assert_eq!(asked_of(&socket), 1);
    drop(peer.join().unwrap());
}

#[test]
fn errors_name_what_was_awaited() {
    let (link, peer) = connect(|mut peer| drop(read_frame(&mut peer)), Duration::from_secs(5));
    assert!(matches!(link, Err(LinkError::Closed { awaited: "the answer to HELLO" })), "{link:?}");
    peer.join().unwrap();

    let (done, wait) = std::sync::mpsc::channel::<()>();
    let (link, peer) = connect(move |_peer| wait.recv().unwrap_or(()), Duration::from_millis(20));
    let error = link.unwrap_err().to_string();
    assert!(error.contains("the answer to HELLO") && error.contains("20ms"), "{error}");
    drop(done);
    peer.join().unwrap();
}

#[test]
fn refusals_carry_the_hosts_words() {
    let (link, peer) = connect(
        |mut peer| {
            let (header, _) = read_frame(&mut peer);
            let refusal = Header { status: ErrorCode::Unsupported as u16, ..header.answer() };
            answer(&mut peer, refusal, b"pages of 4096 bytes only");
        },
        Duration::from_secs(5),
    );
    let error = link.unwrap_err().to_string();
    assert!(error.contains("pages of 4096 bytes only"), "{error}");
    peer.join().unwrap();
}

#[test]
fn frames_larger_than_the_buffer_start_are_moved_not_lost() {
    let body = vec![7; MAX_BODY_BYTES];
    let sent = body.clone();
    let (link, peer) = connect(
        move |mut peer| {
            let (header, _) = read_frame(&mut peer);
            answer(&mut peer, header.answer(), &LIMITS.encode());
            for tag in 0..3 {
                answer(&mut peer, Header { tag, ..Header::request(Op::Get, 0).answer() }, &sent);
            }
        },
        Duration::from_secs(5),
    );
    let (mut reader, _writer) = link.unwrap().split();
    for tag in 0..3 {
        let (header, got) = reader.recv("a page").unwrap();
        assert_eq!((header.tag, got.len()), (tag, body.len()));
        assert!(got == body);
    }
    peer.join().unwrap();
}

#[test]
fn writes_are_split_as_the_endpoint_says() {
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::empty(),
        None,
    )
    .unwrap();
    let mut writer =
        LinkWriter { socket: ours.into(), write_bytes: Some(1000), timeout: Duration::from_secs(1) };
    writer.send(&[1; 2500]).unwrap();
    let mut packet = [0; 4096];
    let lengths: Vec<usize> = (0..3)
        .map(|_| rustix::net::recv(&theirs, &mut packet, rustix::net::RecvFlags::empty()).unwrap().1)
        .collect();
    assert_eq!(lengths, [1000, 1000, 500]);
}
