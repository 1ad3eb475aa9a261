#!/usr/bin/env bash
# Boots systemd as process 1 of a machine made of name spaces; `tests/machines.py` runs this in them.
#
# usage: boot_machine.sh FOLDER SHARED OPT
#
# The root is an overlay over this machine's own: what is written there is lost. SHARED is seen as /mnt, OPT as /opt. Homes, /tmp, /run, /var, /work and /opt of this machine are not seen, so nothing of a checkout or of pip's can be
# used by chance. /proc/sys and /sys can't be written, so that the kernel's settings stay.
set -euo pipefail
folder=$1 shared=$2 opt=$3
new=$folder/root

mkdir -p "$folder/overlay" "$new"
mount -t tmpfs tmpfs "$folder/overlay"
mkdir "$folder/overlay/upper" "$folder/overlay/work"
mount -t overlay -o "lowerdir=/,upperdir=$folder/overlay/upper,workdir=$folder/overlay/work" overlay "$new"
for path in home root run srv tmp var/lib var/log work; do
    mkdir -p "$new/$path"
    mount -t tmpfs -o mode=755 tmpfs "$new/$path"
done
chmod 1777 "$new/tmp"
chmod 700 "$new/root"
mount --bind "$opt" "$new/opt"
mount --bind "$shared" "$new/mnt"

mount -t proc proc "$new/proc"
mount --bind "$new/proc/sys" "$new/proc/sys"
mount -o remount,bind,ro "$new/proc/sys"
mount -t sysfs -o ro sysfs "$new/sys"
mount -t cgroup2 cgroup2 "$new/sys/fs/cgroup"

mount -t tmpfs -o mode=755 tmpfs "$new/dev"
for device in null zero full random urandom tty; do
    touch "$new/dev/$device"
    mount --bind "/dev/$device" "$new/dev/$device"
done
mkdir "$new/dev/pts" "$new/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$new/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$new/dev/shm"
ln -s pts/ptmx "$new/dev/ptmx"
ln -s /proc/self/fd "$new/dev/fd"

# Nothing of this machine's own services; no /etc/xdg/pip, no units of fedimpres.
rm -rf "$new"/etc/systemd/system/*.wants "$new"/etc/systemd/system/fed* "$new/etc/xdg/pip"

ip link set lo up
mkdir "$new/run/old"
cd "$new"
pivot_root . run/old
umount -l /run/old
exec env -i container=other PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=basic.target --show-status=no </dev/null
