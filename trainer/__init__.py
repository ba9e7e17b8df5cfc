"""DisBack Trainer. Each file here is a verb of `disback`; each folder is a room (docs/architecture.md)."""

import os

from trainer.distributed import logs as logs  # first of all: it quiets the libraries that the rest imports

# On CPUs with AVX-512, MKL's sums otherwise depend on where arrays lie in memory, and a resumed run may differ in the last bit
# from one that was never stopped. Read at MKL's first product.
os.environ.setdefault("MKL_CBWR", "AVX512,STRICT")

VERSION = "0.1.0"
