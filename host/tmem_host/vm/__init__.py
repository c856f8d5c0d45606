"""Virtual machines: images, libvirt domains, the way into a guest.

| module | holds |
|---|---|
| `kvm` | whether this host can run guests on KVM, and why not |
| `libvirtd` | a connection to libvirtd, started first where no init system did |
| `supervisor` | the process under which it runs then |
| `process` | processes that outlive the command that started them |
| `definition` | what an image is made of, read from `images/NAME/image.toml` |
| `images` | the cache of built images: build, find, list |
| `rootfs` | Debian root file systems through mmdebstrap |
| `initramfs` | cpio archives: the boot stage, and the layer with tmem's own programs |
| `payload` | tmem's guest part as files, from the built wheel |
| `transport` | how vsock reaches a VM: kernel device, tmemd's own device, vhost-device-vsock |
| `hybrid` | hybrid vsock sockets: `CONNECT port`, and listening for the guest |
| `tsc` | how fast an emulated guest's time stamp counter runs |
| `domain` | a VM as libvirt XML |
| `request` | a VM as it is asked for |
| `launch` | starts a VM that is recorded, step by step |
| `disks` | overlays of the image's disks |
| `readiness` | waiting for a guest that starts, and why it does not |
| `tsc` | how fast the clock of an emulated guest runs |
| `state` | what is recorded of a VM under /run/tmemctl/vm/NAME |
| `machine` | up, down, list: everything a VM owns, in order, and undone in reverse |
| `ssh` | commands in a guest, through SSH over vsock |
| `proxy` | the same way for OpenSSH's client |
| `console` | the last lines a guest wrote |

`machine.up` is the way in; the rest is usable by itself.
"""
