#!/bin/sh
# A real Slurm of two nodes on one machine, without systemd: the controller and each node have a network namespace with
# its own name and address, and all share the machine's disk. Needs root on Debian, with slurm-wlm, munge and iproute2.
#
#   sh tests/launch/slurm_up.sh up                        start munge (if it is not running), slurmctld, and slurmd on each node
#   sh tests/launch/slurm_up.sh on head sbatch launch/slurm.sh   run a command on head, node1 or node2
#   sh tests/launch/slurm_up.sh down                      stop everything that `up` started, and remaining jobs
#
# CLUSTER: a folder for its files, whose name sets this cluster apart from others.
# GPUS: graphics cards that each node pretends to have (0). Nothing computes on them.
set -eu
CLUSTER=${CLUSTER:?a folder for its files}
GPUS=${GPUS:-0}
name=$(basename "$CLUSTER")
hosts='head:10.77.0.254 node1:10.77.0.1 node2:10.77.0.2'
export SLURM_CONF="$CLUSTER/slurm.conf"

on() {
    host=$1 && shift
    # not `ip netns exec`: slurmd does not start in the /sys that it mounts
    exec nsenter --net="/run/netns/$name-$host" unshare --uts --mount \
        sh -c 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"' "$CLUSTER/hosts" "$host" "$@"
}

background() { # background NAME HOST COMMAND...: start a daemon with its output in $CLUSTER/NAME.log
    log=$1 && shift
    (on "$@") >"$CLUSTER/$log.log" 2>&1 </dev/null &
}

wires() { # a bridge on head, to which each node is plugged
    for host in $hosts; do
        ip netns add "$name-${host%:*}"
        ip -n "$name-${host%:*}" link set lo up
        echo "${host#*:} ${host%:*}" >>"$CLUSTER/hosts"
    done
    ip -n "$name-head" link add bridge type bridge
    ip -n "$name-head" addr add 10.77.0.254/24 dev bridge
    ip -n "$name-head" link set bridge up
    for node in node1 node2; do
        ip link add eth0 netns "$name-$node" type veth peer name "to-$node" netns "$name-head"
        ip -n "$name-head" link set "to-$node" master bridge up
        ip -n "$name-$node" addr add "10.77.0.${node#node}/24" dev eth0
        ip -n "$name-$node" link set eth0 up
    done
}

configuration() {
    gres=
    : >"$CLUSTER/gres.conf"
    if [ "$GPUS" -gt 0 ]; then
        gres="Gres=gpu:$GPUS"
        for i in $(seq 0 $((GPUS - 1))); do mknod "$CLUSTER/gpu$i" c 1 3; done # /dev/null under other names
        echo "Name=gpu File=$CLUSTER/gpu[0-$((GPUS - 1))]" >"$CLUSTER/gres.conf"
    fi
    echo 'CgroupPlugin=cgroup/v1' >"$CLUSTER/cgroup.conf" # cgroups are not used, but slurmd ends if it finds no v2
    cat >"$CLUSTER/slurm.conf" <<CONF
ClusterName=$name
SlurmctldHost=head(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$CLUSTER/state
SlurmdSpoolDir=$CLUSTER/spool-%n
SlurmctldPidFile=$CLUSTER/slurmctld.pid
SlurmdPidFile=$CLUSTER/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
MessageTimeout=30
GresTypes=gpu
NodeName=node[1-2] NodeAddr=10.77.0.[1-2] CPUs=8 RealMemory=4000 State=UNKNOWN $gres
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

munge_up() {
    munge -n >/dev/null 2>&1 && return
    [ -s /etc/munge/munge.key ] || mungekey --create 2>/dev/null || dd if=/dev/urandom of=/etc/munge/munge.key bs=128 count=1
    chown munge /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
    mkdir -p /run/munge && chown munge /run/munge && chmod 755 /run/munge
    runuser -u munge -- munged --foreground >"$CLUSTER/munged.log" 2>&1 </dev/null &
    for _ in $(seq 50); do if munge -n >/dev/null 2>&1; then return; else sleep 0.2; fi; done
    echo 'munged does not start' >&2
    exit 1
}

up() {
    mkdir -p "$CLUSTER/state" "$CLUSTER/spool-node1" "$CLUSTER/spool-node2"
    printf '127.0.0.1 localhost\n' >"$CLUSTER/hosts"
    configuration
    munge_up
    wires
    background slurmctld head slurmctld -D -i
    for node in node1 node2; do background "slurmd-$node" "$node" slurmd -D -N "$node"; done
    for _ in $(seq 120); do
        if [ "$( (on head sinfo --noheader --Node --states idle --format %N) 2>/dev/null | wc -l)" = 2 ]; then return; fi
        sleep 0.5
    done
    echo "the nodes do not come up; the logs are in $CLUSTER" >&2
    exit 1
}

down() { # munge stays: another cluster may use it
    for host in $hosts; do
        ip netns pids "$name-${host%:*}" 2>/dev/null | xargs -r kill -9 2>/dev/null || :
        ip netns del "$name-${host%:*}" 2>/dev/null || :
    done
    rm -rf "$CLUSTER"
}

case ${1:-} in
    up | on | down) "$@" ;;
    *) sed -n '2,11s/^# *//p' "$0" && exit 2 ;;
esac
