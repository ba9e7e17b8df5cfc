#!/usr/bin/env bash
# Submits record -> backtrack -> evaluate. Each job starts when the one before has succeeded, and is cancelled if it fails.
#   CONFIG=my.yaml bash slurm/pipeline.sh [sbatch options] [key.sub=value ...]        (default: configs/sdxl.yaml)
set -euo pipefail
DISBACK_HOME=${DISBACK_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
export DISBACK_HOME CONFIG="${CONFIG:-configs/sdxl.yaml}"
if [ ! -f "$CONFIG" ] && [ ! -f "$DISBACK_HOME/$CONFIG" ]; then
    echo "disback: CONFIG=$CONFIG: no such file in $PWD or $DISBACK_HOME" >&2
    exit 2
fi
command -v sbatch >/dev/null || { echo "disback: sbatch is not on PATH: run this on a login node of a Slurm cluster" >&2; exit 2; }

options=() settings=()
while (($#)); do
    case $1 in
    -[A-Za-z]) options+=("$1" "$2") && shift ;; # -p debug
    -*) options+=("$1") ;;
    *) settings+=("$1") ;;
    esac
    shift
done

before=
for verb in record backtrack evaluate; do
    wait_for=()
    [ -n "$before" ] && wait_for=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
    before=$(sbatch --parsable "${wait_for[@]}" "${options[@]}" "$DISBACK_HOME/slurm/$verb.sh" "${settings[@]}")
    before=${before%%;*}
    echo "$verb: job $before, log $(scontrol show job -o "$before" | grep -oP '(?<= StdOut=)\S+')"
    jobs=${jobs:+$jobs,}$before
done
echo "watch:  squeue --jobs=$jobs        disback status --config $CONFIG ${settings[*]}"
echo "cancel: scancel ${jobs//,/ }"
