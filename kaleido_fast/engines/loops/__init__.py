"""Compiled loops of the CPU engine: all steps of all layers for one tile of chains, with its noise.

A tile is ``subs`` sub-tiles of `LANES` chains; its arrays are laid out [sub-tile][value][lane], so that the innermost
loop always runs over chains: one chain is one lane of a vector register, from the noise to the draw. Every lane does
the same operations in the same order, so that a chain's bits depend on neither its place nor its neighbours nor the
register block that computed it. In fp32 that is one multiply-add per weight, in the order of the inputs, from the bias
on, whatever the width of the processor's vectors; only a processor without fused multiply-add rounds otherwise.

    processor  what numba compiles for            scalars  activations, which LLVM turns into vectors
    compiling  entries and their parts            vectors  vector instructions written out
    arrays     what the loops read and write      dense    layers by multiply-adds, chains in the lanes
    packing    weights and buffers for them       few      the same with outputs in the lanes
    schedule   a run's steps for them             bf16     rounding
    choice     which loops run a precision        amx      products of tiles; tiles: layers by them
    steps      the entries                        noise    by the ids of chains
                                                  team     threads that share the layers of a tile
"""
