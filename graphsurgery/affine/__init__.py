"""The affine engine: which stretches of a graph compute `A x + b`, as which layer, and at what cost."""
