"""AF_VSOCK as on a KVM host: a VM inside a VM, behind the outer one's /dev/vhost-vsock, uses its engine.

Both CPUs are emulated, one by the other.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from framework.vms import COMMAND_S, MIB, Vms
from tmem_host.vm import images
from tmem_host.vm.initramfs import Archive
from tmem_host.vm.ssh import GuestShell

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(1800)]

_PROGRAM = "/usr/bin/tmem-bench"
_CID = 5
_BOOT_S = 1200.0
# QEMU's own firmware, from the host: the image has the program only.
_FIRMWARE = (
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/kvmvapic.bin",
)
_INIT = f"""#!/bin/busybox sh
# First process of the inner guest: checks what the vsock device carries, says so on the console, and ends.
/bin/busybox --install -s /bin
export PATH=/usr/local/bin:/bin:/usr/bin:/usr/sbin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
while read -r module; do insmod "$module"; done < /modules.order
tmem-guest ping --endpoint vsock:2:29805
{_PROGRAM} check vsock:2:29805
echo "checked: $?"
poweroff -f
"""


def _inner_initrd(bench_program: Path, directory: Path) -> bytes:
    """The image `mini` with another first process."""
    image = images.get("mini")
    assert image.layer is not None
    archive = Archive()
    archive.file("/check", _INIT.encode(), 0o755)
    archive.file(_PROGRAM, bench_program.read_bytes(), 0o755)
    target = directory / "inner"
    with target.open("wb") as out:
        archive.write(out)
    return b"".join(part.read_bytes() for part in (image.initrd, image.layer, target))


def _serve(shell: GuestShell) -> None:
    """Start an engine that knows the inner VM by its CID."""
    serve = f"{_PROGRAM} serve --dir /run/s --vm inner --vsock-cid {_CID} --capacity-mib 96"
    shell.check(
        f"chmod 755 {_PROGRAM}; modprobe vhost_vsock; test -c /dev/vhost-vsock; mkdir -p /run/s;"
        f" (sleep 3600 | RUST_LOG=info {serve}) > /run/serve.log 2>&1 &"
        " for i in $(seq 100); do grep -q ready /run/serve.log && break; sleep 0.1; done;"
        " grep ready /run/serve.log",
        deadline_s=COMMAND_S,
    )


def test_a_vm_behind_the_kernel_s_device_is_served(vms: Vms, bench_program: Path, tmp_path: Path) -> None:
    images.build("nested", progress=print)
    files = {f"/usr/share/qemu/{Path(path).name}": Path(path).read_bytes() for path in _FIRMWARE}
    files["/inner/vmlinuz"] = images.get("mini").kernel.read_bytes()
    files["/inner/initrd"] = _inner_initrd(bench_program, tmp_path)
    files[_PROGRAM] = bench_program.read_bytes()
    outer = vms.up("nested", memory_bytes=1024 * MIB, files=files)
    with outer.ssh() as shell:
        _serve(shell)
        qemu = (
            "qemu-system-x86_64 -accel tcg -machine pc -nodefaults -no-user-config -no-reboot -display none"
            " -L /usr/share/qemu -m 256 -kernel /inner/vmlinuz -initrd /inner/initrd"
            " -serial file:/run/inner.log"
            " -append 'console=ttyS0 quiet rdinit=/check mitigations=off nokaslr no_timer_check nowatchdog'"
            f" -device vhost-vsock-pci,guest-cid={_CID}"
        )
        began = time.monotonic()
        try:
            shell.check(f"{qemu} > /run/qemu.log 2>&1", deadline_s=_BOOT_S)
        finally:
            print(shell.check("cat /run/qemu.log /run/inner.log /run/serve.log", deadline_s=COMMAND_S))
        print(f"the inner VM ran for {time.monotonic() - began:.0f} s")
        told = shell.check("cat /run/inner.log", deadline_s=COMMAND_S)
        assert "version=1 lz4=true checksums=true" in told
        assert told.count('"result": "ok"') == 8
        assert "checked: 0" in told
        # The engine knew it by the CID that the kernel tells.
        assert "vm=inner" in shell.check("cat /run/serve.log", deadline_s=COMMAND_S)
