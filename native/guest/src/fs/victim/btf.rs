//! The kernel's description of its own types (BTF), as far as finding a function and the place of a struct's member.

use std::path::Path;

use super::VictimError;

const KERNEL: &str = "/sys/kernel/btf/vmlinux";
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_FUNCTION: u32 = 12;
/// `typedef`, `volatile`, `const`, `restrict`.
const KIND_QUALIFIERS: [u32; 4] = [8, 9, 10, 11];
/// Bytes of a type's record without what follows it, and of a member in it.
const RECORD_BYTES: usize = 12;

/// All types of a kernel.
pub(super) struct Btf {
    data: Vec<u8>,
    strings: usize,
    /// Where the record of each type is; type 0 is `void` and has none.
    records: Vec<u32>,
}

/// A type's record.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    members: u32,
    /// Whether members' offsets carry the size of a bit field.
    packed: bool,
    /// Its size, or the type it is made of.
    size: u32,
    /// Where what follows the record begins.
    rest: usize,
}

impl Btf {
    /// That of the running kernel.
    pub(super) fn of_kernel() -> Result<Btf, VictimError> {
        let data =
            std::fs::read(Path::new(KERNEL)).map_err(|_| VictimError::Missing("type information (BTF)"))?;
        Btf::parse(data).ok_or(VictimError::Missing("type information (BTF) of a form that is known"))
    }

    fn parse(data: Vec<u8>) -> Option<Btf> {
        let word = |at: usize| Some(u32::from_ne_bytes(*data.get(at..)?.first_chunk()?));
        if *data.get(..2)? != 0xeb9f_u16.to_ne_bytes() {
            return None;
        }
        let header = word(4)? as usize;
        let (mut at, end) = (header + word(8)? as usize, header + (word(8)? + word(12)?) as usize);
        let strings = header + word(16)? as usize;
        let mut found = Btf { data, strings, records: vec![0] };
        while at < end {
            found.records.push(at as u32);
            let here = found.get(found.records.len() as u32 - 1)?;
            let members = here.members as usize;
            at += RECORD_BYTES
                + match here.kind {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    KIND_STRUCT | KIND_UNION | 15 | 19 => 12 * members,
                    6 | 13 => 8 * members,
                    _ => 0,
                };
        }
        Some(found)
    }

    fn word(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.data.get(at..)?.first_chunk()?))
    }

    fn get(&self, number: u32) -> Option<Type> {
        let at = *self.records.get(number as usize)? as usize;
        let info = self.word(at + 4)?;
        Some(Type {
            name: self.word(at)?,
            kind: (info >> 24) & 0x1f,
            members: info & 0xffff,
            packed: info >> 31 != 0,
            size: self.word(at + 8)?,
            rest: at + RECORD_BYTES,
        })
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        let from = self.data.get(self.strings + name as usize..).unwrap_or_default();
        from.starts_with(wanted.as_bytes()) && from.get(wanted.len()) == Some(&0)
    }

    fn find(&self, kind: u32, name: &str) -> Option<u32> {
        (1..self.records.len() as u32)
            .find(|&number| self.get(number).is_some_and(|t| t.kind == kind && self.is_named(t.name, name)))
    }

    /// The number of a function's type, by which a program is attached to it.
    pub(super) fn function(&self, name: &'static str) -> Result<u32, VictimError> {
        self.find(KIND_FUNCTION, name).ok_or(VictimError::Missing(name))
    }

    /// Bytes that a struct takes.
    pub(super) fn size(&self, structure: &'static str) -> Result<u32, VictimError> {
        let found = self.find(KIND_STRUCT, structure).and_then(|number| self.get(number));
        found.map(|found| found.size).ok_or(VictimError::Missing(structure))
    }

    /// Where a member is in a struct, in bytes, also in nameless structs and unions within.
    pub(super) fn offset(&self, structure: &'static str, member: &'static str) -> Result<i16, VictimError> {
        let found = self.find(KIND_STRUCT, structure).and_then(|number| self.member(number, member));
        found.and_then(|at| i16::try_from(at).ok()).ok_or(VictimError::Missing(member))
    }

    fn member(&self, structure: u32, wanted: &str) -> Option<u32> {
        let outer = self.get(structure)?;
        for n in 0..outer.members as usize {
            let at = outer.rest + 12 * n;
            let (name, kind, offset) = (self.word(at)?, self.word(at + 4)?, self.word(at + 8)?);
            let offset = if outer.packed { offset & 0xff_ffff } else { offset } / 8;
            if self.is_named(name, wanted) {
                return Some(offset);
            }
            if self.is_named(name, "") {
                let mut number = kind;
                let mut inner = self.get(number)?;
                while KIND_QUALIFIERS.contains(&inner.kind) {
                    number = inner.size;
                    inner = self.get(number)?;
                }
                if inner.kind == KIND_STRUCT || inner.kind == KIND_UNION {
                    if let Some(found) = self.member(number, wanted) {
                        return Some(offset + found);
                    }
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_is_understood() {
        let Ok(btf) = Btf::of_kernel() else { return };
        assert_eq!(btf.offset("list_head", "prev").unwrap(), 8);
        assert!(btf.size("inode").unwrap() > 100);
        assert!(btf.offset("folio", "mapping").unwrap() > 0);
        assert!(btf.function("workingset_eviction").unwrap() > 0);
        assert!(btf.function("no_such_function").is_err());
    }

    #[test]
    fn what_is_not_btf_is_refused() {
        assert!(Btf::parse(vec![0; 100]).is_none());
        assert!(Btf::parse(vec![0x9f, 0xeb]).is_none());
    }
}
