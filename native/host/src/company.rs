//! Which VMs are at work, and which of them has had more than its share of the CPUs.
//!
//! The share is kept as virtual time, as fair queueing has it: what was worked for a VM, divided by its weight. A VM
//! that comes back begins with the least of the others' time, so that nobody saves up for a flood.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

/// How long after another VM's request a VM counts as not being alone.
const COMPANY: Duration = Duration::from_millis(20);
/// What a VM may have had more than another one before it counts as ahead.
const LEAD_NS: u64 = 500_000;
/// The most that is remembered against a VM.
const MOST_LEAD_NS: u64 = 20_000_000;
/// The weight whose virtual time runs as fast as the clock.
const USUAL_WEIGHT: u64 = 100;

#[derive(Debug)]
struct Member {
    vm: u16,
    virtual_ns: u64,
    seen: Instant,
}

/// Knows whether more than one VM is at work. Asked with every batch of requests, so it writes only if they are.
#[derive(Debug)]
pub(crate) struct Company {
    began: Instant,
    last: AtomicU32,
    /// Milliseconds since `began` at which the VM at work was last another one than before.
    changed_ms: AtomicU64,
    members: Mutex<Vec<Member>>,
}

impl Company {
    pub(crate) fn new() -> Company {
        Company {
            began: Instant::now(),
            last: AtomicU32::new(u32::MAX),
            changed_ms: AtomicU64::new(0),
            members: Mutex::default(),
        }
    }

    /// Nobody waits for whoever has them, who may be waiting for a CPU.
    fn members(&self) -> Option<MutexGuard<'_, Vec<Member>>> {
        match self.members.try_lock() {
            Ok(members) => Some(members),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// VM number `vm` is at work now; returns whether another was a short while ago.
    pub(crate) fn is_at_work(&self, vm: u16) -> bool {
        let now_ms = self.began.elapsed().as_millis() as u64;
        let last = self.last.load(Ordering::Relaxed);
        if last != u32::from(vm) {
            self.last.store(vm.into(), Ordering::Relaxed);
            if last == u32::MAX {
                return false;
            }
            self.changed_ms.store(now_ms + 1, Ordering::Relaxed);
        }
        let changed_ms = self.changed_ms.load(Ordering::Relaxed);
        let shared = changed_ms > 0 && now_ms < changed_ms + COMPANY.as_millis() as u64;
        if shared {
            if let Some(mut members) = self.members() {
                enter(&mut members, vm, Instant::now());
            }
        }
        shared
    }

    /// Something was worked for `vm`, whose weight is at least 1. Returns whether it has had more than its share, or
    /// `None` if the account is in use: ask again a little later, with all that was worked until then.
    pub(crate) fn charge(&self, vm: u16, weight: u32, worked: Duration) -> Option<bool> {
        let now = Instant::now();
        let mut members = self.members()?;
        members.retain(|member| member.vm == vm || now.saturating_duration_since(member.seen) < COMPANY);
        let others = members.iter().filter(|member| member.vm != vm);
        let Some(least) = others.map(|member| member.virtual_ns).min() else { return Some(false) };
        let member = enter(&mut members, vm, now);
        let virtual_ns =
            member.virtual_ns + worked.as_nanos() as u64 * USUAL_WEIGHT / u64::from(weight.max(1));
        member.virtual_ns = virtual_ns.min(least + MOST_LEAD_NS);
        Some(member.virtual_ns > least + LEAD_NS)
    }
}

/// The member of that number, which is made one if it is not.
fn enter(members: &mut Vec<Member>, vm: u16, now: Instant) -> &mut Member {
    let at = members.iter().position(|member| member.vm == vm).unwrap_or_else(|| {
        let virtual_ns = members.iter().map(|member| member.virtual_ns).min().unwrap_or(0);
        members.push(Member { vm, virtual_ns, seen: now });
        members.len() - 1
    });
    let member = &mut members[at];
    member.seen = now;
    member
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRETCH: Duration = Duration::from_micros(100);

    fn charge(company: &Company, vm: u16, weight: u32, worked: Duration) -> bool {
        company.charge(vm, weight, worked).expect("nobody else has the account")
    }

    #[test]
    fn company_is_noticed_and_forgotten() {
        let company = Company::new();
        assert!(!company.is_at_work(1), "the first is alone");
        assert!(!company.is_at_work(1));
        assert!(company.is_at_work(2));
        assert!(company.is_at_work(1));
        std::thread::sleep(COMPANY + Duration::from_millis(5));
        assert!(!company.is_at_work(1));
    }

    #[test]
    fn who_works_much_is_ahead_of_who_works_little() {
        let company = Company::new();
        (0..4).for_each(|turn| {
            company.is_at_work(turn % 2);
        });
        assert!(!charge(&company, 0, 100, STRETCH), "one stretch is no flood");
        assert!((0..10).any(|_| charge(&company, 0, 100, STRETCH)));
        assert!(!charge(&company, 1, 100, STRETCH));
    }

    #[test]
    fn alone_nobody_is_ahead() {
        let company = Company::new();
        company.is_at_work(0);
        assert!((0..100).all(|_| !charge(&company, 0, 100, STRETCH)));
    }

    #[test]
    fn two_that_work_alike_are_both_within_their_shares_and_weights_count() {
        let company = Company::new();
        (0..4).for_each(|turn| {
            company.is_at_work(turn % 2);
        });
        for _ in 0..100 {
            assert!(!charge(&company, 0, 100, STRETCH));
            assert!(!charge(&company, 1, 100, STRETCH));
        }
        // Three times the weight, three times the work.
        for _ in 0..100 {
            assert!(!charge(&company, 0, 300, 3 * STRETCH));
            assert!(!charge(&company, 1, 100, STRETCH));
        }
        let ahead = (0..100).filter(|_| {
            charge(&company, 1, 100, STRETCH);
            charge(&company, 0, 100, 3 * STRETCH)
        });
        assert!(ahead.count() > 90, "with the same weight it is too much");
    }

    #[test]
    fn nobody_waits_for_the_account() {
        let company = Company::new();
        (0..4).for_each(|turn| {
            company.is_at_work(turn % 2);
        });
        let held = company.members();
        assert!(company.is_at_work(0), "and company is known without it");
        assert_eq!(company.charge(0, 100, 10 * STRETCH), None);
        drop(held);
        assert_eq!(company.charge(0, 100, 10 * STRETCH), Some(true));
    }
}
