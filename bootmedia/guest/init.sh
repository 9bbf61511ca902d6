#!/bin/busybox sh
# /init of the rescue system, PID 1: mounts, the check that all of the initramfs was unpacked, the
# rescue system itself; and when that dies, a shell on every console.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux LANG=C.UTF-8
export FUSE_LIBRARY_PATH=libfuse3.so.3  # mfusepy would look for it with a compiler's help
mkdir -p /proc /sys /dev /run /tmp /root /mnt
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /run/imager
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmp /tmp

say() {  # to the active console, in spite of "quiet"; a dead console is no reason to stop
    echo "<2>$1" >/dev/kmsg
}

shells() {
    for terminal in tty1 $(cat /sys/class/tty/console/active); do
        [ "$terminal" = tty0 ] || echo "$terminal"
    done | sort -u | while read -r terminal; do
        while :; do getty -n -L -l /bin/sh 0 "$terminal" vt220; sleep 1; done &
    done
    while :; do sleep 3600; done
}

# The kernel goes on when memory is too small to unpack everything: the end of each layer is missing.
for layer in python modules job; do
    [ -e "/sentinel/$layer" ] || missing="$missing $layer"
done
if [ -n "$missing" ]; then
    least=$(sed -n 's/.*imager\.memory=\([0-9]*\).*/\1/p' /proc/cmdline)
    say "imager-rescue: sentinel failed: incomplete:$missing"
    say "the machine has too little memory: the rescue system needs at least ${least:-?} MiB"
    shells
fi

python3 -I -B -m bootmedia.guest </dev/null >/run/imager/python.log 2>&1
say "imager-rescue: the rescue system ended with exit code $?"
tail -n 20 /run/imager/python.log | while read -r line; do say "$line"; done
say "press Enter for a shell; 'python3 -I -B -m bootmedia.guest' starts it again"
shells
