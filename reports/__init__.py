"""Pictures and pages of a run. Read in this order:

pictures.py  Gallery: which pictures a run draws
plots.py     panels: cells in grids, with names, times and titles; images
kinds.py     the table KINDS: drawers of images, fields, volumes, signals and points
page.py      report.html: pictures, numbers, curves and settings on one page
parts.py     parts of a page: pictures, tables, sections
curves.py    curves on a page
seeds.py     runs that differ only in their seed: mean, spread, and which differences exceed the spread
dry_run.py   `sh run.sh --check`: does everything once, and estimates time, memory and disk
"""
