"""A VM as libvirt XML, what is recorded of it, and the probes that decide how it runs."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from tmem_host.controller.metadata import parse_spec
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import console, domain, hybrid, kvm, machine, process, state, transport
from tmem_host.vm.domain import Disk, DiskLimits, Domain
from tmem_host.vm.state import VmState
from tmem_host.vm.transport import Transport, TransportName

QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"


def _domain(name: TransportName = "vhost-device-vsock", **changes: object) -> Domain:
    values: dict[str, object] = {
        "name": "a",
        "virt": "tcg",
        "memory_bytes": 256 << 20,
        "cpus": 2,
        "kernel": Path("/i/vmlinuz"),
        "initrd": Path("/v/initrd"),
        "cmdline": "quiet x=<&>",
        "disks": (Disk(Path("/d/root.qcow2")), Disk(Path("/d/data.qcow2"), cache="none")),
        "transport": Transport(name, "a", 123, Path("/v"), Path("/l")),
        "console": Path("/v/console.log"),
        "registered": True,
    }
    return Domain(**(values | changes))  # type: ignore[arg-type]


def _xml(described: Domain) -> Xml.Element:
    return Xml.fromstring(domain.to_xml(described))  # noqa: S314  # our own


def test_memory_is_shared_for_vhost_user() -> None:
    root = _xml(_domain())
    backing = root.find("memoryBacking")
    assert backing is not None
    assert backing.find("source[@type='memfd']") is not None
    assert backing.find("access[@mode='shared']") is not None


def test_a_vhost_user_device_is_qemus_own_argument() -> None:
    root = _xml(_domain())
    words = [argument.get("value") for argument in root.iterfind(f"{QEMU}commandline/{QEMU}arg")]
    assert "socket,id=tmem-vsock,path=/v/vhost.sock" in words
    assert any(word and word.startswith("vhost-user-vsock-pci,") for word in words)
    assert root.find("devices/vsock") is None


def test_the_kernels_device_is_libvirts_own_element() -> None:
    root = _xml(_domain("vhost-vsock"))
    cid = root.find("devices/vsock/cid")
    assert cid is not None
    assert cid.get("address") == "123"
    assert root.find(f"{QEMU}commandline") is None


def test_accelerator_and_cpu_go_together() -> None:
    assert _xml(_domain()).get("type") == "qemu"
    on_kvm = _xml(_domain(virt="kvm"))
    assert on_kvm.get("type") == "kvm"
    assert on_kvm.find("cpu[@mode='host-passthrough']") is not None
    assert on_kvm.find("cpu/feature") is None
    off = _xml(_domain()).findall("cpu/feature[@policy='disable']")
    assert {"erms", "fsrm"} <= {feature.get("name") for feature in off}, "copied byte by byte"


def test_disks_are_in_order_and_limited_as_asked() -> None:
    limits = DiskLimits(read_iops=100, write_bytes=1 << 20)
    root = _xml(_domain(disks=(Disk(Path("/d/r")), Disk(Path("/d/x"), cache="none", limits=limits))))
    first, second = root.findall("devices/disk")
    assert [disk.find("target").get("dev") for disk in (first, second)] == ["vda", "vdb"]  # type: ignore[union-attr]
    assert first.find("iotune") is None
    tune = second.find("iotune")
    assert tune is not None
    assert {each.tag: each.text for each in tune} == {"read_iops_sec": "100", "write_bytes_sec": "1048576"}
    both = _xml(_domain(disks=(Disk(Path("/d/r"), limits=DiskLimits(total_iops=7, total_bytes=8)),)))
    tune = both.find("devices/disk/iotune")
    assert tune is not None
    assert {each.tag: each.text for each in tune} == {"total_iops_sec": "7", "total_bytes_sec": "8"}
    assert second.find("driver").get("cache") == "none"  # type: ignore[union-attr]


def test_text_is_escaped() -> None:
    assert _xml(_domain()).findtext("os/cmdline") == "quiet x=<&>"


def test_every_security_model_is_told() -> None:
    root = _xml(_domain(security_models=("none", "apparmor", "dac")))
    labels = {label.get("model"): label.get("type") for label in root.iterfind("seclabel")}
    assert labels == {"apparmor": "none", "dac": "static"}
    assert root.findtext("seclabel[@model='dac']/label") == "+0:+0"


def test_credentials_are_smbios_strings() -> None:
    root = _xml(_domain(credentials={"vmm.notify_socket": "eA=="}))
    entry = root.findtext("sysinfo[@type='smbios']/oemStrings/entry")
    assert entry == "io.systemd.credential.binary:vmm.notify_socket=eA=="
    assert root.find("os/smbios[@mode='sysinfo']") is not None


def test_the_controller_understands_the_metadata() -> None:
    spec = parse_spec(domain.to_xml(_domain()))
    assert spec is not None
    assert spec.hybrid_socket == "/v/vsock.sock"
    by_cid = parse_spec(domain.to_xml(_domain("vhost-vsock")))
    assert by_cid is not None
    assert by_cid.cid == 123
    assert parse_spec(domain.to_xml(_domain(registered=False))) is None


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "-a", "a" * 32, "ä"])
def test_a_name_unfit_for_a_socket_is_refused(name: str) -> None:
    with pytest.raises(OperatorError) as caught:
        state.check_name(name)
    assert caught.value.code is ExitCode.USAGE


def test_cids_are_chosen_and_checked() -> None:
    assert state.choose_cid(None, {}) == 100
    assert state.choose_cid(None, {100: "a", 101: "b", 103: "c"}) == 102
    assert state.choose_cid(7, {100: "a"}) == 7
    with pytest.raises(OperatorError, match="taken by VM 'a'") as caught:
        state.choose_cid(100, {100: "a"})
    assert caught.value.code is ExitCode.CONFLICT
    for bad in (0, 2, 2**32 - 1, -5):
        with pytest.raises(OperatorError) as caught:
            state.choose_cid(bad, {})
        assert caught.value.code is ExitCode.USAGE


def test_a_record_survives_the_way_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMEM_VM_DIRECTORY", str(tmp_path))
    recorded = VmState(
        name="a",
        image="mini",
        cid=100,
        memory_bytes=1,
        cpus=1,
        virt="tcg",
        virt_reason="r",
        transport="vhost-device-vsock",
        host_key="k",
    )
    (tmp_path / "a").mkdir()
    state.save(recorded)
    assert state.load("a") == recorded
    assert state.every() == [recorded]
    assert machine.get("a").transport.cid == 100
    state.remove(recorded)
    with pytest.raises(OperatorError, match="there is no such VM") as caught:
        machine.get("a")
    assert caught.value.code is ExitCode.NOT_FOUND


CPU = "processor : 0\nflags\t\t: fpu {} sse\n"


@pytest.mark.parametrize("flags", ["", "kvm vmxoff"])
def test_a_kvm_device_without_the_cpus_help_is_not_trusted(tmp_path: Path, flags: str) -> None:
    (tmp_path / "cpuinfo").write_text(CPU.format(flags))
    (tmp_path / "kvm").touch()
    probed = kvm.probe(tmp_path / "kvm", tmp_path / "cpuinfo")
    assert probed.virt == "tcg"
    assert "neither vmx nor svm" in probed.reason


def test_a_kvm_device_that_does_not_answer_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPU.format("svm"))
    assert kvm.probe(tmp_path / "kvm", tmp_path / "cpuinfo").virt == "tcg"
    (tmp_path / "kvm").touch()
    probed = kvm.probe(tmp_path / "kvm", tmp_path / "cpuinfo")
    assert probed.virt == "tcg"
    assert "does not answer" in probed.reason


def test_a_transport_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_KERNEL_DEVICE", Path("/nowhere/vhost-vsock"))
    with pytest.raises(OperatorError, match="no usable") as caught:
        transport.choose("vhost-vsock")
    assert caught.value.code is ExitCode.UNAVAILABLE
    assert transport.choose("auto")[0] == "vhost-user"
    assert transport.choose("auto", registered=False)[0] == "vhost-device-vsock"


def _serve(listener: socket.socket, answer: bytes) -> list[bytes]:
    heard: list[bytes] = []

    def run() -> None:
        stream, _ = listener.accept()
        with stream:
            heard.append(stream.recv(64))
            stream.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    return heard


def test_a_hybrid_connection_is_asked_for_by_port(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        heard = _serve(listener, b"OK 5\nSSH-2.0-x")
        with hybrid.connect(tmp_path / "s", 22, 5.0) as stream:
            assert stream.recv(64) == b"SSH-2.0-x", "what follows the answer is the guest's"
        assert heard == [b"CONNECT 22\n"]


@pytest.mark.parametrize("answer", [b"", b"NO\n", b"x" * 100])
def test_a_port_nobody_listens_on_is_unavailable(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        _serve(listener, answer)
        with pytest.raises(OperatorError, match="nothing listens on vsock port 22") as caught:
            hybrid.connect(tmp_path / "s", 22, 5.0, vm="a")
    assert caught.value.code is ExitCode.UNAVAILABLE
    assert caught.value.vm == "a"


def test_a_guest_that_does_not_answer_is_a_timeout(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(OperatorError) as caught:
            hybrid.connect(tmp_path / "s", 22, 0.1)
    assert caught.value.code is ExitCode.TIMEOUT


def test_what_a_guest_sends_arrives_at_a_socket_of_roots_alone(tmp_path: Path) -> None:
    with hybrid.listen(tmp_path / "s", 29806):
        assert (tmp_path / "s_29806").stat().st_mode & 0o777 == 0o600
    with hybrid.listen(tmp_path / "s", 29806):  # a socket file that was left is replaced
        pass


def test_the_console_is_shown_without_control_sequences(tmp_path: Path) -> None:
    console.path(tmp_path).write_bytes(b"one\r\n\x1b[0;1;31mtwo\x1b[0m\r\n\r\n\x1b[2Jthree\x00")
    assert console.last_lines(tmp_path, 2) == ["two", "three"]
    assert console.last_lines(tmp_path / "nowhere") == []
    assert not console.panicked(tmp_path)
    console.path(tmp_path).write_bytes(b"[ 1.0] Kernel panic - not syncing: VFS\r\nmore\r\n")
    assert console.panicked(tmp_path)


def test_a_pid_used_again_is_never_ended(tmp_path: Path) -> None:
    started = process.start(["sleep", "60"], tmp_path / "log")
    impostor = process.Recorded(started.pid, started.started - 100)
    process.end(impostor)
    assert process.find(started) is not None
    process.end(started)
    os.waitpid(started.pid, 0)
    assert process.find(started) is None
    process.end(started)
