#!/usr/bin/env bash
# Scores a run's generator, or the sources in evaluate.what; writes RUN/eval.
#   sbatch [sbatch options] slurm/evaluate.sh [key.sub=value ...]
# sbatch options override the defaults below; --gpus-per-node=0 runs on CPUs. More in slurm/README.md.
#SBATCH --job-name=disback-evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# Slurm runs a copy of this script from its spool folder, so the repository is found from the path that was submitted.
submitted=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -nE 's|^ *Command=(.*)/slurm/[^/ ]+\.sh.*|\1|p')
for DISBACK_HOME in "${DISBACK_HOME:-}" "$submitted" "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.." "$(dirname "$0")/.."; do
    [ -f "$DISBACK_HOME/slurm/common.sh" ] && break
done
# shellcheck source=slurm/common.sh
source "$DISBACK_HOME/slurm/common.sh" || { echo "disback: cannot find the repository: set DISBACK_HOME" >&2; exit 2; }
# shellcheck disable=SC2034
STOP_SIGNAL=TERM # nothing to save: finished chunks of images are on disk, and a restart makes the others
run_job evaluate "$@"
