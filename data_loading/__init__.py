"""Loads data sets, checks them, and yields batches. The files, in the order to read them:

spec.py            DataSpec, what a data set is; Part, its training or held-out part
checks.py          checks of what `load` returned
toy2d.py           points in the plane, with known densities
ring.py            a stochastic system in time, with a known law
labels.py          classes from labels of any kind, the names of parts, which items are held out
stores.py          the arrays in .npy, .npz, .zarr, .h5 and .nc files, read in place
named.py           which of them are x, labels, x1 and conditions
arrays.py          a data set from them, or from a file that prepare.py wrote
folders.py         finds the images of a folder, and their classes
images.py          decodes, crops and resizes them
hub.py             Hugging Face `datasets`
packed.py          decoded images as one file that is read in place: the cache, and the files of prepare.py
choice.py          chooses the classes and held-out items for samples
workers.py         loader processes: make batches, send them, limit each wait
loader.py          the order of the data, and Loader, which yields batches on the device

data_utils.py has the built-in data sets, the table of all, and the function that puts this together.
"""
