"""Which errors say that memory was too small."""

import torch

OUT_OF_MEMORY = (torch.OutOfMemoryError, RuntimeError)
MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory was too small: only CUDA has a type for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in MEMORY_WORDS)
