# make run: the quick start. make test: everything the tests need, then the tests. make faults: what
# kills, full disks and damaged files do to a run, some minutes. make interop: what other programs
# make of our exports, each installed in .venv-interop/ (5 GB). make report: docs/report.pdf.
# make gpu: what a GPU makes of it, with ARGS="--peer=../nanoGPT" or others of bench_gpu.py.
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: run test faults interop gpu report clean

run: .venv/installed
	@test -f data/shakespeare/meta.json || $(PY) prepare_text.py
	$(PY) train.py config/quickstart.py --init_from=auto
	$(PY) sample.py --init_from=out/quickstart --start "HAMLET:" --max_new_tokens=400

test: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m pytest -q

faults: .venv/installed-dev
	$(PY) tests/test_faults.py

interop: .venv/installed-dev
	$(PY) tests/interop.py

gpu:  # with what is there: such a machine may have no network
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) bench_gpu.py $(ARGS)

report: .venv/installed
	$(PY) -m pip install --quiet -r requirements-docs.txt
	$(PY) docs/figures.py loss
	$(PY) docs/figures.py report

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "taleGPT needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .venv-interop
