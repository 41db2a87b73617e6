"""What config.py needs of the settings. Nothing here imports config.py or torch.

flags.py      from the command line to settings
words.py      the words of the command line: flags of other repos, true and false, paths from the caller's folder
choices.py    the choices of a setting, and which settings each choice reads
help.py       the page of --help
rules.py      which values are right, each and together
same_run.py   what a resumed run may change, how two configs differ, and the default name of a run
"""
