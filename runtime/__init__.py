"""What every process needs, whatever it computes. Nothing here knows the maths. Read ranks.py first.

ranks.py      rank and number of processes, and agreement between them
stopping.py   stop signals, what a process tells the launcher when it ends, and the end of loader processes
errors.py     every error that ends a run on purpose, and the exit codes
command.py    the beginning and the end of every program: flags, messages, exit codes
alive.py      how far training is, and a line every 30 s where a program would be silent
files.py      files that are whole or not there, hashes, locks
means.py      running means over steps and ranks
wandb_run.py  a run's copy on wandb: lines, pictures, alerts
importing.py  the user's script: modules that it imports by old names, and how it is imported itself
"""
