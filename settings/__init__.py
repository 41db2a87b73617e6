"""Parsing, rules and comparison of settings, for config.py. Nothing here imports config.py or torch.

flags.py      from the command line to settings
choices.py    the choices of each setting, the settings that each choice reads, and the page of --help
rules.py      rules for single values and for several together
same_run.py   what a resumed run may change, how two configs differ, and the default name of a run
"""
