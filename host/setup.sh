#!/bin/sh
# Install what a Debian 12 or 13 machine needs to build, test and demonstrate tmem. Idempotent; quick when nothing is
# to do. Called by `make setup`.
#
#   host/setup.sh packages [bench]   Debian packages (`bench`: also the peers the benchmarks measure against)
#   host/setup.sh rust               a Rust toolchain: from PATH, from Debian, or from rustup, in that order
#   host/setup.sh venv               the virtual environment .venv with the project, editable
#   host/setup.sh deny               cargo-deny into build/tools, for `make check`
#   host/setup.sh conformance        the suites for POSIX file systems of `make test-long`: pjdfstest, fsx, stress-ng
#   host/setup.sh peers              vhost-device-vsock, which benchmarks and long tests are held against
#   host/setup.sh fuzz               a nightly toolchain, and cargo-fuzz into build/tools, for `make fuzz`
#
# Settings, for mirrors: apt's own sources.list; PIP_INDEX_URL; cargo's config.toml; RUSTUP_DIST_SERVER and
# RUSTUP_INIT_URL. TMEM_PYTHON names the Python to use (3.11 or later).
set -eu
cd "$(dirname "$0")/.."

MIN_RUST=1.85
PACKAGES="gcc libc6-dev make git pkg-config python3 python3-venv python3-dev
 qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-clients libvirt-dev
 mmdebstrap debian-archive-keyring e2fsprogs kmod busybox-static cpio zstd xz-utils
 fio fuse3 attr acl openssh-client shellcheck ca-certificates"
BENCH_PACKAGES="bindfs libfuse3-dev redis-server memcached"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

packages() {
    wanted=$PACKAGES
    case "${1:-}" in
    bench) wanted="$wanted $BENCH_PACKAGES" ;;
    conformance) wanted="$wanted stress-ng" ;;
    esac
    missing=
    for package in $wanted; do
        state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
        [ "$state" = "install ok installed" ] || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    [ "$(id -u)" = 0 ] || die "not root, and these Debian packages are missing:$missing (try: sudo make setup)"
    say "installing Debian packages:$missing"
    # A policy-rc.d that refuses everything keeps apt from starting daemons that were only wanted as programs.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod 755 "$policy"
        trap 'rm -f "$policy"' EXIT INT TERM
    fi
    apt-get update -q
    # shellcheck disable=SC2086  # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
}

rust_version() { "$1" --version 2>/dev/null | sed -n 's/^rustc \([0-9.]*\).*/\1/p'; }

new_enough() { # VERSION: whether it is at least MIN_RUST
    [ -n "$1" ] && [ "$(printf '%s\n%s\n' "$MIN_RUST" "$1" | sort -V | head -n 1)" = "$MIN_RUST" ]
}

rust() {
    PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
    found=$(rust_version rustc || true)
    if new_enough "$found"; then
        say "Rust $found from $(command -v rustc)"
        return
    fi
    offered=$(apt-cache policy rustc 2>/dev/null | sed -n 's/^ *Candidate: \([0-9.]*\).*/\1/p')
    if new_enough "$offered"; then
        say "Rust $offered from Debian"
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends rustc cargo rustfmt rust-clippy
        return
    fi
    say "Rust from rustup, because PATH has '${found:-none}' and Debian offers '${offered:-none}' (need $MIN_RUST)"
    command -v curl >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends curl
    curl --proto '=https' --tlsv1.2 -sSf "${RUSTUP_INIT_URL:-https://sh.rustup.rs}" |
        sh -s -- -y -q --profile minimal --component rustfmt --component clippy --no-modify-path
}

venv() {
    python=${TMEM_PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$python is older than 3.11 (try: TMEM_PYTHON=/path/to/newer/python3 make setup)"
    if [ ! -x .venv/bin/python ]; then
        say "virtual environment .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    say "building and installing the project into .venv"
    .venv/bin/pip install -q "setuptools>=77" "setuptools-rust>=1.11"
    .venv/bin/pip install -q --no-build-isolation -e '.[host,guest,dev]'
}

tool() { # CRATE: its program, into build/tools
    [ ! -x "build/tools/bin/$1" ] || return 0
    say "building $1 into build/tools (some minutes, once)"
    cargo install -q --locked --root build/tools "$1"
}

deny() { command -v cargo-deny >/dev/null || tool cargo-deny; }

fuzz() {
    command -v rustup >/dev/null || die "libFuzzer wants a nightly compiler, and there is no rustup to get one from"
    if ! rustup toolchain list | grep -q '^nightly'; then
        say "nightly Rust"
        rustup toolchain install -q nightly --profile minimal
    fi
    command -v cargo-fuzz >/dev/null || tool cargo-fuzz
}

peers() { command -v vhost-device-vsock >/dev/null || tool vhost-device-vsock; }

conformance() {
    packages conformance
    peers
    tool pjdfstest
    tool fsx
}

case "${1:-}" in
packages) packages "${2:-}" ;;
rust) rust ;;
venv) venv ;;
deny) deny ;;
conformance) conformance ;;
peers) peers ;;
fuzz) fuzz ;;
*) die "usage: host/setup.sh packages [bench] | rust | venv | deny | conformance | peers | fuzz" ;;
esac
