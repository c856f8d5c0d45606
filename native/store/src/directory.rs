//! Who there is: VMs, pools, grants. In memory for use, in the arena's head for recovery.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::{Arc, Weak};

use tmem_wire::{PoolCreate, PoolKind};
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::arena::Arena;
use crate::config::{VmId, VmLimits};
use crate::error::{AdminError, PoolError};
use crate::index::Index;
use crate::layout::{
    GrantRecord, PoolRecord, VmRecord, GRANTS, IN_USE, MAX_GRANTS, MAX_POOLS, MAX_POOLS_PER_VM, MAX_VMS,
    POOLS, VMS, VM_NAME_BYTES,
};
use crate::pool::Pool;
use crate::vm::Vm;

type Uuid = [u8; 16];

/// Everything known by name. Held in a lock by the store; records are written under its write side.
pub(crate) struct Directory {
    seed: u64,
    vms: Vec<Option<Arc<Vm>>>,
    by_name: HashMap<String, VmId>,
    pools: Vec<Option<Arc<Pool>>>,
    next_pool: usize,
    shared: HashMap<Uuid, Weak<Index>>,
    /// Grant to the record it has.
    grants: BTreeMap<(Uuid, VmId), usize>,
}

fn vm_at(id: usize) -> usize {
    VMS + id * size_of::<VmRecord>()
}

fn pool_at(number: usize) -> usize {
    POOLS + number * size_of::<PoolRecord>()
}

fn grant_at(number: usize) -> usize {
    GRANTS + number * size_of::<GrantRecord>()
}

/// Write all but the state word, then the state word.
fn write_record(arena: &Arena, offset: usize, record: &[u8]) {
    arena.word(offset).store(0, Release);
    for (i, bytes) in record.chunks_exact(4).enumerate().skip(1) {
        let word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        arena.word(offset + 4 * i).store(word, Relaxed);
    }
    arena.word(offset).store(IN_USE, Release);
}

fn clear_record(arena: &Arena, offset: usize, bytes: usize) {
    arena.word(offset).store(0, Release);
    for at in (4..bytes).step_by(4) {
        arena.word(offset + at).store(0, Relaxed);
    }
}

/// A record in use.
fn read_record<T: FromBytes + IntoBytes>(arena: &Arena, offset: usize) -> Option<T> {
    if arena.word(offset).load(Relaxed) != IN_USE {
        return None;
    }
    let mut record = T::new_zeroed();
    for (i, to) in record.as_mut_bytes().chunks_exact_mut(4).enumerate() {
        to.copy_from_slice(&arena.word(offset + 4 * i).load(Relaxed).to_ne_bytes());
    }
    Some(record)
}

fn vm_check(record: &VmRecord) -> u32 {
    xxh3_64(&record.name) as u32 ^ record.name_len
}

fn pool_check(record: &PoolRecord) -> u32 {
    xxh3_64(&record.as_bytes()[8..]) as u32
}

fn grant_check(record: &GrantRecord) -> u32 {
    xxh3_64(&record.as_bytes()[8..]) as u32
}

impl Directory {
    pub(crate) fn new(seed: u64) -> Directory {
        Directory {
            seed,
            vms: Vec::new(),
            by_name: HashMap::new(),
            pools: Vec::new(),
            next_pool: 0,
            shared: HashMap::new(),
            grants: BTreeMap::new(),
        }
    }

    pub(crate) fn vm(&self, id: VmId) -> Option<&Arc<Vm>> {
        self.vms.get(usize::from(id.0))?.as_ref()
    }

    pub(crate) fn vm_named(&self, name: &str) -> Option<VmId> {
        self.by_name.get(name).copied()
    }

    pub(crate) fn vms(&self) -> impl Iterator<Item = &Arc<Vm>> {
        self.vms.iter().flatten()
    }

    pub(crate) fn pool(&self, number: u16) -> Option<&Arc<Pool>> {
        self.pools.get(usize::from(number))?.as_ref()
    }

    pub(crate) fn pools(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.pools.iter().flatten()
    }

    pub(crate) fn pools_of(&self, vm: VmId) -> impl Iterator<Item = &Arc<Pool>> {
        self.pools().filter(move |pool| pool.vm.id == vm)
    }

    pub(crate) fn add_vm(
        &mut self,
        arena: &Arena,
        name: &str,
        limits: &VmLimits,
    ) -> Result<VmId, AdminError> {
        if name.is_empty() || name.len() > VM_NAME_BYTES {
            return Err(AdminError::Name { max: VM_NAME_BYTES, got: name.len() });
        }
        let at = self.vms.iter().position(Option::is_none).unwrap_or(self.vms.len());
        if at >= MAX_VMS {
            return Err(AdminError::TooManyVms(MAX_VMS));
        }
        let id = VmId(at as u16);
        self.insert_vm(Vm::new(id, name.to_owned(), limits));
        self.write_vm(arena, id);
        Ok(id)
    }

    fn insert_vm(&mut self, vm: Vm) {
        let at = usize::from(vm.id.0);
        if self.vms.len() <= at {
            self.vms.resize_with(at + 1, || None);
        }
        self.by_name.insert(vm.name.clone(), vm.id);
        self.vms[at] = Some(Arc::new(vm));
    }

    fn write_vm(&self, arena: &Arena, id: VmId) {
        let Some(vm) = self.vm(id) else { return };
        let mut record = VmRecord::new_zeroed();
        record.name[..vm.name.len()].copy_from_slice(vm.name.as_bytes());
        record.name_len = vm.name.len() as u32;
        record.check = vm_check(&record);
        fill_limits(&mut record, &vm.limits());
        write_record(arena, vm_at(id.0.into()), record.as_bytes());
    }

    /// Bring the record of a VM's limits up to date. The VM's name, and so its pages, are valid throughout.
    pub(crate) fn write_limits(arena: &Arena, vm: &Vm) {
        let at = vm_at(vm.id.0.into());
        let limits = vm.limits();
        let put = |offset: usize, value: u64| arena.long(at + offset).store(value, Relaxed);
        put(std::mem::offset_of!(VmRecord, quota_bytes), limits.quota_bytes);
        put(std::mem::offset_of!(VmRecord, min_bytes), limits.min_bytes);
        put(std::mem::offset_of!(VmRecord, persistent_max_bytes), limits.persistent_max_bytes);
        arena.word(at + std::mem::offset_of!(VmRecord, weight)).store(limits.weight, Relaxed);
    }

    pub(crate) fn write_frozen(arena: &Arena, vm: &Vm) {
        let at = vm_at(vm.id.0.into()) + std::mem::offset_of!(VmRecord, frozen);
        arena.word(at).store(vm.frozen.load(Relaxed).into(), Relaxed);
    }

    pub(crate) fn write_boot(arena: &Arena, vm: &Vm, boot_id: &[u8; 16]) {
        let at = vm_at(vm.id.0.into());
        let has = arena.word(at + std::mem::offset_of!(VmRecord, has_boot));
        has.store(0, Release);
        for (i, bytes) in boot_id.chunks_exact(4).enumerate() {
            let word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            arena.word(at + std::mem::offset_of!(VmRecord, boot_id) + 4 * i).store(word, Relaxed);
        }
        has.store(1, Release);
    }

    pub(crate) fn remove_vm(&mut self, arena: &Arena, id: VmId) {
        let of_vm: Vec<Uuid> =
            self.grants.keys().filter(|(_, vm)| *vm == id).map(|(uuid, _)| *uuid).collect();
        for uuid in of_vm {
            self.revoke(arena, uuid, id);
        }
        if let Some(vm) = self.vms.get_mut(usize::from(id.0)).and_then(Option::take) {
            self.by_name.remove(&vm.name);
        }
        clear_record(arena, vm_at(id.0.into()), size_of::<VmRecord>());
    }

    pub(crate) fn add_pool(
        &mut self,
        arena: &Arena,
        vm: &Arc<Vm>,
        spec: &PoolCreate,
    ) -> Result<Arc<Pool>, PoolError> {
        if let Some(pool) = self.pools_of(vm.id).find(|pool| pool.name == spec.name) {
            return if pool.matches(spec) { Ok(pool.clone()) } else { Err(PoolError::Conflict) };
        }
        if let Some(uuid) = spec.shared {
            if !self.grants.contains_key(&(uuid, vm.id)) {
                return Err(PoolError::Denied);
            }
            if spec.kind == PoolKind::Persistent {
                return Err(PoolError::Unsupported);
            }
            if let Some(pool) = self.pools_of(vm.id).find(|pool| pool.shared == spec.shared) {
                // One membership a VM: under a second name it would be a second account of the same pages.
                return if pool.name == spec.name { Ok(pool.clone()) } else { Err(PoolError::Conflict) };
            }
        }
        if self.pools_of(vm.id).count() >= MAX_POOLS_PER_VM {
            return Err(PoolError::Limit);
        }
        let number = self.free_pool_number().ok_or(PoolError::Limit)?;
        let pool = self.insert_pool(number, vm, spec);
        let mut record = PoolRecord::new_zeroed();
        record.vm = vm.id.0;
        record.kind = match pool.kind {
            PoolKind::Persistent => 0,
            PoolKind::Ephemeral { exclusive } => 1 + u8::from(exclusive),
        };
        record.shared = spec.shared.is_some().into();
        record.uuid = spec.shared.unwrap_or_default();
        record.name = spec.name;
        record.check = pool_check(&record);
        write_record(arena, pool_at(number), record.as_bytes());
        Ok(pool)
    }

    /// Numbers are used in turn, so that a number that just went is not soon another pool's.
    fn free_pool_number(&mut self) -> Option<usize> {
        let number = (0..MAX_POOLS)
            .map(|i| (self.next_pool + i) % MAX_POOLS)
            .find(|&at| self.pools.get(at).is_none_or(Option::is_none))?;
        self.next_pool = number + 1;
        Some(number)
    }

    fn insert_pool(&mut self, number: usize, vm: &Arc<Vm>, spec: &PoolCreate) -> Arc<Pool> {
        let index = match spec.shared {
            None => Arc::new(Index::new(self.seed)),
            Some(uuid) => self.shared.get(&uuid).and_then(Weak::upgrade).unwrap_or_else(|| {
                let index = Arc::new(Index::new(self.seed));
                self.shared.insert(uuid, Arc::downgrade(&index));
                index
            }),
        };
        let pool = Arc::new(Pool::new(number as u16, vm.clone(), spec, index));
        if self.pools.len() <= number {
            self.pools.resize_with(number + 1, || None);
        }
        self.pools[number] = Some(pool.clone());
        pool
    }

    pub(crate) fn remove_pool(&mut self, arena: &Arena, number: u16) {
        if let Some(pool) = self.pools.get_mut(usize::from(number)).and_then(Option::take) {
            *pool.vm.past.lock() += pool.counters.read();
            self.shared.retain(|_, index| index.strong_count() > 0);
        }
        clear_record(arena, pool_at(number.into()), size_of::<PoolRecord>());
    }

    pub(crate) fn grant(&mut self, arena: &Arena, uuid: Uuid, vm: VmId) -> Result<(), AdminError> {
        self.vm(vm).ok_or(AdminError::NoSuchVm)?;
        if self.grants.contains_key(&(uuid, vm)) {
            return Ok(());
        }
        let number = (0..MAX_GRANTS)
            .find(|number| !self.grants.values().any(|used| used == number))
            .ok_or(AdminError::TooManyGrants(MAX_GRANTS))?;
        let mut record = GrantRecord::new_zeroed();
        record.vm = vm.0.into();
        record.uuid = uuid;
        record.check = grant_check(&record);
        write_record(arena, grant_at(number), record.as_bytes());
        self.grants.insert((uuid, vm), number);
        Ok(())
    }

    /// Whether there was a grant.
    pub(crate) fn revoke(&mut self, arena: &Arena, uuid: Uuid, vm: VmId) -> bool {
        let Some(number) = self.grants.remove(&(uuid, vm)) else { return false };
        clear_record(arena, grant_at(number), size_of::<GrantRecord>());
        true
    }

    /// Read the arena's directory. Records that make no sense are cleared: what belongs to them is unreachable.
    pub(crate) fn recover(&mut self, arena: &Arena) {
        for id in 0..MAX_VMS {
            let Some(record) = read_record::<VmRecord>(arena, vm_at(id)) else { continue };
            let name = record.name.get(..record.name_len as usize).map(<[u8]>::to_vec);
            let name = name.and_then(|name| String::from_utf8(name).ok()).filter(|name| {
                !name.is_empty() && record.check == vm_check(&record) && !self.by_name.contains_key(name)
            });
            let Some(name) = name else {
                clear_record(arena, vm_at(id), size_of::<VmRecord>());
                continue;
            };
            let limits = VmLimits {
                quota_bytes: record.quota_bytes,
                min_bytes: record.min_bytes,
                weight: record.weight,
                persistent_max_bytes: record.persistent_max_bytes,
            };
            let vm = Vm::new(VmId(id as u16), name, &limits);
            vm.frozen.store(record.frozen != 0, Relaxed);
            *vm.boot.lock() = (record.has_boot == 1).then_some(record.boot_id);
            self.insert_vm(vm);
        }
        for number in 0..MAX_GRANTS {
            let Some(record) = read_record::<GrantRecord>(arena, grant_at(number)) else { continue };
            let vm = VmId(record.vm as u16);
            let known = record.vm <= u16::MAX.into() && self.vm(vm).is_some();
            if !known || record.check != grant_check(&record) || self.grants.contains_key(&(record.uuid, vm))
            {
                clear_record(arena, grant_at(number), size_of::<GrantRecord>());
                continue;
            }
            self.grants.insert((record.uuid, vm), number);
        }
        for number in 0..MAX_POOLS {
            let Some(record) = read_record::<PoolRecord>(arena, pool_at(number)) else { continue };
            let kind = match record.kind {
                0 => Some(PoolKind::Persistent),
                1 => Some(PoolKind::Ephemeral { exclusive: false }),
                2 => Some(PoolKind::Ephemeral { exclusive: true }),
                _ => None,
            };
            let vm = self.vm(VmId(record.vm)).cloned();
            let (Some(kind), Some(vm), true) = (kind, vm, record.check == pool_check(&record)) else {
                clear_record(arena, pool_at(number), size_of::<PoolRecord>());
                continue;
            };
            let shared = (record.shared == 1).then_some(record.uuid);
            self.insert_pool(number, &vm, &PoolCreate { kind, shared, name: record.name });
            self.next_pool = number + 1;
        }
    }
}

fn fill_limits(record: &mut VmRecord, limits: &VmLimits) {
    record.quota_bytes = limits.quota_bytes;
    record.min_bytes = limits.min_bytes;
    record.weight = limits.weight;
    record.persistent_max_bytes = limits.persistent_max_bytes;
}
