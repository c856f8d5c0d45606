#!/bin/sh
# Unpack Debian's kernel sources into ROOT/srv/data/linux, ready to compile: `kernel-source.sh ROOT PACKAGE`.
# Left out is what the configurations below do not compile: other architectures, drivers, sound, documentation.
# Configured and prepared here, at native speed, so that a guest spends its time compiling.
set -eu
root=$1 package=$2
chroot "$root" apt-get install -q -y --no-install-recommends "$package"
mkdir -p "$root/srv/data"
tar -C "$root/srv/data" -xJf "$root/usr/src/$package.tar.xz" --wildcards \
    --exclude='*/Documentation/*/*' --exclude='*/arch/[!x]*/*.[chSs]' --exclude='*/arch/*.dts*' --exclude='*/arch/xtensa/*.[chS]' \
    --exclude='*/drivers/*.[cS]' --exclude='*/drivers/gpu/drm/amd/include/*' --exclude='*/sound/*.c' \
    --exclude='*/tools/testing/*'
mv "$root/srv/data/$package" "$root/srv/data/linux"
chroot "$root" apt-get purge -q -y "$package"
chroot "$root" make -s -C /srv/data/linux tinyconfig
chroot "$root" make -s -C /srv/data/linux -j2 prepare
