"""The kernels for GPUs, in Triton: `fused` (norms, rotary, activation, the KV write), `linear` and `skinny` (linear layers for
some tokens and for few), `blocks` (block tables, copies and swaps of blocks), `sampling` (from logits to tokens), `attention`;
and `ops`, which chooses among them. Importing this package loads no Triton; its modules do.
"""
