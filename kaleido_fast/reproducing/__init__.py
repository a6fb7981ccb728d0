"""The paper's kaleidoscopes, each from one command: pictures, an animation and measured figures.

One module a kaleidoscope, with ``run(settings, report)``; `kaleido_fast.reproducing.settings` lists them without
loading any.
"""
