"""Keeps libraries' chatter out of a job's log: 64 processes would say everything 64 times. Errors still come through.

Import it before the libraries.
"""

import logging


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


# DeepSpeed sets its logger's level itself when it is imported; a filter stays. It warns of every CPU-only machine.
logging.getLogger("DeepSpeed").addFilter(_errors_only)
# torch warns that a CUDA build has no GPU; xformers that its own extension was built for another torch (the operators
# that call PyTorch's kernels work all the same).
for _name in ("torch.utils.cpp_extension", "xformers"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def no_progress_bars() -> None:
    """Loading bars of diffusers and transformers: they take longer to read than the loading takes."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
