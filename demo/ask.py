"""Ask a chat model, such as a trained student: prompt in, text out.

python demo/ask.py outputs/student "Who looks after the building?"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(folder: str, question: str, most: int = 60) -> str:
    """The most probable answer, of ``most`` tokens at most."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, max_new_tokens=most, do_sample=False)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    print(answer(*sys.argv[1:3]))
