"""Token log-probabilities of chat models, stored and read back.

    import chat_logits

    chat_logits.extract(chat_logits.ExtractConfig(model_id=…, dataset_id=…, output_dir=…))

Nothing heavy is imported before it is used.
"""

import importlib

__all__ = ["ExtractConfig", "Extraction", "extract"]

_PLACES = {
    "ExtractConfig": "chat_logits.extraction.config",
    "Extraction": "chat_logits.extraction.run",
    "extract": "chat_logits.extraction.run",
}


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module 'chat_logits' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
