"""Checkpoints: written whole, found again, loaded to the bit or resharded."""
