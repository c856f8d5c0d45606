"""Swap to host memory in real guests, under everything that can happen to it.

A guest of the image `mini` runs programs that fill and verify more memory than it has, on ublk and on NBD,
several queues each. The tests follow each other in it, each with a disturbance of its own, and the programs
run on through all of them. At the end every page is checked once more. The long test does so for an hour.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from framework.agent_guest import AgentGuest, until
from framework.swap_guest import MIB, VERIFIER, SwapGuest, verifier
from framework.vms import Vms
from tmem_host.api.types import Vm, VmChange
from tmem_host.vm.request import Registration

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

MEMORY_MIB = 160
PROCESSES = 3
PROCESS_MIB = 60
DEVICE_MIB = 320
QUEUES = 2
QUOTA_BYTES = 160 * MIB
NEWCOMER_MIB = 96
SHORT_S = 6.0
SOAK_S = float(os.environ.get("TMEM_SWAP_SOAK_S", "3600"))
"""Seconds of the long test, over both devices together."""
FILLINGS = 16
READS = 1500
"""Pages that must come back from swap after a disturbance."""


class Trouble:
    """What can happen to a guest that swaps. Each method lasts some seconds and leaves all as it was."""

    def __init__(self, vms: Vms, guest: SwapGuest) -> None:
        self.vms = vms
        self.guest = guest
        self.chance = random.Random(1)

    def _change(self, change: VmChange) -> None:
        with self.vms.admin() as admin:
            admin.change_vm(self.guest.up.name, change)

    def none(self, seconds: float) -> None:
        """The programs run undisturbed."""
        time.sleep(seconds)

    def quotas(self, seconds: float) -> None:
        """Another quota every second."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._change(VmChange(quota_bytes=self.chance.choice([0, 10, 30, 60, 160]) * MIB))
            time.sleep(1)
        self._change(VmChange(quota_bytes=QUOTA_BYTES))

    def refusals(self, seconds: float) -> None:
        """Puts are refused by chance: the quota comes and goes many times a second."""
        until = time.monotonic() + seconds
        with self.vms.admin() as admin:
            while time.monotonic() < until:
                for quota_bytes in (0, QUOTA_BYTES):
                    admin.change_vm(self.guest.up.name, VmChange(quota_bytes=quota_bytes))
                    time.sleep(self.chance.uniform(0.01, 0.1))

    @contextmanager
    def _newcomer(self) -> Iterator[None]:
        """Somebody fills more than he may have, from before the body until after it.

        The programs soon wait for host pages, and drop what came back and was not written since. What he
        fills has to be swapped out, whatever they do.
        """
        place, may_have_mib = "/run/newcomer", NEWCOMER_MIB // 4
        options = f"-t tmpfs -o size={NEWCOMER_MIB}M"
        self.guest.run(f"mkdir -p {place}; mountpoint -q {place} || mount {options} none {place}")
        enter = self.guest.limited("newcomer", may_have_mib)
        fill = f"{enter}exec head -c {NEWCOMER_MIB * MIB} /dev/zero > {place}/file"
        # Should memory run out, it is not for him to end.
        fill = f"echo -900 > /proc/self/oom_score_adj; {fill}"
        self.guest.run(f"setsid sh -c '{fill}' > /run/newcomer.log 2>&1 < /dev/null &")

        def filled() -> int:
            return int(self.guest.run(f"stat -c %s {place}/file 2>/dev/null || echo 0"))

        # From here on he needs nothing that is at the host.
        self.guest.until(lambda: filled() > may_have_mib * MIB, "the newcomer's pages are swapped out")
        yield
        self.guest.until(lambda: filled() == NEWCOMER_MIB * MIB, "the newcomer ends")
        self.guest.run(f"rm {place}/file")

    def kills(self, seconds: float, every_s: float = 3.0) -> None:
        """Tmemd is killed and started again."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with self._newcomer():
                self.vms.tmemd.restart(kill=True)
                time.sleep(every_s)

    def absence(self, seconds: float) -> None:
        """Tmemd is away for a while: new pages go to the file, host pages are waited for."""
        with self._newcomer():
            self.vms.tmemd.kill()
            time.sleep(seconds)
            self.vms.tmemd.start()

    def shim_kills(self, seconds: float) -> None:
        """The serving process is killed; another takes over the device, at the first try."""
        until = time.monotonic() + seconds
        if self.guest.device.startswith("/dev/nbd"):
            # By their names the next process knows that the kernel is still at the last one's connections.
            receivers = f"cat /proc/[0-9]*/comm | grep -c +{Path(self.guest.device).name}-recv"
            assert self.guest.run(receivers) == f"{QUEUES}\n"
        expected = self.guest.status()["restarts"]
        while time.monotonic() < until:
            self.guest.kill_server()
            expected += 1
            time.sleep(2)
        assert self.guest.status()["restarts"] == expected, self.guest.log()

    def frosts(self, seconds: float) -> None:
        """The VM is frozen and thawed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for frozen in (True, False):
                self._change(VmChange(frozen=frozen))
                time.sleep(1)

    def reclaims(self, seconds: float) -> None:
        """Pages are moved to the file while the programs use them."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.guest.ask(op="reclaim", pages=2000)
            time.sleep(1)

    def hunger(self, _seconds: float) -> None:
        """Another program takes memory until the kernel ends it."""
        hog = "echo 1000 > /proc/self/oom_score_adj; exec tail /dev/zero"
        killed = self.guest.run(f"sh -c '{hog}' > /dev/null 2>&1; echo $?").strip()
        assert killed == "137", f"the hog ended with {killed}"

    ALL = ("none", "quotas", "refusals", "frosts", "reclaims", "shim_kills", "kills", "absence", "hunger")


@pytest.fixture(scope="module")
def mini(module_vms: Vms) -> Iterator[SwapGuest]:
    register = Registration(
        module_vms.tmemd.admin_socket, quota_bytes=QUOTA_BYTES, persistent_max_bytes=1024 * MIB
    )
    # A device has no more queues than there are processors. The second one comes later: while it boots, the
    # kernel changes its own code, which emulated processors do not always see in time.
    up = module_vms.up(
        memory_bytes=MEMORY_MIB * MIB,
        cpus=QUEUES,
        cmdline="maxcpus=1",
        register=register,
        files={VERIFIER: verifier()},
    )
    guest = SwapGuest(up)
    guest.run(f"chmod 755 {VERIFIER}; echo 1 > /sys/devices/system/cpu/cpu1/online")
    yield guest
    guest.close()


@pytest.fixture(scope="module", params=["ublk", "nbd"])
def trouble(request: pytest.FixtureRequest, module_vms: Vms, mini: SwapGuest) -> Iterator[Trouble]:
    """Swap is on, the programs run. At the end all of their memory is intact, and the shim is gone."""
    mini.swap_on(request.param, "--queues", f"{QUEUES}", size_mib=DEVICE_MIB)
    mini.verify(PROCESSES, PROCESS_MIB)
    yield Trouble(module_vms, mini)
    mini.stop_verifying()
    status = mini.status()
    assert (status["lost"], status["io_errors"], status["lost_pages"]) == (0, 0, 0), status
    # What receives from vsock has to stay in memory, whatever else of the guest is swapped out.
    receivers = "$(pidof socat | sed 's,[0-9][0-9]*,/proc/&/status,g')"
    assert set(mini.run(f"grep -h VmSwap {receivers}").split()) == {"VmSwap:", "0", "kB"}
    mini.swap_off()
    assert mini.run("ls /dev/ublkb* 2>/dev/null || true") == ""


@pytest.mark.parametrize("device", ["ublk", "nbd"])
def test_a_request_to_end_outlives_the_process_that_got_it(mini: SwapGuest, device: str) -> None:
    mini.swap_on(device, size_mib=DEVICE_MIB)
    mini.run(f"swapoff {mini.device}")
    server, keeper = mini.server(), mini.keeper()
    mini.run(f"kill -STOP {server} && kill -TERM {keeper} && sleep 1 && kill -KILL {server}")
    mini.await_end()


@pytest.mark.parametrize("kind", Trouble.ALL)
def test_memory_stays_intact(trouble: Trouble, kind: str) -> None:
    guest = trouble.guest
    before = guest.status()
    getattr(trouble, kind)(SHORT_S)
    guest.await_reads(READS)
    after = guest.status()

    def grew(counter: str) -> bool:
        return after[counter] > before[counter]

    assert grew("puts") and grew("reads_host")
    if kind in ("quotas", "refusals", "frosts"):
        assert grew("refused") and grew("writes_file")
    if kind in ("kills", "absence"):
        assert grew("disconnects") and grew("writes_file")
    if kind == "shim_kills":
        assert grew("restarts")
    if kind == "reclaims":
        assert grew("reclaimed") and grew("reads_file")


@pytest.mark.long
@pytest.mark.timeout(int(SOAK_S) + 1200)
def test_memory_stays_intact_for_long(trouble: Trouble) -> None:
    """Half of the time for each device: trouble by chance, tmemd killed every 20 s at times."""
    guest = trouble.guest
    until = time.monotonic() + SOAK_S / 2
    done: dict[str, int] = {}
    while time.monotonic() < until:
        kind = trouble.chance.choice(Trouble.ALL)
        done[kind] = done.get(kind, 0) + 1
        if kind == "kills":
            trouble.kills(60, every_s=20)
        else:
            getattr(trouble, kind)(trouble.chance.uniform(5, 30))
        guest.await_reads(READS)
    print(f"{done}; {guest.status()}")


@pytest.mark.long
@pytest.mark.parametrize("device", ["ublk", "nbd"])
def test_filling_memory_again_and_again_never_stalls(vms: Vms, device: str) -> None:
    """A lane that waits for memory waits for itself: of a dozen such fillings, one used to hang the guest."""
    register = Registration(vms.tmemd.admin_socket, quota_bytes=QUOTA_BYTES, persistent_max_bytes=1024 * MIB)
    up = vms.up(memory_bytes=MEMORY_MIB * MIB, register=register)
    guest = SwapGuest(up)
    guest.swap_on(device, size_mib=DEVICE_MIB)
    # Fragmented memory must not take the reserve away that packets to the host are made of.
    assert guest.run("cat /proc/sys/vm/watermark_boost_factor") == "0\n"
    guest.run("mkdir /run/fill && mount -t tmpfs -o size=300M none /run/fill")
    guest.run("dd if=/dev/urandom of=/data/noise bs=1M count=30 2>&1")
    for _ in range(FILLINGS):
        guest.run("for i in 1 2 3 4 5; do cat /data/noise > /run/fill/$i; done; rm /run/fill/*")
    status = guest.status()
    assert status["puts"] > FILLINGS * 4096
    assert (status["disconnects"], status["lost"], status["io_errors"]) == (0, 0, 0), status
    guest.swap_off()
    guest.close()


@pytest.mark.long
def test_a_guest_lives_on_without_its_host_pages_and_is_told(vms: Vms) -> None:
    """The host lost the pages for good: programs that need them are ended, the rest of the guest lives."""
    register = Registration(vms.tmemd.admin_socket, quota_bytes=QUOTA_BYTES, persistent_max_bytes=1024 * MIB)
    up = vms.up(register=register, files={VERIFIER: verifier()})
    guest = SwapGuest(up)
    guest.run(f"chmod 755 {VERIFIER}")
    guest.swap_on("ublk", size_mib=256)
    guest.verify(2, 40, memory_mib=48)
    with vms.admin() as admin:
        pool = next(pool for pool in admin.pools(up.name) if pool.pages)
        admin.destroy_pool(up.name, pool.id)
    guest.until(
        lambda: guest.run("ls /run/verify.*.exit 2>/dev/null | wc -l").strip() == "2",
        "programs that need lost pages are ended",
    )
    # SIGBUS from the kernel; 3 would be a page that is wrong.
    assert guest.run("cat /run/verify.*.exit").split() == ["135", "135"]
    assert guest.status()["lost"] > 0
    assert "lost" in guest.log()
    # The device is as good as new for who comes next.
    guest.verify(2, 40, memory_mib=48)
    guest.await_reads(READS)
    guest.stop_verifying()
    guest.close()


HOLD_MIB = 200
"""More than a Debian guest of 256 MiB has left."""


@pytest.mark.long
def test_the_host_gets_its_memory_back_and_the_guest_runs_on_at_no_quota(
    vms: Vms, built: Callable[[str], None]
) -> None:
    """From the quota to the shim: tmemd tells the agent, the agent the shim, which here serves NBD."""
    built("debian")
    register = Registration(vms.tmemd.admin_socket, quota_bytes=200 * MIB, persistent_max_bytes=1024 * MIB)
    up = vms.up("debian", register=register, files={VERIFIER: verifier()})
    guest = AgentGuest(up)

    def vm() -> Vm:
        with vms.admin() as admin:
            return admin.vm(up.name)

    def change(quota_bytes: int) -> None:
        with vms.admin() as admin:
            admin.change_vm(up.name, VmChange(quota_bytes=quota_bytes))

    # A disk of its own is as good as a file; this one must survive being given up.
    guest.run("modprobe loop && truncate -s 384M /data/disk && losetup /dev/loop0 /data/disk")
    guest.run("tmem-agent swap on --size 320M --file /dev/loop0")
    assert guest.status()["swap"]["active"]
    guest.run("tmem-agent swap off && test -b /dev/loop0 && losetup -d /dev/loop0 && rm /data/disk")

    guest.run("tmem-agent swap on --size 320M --file /data/swap.tmem --device nbd")
    assert str(guest.status()["swap"]["device"]).startswith("/dev/nbd")
    hold = f"chmod 755 {VERIFIER}; {VERIFIER} {HOLD_MIB} 86400 /run/stop 100; echo $? > /run/exit"
    guest.run(
        "systemd-run --quiet --unit=hold --property=OOMScoreAdjust=-900 "
        f"--property=StandardOutput=file:/run/hold.log sh -c '{hold.replace('$', '$$')}'"
    )
    until(lambda: guest.says("cat /run/hold.log", "filled"), "memory is filled")
    before = until(lambda: vm() if vm().persistent_pages > 8000 else None, "the host has pages")
    assert before is not None
    held_bytes = Path(vms.tmemd.arena).stat().st_blocks * 512

    change(0)
    began = time.monotonic()
    until(lambda: vm().persistent_pages == 0, "the guest has taken its pages back")
    seconds = time.monotonic() - began
    assert vm().reclaim_pending_pages == 0
    assert before.persistent_pages / seconds < 1.5 * 4096, "faster than the rate that reclaim is bound to"
    with vms.admin() as admin:
        assert admin.status().used_bytes < before.persistent_bytes / 4
        admin.free(held_bytes)
    assert Path(vms.tmemd.arena).stat().st_blocks * 512 < held_bytes / 2
    # The guest runs on, from its file.
    counters = guest.counters("swap", "counters")
    assert counters["reclaimed"] >= before.persistent_pages / 2
    assert counters["host_pages"] == 0
    until(
        lambda: guest.counters("swap", "counters")["reads_file"] > counters["reads_file"] + 1000,
        "pages come back from the file",
    )
    change(200 * MIB)
    until(lambda: vm().persistent_pages > 1000, "pages go to the host again")
    guest.run("touch /run/stop")
    until(lambda: guest.says("cat /run/exit", "0"), "all memory is verified")
    guest.run("tmem-agent swap off")
