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
    twox_hash::XxHash3_64::oneshot(page) as u32
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_of_the_protocol() {
        let mut page = [0; PAGE_BYTES];
        for (i, byte) in page.iter_mut().enumerate() {
            *byte = ((i * i) >> 3) as u8;
            assert!(i % 512 != 0 || checksum(&[*byte; PAGE_BYTES]) == xxh3(&[*byte; PAGE_BYTES]));
        }
        assert_eq!(checksum(&page), xxh3(&page));
    }

    fn xxh3(page: &Page) -> u32 {
        xxhash_rust::xxh3::xxh3_64(page) as u32
    }

    #[test]
    fn same_filled_pages_are_found_and_no_others() {
        let mut page = [0; PAGE_BYTES];
        fill(0x0102_0304_0506_0708, &mut page);
        assert_eq!(same_filled(&page), Some(0x0102_0304_0506_0708));
        assert_eq!(word_checksum(0x0102_0304_0506_0708), checksum(&page));
        for at in [0, 7, 8, 1000, PAGE_BYTES - 1] {
            page[at] ^= 1;
            assert_eq!(same_filled(&page), None, "byte {at}");
            page[at] ^= 1;
        }
    }

    #[test]
    fn blocks_decode_to_their_page_and_nothing_else_decodes() {
        let mut page = [0; PAGE_BYTES];
        for (i, byte) in page.iter_mut().enumerate() {
            *byte = (i / 5 % 251) as u8;
        }
        let (mut block, mut out) = ([0; BLOCK_MAX], [0; PAGE_BYTES]);
        let bytes = compress(&page, &mut block).unwrap();
        assert!(decompress(&block[..bytes], &mut out) && out == page);
        assert!(compress(&page, &mut block[..bytes - 1]).is_none(), "no block longer than its room");
        for cut in 0..bytes {
            assert!(!decompress(&block[..cut], &mut out), "a block cut at {cut}");
        }
        let longer = lzzzz_block(&[7; PAGE_BYTES + 1]);
        assert!(!decompress(&longer, &mut out), "a block of more than a page");
    }

    fn lzzzz_block(bytes: &[u8]) -> Vec<u8> {
        let mut block = vec![0; bytes.len() + 64];
        let length = lzzzz::lz4::compress(bytes, &mut block, 1).unwrap();
        block.truncate(length);
        block
    }
}
