#!/usr/bin/env bash
# Runs one task of a job step, inside the container if there is one: finds and checks Python, then execs the rank or launcher.
# Usage: task.sh status|srun|deepspeed|torchrun ARGUMENTS...
set -u
trap '' USR1 # ignored (and inherited) until the trainer installs its handler; dying of it would end the whole step

fail() {
    if [ -n "${DISBACK_JOB_FOLDER:-}" ]; then
        (set -o noclobber && echo "2 $1" >"$DISBACK_JOB_FOLDER/exit") 2>/dev/null # only the first task to exit writes it
    fi
    [ "${SLURM_LOCALID:-0}" = 0 ] && echo "disback: $1" >&2
    exit 2
}

node=${SLURMD_NODENAME:-$(hostname)}
if [ -n "${DISBACK_SETUP:-}" ]; then
    [ -r "$DISBACK_SETUP" ] || fail "node $node: DISBACK_SETUP=$DISBACK_SETUP cannot be read"
    # shellcheck disable=SC1090
    source "$DISBACK_SETUP" || fail "node $node: DISBACK_SETUP=$DISBACK_SETUP failed with code $?"
fi
venv=${VENV:-$DISBACK_HOME/.venv}
if [ -n "${VENV:-}" ] && [ ! -x "$venv/bin/python" ]; then fail "node $node: VENV=$VENV has no bin/python"; fi
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$venv/bin/python" ]; then PYTHON=$venv/bin/python; else PYTHON=python3; fi
fi
command -v "$PYTHON" >/dev/null || fail "node $node: $PYTHON not found: set VENV or PYTHON"
export PYTHONPATH=$DISBACK_HOME${PYTHONPATH:+:$PYTHONPATH}

missing='import importlib.util as u; print(*[m for m in ("yaml", "torch", "deepspeed", "diffusers") if not u.find_spec(m)])'
missing=$("$PYTHON" -c "$missing" 2>&1)
code=$?
if ((code == 137 || code == 143)); then exit "$code"; fi # stopped with its step, because another rank ended: no mistake
((code == 0)) || fail "node $node: $PYTHON fails to start: ${missing##*$'\n'}"
[ -z "$missing" ] || fail "node $node: $PYTHON is missing ${missing// /, }: choose an environment with VENV, DISBACK_SETUP or CONTAINER"

mode=$1
shift
if [ "$mode" = status ]; then exec "$PYTHON" -m trainer.status "$@"; fi
module=trainer.$1
shift
case $mode in
srun) exec "$PYTHON" -m "$module" "$@" ;;
torchrun)
    exec "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$RANKS_PER_NODE" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 -m "$module" "$@"
    ;;
deepspeed)
    # The launcher numbers the GPUs itself: pass it the ids that Slurm assigned, if they are numbers.
    ids=${CUDA_VISIBLE_DEVICES:-}
    [[ $ids =~ ^[0-9]+(,[0-9]+)*$ ]] || ids=$(seq -s, 0 $((RANKS_PER_NODE - 1)))
    world=
    for other in $DISBACK_NODES; do world+=",\"$other\":[$ids]"; done
    world=$(base64 -w0 <<<"{${world#,}}")
    exec "$PYTHON" -m deepspeed.launcher.launch --quiet --world_info="$world" --node_rank="$SLURM_NODEID" --no_local_rank \
        --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --module "$module" "$@"
    ;;
esac
