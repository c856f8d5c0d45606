//! What the file cache counts, for its status socket.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters since the start. Pages are of 4096 bytes.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $($(#[$doc])* pub(crate) $name: AtomicU64,)* }

        impl Counters {
            /// Names and values, in order.
            pub(crate) fn values(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    /// Pages read from tmem.
    hit_pages,
    /// Pages of cacheable files that tmem was asked for or known not to have, read from the lower file system.
    miss_pages,
    /// Pages asked for that the host did not have.
    get_missed_pages,
    /// Pages of files that may not be cached at the moment.
    bypass_pages,
    /// Pages given to the kernel beside those that it asked for.
    around_pages,
    /// Pages that the kernel evicted, where those are put.
    evicted_pages,
    /// Pages the host stored.
    put_pages,
    /// Pages not put because the guest, the link or the host was busy.
    dropped_pages,
    /// Pages the host refused.
    refused_pages,
    /// Objects flushed because their file changed or went away.
    invalidated_objects,
    /// Gets given up because the host did not answer in time, and other failed connections.
    link_failures,
    /// Changes seen in the lower directory that were made by others.
    outside_changes,
}

/// Add to a counter.
pub(crate) fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}
