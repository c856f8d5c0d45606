//! Encoding pages: same-filled, LZ4 or raw, and the checksum that goes with a page.

use tmem_wire::PAGE_BYTES;

/// A page's content.
pub type Page = [u8; PAGE_BYTES];

/// Where pages that compress to more than this are stored raw: what is saved would not pay for decompression.
pub const STORE_RAW_ABOVE: usize = 3840;
/// Where incompressible pages are refused, pages that compress to more than this are (the threshold of Lagar-Cavilla
/// et al., "Software-Defined Far Memory in Warehouse-Scale Computers", ASPLOS 2019).
pub const REFUSE_ABOVE: usize = 2990;

/// Room for the longest block that is stored.
pub const BLOCK_MAX: usize = STORE_RAW_ABOVE;

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

/// Compress into `out`; the length of the block, `None` if it would be longer than `out`. Stops as soon as it is. The
/// hash table of the compressor is this thread's and is not cleared for every page.
pub fn compress(page: &Page, out: &mut [u8]) -> Option<usize> {
    lzzzz::lz4::compress(page, out, lzzzz::lz4::ACC_LEVEL_DEFAULT).ok().filter(|&bytes| bytes > 0)
}

/// Decompress a block; whether it made exactly a page. Bounds are checked: the block may be a guest's.
pub fn decompress(block: &[u8], page: &mut Page) -> bool {
    lzzzz::lz4::decompress(block, page).is_ok_and(|bytes| bytes == PAGE_BYTES)
}
