"""Random small networks: generated as data, run through the whole library, shrunk where one fails."""
