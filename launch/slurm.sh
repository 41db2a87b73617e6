#!/bin/sh
# Train on a Slurm cluster. In the project's folder:  sbatch launch/slurm.sh [script.py] [--flags ...]
#
#   sbatch launch/slurm.sh --preset cifar10
#   sbatch --nodes=4 --time=2-0 launch/slurm.sh mine.py   options of sbatch come first and replace the ones below
#   sbatch --array=0-3 launch/slurm.sh sweep.py --base_lr 4e-3 2e-3 --time_sampler uniform logit_normal -- --preset digits
#                                                         task i does the i-th run of the grid (scripts/sweep.py)
#
# Two minutes before the time limit the run saves, and the job goes back into the queue. The next start resumes it.
# `scancel --signal=TERM JOB` does the same at once; `scancel JOB` saves and ends the job for good.
# If compute nodes have no network: on the login node, make the environment once by `sh run.sh --help`, and download the
# data (docs/cluster.md).

##SBATCH --account=NAME                  # remove one # from the lines that your cluster needs
##SBATCH --partition=NAME
#SBATCH --job-name=diffusion
#SBATCH --time=24:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1              # run.sh itself starts a process for each GPU of the node
##SBATCH --gpus-per-node=4
##SBATCH --cpus-per-task=32              # all CPUs of the node: they decode images, and without GPUs do all the work
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

cd "${SLURM_SUBMIT_DIR:?'give it to sbatch: sbatch launch/slurm.sh [script.py] [--flags ...]'}" || exit 1
if [ ! -f run.sh ]; then
    echo "slurm.sh: there is no run.sh in $SLURM_SUBMIT_DIR. Call sbatch in the project's folder." >&2
    exit 2
fi
limit=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*TimeLimit=\([^ ]*\).*/\1/p')
case $limit in
    00:0[0-3]:*)
        echo "slurm.sh: --time=$limit is too short: the run saves two minutes before that limit. Ask for 4 minutes or more." >&2
        exit 2
        ;;
esac

# module load cuda                       # whatever your cluster needs before python runs
# . /path/to/environment/bin/activate    # or conda activate: run.sh uses an active environment that has the packages
code=0
srun sh run.sh "$@" || code=$?
# In a container that has the packages of requirements.txt, in place of the line above:
# srun apptainer exec --nv --env VIRTUAL_ENV=/usr image.sif sh run.sh "$@" || code=$?

if [ "$code" = 75 ]; then # stopped and saved: the next start of the job resumes it
    scontrol requeue "$SLURM_JOB_ID" &&
        sleep 60 # Slurm ends this script when it has taken the job back
fi
exit "$code"
