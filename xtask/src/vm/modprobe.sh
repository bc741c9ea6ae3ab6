#!/bin/busybox sh
# Called by the kernel for a module that somebody needs. The modules are in the root that the first process moves to;
# before it has, this one is all there is, and calling the other would be calling this again.
cd /proc/1/root && [ ! -e guest.conf ] || exit 1
exec /bin/busybox chroot /proc/1/root /sbin/modprobe "$@"
