"""What a step should cost, from tile sizes, instruction counts and the order of copies and products in compiled code.

A model, never measured: no number here was timed by this package. An estimate is a range of two sets of assumptions,
`FAST` and `SLOW`; where published readings of a rate differ, one takes the best and the other the worst. Pieces:

- tensor: padded products over the dense fp16 rate of large products (tf32 at half of it, split fp32 three products);
- l2: bytes between L2 and one multiprocessor;
- hbm: what L2 does not hold until it is used again, at every use (`Reuse`);
- issue, alu, mufu: instructions over four warp schedulers, half-rate integer and conversion units, and 16 special
  function lanes a clock;
- chain: what a program does one after another (`Loop`: a copy is hidden only by what runs between its issue and its
  use), shared by the programs of a multiprocessor, which cover each other's waits.

The longest of them is a step of a tile; Python's time for each launch is added once. Not modelled: clocks above or
below `Gpu.clock`, bank conflicts, the latency from one product to the next that needs it.

`gpu` holds the assumptions, `loops` what a program does one after another, `model` the time, `work` what a step of each
kernel asks for. `onchip` plays the steps of a kernel whose warps part, which this cannot tell.
"""
