//! What every transport must carry unharmed. The same checks run against any endpoint, so that an AF_VSOCK socket,
//! tmemd's own device, somebody else's, and a plain unix socket are held to one measure.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::Shutdown;

use tmem_wire::pages::{decode_got, write_keys};
use tmem_wire::{GetStatus, Header, Key, Op, PoolCreate, PoolKind, HEADER_BYTES, MAX_BATCH, PAGE_BYTES};

use crate::client::{key, page, put_frame, Client, Content};
use crate::endpoint::Endpoint;
use crate::report::Report;
use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The server.
    endpoint: Endpoint,
    /// Most bytes in one write; 0 for no limit. Needed with vhost-device-vsock.
    #[arg(long, default_value_t = 0)]
    write_bytes: usize,
    /// Do without streams that one side has ended: vhost-device-vsock carries nothing more on those. None of tmem's
    /// programs ends one.
    #[arg(long)]
    no_half_close: bool,
}

type Check = fn(&Arguments) -> Result<(), Failure>;

const HALF_CLOSED: &str = "what was sent before the end is answered";

const CHECKS: [(&str, Check); 8] = [
    ("batches of every size come back", batches),
    ("frames may arrive in pieces", pieces),
    ("requests may be sent before answers are read", pipelined),
    ("answers wait for a reader that is late", late_reader),
    (HALF_CLOSED, half_closed),
    ("many connections do not mix", many),
    ("a boot that reconnects has its pages, another has not", boots),
    ("garbage ends only its own connection", garbage),
];

/// Pages that the checks put: 8 MiB, more than any buffer on the way.
const PAGES: u32 = 2048;

/// Run all checks; the first that fails is named in the error.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    for (name, check) in CHECKS {
        if name == HALF_CLOSED && arguments.no_half_close {
            continue;
        }
        check(arguments).map_err(|error| format!("{name}: {error}"))?;
        Report::default().text("check", name).text("result", "ok").print();
    }
    Ok(())
}

/// Boots of the guest that the checks play: a run is in the first until `boots` begins the second.
#[derive(Clone, Copy)]
enum Boot {
    First,
    Second,
}

fn connect(arguments: &Arguments, boot: Boot) -> Result<Client, Failure> {
    // Of this run only: a boot that was followed by another is refused.
    let mut id = [boot as u8; 16];
    id[..4].copy_from_slice(&std::process::id().to_le_bytes());
    let spec = PoolCreate::private(PoolKind::Ephemeral { exclusive: false }, "check");
    Client::connect_as(&arguments.endpoint, arguments.write_bytes, id, &spec)
}

fn filled(arguments: &Arguments, boot: Boot) -> Result<Client, Failure> {
    let mut client = connect(arguments, boot)?;
    client.fill(Content::Half, PAGES)?;
    Ok(client)
}

fn get_frame(client: &Client, tag: u32, indices: &[u32]) -> Vec<u8> {
    let keys: Vec<Key> = indices.iter().map(|index| key(*index)).collect();
    let mut out = Vec::new();
    write_keys(Op::Get, tag, client.pool, false, &keys, &mut out);
    out
}

/// Hold the client's latest answer against what was put.
fn verify(client: &Client, header: &Header, indices: &[u32]) -> Result<(), Failure> {
    let got = decode_got(header, client.body())?;
    if got.len() != indices.len() {
        return Err(format!("{} pages were asked for, {} came", indices.len(), got.len()).into());
    }
    for (index, got) in indices.iter().zip(got) {
        if got.status != GetStatus::Hit || got.payload != page(Content::Half, *index) {
            return Err(format!("page {index} did not come back as it was put").into());
        }
    }
    Ok(())
}

fn get(client: &mut Client, tag: u32, indices: &[u32]) -> Result<(), Failure> {
    let frame = get_frame(client, tag, indices);
    client.send(&frame)?;
    let header = client.answer()?;
    if header.tag != tag {
        return Err(format!("tag {tag} was sent, {} answered", header.tag).into());
    }
    verify(client, &header, indices)
}

fn batches(arguments: &Arguments) -> Result<(), Failure> {
    let mut client = filled(arguments, Boot::First)?;
    for size in [1, 2, 7, 8, 31, 64, 255, MAX_BATCH as u32] {
        let indices: Vec<u32> = (0..size).map(|at| (at * 37 + size) % PAGES).collect();
        let mut put = Vec::new();
        put_frame(&mut put, size, client.pool, Content::Half, &indices);
        client.send(&put)?;
        client.answer()?;
        get(&mut client, size, &indices)?;
    }
    Ok(())
}

fn pieces(arguments: &Arguments) -> Result<(), Failure> {
    let mut client = filled(arguments, Boot::First)?;
    for piece in [1, 3, 23, 25, 4095] {
        let frame = get_frame(&client, piece as u32, &[5, 6, 7]);
        for part in frame.chunks(piece) {
            client.send(part)?;
        }
        let header = client.answer()?;
        verify(&client, &header, &[5, 6, 7])?;
    }
    // And several in one piece.
    let together: Vec<u8> = (0..8).flat_map(|at| get_frame(&client, at, &[at])).collect();
    client.send(&together)?;
    for at in 0..8 {
        let header = client.answer()?;
        verify(&client, &header, &[at])?;
    }
    Ok(())
}

fn pipelined(arguments: &Arguments) -> Result<(), Failure> {
    let mut client = filled(arguments, Boot::First)?;
    for round in 0..8 {
        let mut waiting = BTreeSet::new();
        for tag in round * 16..(round + 1) * 16 {
            let frame = get_frame(&client, tag, &[tag, tag + 100, tag + 200]);
            client.send(&frame)?;
            waiting.insert(tag);
        }
        while !waiting.is_empty() {
            let header = client.answer()?;
            if !waiting.remove(&header.tag) {
                return Err(format!("tag {} was answered and never asked", header.tag).into());
            }
            verify(&client, &header, &[header.tag, header.tag + 100, header.tag + 200])?;
        }
    }
    Ok(())
}

fn late_reader(arguments: &Arguments) -> Result<(), Failure> {
    let mut client = filled(arguments, Boot::First)?;
    let indices: Vec<u32> = (0..MAX_BATCH as u32).collect();
    // Answers of 8 MiB: they fill every buffer between the store and here before the first is read.
    for tag in 0..8 {
        let frame = get_frame(&client, tag, &indices);
        client.send(&frame)?;
    }
    std::thread::sleep(std::time::Duration::from_secs(1));
    for _ in 0..8 {
        let header = client.answer()?;
        verify(&client, &header, &indices)?;
    }
    Ok(())
}

fn half_closed(arguments: &Arguments) -> Result<(), Failure> {
    let mut client = filled(arguments, Boot::First)?;
    for tag in 0..4 {
        let frame = get_frame(&client, tag, &[tag]);
        client.send(&frame)?;
    }
    client.stream.shut(Shutdown::Write)?;
    for tag in 0..4 {
        let header = client.answer()?;
        verify(&client, &header, &[tag])?;
    }
    ended(&mut client)
}

fn many(arguments: &Arguments) -> Result<(), Failure> {
    drop(filled(arguments, Boot::First)?);
    let mut clients =
        (0..8).map(|_| connect(arguments, Boot::First)).collect::<Result<Vec<Client>, Failure>>()?;
    for round in 0..16 {
        for (at, client) in (0..).zip(&mut clients) {
            let frame = get_frame(client, round, &[at * 100 + round, at]);
            client.send(&frame)?;
        }
        for (at, client) in (0..).zip(&mut clients) {
            let header = client.answer()?;
            verify(client, &header, &[at * 100 + round, at])?;
        }
    }
    Ok(())
}

fn boots(arguments: &Arguments) -> Result<(), Failure> {
    drop(filled(arguments, Boot::First)?);
    let mut again = connect(arguments, Boot::First)?;
    get(&mut again, 1, &[3, 4, 5])?;
    let mut rebooted = connect(arguments, Boot::Second)?;
    let frame = get_frame(&rebooted, 2, &[3, 4, 5]);
    rebooted.send(&frame)?;
    let header = rebooted.answer()?;
    for got in decode_got(&header, rebooted.body())? {
        if got.status != GetStatus::Miss {
            return Err("a page of the boot before came back".into());
        }
    }
    // The old boot is over: its connection, too.
    ended(&mut again)
}

fn garbage(arguments: &Arguments) -> Result<(), Failure> {
    let mut good = filled(arguments, Boot::Second)?;
    let mut bad = connect(arguments, Boot::Second)?;
    bad.stream.write_all(&[0xa5; 4 * HEADER_BYTES])?;
    // Perhaps after a word of why.
    let mut rest = Vec::new();
    match bad.stream.read_to_end(&mut rest) {
        Ok(bytes) if bytes > PAGE_BYTES => return Err("garbage was answered".into()),
        Ok(_) | Err(_) => {}
    }
    get(&mut good, 1, &[1, 2, 3])
}

/// The server ends the connection, too, and says nothing more.
fn ended(client: &mut Client) -> Result<(), Failure> {
    let mut rest = Vec::new();
    match client.stream.read_to_end(&mut rest) {
        Ok(0) | Err(_) => Ok(()),
        Ok(bytes) => Err(format!("{bytes} bytes came after the last answer").into()),
    }
}
