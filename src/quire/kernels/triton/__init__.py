"""The kernels for GPUs, in Triton: `fused` (norms, rotary, activation, the KV write), `blocks` (block tables, copies and
swaps of blocks), `sampling` (from logits to tokens), `attention`. Importing this package loads no Triton; its modules do.
"""
