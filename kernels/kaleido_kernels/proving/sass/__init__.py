"""Reads machine code, the text that ``nvdisasm -c`` prints. Plain Python, no Triton.

Read in this order: `flow` (dominators and loops of any graph), `program` (instructions and their control flow),
`rounds` (what a round of a loop issues, in which order), `registers` and `memory` (what is used before it is there).
"""
