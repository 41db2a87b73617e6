"""Programs on runs and data. `sh run.sh generate.py ...` finds them here.

generate.py  samples of a run, in files
samples.py   opens a run and draws its samples, for generate.py and evaluate.py
outputs.py   files of samples
evaluate.py  numbers for a run: distances of samples from the data, held-out losses, bits per dimension
compare.py   several runs on one page; side_by_side trains them first
sweep.py     a grid of settings, a run for each combination
prepare.py   a data set as one file, of pixels or latents
"""
