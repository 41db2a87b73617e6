"""What config.py needs of the settings. Nothing here imports config.py or torch.

flags.py      command line -> settings, and which value wins
rules.py      which values are right, each and together
names.py      the default name of a run
same_run.py   what a resumed run may change, and how two configs differ
"""
