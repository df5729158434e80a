#!/usr/bin/env bash
# A study on several nodes of a Slurm cluster: sbatch experiments/cluster/slurm.sh
#
# One process per node (or per GPU: --ntasks-per-node=4 --gpus-per-task=1). They meet once, deal out the chunks, and need nothing of
# each other after that. The folder --out must be on a file system that all nodes see. When the time is up or the job is preempted,
# Slurm sends SIGTERM: each process finishes the chunk in flight and ends. Submitted again, the job goes on where it was.
#SBATCH --job-name=vgrad
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

srun --kill-on-bad-exit=0 vgrad study --distributed --quiet \
  --num-seeds 16384 --width 128 --depths $(seq 2 65) --out "${SLURM_SUBMIT_DIR}/results"

# Should a node have failed, its chunks are missing: whoever is last finds them so and leaves the rest to this.
[ -e "${SLURM_SUBMIT_DIR}/results/study.nc" ] ||
  vgrad study --resume --quiet --num-seeds 16384 --width 128 --depths $(seq 2 65) --out "${SLURM_SUBMIT_DIR}/results"
