"""What config.py needs of the settings. Nothing here imports config.py or torch.

flags.py      from the command line to settings
choices.py    what the sources say of a setting: its choices, which settings each choice reads, the page of --help
rules.py      which values are right, each and together
same_run.py   what a resumed run may change, how two configs differ, and the default name of a run
"""
