"""Token log-probabilities of chat models, stored and read back.

    import chat_logits

    chat_logits.extract(chat_logits.ExtractConfig(model_id=…, dataset_id=…, output_dir=…))
    logits = chat_logits.open_logits("user/my-logits-dataset")

Heavy packages are imported only when they are used.
"""

import importlib
import os

# Read when CUDA is first used. The logits of each batch differ in size; unless its segments can grow, the allocator
# keeps a block for every size (54 GiB for batches of 6).
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

__all__ = ["ExtractConfig", "Extraction", "extract", "open_logits"]

_PLACES = {
    "ExtractConfig": "chat_logits.extraction.config",
    "Extraction": "chat_logits.extraction.run",
    "extract": "chat_logits.extraction.run",
    "open_logits": "chat_logits.display.logits",
}


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module 'chat_logits' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
