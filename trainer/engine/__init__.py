"""Networks as DeepSpeed engines: weights in and out, optimizer."""
