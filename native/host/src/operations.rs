//! What a session's requests do to the store. Every operation may be repeated without harm.

use tmem_store::{PoolError, PoolId, PoolRef, Store};
use tmem_wire::control::REPORT_BYTES;
use tmem_wire::header::FLAG_ACCEPT_LZ4;
use tmem_wire::pages::{self, GotWriter, GET_ENTRY_BYTES, KEY_BYTES, OBJECT_BYTES, PUT_ENTRY_BYTES};
use tmem_wire::{
    hello, pools, Encoding, ErrorCode, Features, FlushStatus, Header, Op, PutStatus, WireError, HEADER_BYTES,
    MAX_BATCH, PAGE_BYTES,
};

use crate::scheduling;
use crate::vm::Vm;

/// Check a request's length by its header alone, so that nothing is read or kept for a body that cannot be right.
pub(crate) fn check_length(header: &Header) -> Result<(), WireError> {
    let count = usize::from(header.count);
    let (op, least, most) = match header.op {
        Op::Hello => ("HELLO request", hello::REQUEST_BYTES, hello::REQUEST_BYTES),
        Op::Report => ("REPORT", REPORT_BYTES, REPORT_BYTES),
        Op::PoolCreate => ("POOL_CREATE", pools::REQUEST_BYTES, pools::REQUEST_BYTES),
        Op::Put => ("PUT", count * (PUT_ENTRY_BYTES + 1), count * (PUT_ENTRY_BYTES + PAGE_BYTES)),
        Op::Get | Op::FlushPage => ("key batch", count * KEY_BYTES, count * KEY_BYTES),
        Op::FlushObject => ("object batch", count * OBJECT_BYTES, count * OBJECT_BYTES),
        _ => ("this operation's", 0, 0),
    };
    let got = header.length as usize;
    let expected = if got < least { least } else { most };
    if (least..=most).contains(&got) {
        Ok(())
    } else {
        Err(WireError::BadLength { op, expected, got })
    }
}

/// Bytes the answer to a GET may have at most.
pub(crate) fn get_answer_bound(count: u16) -> usize {
    HEADER_BYTES + usize::from(count) * (GET_ENTRY_BYTES + PAGE_BYTES)
}

/// Append an answer that says why a request failed.
pub(crate) fn refuse(request: &Header, code: ErrorCode, message: &str, out: &mut Vec<u8>) {
    Header { status: code as u16, ..request.answer() }.write_frame(message.as_bytes(), out);
}

/// Resolve the pool a frame is about; answers with an error if the VM has none of that id.
fn pool(store: &Store, vm: &Vm, header: &Header, out: &mut Vec<u8>) -> Option<PoolRef> {
    let found = store.pool(vm.id, PoolId(header.pool));
    if found.is_none() {
        refuse(header, ErrorCode::NoSuchPool, "no such pool", out);
    }
    found
}

pub(crate) fn put(
    store: &Store,
    vm: &Vm,
    features: Features,
    header: &Header,
    body: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), WireError> {
    let batch = pages::decode_put(header, body)?;
    let Some(pool) = pool(store, vm, header, out) else { return Ok(()) };
    let mut statuses = [0; MAX_BATCH];
    let mut count = 0;
    for page in batch {
        if page.encoding == Encoding::Lz4 && !features.has(Features::LZ4) {
            return Err(WireError::BadValue { field: "encoding (LZ4 was not negotiated)", value: 3 });
        }
        let status: PutStatus = store.put(&pool, &page.key, page.encoding, page.payload, page.checksum);
        statuses[count] = status as u8;
        count += 1;
        scheduling::give_way();
    }
    pages::write_statuses(header, &statuses[..count], out);
    Ok(())
}

pub(crate) fn get(
    store: &Store,
    vm: &Vm,
    features: Features,
    header: &Header,
    body: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), WireError> {
    let keys = pages::decode_keys(header, body)?;
    let Some(pool) = pool(store, vm, header, out) else { return Ok(()) };
    let accept_lz4 = header.flags & FLAG_ACCEPT_LZ4 != 0 && features.has(Features::LZ4);
    let mut answer = GotWriter::begin(out, header, features.has(Features::CHECKSUMS));
    for key in keys {
        answer.page_with(|out| store.get(&pool, &key, accept_lz4, out));
        scheduling::give_way();
    }
    answer.end();
    Ok(())
}

pub(crate) fn flush_page(
    store: &Store,
    vm: &Vm,
    header: &Header,
    body: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), WireError> {
    let keys = pages::decode_keys(header, body)?;
    flush_each(store, vm, header, keys, out, |pool, key| store.flush_page(pool, &key));
    Ok(())
}

pub(crate) fn flush_object(
    store: &Store,
    vm: &Vm,
    header: &Header,
    body: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), WireError> {
    let objects = pages::decode_objects(header, body)?;
    flush_each(store, vm, header, objects, out, |pool, object| {
        if store.flush_object(pool, &object) > 0 {
            FlushStatus::Flushed
        } else {
            FlushStatus::Absent
        }
    });
    Ok(())
}

/// Flush what a batch names, one entry after the other, and answer with their statuses.
fn flush_each<T>(
    store: &Store,
    vm: &Vm,
    header: &Header,
    batch: impl Iterator<Item = T>,
    out: &mut Vec<u8>,
    mut flush: impl FnMut(&PoolRef, T) -> FlushStatus,
) {
    let Some(pool) = pool(store, vm, header, out) else { return };
    let mut statuses = [0; MAX_BATCH];
    let mut count = 0;
    for entry in batch {
        statuses[count] = flush(&pool, entry) as u8;
        count += 1;
        scheduling::give_way();
    }
    pages::write_statuses(header, &statuses[..count], out);
}

pub(crate) fn flush_pool(store: &Store, vm: &Vm, header: &Header, out: &mut Vec<u8>) {
    let Some(pool) = pool(store, vm, header, out) else { return };
    store.flush_pool(&pool);
    header.answer().write_frame(&[], out);
}

/// Destroying a pool that is not there succeeds: the request may be a repetition.
pub(crate) fn destroy_pool(store: &Store, vm: &Vm, header: &Header, out: &mut Vec<u8>) {
    match store.destroy_pool(vm.id, PoolId(header.pool)) {
        Ok(_) | Err(PoolError::NoSuchPool) => header.answer().write_frame(&[], out),
        Err(error) => refuse(header, error_code(error), &error.to_string(), out),
    }
}

pub(crate) fn error_code(error: PoolError) -> ErrorCode {
    match error {
        PoolError::NoSuchPool => ErrorCode::NoSuchPool,
        PoolError::Conflict => ErrorCode::Conflict,
        PoolError::Limit => ErrorCode::Limit,
        PoolError::Denied => ErrorCode::Denied,
        PoolError::Unsupported => ErrorCode::Unsupported,
    }
}
