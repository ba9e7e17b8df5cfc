"""What the training stages share: the loop, the run, data, metrics."""
