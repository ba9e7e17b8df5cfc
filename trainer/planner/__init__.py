"""What a run costs before it starts: memory, traffic, FLOP."""
