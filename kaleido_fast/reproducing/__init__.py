"""The paper's kaleidoscopes, each from one command: pictures, an animation and measured figures.

One module a kaleidoscope, with ``run(job, report)``; `kaleido_fast.reproducing.job` lists them without loading any.
"""
