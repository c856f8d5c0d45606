//! Put, get and flush batches.
//!
//! A batch's entries stand first, all of one size, then its payloads, in order and without padding: a reader can
//! check every length before it touches a payload.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::header::{FLAG_ACCEPT_LZ4, FLAG_CHECKSUMS};
use crate::{exact, Header, Op, WireError, HEADER_BYTES, PAGE_BYTES};

/// Names an object (a file, a swap area) within a pool.
pub type ObjectId = [u8; 16];

/// Names a page within a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The object.
    pub object: ObjectId,
    /// The page's index in the object.
    pub index: u32,
}

/// How a page's payload stands on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// No payload: the answer is a miss.
    None = 0,
    /// The page itself, 4096 bytes.
    Raw = 1,
    /// One 64-bit word, little-endian, that fills the page; 8 bytes.
    SameFilled = 2,
    /// An LZ4 block that decodes to 4096 bytes; 1 to 4095 bytes.
    Lz4 = 3,
}

impl Encoding {
    /// Check an encoding code and the payload length that goes with it.
    fn checked(code: u8, length: usize) -> Result<Encoding, WireError> {
        match (code, length) {
            (0, 0) => Ok(Encoding::None),
            (1, PAGE_BYTES) => Ok(Encoding::Raw),
            (2, 8) => Ok(Encoding::SameFilled),
            (3, 1..PAGE_BYTES) => Ok(Encoding::Lz4),
            (0..=3, _) => Err(WireError::BadValue { field: "payload length", value: length as u64 }),
            _ => Err(WireError::BadValue { field: "encoding", value: code.into() }),
        }
    }
}

macro_rules! statuses {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $value:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$vdoc])* $variant = $value,)* }

        impl $name {
            /// The status with this code.
            pub fn from_code(code: u8) -> Option<$name> {
                match code { $($value => Some($name::$variant),)* _ => None }
            }
        }
    };
}

statuses! {
    /// The answer to one put. Everything but `Stored` is a refusal, and then no older data remains either.
    PutStatus {
        /// The page is stored.
        Stored = 0,
        /// The VM is at its quota.
        OverQuota = 1,
        /// The VM is frozen.
        Frozen = 2,
        /// The page does not compress, and the host does not store such pages.
        Incompressible = 3,
        /// The host has no memory to lend.
        NoMemory = 4,
        /// The payload does not decode, or its checksum is wrong.
        Corrupt = 5,
    }
}

statuses! {
    /// The answer to one get.
    GetStatus {
        /// The page follows.
        Hit = 0,
        /// No such page.
        Miss = 1,
        /// The stored page fails its checksum and is gone.
        Lost = 2,
    }
}

statuses! {
    /// The answer to one flush. Both mean the page is not there any more.
    FlushStatus {
        /// It was there.
        Flushed = 0,
        /// It was not.
        Absent = 1,
    }
}

/// Bytes of one entry of a put.
pub const PUT_ENTRY_BYTES: usize = 28;
/// Bytes of one key, the entry of a get or a page flush.
pub const KEY_BYTES: usize = 20;
/// Bytes of one entry of a get's answer.
pub const GET_ENTRY_BYTES: usize = 8;
/// Bytes of one entry of an object flush.
pub const OBJECT_BYTES: usize = 16;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawKey {
    object: [u8; 16],
    index: U32,
}

impl RawKey {
    fn key(&self) -> Key {
        Key { object: self.object, index: self.index.get() }
    }

    fn new(key: &Key) -> RawKey {
        RawKey { object: key.object, index: key.index.into() }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawPut {
    key: RawKey,
    encoding: u8,
    reserved: u8,
    length: U16,
    checksum: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawGot {
    status: u8,
    encoding: u8,
    length: U16,
    checksum: U32,
}

/// One page of a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PutPage<'a> {
    /// Where to.
    pub key: Key,
    /// How the payload is encoded; never [`Encoding::None`].
    pub encoding: Encoding,
    /// The payload.
    pub payload: &'a [u8],
    /// Low half of the page's XXH3-64, if the frame carries checksums.
    pub checksum: Option<u32>,
}

/// One page of a get's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GotPage<'a> {
    /// Hit, miss or lost.
    pub status: GetStatus,
    /// How the payload is encoded; [`Encoding::None`] unless it is a hit.
    pub encoding: Encoding,
    /// The payload.
    pub payload: &'a [u8],
    /// Low half of the page's XXH3-64, if the frame carries checksums.
    pub checksum: Option<u32>,
}

fn counted(header: &Header) -> Result<usize, WireError> {
    if header.count == 0 {
        return Err(WireError::BadCount(0));
    }
    Ok(header.count.into())
}

fn split_entries<'a, T: FromBytes + KnownLayout + Immutable + Unaligned>(
    op: &'static str,
    body: &'a [u8],
    count: usize,
) -> Result<(&'a [T], &'a [u8]), WireError> {
    <[T]>::ref_from_prefix_with_elems(body, count).map_err(|_| WireError::BadLength {
        op,
        expected: count * size_of::<T>(),
        got: body.len(),
    })
}

/// Read the pages of a PUT. The whole body is checked before the first page is given out.
pub fn decode_put<'a>(
    header: &Header,
    body: &'a [u8],
) -> Result<impl ExactSizeIterator<Item = PutPage<'a>>, WireError> {
    let count = counted(header)?;
    let (entries, mut payloads) = split_entries::<RawPut>("PUT", body, count)?;
    let mut total = 0;
    for entry in entries {
        let length = usize::from(entry.length.get());
        if Encoding::checked(entry.encoding, length)? == Encoding::None {
            return Err(WireError::BadValue { field: "encoding", value: 0 });
        }
        total += length;
    }
    exact("PUT payload", payloads, total)?;
    let with_checksums = header.flags & FLAG_CHECKSUMS != 0;
    Ok(entries.iter().map(move |entry| {
        let (payload, rest) = payloads.split_at(entry.length.get().into());
        payloads = rest;
        PutPage {
            key: entry.key.key(),
            // Checked above; a code that passed cannot turn into `None` here.
            encoding: Encoding::checked(entry.encoding, payload.len()).unwrap_or(Encoding::None),
            payload,
            checksum: with_checksums.then_some(entry.checksum.get()),
        }
    }))
}

/// Read the keys of a GET or `FLUSH_PAGE`.
pub fn decode_keys<'a>(
    header: &Header,
    body: &'a [u8],
) -> Result<impl ExactSizeIterator<Item = Key> + 'a, WireError> {
    let count = counted(header)?;
    let (entries, rest) = split_entries::<RawKey>("key batch", body, count)?;
    exact("bytes after the key batch", rest, 0)?;
    Ok(entries.iter().map(RawKey::key))
}

/// Read the objects of a `FLUSH_OBJECT`.
pub fn decode_objects<'a>(
    header: &Header,
    body: &'a [u8],
) -> Result<impl ExactSizeIterator<Item = ObjectId> + 'a, WireError> {
    let count = counted(header)?;
    let (entries, rest) = split_entries::<ObjectId>("object batch", body, count)?;
    exact("bytes after the object batch", rest, 0)?;
    Ok(entries.iter().copied())
}

/// Read the pages of a GET's answer.
pub fn decode_got<'a>(
    header: &Header,
    body: &'a [u8],
) -> Result<impl ExactSizeIterator<Item = GotPage<'a>>, WireError> {
    let count = counted(header)?;
    let (entries, mut payloads) = split_entries::<RawGot>("GET answer", body, count)?;
    let mut total = 0;
    for entry in entries {
        let length = usize::from(entry.length.get());
        let encoding = Encoding::checked(entry.encoding, length)?;
        let status = GetStatus::from_code(entry.status)
            .ok_or(WireError::BadValue { field: "get status", value: entry.status.into() })?;
        if (status == GetStatus::Hit) != (encoding != Encoding::None) {
            return Err(WireError::BadValue { field: "encoding", value: entry.encoding.into() });
        }
        total += length;
    }
    exact("GET payload", payloads, total)?;
    let with_checksums = header.flags & FLAG_CHECKSUMS != 0;
    Ok(entries.iter().map(move |entry| {
        let (payload, rest) = payloads.split_at(entry.length.get().into());
        payloads = rest;
        GotPage {
            // Both were checked above.
            status: GetStatus::from_code(entry.status).unwrap_or(GetStatus::Lost),
            encoding: Encoding::checked(entry.encoding, payload.len()).unwrap_or(Encoding::None),
            payload,
            checksum: with_checksums.then_some(entry.checksum.get()),
        }
    }))
}

/// Append a GET or `FLUSH_PAGE` frame.
pub fn write_keys(op: Op, tag: u32, pool: u32, accept_lz4: bool, keys: &[Key], out: &mut Vec<u8>) {
    debug_assert!(matches!(op, Op::Get | Op::FlushPage));
    let header = Header {
        pool,
        flags: if accept_lz4 { FLAG_ACCEPT_LZ4 } else { 0 },
        length: (keys.len() * KEY_BYTES) as u32,
        count: keys.len() as u16,
        ..Header::request(op, tag)
    };
    out.extend_from_slice(&header.encode());
    for key in keys {
        out.extend_from_slice(RawKey::new(key).as_bytes());
    }
}

/// Append a `FLUSH_OBJECT` frame.
pub fn write_objects(tag: u32, pool: u32, objects: &[ObjectId], out: &mut Vec<u8>) {
    let header = Header {
        pool,
        length: (objects.len() * OBJECT_BYTES) as u32,
        count: objects.len() as u16,
        ..Header::request(Op::FlushObject, tag)
    };
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(objects.as_bytes());
}

/// Writes a frame of entries and payloads in place at the end of a buffer, so that a page is compressed or
/// decompressed straight into the frame that carries it.
struct BatchWriter<'b> {
    out: &'b mut Vec<u8>,
    start: usize,
    entry_bytes: usize,
    next: usize,
    header: Header,
}

impl<'b> BatchWriter<'b> {
    fn begin(out: &'b mut Vec<u8>, header: Header, entry_bytes: usize) -> Self {
        let start = out.len();
        out.resize(start + HEADER_BYTES + usize::from(header.count) * entry_bytes, 0);
        BatchWriter { out, start, entry_bytes, next: 0, header }
    }

    fn entry(&mut self, bytes: &[u8]) {
        assert!(self.next < self.header.count.into(), "more entries than announced");
        let at = self.start + HEADER_BYTES + self.next * self.entry_bytes;
        self.out[at..at + self.entry_bytes].copy_from_slice(bytes);
        self.next += 1;
    }

    fn end(self) {
        assert!(self.next == self.header.count.into(), "fewer entries than announced");
        let length = (self.out.len() - self.start - HEADER_BYTES) as u32;
        let header = Header { length, ..self.header };
        self.out[self.start..self.start + HEADER_BYTES].copy_from_slice(&header.encode());
    }
}

/// Writes a PUT frame page by page. Exactly `count` pages must be written before [`PutWriter::end`].
pub struct PutWriter<'b>(BatchWriter<'b>);

impl<'b> PutWriter<'b> {
    /// Start a PUT of `count` pages at the end of `out`.
    pub fn begin(out: &'b mut Vec<u8>, tag: u32, pool: u32, count: u16, checksums: bool) -> Self {
        let flags = if checksums { FLAG_CHECKSUMS } else { 0 };
        let header = Header { flags, pool, count, ..Header::request(Op::Put, tag) };
        PutWriter(BatchWriter::begin(out, header, PUT_ENTRY_BYTES))
    }

    /// Add a page whose payload `write` appends to the frame; it returns the encoding it chose.
    pub fn page_with(&mut self, key: &Key, checksum: u32, write: impl FnOnce(&mut Vec<u8>) -> Encoding) {
        let before = self.0.out.len();
        let encoding = write(self.0.out);
        let length = (self.0.out.len() - before) as u16;
        debug_assert!(Encoding::checked(encoding as u8, length.into()).is_ok());
        let entry = RawPut {
            key: RawKey::new(key),
            encoding: encoding as u8,
            reserved: 0,
            length: length.into(),
            checksum: checksum.into(),
        };
        self.0.entry(entry.as_bytes());
    }

    /// Add a page whose payload is at hand.
    pub fn page(&mut self, key: &Key, encoding: Encoding, payload: &[u8], checksum: u32) {
        self.page_with(key, checksum, |out| {
            out.extend_from_slice(payload);
            encoding
        });
    }

    /// Finish the frame.
    pub fn end(self) {
        self.0.end();
    }
}

/// Writes a GET's answer page by page.
pub struct GotWriter<'b>(BatchWriter<'b>);

impl<'b> GotWriter<'b> {
    /// Start the answer to `request` at the end of `out`.
    pub fn begin(out: &'b mut Vec<u8>, request: &Header, checksums: bool) -> Self {
        let mut header = Header { count: request.count, ..request.answer() };
        if checksums {
            header.flags |= FLAG_CHECKSUMS;
        }
        GotWriter(BatchWriter::begin(out, header, GET_ENTRY_BYTES))
    }

    /// Answer the next key. `look_up` appends the payload and says what it is: status, encoding, checksum. On
    /// anything but a hit it must append nothing.
    pub fn page_with(&mut self, look_up: impl FnOnce(&mut Vec<u8>) -> (GetStatus, Encoding, u32)) {
        let before = self.0.out.len();
        let (status, encoding, checksum) = look_up(self.0.out);
        let length = (self.0.out.len() - before) as u16;
        debug_assert!(Encoding::checked(encoding as u8, length.into()).is_ok());
        let entry = RawGot {
            status: status as u8,
            encoding: encoding as u8,
            length: length.into(),
            checksum: checksum.into(),
        };
        self.0.entry(entry.as_bytes());
    }

    /// Finish the frame.
    pub fn end(self) {
        self.0.end();
    }
}

/// Append the answer to a PUT or flush: one status byte an entry.
pub fn write_statuses(request: &Header, statuses: &[u8], out: &mut Vec<u8>) {
    Header { count: statuses.len() as u16, ..request.answer() }.write_frame(statuses, out);
}

/// Read the answer to a PUT or flush: the status bytes, one an entry.
pub fn decode_statuses<'a>(header: &Header, body: &'a [u8]) -> Result<&'a [u8], WireError> {
    exact("statuses", body, header.count.into())?;
    Ok(body)
}
