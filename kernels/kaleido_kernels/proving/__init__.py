"""What judges kernels without a GPU. Nothing that runs on one imports it.

`inspect` compiles for a device that is not there (`fake_driver`), reads the machine code and the IR (`sass`, `ttgir`,
`carried`), judges them as `evidence` (`verdicts`, of kernels whose warps part `specialised`) and says what it should
cost (`roofline`); `trials` lists by that cost the tiles that are worth timing.
`emulate` runs compiled kernels on the CPU (`emulation`) and compares their states with plain torch.
"""
