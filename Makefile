# `make train` and `make test` do all their own set-up in .venv; nothing else is touched.
# Another interpreter: make train PYTHON=python3.12

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: train check test test-faults bench demo test-demo clean

train: .venv/installed
	$(RUN) data/stdlib/prepare.py
	$(RUN) train.py config/train_stdlib.py
	$(RUN) sample.py --out_dir=out-stdlib --num_samples=2 --max_new_tokens=400

# In a minute: the layout, the documents, the laws of one mechanism, the model and the settings.
check: .venv/installed-test
	$(RUN) -m pytest -q tests/test_house.py -rP
	$(RUN) -m pytest -q -n 2 tests/test_docs.py tests/models tests/settings/test_configurator.py tests/datasets/test_dataset.py
	$(RUN) -m pytest -q -n 2 tests/attention/test_contract.py --attention=sparse

test: .venv/installed-test
	$(RUN) -m pytest -q -n 3 tests --ignore=tests/demo --ignore=tests/faults

# What no run may lose: kills, full disks, damaged files, lost ranks. The counts go to results/faults.json; with FAULTS=
# each fault is tried a few times only, and nothing is counted.
FAULTS = 1
test-faults: .venv/installed-test
	$(if $(FAULTS),FAULTS=1) $(RUN) -m pytest -q -n 4 tests/faults

bench: .venv/installed
	$(RUN) bench.py attention
	$(RUN) bench.py layer
	$(RUN) bench.py step
	$(RUN) bench.py sample

# The page opens on models: a toy classifier and a toy language model, trained in seconds where there are none yet.
demo: .venv/installed-demo | out-sentences/best.pt out-toy/best.pt
	$(RUN) -m streamlit run app.py

out-sentences/best.pt out-toy/best.pt: out-%/best.pt: | .venv/installed
	$(RUN) data/$*/prepare.py
	$(RUN) train.py config/train_$*.py

# In a real browser: Chromium, which Debian and Ubuntu have as a package.
test-demo: .venv/installed-test-demo
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get && apt-get -qq update && \
		apt-get -qq install -y --no-install-recommends chromium >/dev/null; } || \
		{ echo "The demo's tests need a browser: install chromium (as root: apt-get install chromium)" >&2; exit 2; }
	$(RUN) -m pytest -q tests/demo

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

.venv/installed-demo: requirements-demo.txt .venv/installed
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements-demo.txt
	touch $@

.venv/installed-test-demo: requirements-test-demo.txt .venv/installed-test .venv/installed-demo
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements-test-demo.txt
	touch $@

clean:
	rm -rf .venv
