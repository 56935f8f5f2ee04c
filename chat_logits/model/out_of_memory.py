"""Which errors say that memory was too small."""

import torch

OUT_OF_MEMORY = (torch.OutOfMemoryError, RuntimeError)
# Of the runtimes and of allocators; then the status of cuBLAS, cuDNN and their like, of AMD's too, which take room for
# handles and workspaces of their own: CUBLAS_STATUS_ALLOC_FAILED, and since cuDNN 9
# CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED.
MEMORY_WORDS = (
    *("out of memory", "can't allocate memory", "not enough memory"),
    *("_status_alloc_failed", "_allocation_failed"),
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory was too small: torch's own allocators alone have a type for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in MEMORY_WORDS)
