//! Doing something as the user who asked for it, so that what is created belongs to that user.
//!
//! The kernel checked the permissions before it asked (`default_permissions`), with everything it knows about the
//! caller. So only the file-system user and group are changed, and the capabilities that Linux takes away with them
//! are put back: the lower file system must not decide a second time, without the supplementary groups.

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// The user a request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Caller {
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
}

/// What a worker thread may do, and how to change it for a moment.
pub(crate) struct Rights {
    usual: CapabilitySets,
}

fn set_fs_ids(caller: Caller) {
    // SAFETY: neither call touches memory; both change this thread only, as the raw system calls do. They cannot
    // fail for a thread with CAP_SETUID and CAP_SETGID, and have no way to tell.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, libc::c_ulong::from(caller.gid));
        libc::syscall(libc::SYS_setfsuid, libc::c_ulong::from(caller.uid));
    }
}

const ROOT: Caller = Caller { uid: 0, gid: 0 };

impl Rights {
    /// Prepare the calling thread: a umask of its own, and no right to exceed users' disk quotas.
    pub(crate) fn of_this_thread() -> Result<Rights, Errno> {
        // SAFETY: CLONE_FS unshares umask and working directory only; no file descriptor is concerned.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS)? };
        rustix::process::umask(Mode::empty());
        let mut usual = rustix::thread::capabilities(None)?;
        usual.effective &= !CapabilitySet::SYS_RESOURCE;
        rustix::thread::set_capabilities(None, usual)?;
        Ok(Rights { usual })
    }

    /// Create something as `caller` with `umask`. The umask is for the lower file system, which alone knows whether
    /// a default ACL takes its place.
    pub(crate) fn create<T>(
        &self,
        caller: Caller,
        umask: u32,
        create: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let masked = umask & 0o777 != 0;
        if masked {
            rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
        }
        let done = if caller == ROOT {
            create()
        } else {
            set_fs_ids(caller);
            let raised = rustix::thread::set_capabilities(None, self.usual);
            let done = raised.and_then(|()| create());
            // Going back to user 0 gives the file-system capabilities back.
            set_fs_ids(ROOT);
            done
        };
        if masked {
            rustix::process::umask(Mode::empty());
        }
        done
    }

    /// Change content on behalf of a caller who may not keep set-user-id and set-group-id on the file.
    pub(crate) fn without_fsetid<T>(&self, change: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let mut less = self.usual;
        less.effective &= !CapabilitySet::FSETID;
        rustix::thread::set_capabilities(None, less)?;
        let done = change();
        rustix::thread::set_capabilities(None, self.usual)?;
        done
    }
}
