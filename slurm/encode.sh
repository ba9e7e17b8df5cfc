#!/usr/bin/env bash
# Encodes shards ahead of training, as an array of jobs that share them out; each is resumed at its first missing shard.
#   sbatch [sbatch options] slurm/encode.sh SHARDS --out FOLDER --pipeline FOLDER [options of disback shards --encode]
# sbatch options override the defaults below; --gpus-per-node=0 runs on CPUs. More in slurm/README.md.
#SBATCH --job-name=disback-encode
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log

# Slurm runs a copy of this script from its spool folder, so the repository is found from the path that was submitted.
submitted=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -nE 's|^ *Command=(.*)/slurm/[^/ ]+\.sh.*|\1|p' | head -n 1)
for DISBACK_HOME in "${DISBACK_HOME:-}" "$submitted" "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.." "$(dirname "$0")/.."; do
    [ -f "$DISBACK_HOME/slurm/common.sh" ] && break
done
# shellcheck source=slurm/common.sh
source "$DISBACK_HOME/slurm/common.sh" || { echo "disback: cannot find the repository: set DISBACK_HOME" >&2; exit 2; }
# shellcheck disable=SC2034
STOP_SIGNAL=TERM # nothing to save: finished shards are on disk, and a restart makes the others
run_part shards --encode "$@"
