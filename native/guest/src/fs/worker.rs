//! A worker thread: receive a request, have it served, answer.

use std::sync::Arc;

use rustix::io::Errno;
use zerocopy::FromBytes;

use super::abi::{Args, InHeader, Opcode};
use super::caller::Rights;
use super::device::{Device, REQUEST_BYTES};
use super::tree::{is_answered, Call, Done, Tree};

/// Serve requests until the file system is unmounted.
pub(crate) fn run(tree: &Arc<Tree>, device: &Arc<Device>) -> Done {
    let mut server = Server::new(Rights::of_this_thread()?);
    let mut request = vec![0; REQUEST_BYTES];
    loop {
        let served = match device.receive(&mut request) {
            Ok(length) => server.serve(tree, device, &request[..length]),
            Err(error) => Err(error),
        };
        match served {
            Err(Errno::NODEV) => return Ok(()),
            other => other?,
        }
    }
}

/// What a thread serves requests with.
pub(crate) struct Server {
    rights: Rights,
    out: Vec<u8>,
    entered: Vec<u64>,
}

impl Server {
    /// For the thread that has these rights.
    pub(crate) fn new(rights: Rights) -> Server {
        Server { rights, out: Vec::with_capacity(8192), entered: Vec::new() }
    }

    /// Serve a request and answer it. An error says that the file system cannot be served any more, `ENODEV` that it
    /// was unmounted.
    pub(crate) fn serve(&mut self, tree: &Arc<Tree>, device: &Arc<Device>, request: &[u8]) -> Done {
        let Ok((header, body)) = InHeader::read_from_prefix(request) else {
            return Err(Errno::PROTO);
        };
        let (out, entered) = (&mut self.out, &mut self.entered);
        out.clear();
        entered.clear();
        // Extensions (security contexts, supplementary groups) are only sent to those who ask for them.
        let mut call = Call {
            header,
            request,
            args: Args::new(body),
            out,
            entered,
            rights: &self.rights,
            device,
            sent: false,
        };
        let opcode = Opcode::from_code(header.opcode);
        let done = opcode.map_or(Err(Errno::NOSYS), |opcode| serve(tree, opcode, &mut call));
        if call.sent || opcode.is_some_and(|opcode| !is_answered(opcode)) {
            return Ok(());
        }
        let answered = match done {
            Ok(()) => device.answer(header.unique, 0, &[out]),
            Err(error) => {
                forget(tree, entered);
                device.answer(header.unique, error.raw_os_error(), &[])
            }
        };
        match answered {
            // The caller was interrupted: the kernel did not learn of these nodes.
            Err(Errno::NOENT) => forget(tree, entered),
            Err(Errno::NODEV) => return Err(Errno::NODEV),
            Err(error) => log::warn!("the kernel refused an answer to {opcode:?}: {error}"),
            Ok(()) => {}
        }
        if out.capacity() > 1 << 16 {
            *out = Vec::with_capacity(8192);
        }
        Ok(())
    }
}

fn forget(tree: &Tree, entered: &mut Vec<u64>) {
    for node in entered.drain(..) {
        tree.drop_references(node, 1);
    }
}

fn serve(tree: &Tree, opcode: Opcode, call: &mut Call) -> Done {
    match opcode {
        Opcode::Lookup => tree.lookup(call),
        Opcode::Forget => tree.forget(call),
        Opcode::BatchForget => tree.batch_forget(call),
        Opcode::Getattr => tree.getattr(call),
        Opcode::Setattr => tree.setattr(call),
        Opcode::Statx => tree.statx(call),
        Opcode::Readlink => tree.readlink(call),
        Opcode::Symlink => tree.symlink(call),
        Opcode::Mknod => tree.mknod(call),
        Opcode::Mkdir => tree.mkdir(call),
        Opcode::Unlink => tree.unlink(call),
        Opcode::Rmdir => tree.rmdir(call),
        Opcode::Rename => tree.rename(call),
        Opcode::Rename2 => tree.rename2(call),
        Opcode::Link => tree.link(call),
        Opcode::Open => tree.open(call),
        Opcode::Create => tree.create(call),
        Opcode::Tmpfile => tree.tmpfile(call),
        Opcode::Read => tree.read(call),
        Opcode::Write => tree.write(call),
        Opcode::Statfs => tree.statfs(call),
        Opcode::Release => tree.release(call),
        Opcode::Fsync => tree.fsync(call),
        Opcode::Syncfs => tree.syncfs(call),
        Opcode::Fallocate => tree.fallocate(call),
        Opcode::Lseek => tree.lseek(call),
        Opcode::CopyFileRange => tree.copy_file_range(call),
        Opcode::Setxattr => tree.setxattr(call),
        Opcode::Getxattr => tree.getxattr(call),
        Opcode::Listxattr => tree.listxattr(call),
        Opcode::Removexattr => tree.removexattr(call),
        Opcode::Ioctl => tree.ioctl(call),
        Opcode::Opendir => tree.opendir(call),
        Opcode::Readdir => tree.readdir(call),
        Opcode::Readdirplus => tree.readdirplus(call),
        Opcode::Releasedir => tree.releasedir(call),
        Opcode::Fsyncdir => tree.fsyncdir(call),
        Opcode::Destroy => Ok(()),
        Opcode::Init => Err(Errno::PROTO),
    }
}
