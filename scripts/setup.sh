#!/usr/bin/env bash
# Installs what a bare Debian 12 needs: Debian packages, and .venv/ with the project in it.
#
#   scripts/setup.sh runtime|demo|test|bench    .venv/ here, the project editable in it
#   scripts/setup.sh install FOLDER             the runtime level, for use: FOLDER, not editable
#
# demo holds runtime; test and bench hold demo. Safe to run again: it only does what is missing, and
# needs root only to install packages.
set -euo pipefail

# pyparted has no wheels: it is compiled against libparted.
build="gcc libc6-dev pkg-config libparted-dev"
# What rescue media are made of.
media="grub-common grub-pc-bin grub-efi-amd64-bin grub-efi-amd64-signed shim-signed busybox-static
       dropbear-bin fuse3 xfsprogs btrfs-progs"
runtime="$build e2fsprogs fdisk mount util-linux $media"
demo="$runtime dosfstools mtools mmdebstrap qemu-system-x86 qemu-utils ovmf zstd"
test="$demo gdisk xorriso genisoimage ntfs-3g exfatprogs f2fs-tools cryptsetup-bin lvm2 mdadm dmsetup
      thin-provisioning-tools exfat-fuse
      libnbd-bin nbd-client partclone lz4 bzip2 xz-utils openssl attr acl openssh-client chromium fonts-dejavu-core
      restic borgbackup postgresql postfix dovecot-imapd"
bench="$demo partclone borgbackup restic fio time"

export PIP_DISABLE_PIP_VERSION_CHECK=1
# pyparted has no pyproject.toml; an older pip would build it the old way, with a warning.
export PIP_USE_PEP517=1

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The caller's python3 when it is new enough, else Debian's own.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.11 /usr/bin/python3; do
        if [[ -n $candidate ]] && new_enough "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    fail "needs Python 3.11 or newer; name one with PYTHON=/path/to/python3"
}

# Debian splits its Python: the headers and the venv module are packages of their own.
python_packages() {
    if [[ $python == /usr/bin/* ]]; then
        local version
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "python$version-dev python$version-venv"
    fi
}

missing_packages() {
    local package
    for package in "$@"; do
        dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
            echo "$package"
    done
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    if ((${#missing[@]} == 0)); then
        return
    fi
    if ((EUID != 0)); then
        fail "these Debian packages are missing, and installing them needs root:" \
            "sudo apt-get install --no-install-recommends ${missing[*]}"
    fi
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3)
    "${apt[@]}" update || say "apt-get update failed; trying with the lists that are there"
    without_services "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null
}

# Debian starts a server when it is installed; the tests run their own beside it (policy-rc.d is
# described in /usr/share/doc/init-system-helpers/README.policy-rc.d.gz).
without_services() {
    local policy=/usr/sbin/policy-rc.d
    if [[ -e $policy ]]; then
        "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    local code=0
    "$@" || code=$?
    rm -f "$policy"
    return "$code"
}

make_venv() {
    local folder=$1
    # Also when its Python has gone or was replaced.
    "$folder/bin/python" -c 'import pip' 2>/dev/null && return
    say "making $folder with $python"
    "$python" -m venv --clear "$folder"
}

# The work tree in .venv, with the developer's tools: they are small beside the rest, and one venv
# for all levels means that no level takes away what another brought.
install_for_work() {
    local stamp=.venv/setup-stamp wanted
    # The folder too: a venv that was moved with its checkout still points to the old place.
    wanted=$({ pwd && cat scripts/setup.sh pyproject.toml; } | sha256sum)
    make_venv .venv
    if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
        say "pip install -e .[dev]"
        .venv/bin/python -m pip install --quiet -e '.[dev]'
        echo "$wanted" >"$stamp"
    fi
}

install_for_use() {
    make_venv "$1"
    say "pip install . in $1"
    # Setuptools would pack modules that an earlier build left here and that are gone since.
    rm -rf build
    "$1/bin/python" -m pip install --quiet --upgrade .
}

cd "$(dirname "$0")/.."
# One setup at a time: this file is the lock.
exec 9<scripts/setup.sh
flock 9

level=${1:-runtime}
case $level in
runtime | install) packages=$runtime ;;
demo) packages=$demo ;;
test) packages=$test ;;
bench) packages=$bench ;;
*) fail "unknown level $level: runtime, demo, test, bench or install FOLDER" ;;
esac
python=$(find_python)
# shellcheck disable=SC2046,SC2086 # lists of words are meant
install_packages $(python_packages) $packages
if [[ $level == install ]]; then
    install_for_use "${2:?install needs a folder}"
else
    install_for_work
fi
