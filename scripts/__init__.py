"""Command-line programs besides training, started by `sh run.sh generate.py ...` and so on.

generate.py  writes samples of a run to files
samples.py   opens a run and draws its samples, for generate.py and evaluate.py
outputs.py   writes and resumes files of samples
evaluate.py  metrics of a run: distances of samples from the data, held-out losses, bits per dimension
export.py    writes the weights of a run with a file that samples from them, standalone.py, without this project
compare.py   puts several runs on one page; side_by_side trains them first
sweep.py     trains a run for each combination of a grid of settings
prepare.py   stores a data set in one file, as pixels or latents
"""
