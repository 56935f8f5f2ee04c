"""Make the demo's student: the first 8 of SmolLM2-135M-Instruct's 30 layers, with its embedding and tokenizer.

    python demo/student.py .cache/smollm2-8-layers

The layers that would follow are missing, so that it writes nothing of sense until it is trained.
"""

import shutil
import sys
from pathlib import Path

from fetch import MODEL

LAYERS = 8
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_student(folder: Path) -> None:
    """Save the student; the folder gets its name only when it is whole."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:LAYERS]
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    for name in TOKENIZER:
        shutil.copy(MODEL / name, unfinished / name)
    unfinished.rename(folder)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not folder.exists():
        make_student(folder)
