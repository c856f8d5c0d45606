//! One page between the kernel's buffer and a frame.

use tmem_wire::pages::{GotPage, PutWriter};
use tmem_wire::{Encoding, Key, PAGE_BYTES};
use xxhash_rust::xxh3::xxh3_64;

/// The checksum of a page, as it travels in frames and, in part, stands in the page table.
pub fn checksum(page: &[u8]) -> u32 {
    xxh3_64(page) as u32
}

/// The word that fills the page, if one does.
fn same_filled(page: &[u8]) -> Option<[u8; 8]> {
    let (first, rest) = page.split_first_chunk::<8>()?;
    (*rest == page[..page.len() - 8]).then_some(*first)
}

/// A page that needs more than this is not worth decompressing.
const WORTH_BYTES: usize = PAGE_BYTES * 3 / 4;

/// Appends pages to PUT frames in the form that costs the link least.
pub struct Encoder {
    /// Space for a compressed page, if pages are to be compressed.
    compressed: Option<Box<[u8; WORTH_BYTES]>>,
}

impl Encoder {
    /// `compress`: spend the guest's time to save bytes on the link. To be used by the thread that made it.
    pub fn new(compress: bool) -> Encoder {
        let mut compressed = compress.then(|| Box::new([0; WORTH_BYTES]));
        if let Some(space) = &mut compressed {
            // The codec allocates a state for the thread with its first block: now, and not while memory is short.
            let _ = compress_into(&[0; PAGE_BYTES], space);
        }
        Encoder { compressed }
    }

    /// Append a page.
    pub fn put(&mut self, writer: &mut PutWriter<'_>, key: &Key, page: &[u8], checksum: u32) {
        if let Some(word) = same_filled(page) {
            return writer.page(key, Encoding::SameFilled, &word, checksum);
        }
        if let Some(space) = self.compressed.as_deref_mut() {
            if let Some(bytes) = compress_into(page, space) {
                return writer.page(key, Encoding::Lz4, &space[..bytes], checksum);
            }
        }
        writer.page(key, Encoding::Raw, page, checksum);
    }
}

/// Compress a page; returns the bytes it takes, if they fit.
fn compress_into(page: &[u8], space: &mut [u8; WORTH_BYTES]) -> Option<usize> {
    lzzzz::lz4::compress(page, space, lzzzz::lz4::ACC_LEVEL_DEFAULT).ok().filter(|bytes| *bytes > 0)
}

/// Write a page that the host sent to `to`; returns its checksum, or `None` if it does not decode.
pub fn decode(got: &GotPage<'_>, to: &mut [u8]) -> Option<u32> {
    match got.encoding {
        Encoding::None => return None,
        Encoding::Raw => to.copy_from_slice(got.payload),
        Encoding::SameFilled => to.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(got.payload)),
        Encoding::Lz4 => {
            let bytes = lzzzz::lz4::decompress(got.payload, to).ok()?;
            if bytes != PAGE_BYTES {
                return None;
            }
        }
    }
    let sum = checksum(to);
    (got.checksum.is_none_or(|sent| sent == sum)).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tmem_wire::{pages, Header, HEADER_BYTES};

    fn through(page: &[u8], compress: bool) -> (Encoding, Vec<u8>) {
        let mut frame = Vec::new();
        let mut writer = PutWriter::begin(&mut frame, 1, 2, 1, true);
        let key = Key { object: [0; 16], index: 3 };
        Encoder::new(compress).put(&mut writer, &key, page, checksum(page));
        writer.end();
        let header = Header::decode(frame[..HEADER_BYTES].try_into().unwrap()).unwrap();
        let put = pages::decode_put(&header, &frame[HEADER_BYTES..]).unwrap().next().unwrap();
        let got = GotPage {
            status: tmem_wire::GetStatus::Hit,
            encoding: put.encoding,
            payload: put.payload,
            checksum: put.checksum,
        };
        let mut out = vec![0; PAGE_BYTES];
        assert_eq!(decode(&got, &mut out), Some(checksum(page)));
        (put.encoding, out)
    }

    #[test]
    fn pages_come_back_however_they_travel() {
        let noise: Vec<u8> =
            (0..PAGE_BYTES as u64 / 8).flat_map(|i| xxh3_64(&i.to_le_bytes()).to_le_bytes()).collect();
        let text: Vec<u8> = b"swap me out ".iter().copied().cycle().take(PAGE_BYTES).collect();
        let word = [7; PAGE_BYTES];
        for (page, compress, encoding) in [
            (&noise[..], true, Encoding::Raw),
            (&text, true, Encoding::Lz4),
            (&text, false, Encoding::Raw),
            (&word, false, Encoding::SameFilled),
        ] {
            let (how, back) = through(page, compress);
            assert!(how == encoding && back == page, "{how:?}");
        }
    }

    #[test]
    fn damage_is_noticed() {
        let page = [9; PAGE_BYTES];
        let mut got = GotPage {
            status: tmem_wire::GetStatus::Hit,
            encoding: Encoding::Raw,
            payload: &page,
            checksum: Some(checksum(&page) ^ 1),
        };
        let mut out = vec![0; PAGE_BYTES];
        assert_eq!(decode(&got, &mut out), None);
        got.encoding = Encoding::Lz4;
        got.payload = &[0xff; 40];
        assert_eq!(decode(&got, &mut out), None);
    }
}
