"""What a domain's XML says about tmem, and how a domain is registered by it.

    <metadata>
      <tmem:vm xmlns:tmem="https://tmem.invalid/vm/1" hybrid-socket="/run/tmem/vm/a/vsock.sock" quota="512M"
               minimum="64M" weight="100" maximum="1G"/>
    </metadata>

All attributes are optional; `cid` is for people, `tmemctl vm up` writes it. Without `hybrid-socket` the CID
of the domain's `<vsock>` device is used. `maximum` is the most the guest's RAM and its persistent pages may
be together.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from tmem_host.api.types import Cid, VmSpec
from tmem_host.units import parse_size

NAMESPACE = "https://tmem.invalid/vm/1"
KEY = "tmem"
"""Prefix libvirt keeps the element under (`virsh metadata --key`)."""

_ATTRIBUTES = ("cid", "hybrid-socket", "quota", "minimum", "weight", "maximum")


class MetadataError(ValueError):
    """The element cannot be used; the text says why."""


def parse_spec(domain_xml: str) -> VmSpec | None:
    """How to register the domain, or None if its XML does not mention tmem. Raises `MetadataError`."""
    # The XML is libvirt's own, not a guest's.
    root = ET.fromstring(domain_xml)  # noqa: S314
    element = root.find(f"./metadata/{{{NAMESPACE}}}vm")
    if element is None:
        return None
    for key in element.keys():  # noqa: SIM118  # an Element is not a mapping
        if key not in _ATTRIBUTES:
            raise MetadataError(f"unknown attribute {key!r}; there are {', '.join(_ATTRIBUTES)}")
    maximum_bytes = _size(element, "maximum")
    persistent_bytes = None
    if maximum_bytes is not None:
        memory_bytes = _memory_bytes(root)
        if maximum_bytes < memory_bytes:
            raise MetadataError(
                f"maximum is {maximum_bytes} bytes, below the domain's memory, {memory_bytes}"
            )
        persistent_bytes = maximum_bytes - memory_bytes
    hybrid_socket = element.get("hybrid-socket")
    return VmSpec(
        hybrid_socket=hybrid_socket,
        cid=None if hybrid_socket else _cid(root),
        quota_bytes=_size(element, "quota"),
        min_bytes=_size(element, "minimum") or 0,
        weight=_weight(element),
        persistent_max_bytes=persistent_bytes,
    )


def _size(element: ET.Element, key: str) -> int | None:
    text = element.get(key)
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise MetadataError(f"{key}: {error}") from None


def _weight(element: ET.Element) -> int:
    text = element.get("weight", "100")
    if not text.isdigit():
        raise MetadataError(f"weight: {text!r} is not a whole number")
    return int(text)


def _cid(root: ET.Element) -> Cid | None:
    cid = root.find("./devices/vsock/cid")
    address = cid.get("address") if cid is not None else None
    return Cid(int(address)) if address else None


def _memory_bytes(root: ET.Element) -> int:
    memory = root.find("./memory")
    if memory is None or not memory.text:
        return 0
    unit = memory.get("unit", "KiB")
    return parse_size(memory.text.strip() + ("" if unit in ("b", "bytes") else unit))
