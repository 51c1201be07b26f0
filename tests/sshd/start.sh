#!/bin/sh
# Becomes the SSH server of a machine of its own: process and mount namespaces with a kernel, processors, hugepages and
# packages as an EC2 instance shows them. The argument is the machine's directory. What it changes in /etc and elsewhere
# is changed in the namespace alone.
set -eu
machine=$1
stand_ins=$2
mkdir -p "$machine/layers"
mount -t tmpfs -o mode=755 layers "$machine/layers"

# A directory whose changes are thrown away.
cover() {
  layer="$machine/layers/$(echo "$1" | tr / _)"
  mkdir -p "$layer/upper" "$layer/work"
  mount -t overlay -o "lowerdir=$1,upperdir=$layer/upper,workdir=$layer/work" overlay "$1"
}
# Files of /etc that are mounts of their own would be hidden.
cp -L /etc/resolv.conf /etc/hosts "$machine/layers/"
for directory in /etc /usr/lib /usr/local /var; do cover "$directory"; done
rm -f /etc/resolv.conf /etc/hosts
cp "$machine/layers/resolv.conf" "$machine/layers/hosts" /etc/

mkdir "$machine/layers/dev"
mount --rbind /dev "$machine/layers/dev"
mount -t tmpfs -o mode=755 dev /dev
for device in full kvm null ptmx pts random shm tty urandom zero; do
  [ -e "$machine/layers/dev/$device" ] || continue
  if [ -d "$machine/layers/dev/$device" ]; then mkdir "/dev/$device"; else touch "/dev/$device"; fi
  mount --rbind "$machine/layers/dev/$device" "/dev/$device"
done
ln -s /proc/self/fd /dev/fd
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=755 sys /sys
mkdir /run/sshd

# The machine: four processors of two threads each, 7.5 GiB, Amazon Linux.
mkdir -p /sys/devices/system/cpu/cpu0/topology /sys/kernel/mm/hugepages/hugepages-2048kB
echo 0-3 >/sys/devices/system/cpu/present
echo 0,2 >/sys/devices/system/cpu/cpu0/topology/thread_siblings_list
echo 0 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
echo 0 >/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages
echo 'MemTotal:        7864320 kB' >"$machine/meminfo"
mount --bind "$machine/meminfo" /proc/meminfo
mount --bind "$machine/boot_id" /proc/sys/kernel/random/boot_id
rm -f /etc/os-release /etc/systemd/system/host-proxy.service /etc/host-proxy.toml
printf 'ID="amzn"\nVERSION_ID="2023"\n' >/etc/os-release
mkdir -p "/lib/modules/$(cat "$machine/modules")/kernel/drivers/virt/nitro_enclaves" /var/lib/host-proxy
touch "/lib/modules/$(cat "$machine/modules")/kernel/drivers/virt/nitro_enclaves/nitro_enclaves.ko"

# Root under another name: sudo has nothing to add.
echo "ec2-user:*:0:0::$machine/home:/bin/sh" >>/etc/passwd
grep -q ^sshd: /etc/passwd || echo 'sshd:*:74:74::/run/sshd:/usr/sbin/nologin' >>/etc/passwd
rm -f /usr/local/bin/host-proxy /usr/local/bin/nitro-cli
for program in "$stand_ins"/*; do
  case $program in
    */nitro-cli) ;; # comes with its package
    *) ln -sf "$program" "/usr/local/bin/$(basename "$program")" ;;
  esac
done
exec /usr/sbin/sshd -D -e -f "$machine/sshd_config"
