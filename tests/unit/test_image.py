"""Image definitions, initramfs archives, and the cache of images."""

from __future__ import annotations

import io
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from framework.daemon import ROOT
from tmem_host.errors import ExitCode, OperatorError
from tmem_host.units import parse_size
from tmem_host.vm import definition, images, rootfs
from tmem_host.vm.definition import Definition
from tmem_host.vm.initramfs import Archive, add_modules
from tmem_host.vm.rootfs import Progress

VERSION = "6.12.0-test"


def _cpio(archive: Archive) -> bytes:
    out = io.BytesIO()
    archive.write(out)
    return out.getvalue()


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of definitions with one image, `small`."""
    top = tmp_path / "definitions"
    (top / "small/files").mkdir(parents=True)
    (top / "boot").mkdir()
    (top / "boot/init").write_text("#!/bin/sh\n")
    (top / "small/image.toml").write_text('description = "d"\nsuite = "trixie"\npackages = ["a"]\n')
    monkeypatch.setattr(definition, "definitions_directory", lambda: top)
    return top


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("TMEM_IMAGES", str(path))
    return path


def _pretend_build(out: Path) -> None:
    for name in ("vmlinuz", "initrd", "data.ext4"):
        (out / name).write_bytes(b"x")
    (out / "host_key.pub").write_text("ssh-ed25519 AAAA\n")
    (out / "kernel_version").write_text(VERSION + "\n")


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is the oracle")
def test_cpio_reads_what_was_written(tmp_path: Path) -> None:
    archive = Archive()
    archive.file("/usr/bin/tool", b"#!/bin/sh\n", 0o755)
    archive.file("/etc/odd name", b"123")
    archive.file("/empty", b"")
    archive.symlink("/bin", "usr/bin")
    archive.directory("/root", 0o700)
    subprocess.run(["cpio", "-id", "--quiet"], input=_cpio(archive), cwd=tmp_path, check=True)
    assert (tmp_path / "usr/bin/tool").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "usr/bin/tool").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "etc/odd name").read_bytes() == b"123"
    assert (tmp_path / "empty").read_bytes() == b""
    assert (tmp_path / "bin").readlink() == Path("usr/bin")
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o700


def test_archives_can_follow_each_other() -> None:
    archive = Archive()
    archive.file("/x", b"y")
    # The kernel wants every archive to begin at a multiple of four bytes; ours are padded to 512.
    assert len(_cpio(archive)) % 512 == 0


def test_a_file_is_replaced_by_one_of_the_same_path() -> None:
    archive = Archive()
    archive.file("/x", b"old")
    archive.file("x", b"new")
    written = _cpio(archive)
    assert b"new" in written
    assert b"old" not in written


@pytest.fixture
def kernel_root(tmp_path: Path) -> Path:
    base = tmp_path / "root/usr/lib/modules" / VERSION
    base.mkdir(parents=True)
    (base / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    (base / "modules.dep").write_text(
        "kernel/vsock-virtio.ko: kernel/common.ko kernel/vsock.ko\n"
        "kernel/common.ko: kernel/vsock.ko\n"
        "kernel/vsock.ko:\n"
        "kernel/nbd.ko:\n"
    )
    for name in ("vsock-virtio", "common", "vsock", "nbd"):
        (base / "kernel").mkdir(exist_ok=True)
        (base / "kernel" / f"{name}.ko").write_bytes(name.encode())
    return tmp_path / "root"


def test_modules_come_with_what_they_need_and_in_order(kernel_root: Path) -> None:
    archive = Archive()
    add_modules(archive, kernel_root, ["ext4", "vsock_virtio"], ["nbd"])
    written = _cpio(archive).decode()
    where = f"/lib/modules/{VERSION}"
    assert f"{where}/vsock.ko\n{where}/common.ko\n{where}/vsock-virtio.ko\n" in written
    assert "nbd.ko: \n" in written
    assert f"{where}/nbd.ko\n" not in written, "a module that is only carried is not loaded"


def test_a_module_the_kernel_lacks_is_named(kernel_root: Path) -> None:
    with pytest.raises(OperatorError, match=r"no module 'warp'"):
        add_modules(Archive(), kernel_root, ["warp"])


@pytest.mark.parametrize("name", ["debian", "mini", "nested", "plain"])
def test_the_provided_definitions_are_sound(name: str) -> None:
    loaded = definition.load(name)
    assert loaded.description
    base = definition.load(loaded.same_as) if loaded.same_as else loaded
    assert base.suite == "trixie"
    assert parse_size(base.data_size) > 0
    assert len(set(base.mask)) == len(base.mask)
    assert len(definition.digest(name)) == 16


def test_plain_shares_all_but_the_payload_with_debian() -> None:
    assert definition.digest("plain") == definition.digest("debian") != definition.digest("mini")
    assert definition.load("plain").payload is None


def test_an_unknown_image_is_named_with_those_there_are() -> None:
    with pytest.raises(OperatorError, match=r"no image 'windows'.*debian, mini, nested, plain") as caught:
        definition.load("windows")
    assert caught.value.code is ExitCode.NOT_FOUND


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('description = "d"\nkolour = 1\n', "kolour"),
        ('description = "d"\ndata_size = "much"\n', "'much' is not a size"),
        ('description = "d"\nvariant = "huge"\n', "huge"),
        ("not toml", "image.toml"),
    ],
)
def test_a_wrong_definition_is_refused_with_file_and_key(
    definitions: Path, text: str, complaint: str
) -> None:
    (definitions / "small/image.toml").write_text(text)
    with pytest.raises(OperatorError) as caught:
        definition.load("small")
    assert caught.value.code is ExitCode.USAGE
    assert complaint in caught.value.message
    assert "image.toml" in caught.value.message


def test_the_digest_follows_the_definition_and_the_files_beside_it(definitions: Path) -> None:
    before = definition.digest("small")
    (definitions / "small/files/motd").write_text("hello")
    with_file = definition.digest("small")
    (definitions / "boot/init").chmod(0o755)
    assert len({before, with_file, definition.digest("small")}) == 3


@pytest.mark.usefixtures("definitions", "cache")
def test_an_image_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def build(_definition: Definition, _sources: Path, out: Path, _progress: Progress) -> None:
        calls.append(out)
        _pretend_build(out)

    monkeypatch.setattr(rootfs, "build", build)
    first = images.build("small")
    assert images.build("small") == first
    assert first.host_key == "ssh-ed25519 AAAA"
    assert len(calls) == 1
    images.build("small", force=True)
    assert len(calls) == 2
    assert [info.built for info in images.list_images()] == [True]


@pytest.mark.usefixtures("definitions")
def test_a_build_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_definition: Definition, _sources: Path, out: Path, _progress: Progress) -> None:
        (out / "half").write_text("written")
        raise OperatorError("the mirror is gone")

    monkeypatch.setattr(rootfs, "build", build)
    with pytest.raises(OperatorError, match="the mirror is gone"):
        images.build("small")
    assert [path.name for path in cache.iterdir()] == [".small.lock"]
    with pytest.raises(OperatorError, match="is not built") as caught:
        images.get("small")
    assert caught.value.code is ExitCode.NOT_FOUND


@pytest.mark.usefixtures("definitions")
def test_what_a_killed_build_left_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / ".small-4711").mkdir(parents=True)
    monkeypatch.setattr(rootfs, "build", lambda _d, _s, out, _p: _pretend_build(out))
    images.build("small")
    assert not (cache / ".small-4711").exists()


@pytest.mark.usefixtures("definitions")
def test_a_full_disk_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 20))
    with pytest.raises(OperatorError, match=r"needs 3 GiB of free disk") as caught:
        images.build("small")
    assert caught.value.code is ExitCode.NO_SPACE
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("small-*"))


def test_a_step_that_fills_the_disk_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="the disk is full") as caught:
        rootfs._run(["sh", "-c", "echo 'tar: No space left on device'; exit 2"], tmp_path / "log")
    assert caught.value.code is ExitCode.NO_SPACE


def test_a_step_that_fails_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"(?s)failed with status 9:.*the reason"):
        rootfs._run(["sh", "-c", "seq 100; echo the reason; exit 9"], tmp_path / "log")


def test_a_mirror_of_ones_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMEM_DEBIAN_MIRROR", "http://mirror.test/debian")
    assert rootfs.apt_sources("trixie") == [
        "deb http://mirror.test/debian trixie main",
        "deb http://mirror.test/debian trixie-updates main",
    ]


def test_an_installation_has_every_file_of_the_definitions() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    installed = {
        f"{directory.removeprefix('share/tmem/')}/{Path(name).name}": name
        for directory, names in listed.items()
        for name in names
        if name.startswith("images/")
    }
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "images").rglob("*") if path.is_file()}
    assert installed == {name: name for name in there}
