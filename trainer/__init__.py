"""DisBack Trainer. Each file here is a verb of `disback`; each folder is a room (docs/architecture.md)."""

from trainer.distributed import logs as logs  # first of all: it quiets the libraries that the rest imports

VERSION = "0.1.0"
