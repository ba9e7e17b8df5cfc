"""The convergence study: does the path pay, and what else does? See docs/convergence.md.

A run is one recipe on one problem with one seed, in this process: the product's mathematics (models/, trainer.path) in a plain
loop, so that variants that the product does not have can stand beside those that it has. tests/integration/test_convergence.py
holds the loop to the product's own training.
"""
