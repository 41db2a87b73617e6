"""The steps of run.sh before main() starts, in the order in which they happen:

environment.sh  the Python environment: the active one, or .venv, which it makes
start.py        the first Python program: checks the script and the flags before torch is imported
launcher.py     torchrun, and the cause when workers fail
machines.py     which machine this is, of several machines or of a Slurm job
rows.py         the launchers of several machines: they wait for each other, and end with the same code
slurm.sh        a job for sbatch
"""
