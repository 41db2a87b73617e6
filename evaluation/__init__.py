"""Evaluates a run. Read in this order:

judge.py       calls the rest for a run: held-out losses, and numbers for samples
reference.py   the reference loss, comparable between runs whose x1 is noise, and its two baselines
detectors.py   feature extractors: Inception, DINOv2, a small classifier, raw pixels; DETECTORS is their table
distances.py   distances between features of samples and of data
scores.py      scores for `sample_metrics`: ensembles, spectra, two samples, known densities
annealing.py   weighted samples of a density known up to a constant
likelihood.py  log p(x0) by the probability-flow ODE

docs/numbers.md says what the numbers mean.
"""
