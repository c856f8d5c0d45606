//! Encoding pages: same-filled, LZ4 or raw, and the checksum that goes with a page.

use std::cell::RefCell;

use lz4_flex::block::{compress_into_with_table, decompress_into, CompressTable};
use tmem_wire::PAGE_BYTES;

/// A page's content.
pub type Page = [u8; PAGE_BYTES];

/// Where pages that compress to more than this are stored raw: what is saved would not pay for decompression.
pub const STORE_RAW_ABOVE: usize = 3840;
/// Where incompressible pages are refused, pages that compress to more than this are (the threshold of Lagar-Cavilla
/// et al., "Software-Defined Far Memory in Warehouse-Scale Computers", ASPLOS 2019).
pub const REFUSE_ABOVE: usize = 2990;

/// Room that [`compress`] needs, bytes.
pub const BLOCK_MAX: usize = 4608;
const _: () = assert!(BLOCK_MAX >= lz4_flex::block::get_maximum_output_size(PAGE_BYTES));

thread_local! {
    static TABLE: RefCell<CompressTable> = RefCell::new(CompressTable::small());
}

/// Low half of the page's XXH3-64.
pub fn checksum(page: &Page) -> u32 {
    xxhash_rust::xxh3::xxh3_64(page) as u32
}

/// Checksum of the page a word fills.
pub fn word_checksum(word: u64) -> u32 {
    let mut page = [0; PAGE_BYTES];
    fill(word, &mut page);
    checksum(&page)
}

/// The word that fills the page, if one does.
pub fn same_filled(page: &Page) -> Option<u64> {
    let first: [u8; 8] = [page[0], page[1], page[2], page[3], page[4], page[5], page[6], page[7]];
    // Most pages differ in their first or last words: cheap answer first.
    if page[PAGE_BYTES - 8..] != first || page[8..16] != first {
        return None;
    }
    // All words equal exactly if the page equals itself shifted by a word.
    (page[8..] == page[..PAGE_BYTES - 8]).then(|| u64::from_le_bytes(first))
}

/// Fill a page with a word.
pub fn fill(word: u64, page: &mut Page) {
    for to in page.chunks_exact_mut(8) {
        to.copy_from_slice(&word.to_le_bytes());
    }
}

/// Compress into `out`; the length of the block. `None` cannot happen with room enough.
pub fn compress(page: &Page, out: &mut [u8; BLOCK_MAX]) -> Option<usize> {
    TABLE.with_borrow_mut(|table| compress_into_with_table(page, out, table).ok())
}

/// Decompress a block; whether it made exactly a page. Bounds are checked: the block may be a guest's.
pub fn decompress(block: &[u8], page: &mut Page) -> bool {
    matches!(decompress_into(block, page), Ok(PAGE_BYTES))
}
