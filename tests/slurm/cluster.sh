#!/usr/bin/env bash
# A real SLURM cluster on one machine, for tests: the controller ("head") and some nodes, each in namespaces of its own.
#
#   cluster.sh up                          start it, or what of it is missing
#   cluster.sh down                        end it and remove its directory
#   cluster.sh crash NODE                  a power failure: all that runs on the node is gone at once
#   cluster.sh start NODE [-b]             power again; -b: slurmd says that the node was rebooted, which ends its jobs
#   cluster.sh cut NODE | join NODE        pull the network cable: packets vanish, processes live on; plug it in again
#   cluster.sh controller kill|stop|start  SIGKILL or SIGTERM slurmctld; start it
#   cluster.sh exec NODE COMMAND...        run something on a node (or on head)
#
#   SLURMLAB_DIR    configuration, state, logs, keys (a directory of its own; a short path, sockets lie in it)
#   SLURMLAB_NODES  number of nodes (2)                SLURMLAB_GPUS  fake GPUs a node (2)
#   SLURMLAB_CPUS   CPUs a node claims to have (8)     SLURMLAB_MEM   MiB a node claims to have (8192)
#   SLURMLAB_TRACK  cgroup: job steps are killed with all their children, as on most clusters; needs cgroup v1's freezer
#                   linuxproc: what leaves its process tree survives (the default where there is no freezer)
#   SLURMLAB_DBD    1: accounting, needs slurmdbd and mariadb-server (0)
#   SLURMLAB_EXTRA  lines for the end of slurm.conf
#   SLURMLAB_OWNER  a pid: when that process is gone, the cluster comes down by itself
#
# Each of head and the nodes is a "holder", pid 1 of a PID namespace: killing it kills all that runs there.
# The network is a bridge in head's network namespace; this machine has one cable to it, and vanishes from it with head.
# Needs root, and: apt-get install -y --no-install-recommends slurm-wlm munge iproute2 util-linux
set -euo pipefail
export LC_ALL=C

say() { printf 'cluster.sh: %s\n' "$*" >&2; }

usage() { sed -n '2,/^set/{/^#/s/^# \?//p}' "$0"; exit 2; }

[ $# -gt 0 ] || usage
DIR=${SLURMLAB_DIR:?a directory for the cluster}
[ "${1:-}" != up ] || mkdir -p "$DIR"
DIR=$(realpath "$DIR")

FREEZER=/sys/fs/cgroup/freezer
NODES=${SLURMLAB_NODES:-2} CPUS=${SLURMLAB_CPUS:-8} MEM=${SLURMLAB_MEM:-8192} GPUS=${SLURMLAB_GPUS:-2}
DBD=${SLURMLAB_DBD:-0} EXTRA=${SLURMLAB_EXTRA:-} TRACK=${SLURMLAB_TRACK:-}
[ -n "$TRACK" ] || { [ -w $FREEZER/cgroup.procs ] && TRACK=cgroup || TRACK=linuxproc; }
if [ -f "$DIR/settings" ]; then
  . "$DIR/settings"     # a cluster keeps what it was started with
elif [ "${1:-}" != up ] || [ -n "$(ls -A "$DIR")" ]; then
  say "$DIR is not a cluster's"; exit 2   # nor will `down` ever remove it
fi

# names and addresses of this cluster's own, so that several run side by side
HASH=$(printf %s "$DIR" | sha256sum | cut -c1-6)
NET=10.$((64 + 16#${HASH:0:2} % 64)).$((16#${HASH:2:2}))
CABLE=slurm$HASH
export SLURM_CONF=$DIR/slurm.conf MYSQL_UNIX_PORT=$DIR/run/mysql.sock

await() {   # await SECONDS WHAT COMMAND...: until the command succeeds
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@"; do [ $SECONDS -lt "$end" ] || { say "$what; see $DIR/log"; return 1; }; sleep 0.02; done
}

# A recorded process is "pid start-time", so that a pid which another process has by now is never taken for ours.
process() {
  local pid start stat
  read -r pid start 2>/dev/null < "$DIR/run/$1" || return 1
  read -ra stat 2>/dev/null < "/proc/$pid/stat" || return 1
  [ "${stat[21]}" = "$start" ] && [ "${stat[2]}" != Z ] && echo "$pid"
}
gone() { ! process "$1" >/dev/null; }
inside() { local name=$1; shift; nsenter -t "$(process "$name")" -a --wd=/ -- "$@"; }
runs() { inside "$1" pgrep -x "$2" >/dev/null; }
ends() { ! runs "$@"; }

hold() {   # hold NAME: its namespaces
  local cgroup=
  # two clusters must not share a cgroup of jobs: both count these from 1
  if [ "$TRACK" = cgroup ]; then cgroup=$FREEZER/$CABLE-$1; mkdir -p "$cgroup"; fi
  # /proc is still this machine's at first, so the holder can read its pid there;
  # with SIGCHLD ignored it reaps whatever is left to it
  setsid unshare --fork --pid --mount --uts --net bash -c '
    set -e
    read -ra stat < /proc/self/stat; echo "${stat[0]} ${stat[21]}" > "$1/run/$2"
    mount -t proc proc /proc; mount --bind "$1/hosts" /etc/hosts; [ -z "$3" ] || mount --bind "$3" /sys/fs/cgroup/freezer
    hostname "$2"; ip link set lo up
    exec env --ignore-signal=CHLD sleep infinity' _ "$DIR" "$1" "$cgroup" </dev/null >/dev/null 2>>"$DIR/log/holders.log" &
  await 5 "$1 does not start" held "$1"
}
held() { local pid; pid=$(process "$1") && [ "$(cat "/proc/$pid/comm")" = sleep ]; }

end() {   # end NAME: all that runs there
  local pid
  if pid=$(process "$1"); then kill -KILL "$pid" 2>/dev/null || :; await 10 "$1 does not end" gone "$1"; fi
  rm -f "$DIR/run/$1"
  [ ! -d "$FREEZER/$CABLE-$1" ] || find "$FREEZER/$CABLE-$1" -depth -type d -exec rmdir {} + 2>/dev/null || :
}

head_network() { nsenter -t "$(process head)" -n -- "$@"; }
plug() {   # plug NAME ADDRESS PID DEVICE: a cable from the bridge to the network of a process
  local mac; mac=$(printf '02:00:%02x:%02x:%02x:%02x' ${2//./ })   # the same after a crash: nobody's ARP table is stale
  head_network ip link del "$1" 2>/dev/null || :
  head_network ip link add "$1" type veth peer name "$4" netns "$3" address "$mac"
  head_network ip link set "$1" master lan up
  nsenter -t "$3" -n -- ip addr add "$2/24" dev "$4"
  nsenter -t "$3" -n -- ip link set "$4" up
}

start_head() {
  if gone head; then
    hold head
    head_network ip link add lan type bridge
    head_network ip addr add "$NET.1/24" dev lan
    head_network ip link set lan up
    ip link del "$CABLE" 2>/dev/null || :
    plug host "$NET.254" $$ "$CABLE"   # this machine
  fi
  if ! runs head munged; then
    [ -s "$DIR/munge.key" ] || (umask 077; head -c 1024 /dev/urandom > "$DIR/munge.key")
    inside head munged --force --key-file="$DIR/munge.key" --socket="$DIR/run/munge.socket" --seed-file="$DIR/run/munge.seed" \
      --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log"
  fi
  if [ "$DBD" = 1 ] && ! runs head slurmdbd; then
    [ -d "$DIR/db/mysql" ] || mariadb-install-db --no-defaults --datadir="$DIR/db" --user=root --skip-test-db \
      --auth-root-authentication-method=normal > "$DIR/log/mariadb.log" 2>&1
    inside head setsid mariadbd --no-defaults --user=root --datadir="$DIR/db" --socket="$MYSQL_UNIX_PORT" --skip-networking \
      --pid-file="$DIR/run/mariadbd.pid" --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
      --innodb-flush-log-at-trx-commit=0 </dev/null >>"$DIR/log/mariadb.log" 2>&1 &
    await 20 "mariadbd does not start" mariadb --no-defaults -uroot -e 'create database if not exists slurm_acct' 2>/dev/null
    inside head slurmdbd
    await 20 "slurmdbd does not start" bash -c "exec 3<>/dev/tcp/$NET.1/6819" 2>/dev/null
  fi
  controller start
}

controller() {
  case $1 in
    start) runs head slurmctld || inside head slurmctld -f "$SLURM_CONF"
           await 20 "slurmctld does not answer" answers;;
    stop|kill) inside head pkill "-$([ "$1" = stop ] && echo TERM || echo KILL)" -x slurmctld || :
               await 20 "slurmctld does not end" ends head slurmctld;;
    *) say "controller kill, stop or start"; return 2;;
  esac
}
answers() { timeout 3 scontrol ping 2>/dev/null | grep -q 'is UP'; }

start_node() {   # start_node NAME [-b]
  if gone "$1"; then hold "$1"; plug "$1" "$NET.$((10 + ${1#node}))" "$(process "$1")" eth0; fi
  if [ -n "${2:-}" ]; then
    # the controller believes in a reboot when the node booted after its last answer, in whole seconds
    local before; before=$(booted "$1"); sleep 2
    inside "$1" slurmd -b -N "$1" -f "$SLURM_CONF"
    await 20 "$1 does not report" rebooted "$1" "$before"
    # this slurmd goes on saying that it has just booted, which would end jobs again
    inside "$1" pkill -KILL -x slurmd; await 5 "slurmd does not end" ends "$1" slurmd
  fi
  runs "$1" slurmd || inside "$1" slurmd -N "$1" -f "$SLURM_CONF"
}
booted() { scontrol -o show node "$1" | grep -o 'BootTime=[^ ]*'; }
rebooted() { [ "$(booted "$1")" != "$2" ]; }
all_up() { [ "$(timeout 3 sinfo -h -N -o '%N %T' 2>/dev/null | sort -u | grep -cE ' (idle|mixed|allocated)$')" = "$NODES" ]; }

configure() {
  local i
  cat > "$DIR/slurm.conf" <<END
ClusterName=lab
SlurmctldHost=head($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/$TRACK
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
SlurmdParameters=config_overrides
# a lost node comes back by itself; a rebooted one loses its jobs and is down until it is resumed
ReturnToService=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# short times, so that tests see the slow events soon
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=10
MinJobAge=600
MessageTimeout=10
SchedulerParameters=sched_interval=5,bf_interval=5,sched_min_interval=1,batch_sched_delay=0,requeue_delay=0
GresTypes=gpu
PartitionName=batch Nodes=ALL Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=OFF
PartitionName=low Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=grace Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=cancel Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=CANCEL
PartitionName=high Nodes=ALL DefaultTime=10 PriorityTier=10 PreemptMode=OFF
END
  echo AutoDetect=off > "$DIR/gres.conf"
  printf '%s\n' CgroupAutomount=no ConstrainCores=no ConstrainDevices=no ConstrainRAMSpace=no > "$DIR/cgroup.conf"
  printf '%s\n' "127.0.0.1 localhost" "$NET.1 head" "$NET.254 $(hostname -s)" > "$DIR/hosts"
  for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$DIR/dev/nvidia$i"; done
  for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=node$i NodeAddr=$NET.$((10 + i)) CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS" >> "$DIR/slurm.conf"
    [ "$GPUS" = 0 ] || echo "NodeName=node$i Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >> "$DIR/gres.conf"
    echo "$NET.$((10 + i)) node$i" >> "$DIR/hosts"
    mkdir -p "$DIR/spool/node$i"
  done
  if [ "$DBD" = 1 ]; then
    cat >> "$DIR/slurm.conf" <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$NET.1
AccountingStoragePass=$DIR/run/munge.socket
AccountingStorageTRES=gres/gpu
END
    (umask 077; cat > "$DIR/slurmdbd.conf") <<END
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket
DbdHost=head
SlurmUser=root
PidFile=$DIR/run/slurmdbd.pid
LogFile=$DIR/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
CommitDelay=1
END
  fi
  printf '%s\n' "$EXTRA" >> "$DIR/slurm.conf"
}

up() {
  local i tool tools="slurmctld slurmd munged ip unshare nsenter"
  [ "$DBD" = 0 ] || tools+=" slurmdbd mariadbd mariadb-install-db"
  for tool in $tools; do command -v "$tool" >/dev/null || { say "$tool is missing"; return 2; }; done
  if [ ! -f "$DIR/settings" ]; then
    declare -p NODES CPUS MEM GPUS DBD EXTRA TRACK > "$DIR/settings"
    mkdir -p "$DIR"/{state,spool,log,run,dev}
    configure
  fi
  if [ -n "${SLURMLAB_OWNER:-}" ] && gone watcher; then
    setsid bash -c 'read -ra stat < /proc/self/stat; echo "${stat[0]} ${stat[21]}" > "$1/run/watcher"
      tail --pid="$2" -f /dev/null; SLURMLAB_DIR=$1 exec bash "$0" down' "$(realpath "$0")" "$DIR" "$SLURMLAB_OWNER" \
      </dev/null >/dev/null 2>&1 &
  fi
  start_head
  for ((i = 1; i <= NODES; i++)); do start_node "node$i"; done
  await 30 "the nodes do not come up" all_up
}

down() {
  local i watcher
  for ((i = 1; i <= NODES; i++)); do end "node$i"; done
  end head
  watcher=$(process watcher) || watcher=$$
  rm -rf "$DIR"
  await 10 "$CABLE does not go" unplugged || :   # the kernel clears up in its own time
  # last: if this is killed, the watcher does it
  [ "$watcher" = $$ ] || kill -KILL -- "-$watcher" 2>/dev/null || :
}
unplugged() { ! ip link show "$CABLE" >/dev/null 2>&1; }

case ${1:-} in
  up) up;;
  down) down;;
  start) start_node "$2" ${3:-};;
  crash) head_network ip link set "$2" down; end "$2";;   # the cable first: no farewell reaches anybody
  cut) head_network ip link set "$2" down;;
  join) head_network ip link set "$2" up;;
  controller) controller "${2:-}";;
  exec) shift; inside "$@";;
  *) usage;;
esac
