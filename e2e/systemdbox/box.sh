#!/bin/bash
# Turns into the systemd of a box. The Go side starts it as PID 1 of new pid,
# mount, uts, ipc and network namespaces:
#
#   box.sh DIR CGROUP_DIR=MOUNT_OPTIONS...
#
# DIR is an empty directory to mount on. Each CGROUP_DIR is a cgroup made for the
# box in one hierarchy of the host, and MOUNT_OPTIONS what mounts that hierarchy
# (empty: cgroup2). All that the box writes goes to a tmpfs over the machine's own
# root, and is gone with the last of its processes.
set -euo pipefail

if [ "$1" != --inner ]; then
  # 0 is the writing process. Every hierarchy, before the cgroup namespace is
  # made: systemd would build its slices in the host's root of one left out.
  for pair in "${@:2}"; do echo 0 >"${pair%%=*}/cgroup.procs"; done
  exec unshare --cgroup bash "$0" --inner "$@"
fi
shift
dir=$1
shift

mount --make-rprivate /
mount -t tmpfs tmpfs "$dir"
mkdir "$dir"/{up,work,root}
root=$dir/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/up,workdir=$dir/work" "$root"

# A promferry that is installed on this machine is none of the box's.
rm -rf "$root"/var/lib/promferry-* "$root"/var/lib/private/promferry-*

mount -t proc proc "$root/proc"
for d in kernel vm fs; do
  mount --bind "$root/proc/sys/$d" "$root/proc/sys/$d"
  mount -o remount,bind,ro "$root/proc/sys/$d"
done
mount -t sysfs -o ro sysfs "$root/sys"
cg=$root/sys/fs/cgroup
# One hierarchy is cgroup2 alone; more are the v1 ones, with cgroup2 in "unified".
if [ $# -gt 1 ]; then mount -t tmpfs -o mode=755 tmpfs "$cg"; fi
for pair in "$@"; do
  options=${pair#*=}
  if [ $# = 1 ]; then
    mount -t cgroup2 cgroup2 "$cg"
  elif [ -z "$options" ]; then
    mkdir "$cg/unified"
    mount -t cgroup2 cgroup2 "$cg/unified"
  else
    name=${options#none,name=}
    mkdir "$cg/$name"
    mount -t cgroup -o "$options" cgroup "$cg/$name"
  fi
done

mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root"/dev/{pts,shm}
for n in null zero full random urandom tty; do
  touch "$root/dev/$n"
  mount --bind "/dev/$n" "$root/dev/$n"
done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"

# Only what a test puts there is enabled: none of the host's own services. What
# would reach for hardware or the kernel's settings is masked.
mount -t tmpfs -o mode=755 tmpfs "$root/etc/systemd/system"
for unit in dev-hugepages.mount dev-mqueue.mount sys-fs-fuse-connections.mount \
  sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
  systemd-modules-load.service systemd-random-seed.service systemd-sysctl.service \
  systemd-timesyncd.service systemd-udev-trigger.service systemd-udevd.service; do
  ln -s /dev/null "$root/etc/systemd/system/$unit"
done
cat >"$root/etc/systemd/system/box.target" <<'U'
[Unit]
Requires=basic.target
After=basic.target
U
# With an empty one systemd would take this for a first boot and enable all.
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
echo box >"$root/etc/hostname"

cd "$root"
mkdir -p mnt/.old
pivot_root . mnt/.old
cd /
umount -l /mnt/.old
mount --make-rshared / # else LoadCredential= fails for a DynamicUser
exec env -i container=box PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb \
  /lib/systemd/systemd --system --unit=box.target
