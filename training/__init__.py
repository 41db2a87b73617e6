"""The parts of a trainer. trainer.py makes each of them and calls them. Read in this order:

experiment.py    the contract: a batch, what sampling starts from, the hooks that the parts may call
batches.py       prepared batches for training, held-out losses and sampling; where randomness is seeded
calling.py       networks as functions: train or eval mode, precision, torch.compile; the loss on several processes
bad_steps.py     steps whose loss or gradient is not finite
drawing.py       samples, drawn by all processes together
independence.py  a test, on the first images, of whether x1 is the process's base, drawn independently of x0
advice.py        warnings about settings that learn badly, and about the scale of the first images
unused.py        warnings about code in an experiment that is never called
checkpoints.py   what a checkpoint holds, how it is written in a thread, and how it is put back
posthoc.py       averaged weights, whose averaging length is chosen after training
run_folder.py    the folder of a run: name, lock, newest whole checkpoint, which run it holds
run_record.py    what identifies a run, and run.json: code, command and versions of each start

docs/inside.md follows a training step and a checkpoint through them.
"""
