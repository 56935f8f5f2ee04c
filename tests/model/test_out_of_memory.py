"""Which errors are taken for want of memory: by their types, and by what torch and the libraries below it write."""

import pytest
import torch

from chat_logits.model.out_of_memory import OUT_OF_MEMORY, is_out_of_memory

HELP = "\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/cuda-runtime-api/ for more …"
CREATE = "when calling `cublasCreate(handle)`"
LT = "when calling `cublasLtMatmul( ltHandle, computeDesc.descriptor(), &alpha_val, mat1_ptr, …)`"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"),
        torch.AcceleratorError(f"CUDA error: out of memory{HELP}"),
        RuntimeError(f"CUDA error: CUBLAS_STATUS_ALLOC_FAILED {CREATE}"),
        RuntimeError(f"CUDA error: CUBLAS_STATUS_ALLOC_FAILED {LT}"),
        RuntimeError(f"CUDA error: CUBLAS_STATUS_NOT_INITIALIZED {CREATE}"),
        RuntimeError(f"CUDA error: HIPBLAS_STATUS_ALLOC_FAILED {CREATE}"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.9 GB, other allocations: 1.1 GB)"),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:60]}",
)
def test_want_of_memory_is_known(error):
    assert isinstance(error, OUT_OF_MEMORY) and is_out_of_memory(error)


def test_want_of_memory_on_the_cpu_is_known():
    with pytest.raises(OUT_OF_MEMORY) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError(f"CUDA error: CUBLAS_STATUS_EXECUTION_FAILED {LT}"),
        RuntimeError(f"CUDA error: CUBLAS_STATUS_NOT_SUPPORTED {LT}"),
        RuntimeError(f"CUDA error: CUBLAS_STATUS_NOT_INITIALIZED {LT}"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if …"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (5x32 and 64x1000)"),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:60]}",
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)
