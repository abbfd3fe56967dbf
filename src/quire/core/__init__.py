"""The memory manager and the scheduler: standard library and NumPy only.

Knows blocks, tables, sequences, steps. Does not know tensors, devices, models, text, clocks or random numbers: what it
needs of those is passed in. It runs, and is tested, without torch.
"""
