# `make train` and `make test` do all their own set-up in .venv; nothing else is touched.
# Another interpreter: make train PYTHON=python3.12

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: train test bench clean

train: .venv/installed
	$(RUN) data/stdlib/prepare.py
	$(RUN) train.py config/train_stdlib.py
	$(RUN) sample.py --out_dir=out-stdlib --num_samples=2 --max_new_tokens=400

test: .venv/installed-test
	$(RUN) -m pytest -q tests

bench: .venv/installed
	$(RUN) bench.py attention
	$(RUN) bench.py layer
	$(RUN) bench.py step
	$(RUN) bench.py sample

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one: make train PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: requirements.txt .venv/created
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv
