"""Fixtures that boot VMs."""

from framework.vms import built, module_vms, vms

__all__ = ["built", "module_vms", "vms"]
