"""What a run shows. Read in this order:

pictures.py  Gallery: which pictures a run draws, and when
grids.py     images as one picture
points.py    scatter plots, densities and paths of points in the plane
page.py      report.html: curves, pictures, settings and numbers on one page
dry_run.py   `sh run.sh --check`: everything once, and an estimate of time, memory and disk
"""
