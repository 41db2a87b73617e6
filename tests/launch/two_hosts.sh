#!/bin/sh
# Two hosts on one machine, joined by a cable: h1 (10.78.0.1) and h2 (10.78.0.2). A host is a network namespace with its
# own host name and /etc/hosts; the disk is the machine's. Needs root on Linux, with iproute2.
#
#   sh tests/launch/two_hosts.sh up [good|debian|nameless]   good: both know both names; debian: a host's own name is 127.0.1.1
#                                                     on itself, as Debian's installer leaves it; nameless: addresses only
#   sh tests/launch/two_hosts.sh on h1 COMMAND...            run a command there
#   sh tests/launch/two_hosts.sh cut|heal                    take the cable away (packets vanish without an error); put it back
#   sh tests/launch/two_hosts.sh down                        kill all their processes, and remove them
#
# HOSTS: a folder for its files, whose name sets this pair of hosts apart from others.
set -eu
HOSTS=${HOSTS:?a folder for its files}
name=$(basename "$HOSTS")

up() {
    mkdir -p "$HOSTS"
    for i in 1 2; do
        ip netns add "$name-h$i"
        ip -n "$name-h$i" link set lo up
        echo "127.0.0.1 localhost" >"$HOSTS/h$i"
        case ${1:-good} in
            good) printf '10.78.0.1 h1\n10.78.0.2 h2\n' >>"$HOSTS/h$i" ;;
            debian) printf '127.0.1.1 h%s\n10.78.0.%s h%s\n' "$i" $((3 - i)) $((3 - i)) >>"$HOSTS/h$i" ;;
        esac
    done
    ip link add cable netns "$name-h1" type veth peer name cable netns "$name-h2"
    for i in 1 2; do
        ip -n "$name-h$i" addr add "10.78.0.$i/24" dev cable
        ip -n "$name-h$i" link set cable up
    done
}

on() {
    host=$1 && shift
    # not `ip netns exec`, which changes /sys too; sh -c gets the hosts file, the host's name and the command
    exec nsenter --net="/run/netns/$name-$host" unshare --uts --mount \
        sh -c 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"' "$HOSTS/$host" "$host" "$@"
}

down() {
    for i in 1 2; do
        ip netns pids "$name-h$i" 2>/dev/null | xargs -r kill -9 2>/dev/null || :
        ip netns del "$name-h$i" 2>/dev/null || :
    done
    rm -rf "$HOSTS"
}

case ${1:-} in
    up | on | down) "$@" ;;
    cut) ip -n "$name-h1" link set cable down ;;
    heal) ip -n "$name-h1" link set cable up ;;
    *) sed -n '2,12s/^# *//p' "$0" && exit 2 ;;
esac
