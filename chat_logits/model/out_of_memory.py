"""Which errors mean that memory ran out."""

import torch

OUT_OF_MEMORY = (torch.OutOfMemoryError, RuntimeError)
# First from the runtimes and allocators; then status codes of cuBLAS, cuDNN and similar libraries (AMD's as well),
# which allocate memory for their own handles and workspaces: CUBLAS_STATUS_ALLOC_FAILED, and since cuDNN 9
# CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED.
MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "_status_alloc_failed",
    "_allocation_failed",
    "_status_not_initialized when calling `cublascreate",  # no memory for its handle
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory ran out: only torch's own allocators have an exception type for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in MEMORY_WORDS)
