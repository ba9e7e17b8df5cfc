"""Diffusion models: noise schedules, networks, objectives, pipelines and metrics. Imports nothing from `trainer`."""
