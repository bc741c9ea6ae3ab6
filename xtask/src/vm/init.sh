#!/bin/busybox sh
# The first process of a guest: makes the host's files its own, in memory, and runs the suites.
# What differs from run to run stands in /guest.conf.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
stty -F /dev/ttyS1 raw -echo
# The kernel talks on the first serial line; this and all that follows, on the second.
exec </dev/null >/dev/ttyS1 2>&1
. /guest.conf

leave() {
    echo "$1"
    # Time for the line to be read.
    sleep 10
    reboot -f
}
[ -n "$guest" ] || leave "@booted"

for module in /modules/*.ko; do
    # Globs that match nothing stay as they are: a kernel may have all of it built in.
    [ ! -e "$module" ] || insmod "$module" || leave "@failed could not load $module"
done
mkdir -p /lower /memory /guest
mount -t virtiofs -o ro host /lower || leave "@failed could not mount the host's files"
mount -t tmpfs -o size=75% memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/lower,upperdir=/memory/upper,workdir=/memory/work overlay /guest ||
    leave "@failed could not mount an overlay"

# (/tmp is the host's, as written to here as any other folder: the sources may lie there.)
for folder in dev proc run sys; do
    mkdir -p "/guest/$folder"
done
mount -t devtmpfs devtmpfs /guest/dev
mkdir -p /guest/dev/pts /guest/dev/shm
mount -t devpts devpts /guest/dev/pts
mount -t tmpfs tmpfs /guest/dev/shm
mount -t proc proc /guest/proc
mount -t sysfs sysfs /guest/sys
mount -t bpf bpf /guest/sys/fs/bpf
mount -t cgroup2 cgroup2 /guest/sys/fs/cgroup
mount -t tmpfs -o mode=0755 run /guest/run
mkdir -p "/guest/lib/modules/$release"
mount --bind "/guest$modules" "/guest/lib/modules/$release"
# For the tests; the kernel itself calls the initrd's, whose root stays where it is, below the new one.
rm -f /guest/sbin/modprobe
cp /sbin/modprobe.root /guest/sbin/modprobe

hostname guest
ip link set lo up
cd /guest
mount --move . /
exec chroot . /bin/sh -c "$guest; sleep 10; echo b >/proc/sysrq-trigger"
