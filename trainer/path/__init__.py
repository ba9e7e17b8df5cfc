"""The degradation path: its nodes on disk, and which of them is the target."""
