"""Processes: how they meet, what they agree on, what they tell the job script."""
