#!/usr/bin/env bash
# The whole story on one machine: image a real Debian server, change it, image it again, verify,
# restore it to an empty disk, and boot that disk. `make demo` sets everything up and runs this.
#
#   scripts/demo.sh [bios|uefi]
#
# Work files lie in DEMO_DIR (default: a new folder in /var/tmp, removed at the end).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH:/usr/sbin:/sbin"

firmware=${1:-uefi}
if [[ -n ${DEMO_DIR:-} ]]; then
    work=$DEMO_DIR
    mkdir -p "$work"
else
    work=$(mktemp -d /var/tmp/imager-demo.XXXXXX)
    trap 'rm -rf "$work"' EXIT
fi
disk=$work/server.img
target=$work/empty-disk.img
export IMAGER_REPO=$work/images

if [[ -t 1 ]]; then
    bold=$'\e[1m' blue=$'\e[36m' plain=$'\e[0m'
else
    bold='' blue='' plain=''
fi
step() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
note() { printf '   %s\n' "$*"; }

# Print a command as it would be typed, and run it.
show() {
    local word line='$'
    for word in "$@"; do
        [[ $word != *' '* ]] || word="'$word'"
        line+=" $word"
    done
    printf '%s%s%s\n' "$blue" "$line" "$plain"
    "$@"
}

# Mount the root filesystem inside the disk image, and change it as an administrator would.
change_server() {
    local mountpoint=$work/mnt start
    mkdir -p "$mountpoint"
    start=$(sfdisk --json "$disk" | python -c '
import json, sys
print(json.load(sys.stdin)["partitiontable"]["partitions"][3]["start"] * 512)')
    mount -o "loop,offset=$start" "$disk" "$mountpoint"
    echo 'changed after the first image' >"$mountpoint/etc/motd"
    head -c 20M /dev/urandom >"$mountpoint/srv/new-data.bin"
    umount "$mountpoint"
}

step "A server's disk: Debian 12, GPT, ESP, swap, ext4 (built once, then cached)"
show python -m tests.machines.debian_disk "$disk"
note "$(du -h --apparent-size "$disk" | cut -f1) disk, $(du -h "$disk" | cut -f1) of it ever written"

step "What is on it, and what a capture would read"
show imager inspect "$disk"

step "Take an image: only blocks in use, compressed, each with its digest"
show imager capture "$disk" --name server --note "before the change"

step "Change the server: a new message of the day and 20 MiB of new data"
change_server
note "done"

step "Take a second image: only what changed is stored"
show imager capture "$disk" --name server --note "after the change"
show imager list
note "repository: $(du -sh "$IMAGER_REPO" | cut -f1)"

step "Verify: read every stored block and check its digest"
show imager verify

step "Restore the newest image to an empty disk"
show truncate -s "$(stat -c %s "$disk")" "$target"
show imager restore server@latest "$target" --yes

step "Boot the restored disk ($firmware firmware, emulated: about half a minute)"
show python -m tests.machines.qemu "$target" --firmware "$firmware" --last-lines 12

step "Done: the server is back, from one image, with one command"
