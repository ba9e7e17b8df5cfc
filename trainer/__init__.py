"""The stages of DisBack and what they share: engines, run state, telemetry and the one training loop."""

from trainer import quiet as quiet  # first of all: it quiets the libraries that the rest imports
