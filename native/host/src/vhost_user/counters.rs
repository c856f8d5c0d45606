//! What a device counts: for metrics, and to tell an operator once, not a thousand times, that a guest misbehaves.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of one VM's device; only ever rising, except for `connections`.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }

        /// The values of [`Counters`] at one moment.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Read all counters.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl Snapshot {
            /// Names and values, in the order of declaration.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Streams open now.
    connections,
    /// Streams opened since the device started.
    connections_opened,
    /// Streams refused: limits, or nothing listening.
    connections_refused,
    /// Packets from the guest.
    packets_from_guest,
    /// Packets to the guest.
    packets_to_guest,
    /// Bytes of stream data from the guest.
    bytes_from_guest,
    /// Bytes of stream data to the guest.
    bytes_to_guest,
    /// Chains that broke the rules of virtqueues; dropped.
    bad_chains,
    /// Packets with a foreign context id or an unknown type or operation.
    bad_packets,
    /// Streams ended because the guest broke the rules of vsock.
    violations,
    /// Rings given up until the driver resets them.
    broken_rings,
    /// Front-end messages that made no sense; each ends its connection.
    bad_messages,
    /// Kicks from the guest.
    kicks,
    /// Interrupts to the guest.
    calls,
    /// Times a poll found work before its deadline.
    polls_hit,
    /// Times a poll found none, and the thread slept.
    polls_missed,
    /// Front ends (QEMU processes) that connected.
    front_ends,
    /// Times the device took over from a process that died.
    resumed,
}

/// Add to a counter.
pub fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}
