"""What is computed: diffusion schedules, networks, objectives, pipelines, metrics. Knows nothing of `trainer`."""
