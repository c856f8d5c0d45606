"""The cache of built images: found by the hash of their definition, built when missing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tmem_host.errors import ExitCode, OperatorError
from tmem_host.vm import definition as definitions
from tmem_host.vm import payload, rootfs
from tmem_host.vm.rootfs import Progress

_ENVIRONMENT = "TMEM_IMAGES"
_SYSTEM = Path("/var/lib/tmem/images")
_LEAST_FREE_BYTES = 3 << 30


@dataclass(frozen=True)
class Image:
    """A built image. Its files are never written to again; VMs get overlays of the disks."""

    name: str
    path: Path
    kernel: Path
    initrd: Path
    layer: Path | None
    """Second initramfs archive, with tmem's own programs."""
    root: Path | None
    """Root disk, raw ext4; `None`: the file system is the initramfs."""
    data: Path
    """Data disk, raw ext4; holds `linux/`, the kernel sources, if the image has them."""
    host_key: str
    """SSH host key, as in known_hosts: type and base64."""
    kernel_version: str
    has_agent: bool
    """Whether the agent runs in it."""


@dataclass(frozen=True)
class ImageInfo:
    """A line of the list of images."""

    name: str
    description: str
    digest: str
    built: bool
    path: Path
    size_bytes: int
    """On disk; 0 if not built."""


def cache_directory() -> Path:
    """TMEM_IMAGES if set, `build/images` in a checkout, /var/lib/tmem/images otherwise."""
    if chosen := os.environ.get(_ENVIRONMENT):
        return Path(chosen)
    checkout = Path(__file__).parents[3]
    return checkout / "build/images" if (checkout / "pyproject.toml").is_file() else _SYSTEM


def list_images() -> list[ImageInfo]:
    """All images that have a definition, built or not."""
    return [_info(name) for name in definitions.names()]


def build(name: str, *, force: bool = False, progress: Progress = lambda _: None) -> Image:
    """Build an image unless it is in the cache, and return it. Minutes the first time, instant afterwards.

    Raises OperatorError: NOT_FOUND (no such definition), PRIVILEGE, NO_SPACE, UNAVAILABLE (a tool, a part of
    tmem or the mirror is missing). A build that fails leaves nothing behind.
    """
    definition = definitions.load(name)
    base = definition.same_as or name
    target = _path(name)
    if force or not target.is_dir():
        with _lock(base, progress):
            if force or not target.is_dir():
                _build(definitions.load(base), base, target, progress)
    return get(name)


def get(name: str) -> Image:
    """A built image, its layer of tmem's own programs brought up to date. NOT_FOUND if it is not built."""
    definition = definitions.load(name)
    path = _path(name)
    if not path.is_dir():
        raise OperatorError(
            f"image {name!r} is not built", hint=f"tmemctl image build {name}", code=ExitCode.NOT_FOUND
        )
    root = path / "root.ext4"
    return Image(
        name=name,
        path=path,
        kernel=path / "vmlinuz",
        initrd=path / "initrd",
        layer=_layer(definition.payload, path) if definition.payload else None,
        root=root if root.exists() else None,
        data=path / "data.ext4",
        host_key=(path / "host_key.pub").read_text().strip(),
        has_agent=definition.payload == "agent",
        kernel_version=(path / "kernel_version").read_text().strip(),
    )


def _path(name: str) -> Path:
    base = definitions.load(name).same_as or name
    return cache_directory() / f"{base}-{definitions.digest(name)}"


def _info(name: str) -> ImageInfo:
    path = _path(name)
    size = sum(file.stat().st_blocks * 512 for file in path.iterdir()) if path.is_dir() else 0
    return ImageInfo(
        name=name,
        description=definitions.load(name).description,
        digest=definitions.digest(name),
        built=path.is_dir(),
        path=path,
        size_bytes=size,
    )


def _build(definition: definitions.Definition, base: str, target: Path, progress: Progress) -> None:
    cache = cache_directory()
    free = shutil.disk_usage(cache).free
    if free < _LEAST_FREE_BYTES:
        raise OperatorError(
            f"an image needs {_LEAST_FREE_BYTES >> 30} GiB of free disk, and {cache} has {free >> 20} MiB",
            hint=f"free space there, or set {_ENVIRONMENT} to another directory",
            code=ExitCode.NO_SPACE,
        )
    with _scratch(cache / f".{base}-{os.getpid()}") as scratch:
        started = time.monotonic()
        rootfs.build(definition, definitions.definitions_directory() / base, scratch, progress)
        for old in cache.glob(f"{base}-*"):
            shutil.rmtree(old)
        scratch.rename(target)
        progress(f"image {base} built in {time.monotonic() - started:.0f} s")


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A new directory that is gone afterwards unless it was renamed."""
    try:
        path.mkdir()
        yield path
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OperatorError(
            f"the disk is full at {path.parent}", hint="free some gigabytes there", code=ExitCode.NO_SPACE
        ) from error
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(base: str, progress: Progress) -> Iterator[None]:
    """One build of an image at a time on this machine; a second one waits for the first one's result."""
    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / f".{base}.lock").open("w")
    except PermissionError as error:
        raise OperatorError(
            f"not allowed to write to {cache}", hint="run as root", code=ExitCode.PRIVILEGE
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that builds image {base}")
            fcntl.flock(file, fcntl.LOCK_EX)
        for debris in cache.glob(f".{base}-*"):  # of a build that was killed
            shutil.rmtree(debris, ignore_errors=True)
        yield


def _layer(kind: definitions.Payload, image: Path) -> Path:
    path = image / f"layer-{payload.digest(kind)}.cpio"
    if not path.exists():
        scratch = path.with_suffix(f".{os.getpid()}")
        try:
            payload.write(kind, scratch, image / "python")
            for old in image.glob("layer-*.cpio"):
                old.unlink(missing_ok=True)
            scratch.rename(path)
        finally:
            scratch.unlink(missing_ok=True)
    return path
