//! A device's connection to its front end as bytes and descriptors, for the keeper to hold and a successor to resume.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::front::{FrontState, Region, Vring, MAX_REGIONS, RINGS};

/// Most descriptors of a snapshot: the front end's socket, the ledger, memory, kick and call of each ring.
pub const MAX_DESCRIPTORS: usize = 2 + MAX_REGIONS + 2 * RINGS;
/// Most bytes of a snapshot.
pub const MAX_BYTES: usize = 4096;
const VERSION: u64 = 1;

/// A snapshot that is not one of ours, or of another version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the keeper's record of the device is unusable: {0}")]
pub struct SnapshotError(&'static str);

/// Write a snapshot. Rings' avail indices are not in it: they are read from guest memory by who resumes.
pub fn encode<'a>(
    state: &'a FrontState,
    front: BorrowedFd<'a>,
    ledger: BorrowedFd<'a>,
) -> (Vec<u8>, Vec<BorrowedFd<'a>>) {
    let mut words = vec![VERSION, state.features, state.protocol_features, state.regions.len() as u64];
    let mut descriptors = vec![front, ledger];
    for region in &state.regions {
        words.extend([region.guest_address, region.size, region.user_address, region.offset]);
        descriptors.push(region.file.as_fd());
    }
    for vring in &state.vrings {
        let mut flags = u64::from(vring.enabled);
        for (bit, descriptor) in [(2, &vring.kick), (4, &vring.call)] {
            if let Some(descriptor) = descriptor {
                flags |= bit;
                descriptors.push(descriptor.as_fd());
            }
        }
        words.extend([u64::from(vring.size), u64::from(vring.base), flags]);
        words.extend([vring.descriptors, vring.used, vring.avail]);
    }
    (words.iter().flat_map(|word| word.to_le_bytes()).collect(), descriptors)
}

/// What a snapshot held.
pub struct Resumed {
    /// What the front end had told.
    pub state: FrontState,
    /// The connection to it.
    pub front: OwnedFd,
    /// The table of open streams.
    pub ledger: OwnedFd,
}

/// Read a snapshot.
pub fn decode(bytes: &[u8], descriptors: Vec<OwnedFd>) -> Result<Resumed, SnapshotError> {
    let mut words = bytes.chunks_exact(8).map(|chunk| {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    let mut descriptors = descriptors.into_iter();
    let mut word = || words.next().ok_or(SnapshotError("it is cut short"));
    let mut descriptor = || descriptors.next().ok_or(SnapshotError("descriptors are missing"));
    if word()? != VERSION {
        return Err(SnapshotError("it is of another version"));
    }
    let (features, protocol_features, count) = (word()?, word()?, word()?);
    if count > MAX_REGIONS as u64 {
        return Err(SnapshotError("it has too many memory regions"));
    }
    let (front, ledger) = (descriptor()?, descriptor()?);
    let mut state = FrontState { features, protocol_features, ..FrontState::default() };
    for _ in 0..count {
        state.regions.push(Region {
            guest_address: word()?,
            size: word()?,
            user_address: word()?,
            offset: word()?,
            file: descriptor()?,
        });
    }
    for vring in &mut state.vrings {
        let (size, base, flags) = (word()?, word()?, word()?);
        *vring = Vring {
            size: size as u16,
            base: base as u16,
            enabled: flags & 1 != 0,
            kick: if flags & 2 != 0 { Some(descriptor()?) } else { None },
            call: if flags & 4 != 0 { Some(descriptor()?) } else { None },
            descriptors: word()?,
            used: word()?,
            avail: word()?,
        };
    }
    Ok(Resumed { state, front, ledger })
}
