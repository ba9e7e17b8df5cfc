# shellcheck shell=bash
# Shared by the job scripts: starts the ranks of an allocation, and decides from how they ended whether the job restarts.
# Settings are environment variables, all optional: see slurm/README.md.

: "${CONFIG:=configs/sdxl.yaml}" "${LAUNCHER:=srun}" "${MAX_STALLED:=3}" "${SELF_CHAIN:=0}"
: "${CONTAINER:=}" "${CONTAINER_FLAGS:=}" "${SRUN_FLAGS:=}" "${MODULES:=}"
DISBACK_HOME=$(cd "$DISBACK_HOME" && pwd)
MISTAKE=2 STOPPED=75

say() { echo "disback: $*" >&2; }

# Ends the job for good. The reason is the last line of its log, and goes to the logs of the jobs that depend on it.
give_up() { # code message
    tell_dependents "$SLURM_JOB_ID" "job $SLURM_JOB_ID ($VERB) failed: $2"
    say "job $SLURM_JOB_ID ($VERB): $2"
    exit "$1"
}

job_field() { # job field
    # One job of an array has the id of the array, for which Slurm shows all.
    scontrol show job -o "$1" 2>/dev/null | grep -m1 "^JobId=$1 " | grep -oP "(?<= $2=)\S+" || true
}

dependents() { # job -> the pending jobs that depend on it
    squeue --noheader --user="$(id -un)" --states=PENDING --format='%i %E' 2>/dev/null |
        awk -v job="$1" '{ n = split($2, parts, /[:,?(]/); for (i = 1; i <= n; i++) if (parts[i] == job) { print $1; break } }'
}

# A job that Slurm cancels for a failed dependency never runs and writes no log, so this one writes the reason there.
tell_dependents() { # job message
    local child file
    for child in $(dependents "$1"); do
        file=$(job_field "$child" StdOut)
        [ -n "$file" ] && echo "disback: job $child is cancelled: $2" >>"$file"
        tell_dependents "$child" "$2"
    done
}

# The node's name if it resolves, as on most clusters; otherwise the address that Slurm has for it.
address_of() { # node
    if getent hosts "$1" >/dev/null; then echo "$1"; else
        scontrol show node -o "$1" | grep -oP '(?<= NodeAddr=)\S+'
    fi
}

in_use() { # port
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# A port derived from the job id, below the ephemeral range, so that two jobs on one node do not collide.
choose_port() {
    local port try
    if [ -n "${MASTER_PORT:-}" ]; then
        in_use "$MASTER_PORT" && give_up $MISTAKE "MASTER_PORT=$MASTER_PORT is in use on node ${SLURMD_NODENAME:-$(hostname)}: choose another, or leave it unset"
        port=$MASTER_PORT
    else
        for try in $(seq 0 19); do
            port=$((12000 + (SLURM_JOB_ID + 997 * try) % 20000))
            in_use "$port" || break
        done
    fi
    echo "$port"
}

# One rank per GPU, whatever --ntasks-per-node says; without GPUs, the requested tasks.
choose_tasks() {
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    NODES=$SLURM_JOB_NUM_NODES
    RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
    RANKS_PER_NODE=${RANKS_PER_NODE%%(*}
    ((gpus > 0)) && RANKS_PER_NODE=$gpus
    RANKS_PER_NODE=${TASKS_PER_NODE:-$RANKS_PER_NODE}
    CPUS=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))
    ((CPUS > 0)) || CPUS=1
}

# Runs a job step: every task runs slurm/task.sh on its node, inside the container if there is one. Ranks fill one socket after
# the other, as GPUs are numbered: by default srun deals tasks to the sockets in turn, half of them far from their GPU.
step() { # tasks-per-node cpus-per-task nodes mode arguments...
    local per_node=$1 cpus=$2 nodes=$3
    local -a flags inside=()
    shift 3
    read -ra flags <<<"$SRUN_FLAGS"
    if [ -n "$CONTAINER" ]; then
        read -ra inside <<<"$CONTAINER_FLAGS"
        case $CONTAINER in
        *.sif) inside=(apptainer exec --nv --bind "$PWD" --bind "$DISBACK_HOME" "${inside[@]}" "$CONTAINER") ;;
        *) flags+=("--container-image=$CONTAINER" "--container-mounts=$PWD,$DISBACK_HOME" "--container-workdir=$PWD" "${inside[@]}") inside=() ;;
        esac
    fi
    exec srun --overlap --mpi=none --nodes="$nodes" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" \
        --distribution=block:block --cpus-per-task="$cpus" --cpu-bind=cores --kill-on-bad-exit=1 "${flags[@]}" \
        "${inside[@]}" bash "$DISBACK_HOME/slurm/task.sh" "$@"
}

# Sets RUN (the run folder) and PROGRESS (its last checkpoint). On failure the reason is in PROBLEM.
read_progress() {
    local word answer
    local -a overrides=()
    for word in "$@"; do [[ $word == [!-]*=* ]] && overrides+=("$word"); done
    answer=$(step 1 1 1 status --progress "$VERB" --config "$CONFIG" "${overrides[@]}" 2>&1) ||
        {
            PROBLEM=$(grep -m1 -oP '(?<=disback: ).*' <<<"$answer" || tail -n 1 <<<"$answer")
            return 1
        }
    answer=$(grep -m1 $'\t' <<<"$answer") || {
        PROBLEM="cannot determine the run folder"
        return 1
    }
    RUN=${answer%%$'\t'*} PROGRESS=${answer#*$'\t'}
}

# STALLED: the number of consecutive starts, this one included, that began at the same checkpoint as the one before.
count_starts() {
    local before
    STALLED=0
    if [ -f "$DISBACK_JOB_FOLDER/start" ]; then
        read -r STALLED before <"$DISBACK_JOB_FOLDER/start"
        [ "$before" = "$PROGRESS" ] && STALLED=$((STALLED + 1)) || STALLED=0
    fi
    echo "$STALLED $PROGRESS" >"$DISBACK_JOB_FOLDER/start"
}

# Nodes that failed the startup check twice, as a list for Slurm.
bad_nodes() {
    sort "$DISBACK_JOB_FOLDER/bad-nodes" 2>/dev/null | uniq -c | awk '$1 >= 2 { print $2 }' | paste -sd,
}

# Exits unless this script should restart the job: not if the user cancelled it, or Slurm has requeued it already.
exit_unless_restartable() { # reason
    local state starts
    for _ in $(seq 12); do # the Slurm controller may be unreachable for a minute
        starts=$(job_field "$SLURM_JOB_ID" Restarts)
        [ -n "$starts" ] && break
        sleep 5
    done
    state=$(job_field "$SLURM_JOB_ID" JobState)
    if ((${starts:-0} > ${SLURM_RESTART_COUNT:-0})); then
        say "job $SLURM_JOB_ID ($VERB): $1; Slurm has already requeued it"
        exit $STOPPED
    fi
    # While a job ends, Slurm shows COMPLETING instead of what ended it.
    if [ "$state" = COMPLETING ]; then
        case $(job_field "$SLURM_JOB_ID" Reason) in
        TimeLimit) state=TIMEOUT ;;
        NodeDown | SystemFailure) state=NODE_FAIL ;;
        *) state=CANCELLED ;;
        esac
        [[ $(job_field "$SLURM_JOB_ID" PreemptTime) == [0-9]* ]] && state=PREEMPTED
    fi
    [[ $state =~ ^(RUNNING|TIMEOUT|PREEMPTED|NODE_FAIL)$ ]] || give_up $STOPPED "$1; not restarting, since the job is ${state:-gone}"
}

# Restarts the job: by requeueing it, or as a new job where the cluster forbids that.
restart_job() { # reason
    local bad
    exit_unless_restartable "$1"
    # A job past its time limit cannot start another step, and restarts all the same.
    read_progress "${ARGUMENTS[@]}" || {
        say "cannot read the run's progress now ($PROBLEM)"
        PROGRESS="progress unknown"
    }
    exit_unless_restartable "$1" # reading the progress took seconds
    if [ "$PROGRESS" = "$STARTED_AT" ] && ((STALLED + 1 >= MAX_STALLED)); then
        give_up 1 "giving up after $MAX_STALLED starts without progress ($PROGRESS): $1"
    fi
    bad=$(bad_nodes)
    [ -n "$bad" ] && say "job $SLURM_JOB_ID: excluding $bad, which failed the startup check twice"
    say "job $SLURM_JOB_ID ($VERB): $1; restarting ($PROGRESS)"
    trap '' USR1 TERM # requeueing sends SIGTERM to this shell: the nodes must be excluded first
    if [ "$SELF_CHAIN" = 1 ]; then
        chain "$bad"
    elif ! scontrol requeue "$SLURM_JOB_ID" 2>/dev/null; then
        exit_unless_restartable "$1"
        say "job $SLURM_JOB_ID: this cluster does not allow requeueing: submitting a new job"
        chain "$bad"
    elif [ -n "$bad" ]; then
        for _ in $(seq 20); do
            scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$bad" 2>/dev/null && break
            sleep 0.5
        done
    fi
    exit $STOPPED
}

# Submits this job again, to start when this one has ended, and makes its dependents wait for the new job. This job exits
# with a nonzero code, so that a dependent that was missed is cancelled instead of starting too early.
chain() { # nodes to exclude
    local id=$SLURM_JOB_ID child new rule key option value log
    local -a flags=(--parsable --dependency="afterany:$id" --open-mode=append)
    log=$(job_field "$id" StdOut)
    for key in Partition:partition Account:account QOS:qos TimeLimit:time Features:constraint Reservation:reservation \
        JobName:job-name CPUs/Task:cpus-per-task WorkDir:chdir; do
        option=${key#*:} value=$(job_field "$id" "${key%%:*}")
        [ -n "$value" ] && [ "$value" != '(null)' ] && flags+=("--$option=$value")
    done
    flags+=(--nodes="$SLURM_JOB_NUM_NODES" --gpus-per-node="${SLURM_GPUS_ON_NODE:-0}" ${log:+--output="$log"})
    [ -n "${SLURM_NTASKS_PER_NODE:-}" ] && flags+=(--ntasks-per-node="$SLURM_NTASKS_PER_NODE")
    [ -n "${SLURM_MEM_PER_NODE:-}" ] && flags+=(--mem="$SLURM_MEM_PER_NODE")
    [ -n "$1" ] && flags+=(--exclude="$1")
    new=$(
        for key in "${!SLURM_@}"; do [ "$key" = SLURM_CONF ] || unset "$key"; done # they describe this job; the new job gets its own
        DISBACK_CHAIN=$CHAIN sbatch "${flags[@]}" "$DISBACK_HOME/slurm/$VERB.sh" "${ARGUMENTS[@]}"
    ) || give_up 1 "cannot submit the job again (see above)"
    new=${new%%;*}
    say "job $id ($VERB): continues as job $new"
    for child in $(dependents "$id"); do
        [ "$child" = "$new" ] && continue
        rule=$(job_field "$child" Dependency | sed -E 's/\([a-z]+\)//g; s/(^|[:,?])'"$id"'($|[:,?])/\1'"$new"'\2/g')
        scontrol update JobId="$child" Dependency="$rule" && say "job $child now waits for job $new"
    done
}

# Handles Slurm's signal before the time limit or a preemption. It may arrive before the step has started.
stop_step() {
    ASKED=1
    [ -n "$STEP" ] && [ -z "$SIGNALLER" ] || return 0
    say "job $SLURM_JOB_ID ($VERB): stop requested, saving"
    # Repeated, since a rank that is still starting ignores the signal.
    while kill -s "$STOP_SIGNAL" "$STEP" 2>/dev/null; do sleep 2; done &
    SIGNALLER=$!
}

# Goes to the folder that the job was submitted from, checks the settings and prepares the environment.
enter_job() { # verb
    local module
    ASKED=0 STEP='' SIGNALLER=''
    trap stop_step USR1 TERM
    VERB=$1
    [ -n "${SLURM_JOB_ID:-}" ] || { say "submit this script with sbatch; without Slurm run: disback $VERB ..."; exit $MISTAKE; }
    cd "${SLURM_SUBMIT_DIR:-.}" || give_up $MISTAKE "the folder that the job was submitted from does not exist: $SLURM_SUBMIT_DIR"
    [[ $LAUNCHER =~ ^(srun|deepspeed|torchrun)$ ]] || give_up $MISTAKE "LAUNCHER=$LAUNCHER: use srun, deepspeed or torchrun"
    for module in $MODULES; do
        module load "$module" || give_up $MISTAKE "MODULES: module load $module failed"
    done
    choose_tasks
    export PYTHONUNBUFFERED=1 DISBACK_HOME OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CPUS < 8 ? CPUS : 8))}"
    # Without it, blocks of many sizes leave the GPU's memory in pieces. Either name sets it.
    [ -n "${PYTORCH_ALLOC_CONF:-}" ] || export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}"
}

# Starts the ranks with these arguments and waits for them; sets CODE.
run_ranks() { # about verb arguments...
    local port about=$1
    shift
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export DISBACK_NODES="${nodes[*]}" DISBACK_PEERS RANKS_PER_NODE
    DISBACK_PEERS=$(for node in "${nodes[@]:0:2}"; do address_of "$node"; done | paste -sd' ')
    port=$(choose_port) || exit $?
    say "job $SLURM_JOB_ID ($VERB): $NODES nodes x $RANKS_PER_NODE ranks x $CPUS CPUs with $LAUNCHER, ${MASTER_ADDR:-${DISBACK_PEERS%% *}}:$port, $about"

    MASTER_ADDR=${MASTER_ADDR:-${DISBACK_PEERS%% *}} MASTER_PORT=$port launch "$@" &
    STEP=$!
    ((ASKED)) && stop_step
    while :; do
        wait "$STEP"
        CODE=$?
        # A signal to this shell also ends `wait`.
        if ((CODE <= 128)) || ! kill -0 "$STEP" 2>/dev/null; then break; fi
    done
    [ -n "$SIGNALLER" ] && kill "$SIGNALLER" 2>/dev/null
}

# Where the ranks leave their exit-status file.
use_job_folder() { # folder, message if it cannot be made
    export DISBACK_JOB_FOLDER=$1
    mkdir -p "$1" || give_up $MISTAKE "$2"
    rm -f "$1/exit"
}

run_job() { # verb arguments...
    local folder
    ARGUMENTS=("${@:2}")
    enter_job "$1"
    shift
    [ -f "$CONFIG" ] || [ ! -f "$DISBACK_HOME/$CONFIG" ] || CONFIG=$DISBACK_HOME/$CONFIG
    [ -f "$CONFIG" ] || give_up $MISTAKE "CONFIG=$CONFIG: no such file in $PWD or $DISBACK_HOME"
    CHAIN=${DISBACK_CHAIN:-$SLURM_JOB_ID}
    read_progress "$@" || give_up $MISTAKE "$PROBLEM"
    folder=$RUN/slurm/$CHAIN
    [[ $folder == /* ]] || folder=$PWD/$folder
    use_job_folder "$folder" "run folder $RUN is not writable: choose another with run=..."
    count_starts
    STARTED_AT=$PROGRESS
    ((STALLED < MAX_STALLED)) || give_up 1 "giving up after $MAX_STALLED starts without progress ($PROGRESS)"

    run_ranks "$CONFIG, $PROGRESS" "$VERB" --config "$CONFIG" "$@"
    conclude
}

# One job of an array, or a job alone. It has no run folder: what is done is on disk, and a restart does the rest.
run_part() { # verb arguments...
    local step=${SLURM_ARRAY_TASK_STEP:-1} part
    enter_job "$1"
    part=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / (step > 0 ? step : 1)))/${SLURM_ARRAY_TASK_COUNT:-1}
    use_job_folder "$PWD/.disback-$SLURM_JOB_ID" "$PWD is not writable: submit the job from a folder that is"
    run_ranks "part $part" "$@" --job "$part"
    find_cause
    rm -rf "$DISBACK_JOB_FOLDER"
    if ((CODE == 0)); then
        say "job $SLURM_JOB_ID ($VERB): done"
    elif ((CODE == MISTAKE)); then
        give_up $MISTAKE "$CAUSE"
    elif ((${SLURM_RESTART_COUNT:-0} >= MAX_STALLED)); then
        give_up "$CODE" "giving up after $((SLURM_RESTART_COUNT + 1)) starts ($CAUSE): submit it again to go on"
    else
        exit_unless_restartable "$CAUSE"
        say "job $SLURM_JOB_ID ($VERB): $CAUSE; restarting"
        trap '' USR1 TERM # requeueing sends SIGTERM to this shell
        scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" ||
            give_up "$CODE" "this cluster does not allow requeueing: submit it again to go on"
        exit $STOPPED
    fi
}

launch() {
    if [ "$LAUNCHER" = srun ]; then
        step "$RANKS_PER_NODE" "$CPUS" "$NODES" srun "$@"
    else
        step 1 "$SLURM_CPUS_ON_NODE" "$NODES" "$LAUNCHER" "$@"
    fi
}

# Sets CODE and CAUSE to those of the first rank that failed: the step's own code may come from ranks that were killed afterwards.
find_cause() {
    CAUSE="the step exited with code $CODE"
    if ((CODE)) && [ -s "$DISBACK_JOB_FOLDER/exit" ]; then read -r CODE CAUSE <"$DISBACK_JOB_FOLDER/exit"; fi
}

conclude() {
    local killed
    if ((CODE == 0)); then
        say "job $SLURM_JOB_ID ($VERB): done"
        exit 0
    fi
    killed=$(tac "$(job_field "$SLURM_JOB_ID" StdOut)" 2>/dev/null | sed '/ ranks x /q' | grep -oP '^srun: error: \K.*: (Killed|Out Of Memory)' | tail -n 1)
    find_cause
    [ -n "$killed" ] && [ ! -s "$DISBACK_JOB_FOLDER/exit" ] && CAUSE="a rank was killed ($killed)"
    ((CODE == MISTAKE)) && give_up $MISTAKE "$CAUSE"
    restart_job "$CAUSE"
}
