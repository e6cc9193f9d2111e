#!/bin/bash
@SBATCH@

# The batch script of one run, made by `launcher submit` from a template: copy that, change it, and give it with
# `launcher submit --template`. Lines @LIKE THIS@ were filled in. It starts a process a rank, and when they have ended
# it decides, from what they wrote down, whether the job is to be requeued. `launcher resume` submits it again.

cd -- @HOME@ || exit 1
home=$PWD

# the run directory; where it was submitted, which relative paths mean; the line that one can paste
run=@RUN@
cwd=@CWD@
command=(@COMMAND@)
@POINT@
# seconds between SLURM's first signal and its last at a preemption, and before the time limit
export LAUNCHER_RUN=$run LAUNCHER_CWD=$cwd LAUNCHER_GRACE=@AFTER_KILL@ LAUNCHER_SIGNAL_LEAD=@SIGNAL_LEAD@
@ENVIRONMENT@
@SETUP@
set +eu +o pipefail                         # whatever stands above has set

# ---- what this start is ----
me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
me=${me:-$SLURM_JOB_ID}                     # of an array's task: the array's id alone would mean all of them
say() { echo "launcher: $*"; }
newest() { ls -- "$run/attempts" 2>/dev/null | sort -n | tail -n 1; }
saved() { ls -- "$run/checkpoints" 2>/dev/null | grep -x 'step-[0-9]*' | tail -n 1; }   # the newest checkpoint
idle() { cat -- "$run/slurm/idle" 2>/dev/null || echo 0; }   # starts in a row that left no new one
count() { echo "$1" > "$run/slurm/.idle" && mv -f -- "$run/slurm/.idle" "$run/slurm/idle"; }
status() { sed -i "s/^  \"status\": \"[a-z]*\"/  \"status\": \"$1\"/" "$run/run.json"; }
mkdir -p -- "$run/logs" "$run/slurm"
exec >> "$home/slurm/$me.out" 2>&1                # where SLURM's own lines are too
say "$(date '+%F %T') job $me start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $run"
if grep -qs '^  "status": "finished"' "$run/run.json"; then say "the run has finished before"; exit 0; fi
if [ -e "$run/slurm/cancelled" ]; then say "the run is cancelled"; exit 0; fi
if [ -n "@CHAIN@" ] && grep -qs '^failed:' "$run/slurm/verdict"; then
  say "not tried again: $(<"$run/slurm/verdict")"
  exit 1
fi
if [ "${SLURM_RESTART_COUNT:-0}" != 0 ] && [ ! -e "$run/slurm/verdict" ] &&
  [ "$(saved)" = "$(cat "$run/slurm/saved" 2>&1)" ]; then   # the start before was gone before it could say so
  count "$(($(idle) + 1))"
  if [ "$(idle)" -gt 3 ]; then
    why="$(idle) starts in a row got nowhere: the last was killed, or its node was lost"
    say "failed: $why"
    echo "failed: $why" > "$run/slurm/verdict"
    status failed
    exit 1
  fi
fi
rm -f -- "$run/slurm/verdict" "$run/slurm/refused"
saved > "$run/slurm/saved"
echo "$(date +%s) $SLURM_JOB_NODELIST" > "$run/slurm/started-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
attempt_before=$(newest) saved_before=$(saved)

# ---- ranks and rendezvous ----
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 22000))   # below the ports that the kernel deals out; no two jobs have one
while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-@THREADS@}
ends() {                                    # nothing where there is no limit, or no answer
  local when
  when=$(squeue -h -j "$me" -o %e 2>/dev/null)
  [ -n "$when" ] && date -d "$when" +%s 2>/dev/null
}
end=$(ends)
[ -z "$end" ] || export LAUNCHER_JOB_END=$((end - 20))   # the ranks stop by themselves before it

# One task a rank, which becomes python: the signals that SLURM sends to tasks must reach it. USR2 is ignored until
# python has a handler for it. A rank's output goes to its own file, and rank 0's is followed into the job's.
@TASK@

# ---- run ----
late=''
trap : TERM USR2                            # a preemption, scancel: the ranks stop by themselves
trap 'late=1' USR1                          # from below: they have not, and the limit is near
keep_time() {                               # the limit may be changed meanwhile; no `sleep`, which would be left behind
  local left now never
  exec {never}<> <(:)
  while left=$((end - $(date +%s) - 10)) && [ "$left" -gt 0 ]; do
    read -r -t "$left" -u "$never" || [ $? -gt 128 ] || sleep "$left"
    now=$(ends)
    end=${now:-$end}
  done
  kill -USR1 $$
}
[ -z "$end" ] || { (trap - TERM; keep_time) > /dev/null 2>&1 & keeper=$!; }
(trap '' TERM; exec tail -n 0 -F -- "$first_log" 2>/dev/null) &
follow=$!
disown -a                                   # bash need not tell that they were killed
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" @SRUN@ bash -c "$task" rank "${command[@]}" &
step=$!
while [ -z "$late" ]; do
  wait "$step"; code=$?
  kill -0 "$step" 2>/dev/null || break      # else a signal has broken off the wait
done
sleep 1                                     # for what was written last to be followed
kill -KILL "$follow" ${keeper:+"$keeper"} 2>/dev/null

# ---- why it ended: finished, cancelled, failed (not tried again), preempted, lost (both go on) ----
attempt=$(newest) facts=/nonexistent
[ "$attempt" = "$attempt_before" ] || facts=$run/attempts/$attempt
failed=$(sed -n 's/^  "error": "\(.*\)",\{0,1\}$/\1/p' "$facts/failed" 2>/dev/null)
look() {
  slurm=$(scontrol -o show job "$me" 2>/dev/null | head -n 1)
  slurm=${slurm%% Command=*} slurm=${slurm%% WorkDir=*}   # paths follow, which may say anything
}
ending() { [[ $slurm == *" JobState="@(COMPLETING|CANCELLED|PREEMPTED|TIMEOUT)* ]]; }
again() { [[ -n $slurm && $slurm != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; }   # SLURM has requeued it itself
by_a_person() {                             # it is ending, and neither a limit, a preemption nor SLURM's requeue is why
  [ -e "$run/slurm/cancelled" ] && return
  ending && ! again && [[ $slurm != *" Reason=TimeLimit "* ]] &&
    [[ $(squeue -h -t all -j "$me" -O PreemptTime 2>/dev/null) == N/A* ]]
}
look
if grep -qs '^  "status": "finished"' "$run/run.json"; then verdict=finished why="in $attempt starts"
elif by_a_person; then verdict=cancelled why="by a person"
elif grep -qs '^  "retry": false' "$facts/failed"; then verdict=failed why=$failed
elif [ -e "$run/slurm/refused" ]; then verdict=failed why=$(<"$run/slurm/refused")
elif grep -qs '^  "status": "preempted"' "$facts"/exit-*.json; then
  verdict=preempted why="stopped by a signal, or ahead of the time limit"
elif [ -n "$late" ]; then verdict=lost why="the ranks had not stopped 10 s before the time limit"
else
  # without an attempt python has not come to launcher.main: the last words of a rank say why
  last_words() { tail -qn 1 -- "$run"/logs/* 2>/dev/null | grep -m 1 -e Error -e '^launcher: '; }
  [ "$facts" != /nonexistent ] || failed=$(last_words)
  verdict=lost why="${failed:-a rank was killed, or could not start (exit code ${code:-none})}"
fi

# what goes on must get on: a start that has left no new checkpoint got nowhere
idle=0
case $verdict in
  preempted | lost) [ "$(saved)" != "$saved_before" ] || idle=$(($(idle) + 1));;
esac
if [ "$idle" -gt 3 ]; then verdict=failed why="$idle starts in a row got nowhere: $why"; fi
if ! count "$idle"; then
  verdict=failed why="$run/slurm cannot be written: $why"   # uncounted, it might go on like this for ever
fi
case $verdict in preempted | lost) [ "@REQUEUE@" = yes ] || why="$why; no requeue was asked for: launcher resume";; esac
say "$verdict: $why"
echo "$verdict: $why" > "$run/slurm/verdict"
case $verdict,$late,$facts in               # who failed first, where and why, for a person; nothing hangs on it
  *,/nonexistent | lost,1,*) ;;
  failed,* | lost,*) timeout 20 "${command[0]}" -P -m launcher.verdict "$run" 2>/dev/null || true;;
esac
case $verdict in
  finished) exit 0;;
  cancelled) status cancelled; exit 0;;
  failed) status failed; exit 1;;
esac
status preempted
[ "@REQUEUE@" = yes ] || exit 1

# ---- requeue: the last thing, because SLURM then ends all that is here ----
trap '' TERM                                # scontrol inherits it, and lives to tell
while look; do                              # asked now, SLURM would revive what a person cancels meanwhile
  if [ -z "$slurm" ]; then sleep 5; continue; fi
  if ending && again; then exit 0; fi
  if by_a_person; then status cancelled; echo "cancelled: by a person" > "$run/slurm/verdict"; exit 0; fi
  said=$(scontrol requeue "$me" 2>&1) && break
  [[ $said == *@(contact|Unexpected message|timed out)* ]] || { say "$said"; exit 1; }
  sleep 5                                   # slurmctld is away
done
node=$(sed -n 's/^  "host": "\([^"]*\)",\{0,1\}$/\1/p' "$facts/failed" 2>/dev/null)
if grep -qs '^  "kind": "hardware"' "$facts/failed" && [ -n "$node" ]; then
  others=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,alloc,mix,comp -o %N | sort -u | grep -cvx -- "$node")
  [ "$others" -lt "$SLURM_JOB_NUM_NODES" ] || scontrol update "JobId=$me" "ExcNodeList=$node"
fi
