"""Networks that people have, made by code: torchvision, timm, transformers, peft.

Each is an `Entry`, which makes the network and an example call of it when it is asked to; listing them loads
nothing.
"""
