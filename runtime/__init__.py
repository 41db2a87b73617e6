"""Processes, signals, files and logging: everything that is independent of the maths. Read ranks.py first.

ranks.py      rank, world size, and collectives
stopping.py   stop signals, the report of each process to the launcher, and shutting down loader processes
errors.py     every error that ends a run on purpose, and the exit codes
command.py    start and end of every program: flags, messages, exit codes
alive.py      progress of training, and a line every 30 s where a program would be silent
files.py      atomic writes, hashes, locks
means.py      running means over steps and ranks
wandb_run.py  a run's copy on wandb: lines, pictures, alerts
importing.py  the user's script: refuses imports by old module names, and imports the script itself
"""
