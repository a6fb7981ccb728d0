"""Names and defaults of a run: plain Python, so that ``--help`` need not wait for torch.

Lists that the kernels know too are taken from them.
"""

from __future__ import annotations

from kaleido_kernels import precision, shapes

ENGINES = ("auto", "triton", "cpu", "reference")
ACTIVATIONS, INITS, NOISES = shapes.ACTIVATIONS, shapes.INITS, shapes.NOISES
KERNELS = ("auto", *shapes.KERNELS)
LOW_PRECISIONS = precision.PRECISIONS[1:]
PRECISIONS = ("fp32", "fp64", *LOW_PRECISIONS)
BOUNDS = tuple(shapes.BOUNDS)
PUBLISHED_EPS, PUBLISHED_RUNS = 0.01, 30  # of the published sampler, as its MNIST notebook runs it
BUILT_IN_PREFIX = "builtin:"
DEFAULT_MODEL = f"{BUILT_IN_PREFIX}digits"  # with its prefix: a file of that name in the working folder is not meant
ATTRACTORS_MODEL = "attractors"  # bundled: the same digits, trained to attract chains
BACKGROUND = "white"  # of transparent pictures, as viewers and browsers show them
IMAGE_SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
IMAGE_SUFFIXES |= {".pgm", ".ppm", ".pbm", ".pnm", ".jp2", ".tga", ".avif"}  # of files that are read as pictures
CHANNELS = ("first", "last", "none")
SAMPLERS = ("kaleidoscope", "flow")
DEFAULT_STEPS, DEFAULT_NOISE_FROM, DEFAULT_NOISE_TO = 20, 0.9, 0.1  # of a flow
DEFAULT_BURN_IN = 299
DEFAULT_THIN = 1
DEFAULT_JITTERED_STEPS = 64  # between draws of a jittered chain, where it was not measured how many mix
DEFAULT_JITTER = 0.0
MIXED_R_HAT, MIXED_SHARE = 1.05, 0.5  # up to, and from which on, draws of a chain pass for independent
DEFAULT_SETTLE = 2
DEFAULT_TOL = 1e-4
DEFAULT_PATIENCE = 1
DEFAULT_CHECK_EVERY = 4
DEFAULT_MAX_PERIOD = 64
OUTPUT_ENDINGS = (".npy", ".npz", ".safetensors", ".zarr")
BLOCK_ENDINGS = (".zarr", ".npy")  # of outputs that are written block by block
STORED_DTYPES = ("float32", "float16", "uint8")
