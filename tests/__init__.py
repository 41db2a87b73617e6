"""Tests. tests/<wing>/test_<file>.py tests <wing>/<file>.py, and tests/test_<file>.py a file of the top level.

helpers.py and conftest.py  tiny settings, real runs, fixtures
oracle.py                   exact scores and samples of a mixture of Gaussians
experiments/                experiments that tests train
test_layers.py              the allowed imports
test_readme.py              everything that README.md and docs/ tell a reader to type
test_symptoms.py            each row of docs/symptoms.md, made by breaking a run in this way
test_promises.py            what a resumed run and several processes promise
test_faults.py              whole runs that are killed or stopped in every way (slow)
"""
