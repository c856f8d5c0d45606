"""How much slower a guest builds the kernel than the host does: the factor of a build's disk model.

`disk_model.measure` times four loops, which an emulator translates once. A compiler is megabytes of code that
jumps everywhere, and an emulated processor is three times slower still at it. Beside it a disk slowed
by the loops' factor would be a fast one, and programs that wait for it would seem to lose little. Here the
factor is that of the work itself: the same build, by the same compiler of the same image, in a guest with
memory to spare and on the host, below a changed root. Processor time is compared, so that no disk counts.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile

from disk_model import DiskModel
from framework.daemon import Tmemd
from tmem_host.vm import images, machine
from tmem_host.vm.images import Image
from tmem_host.vm.request import Registration, VmRequest
from tmem_host.workloads.shell import DATA

_MEMORY_BYTES = 1 << 30
_ROUNDS = 2
_RUN_S = 600.0
_VM = "bench-slowdown"

# The image's disks, which running guests have below theirs, are not written to: what the build writes is kept
# in memory, in a mount namespace that ends with it.
_ON_THE_HOST = """
set -e
root=$1/root data=$1/data memory=$1/memory
mkdir "$root" "$data" "$memory"
mount -t tmpfs none "$memory"
mount -o loop,ro,noload "$2" "$root"
mount -o loop,ro,noload "$3" "$data"
over() {
    mkdir -p "$memory/$1/upper" "$memory/$1/work"
    mount -t overlay -o "lowerdir=$2,upperdir=$memory/$1/upper,workdir=$memory/$1/work" none "$3"
}
over root "$root" "$root"
over data "$data" "$root$4"
mount -t proc none "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot "$root" bash -c "$5"
"""


def measure(tmemd: Tmemd, directory: str, *, cpus: int) -> DiskModel:
    """Build a directory of the kernel's sources (`kernel/time/`) on the host and in a guest, by turns.

    Takes some minutes in an emulated guest; with KVM nothing is built, the factor is 1.
    """
    # Objects are counted, for a build that found nothing to do would take no time at all.
    build = (
        f"set -o pipefail; cd {DATA}/linux && find {directory} -name '*.o' -delete && TIMEFORMAT='%U %S'"
        f" && (time make -s -j{cpus} {directory} >&2) 2>&1 | tail -n 1 && ls {directory}*.o | wc -l"
    )
    request = VmRequest(
        name=_VM,
        cpus=cpus,
        memory_bytes=_MEMORY_BYTES,
        register=Registration(tmemd.admin_socket, quota_bytes=0),
    )
    with machine.up(request, print) as guest, guest.ssh() as shell:
        if guest.state.virt == "kvm":
            return DiskModel(1.0, {"build": 1.0}, 0)
        image, quotients = images.get(guest.state.image), []
        for _ in range(1 + _ROUNDS):
            native, objects = _seconds_and_objects(_on_the_host(image, build))
            emulated, as_many = _seconds_and_objects(
                shell.check(f"bash -c {shlex.quote(build)}", deadline_s=_RUN_S)
            )
            assert objects == as_many > 0, f"{objects} objects on the host, {as_many} in the guest"
            quotients.append(emulated / native)
    # The first in the guest also reads everything.
    return DiskModel.of({"build": quotients[1:]})


def _on_the_host(image: Image, command: str) -> str:
    with tempfile.TemporaryDirectory() as place:
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        script = ["bash", "-c", _ON_THE_HOST, "build", place, str(image.root), str(image.data), DATA, command]
        return subprocess.check_output([*alone, *script], timeout=_RUN_S, text=True)


def _seconds_and_objects(said: str) -> tuple[float, int]:
    """Of processor time, the programs' and the kernel's on their behalf; how many files were compiled."""
    times, objects = said.strip().splitlines()[-2:]
    return sum(map(float, times.split())), int(objects)
