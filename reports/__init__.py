"""What a run shows. Read in this order:

pictures.py  Gallery: which pictures a run draws
plots.py     tensors as pictures: grids of images, plots of points in the plane
page.py      report.html: curves, pictures, settings and numbers on one page
seeds.py     runs that differ only in their seed: mean, spread, and which differences are more than that
dry_run.py   `sh run.sh --check`: everything once, and an estimate of time, memory and disk
"""
