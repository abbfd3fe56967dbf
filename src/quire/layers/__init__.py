"""The layers that the model files are built of. Each takes all it needs when it is built; none holds global state.

`context` what a model is built with and what a step brings · `slots` where checkpoint tensors go · `linear`,
`embedding`, `norm`, `rotary`, `attention` the layers. They know no model family, no scheduler and no weight file.
"""
