"""The benchmark beside other tools: its networks, its tools, what is measured, and how it is shown.

`benchmarks/side_by_side.py` runs it.
"""
