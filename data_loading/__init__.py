"""Data: where they come from, how they are checked, in which order they are read. In the order to read:

spec.py            DataSpec, what a data set is; Part, its training or held-out part
checks.py          checks of what `load` returned
toy2d.py           points in the plane, with known densities
labels.py          classes from labels of any kind, the names of parts, which items are held out
arrays.py          .npy, .npz and the files of prepare.py
folders.py         the images of a folder: which files, which classes
images.py          a folder of images, decoded
hub.py             a data set of Hugging Face `datasets`
packed.py          decoded images as one file that is read in place: the cache, and the files of prepare.py
choice.py          which classes and held-out items samples are made of
workers.py         loader processes: batches from items, how they are sent, waits that end
loader.py          the order of the data, and Loader, which yields batches on the device

The built-in data sets, the table of all, and the function that puts this together are in data_utils.py.
"""
