"""Runs the PTX that Triton makes for sm_90 on the CPU: what is compiled is compared with what is right, without a GPU.

Read in this order: `ptx` (the text), `flow` (what steers it), `memory` (tensors and shared memory), `threads` and
`warps` (threads that run together), `arithmetic`, `conversion`, `movement`, `copies`, `products` (the instructions),
`block` (a block of threads, its partitions, and the order in which its warps run), `driver` (launches of Triton's JIT
end here instead of on a GPU), `faults` (what the emulator must see in a warp-specialised kernel).

It is adversarial where the machine leaves a choice: copies take effect as late as allowed, shared memory holds NaN
until it is written and from the moment that a copy is on its way, groups of warps run in chosen orders. It cannot see
time, races that need two warps to run at the same instant, what ptxas makes of the PTX, CUDA graphs, or the library's
products. Section titles name chapters of NVIDIA's "Parallel Thread Execution ISA", version 8.7.
"""
