"""What run.sh does before main() starts. In the order in which it happens:

environment.sh  the Python environment: the active one, or .venv, which it makes
start.py        the first Python program: looks at the script and at the flags before torch is imported
launcher.py     torchrun, and the cause when workers fail
machines.py     which machine this is, of several or of a Slurm job
rows.py         the launchers of several machines: they wait for each other, and end alike
slurm.sh        a job for sbatch
"""
