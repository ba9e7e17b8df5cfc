"""Networks as DeepSpeed engines: their roles, sharded weights, optimizer, and weights folders."""
