# Every target creates .venv and installs what it needs, once. PYTHON chooses the interpreter the environment is made from.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help study test check bench bench-million faults figures clean

help:
	@echo "make study   measure the decay of gradients on real data: table, labelled data, pictures (results/)"
	@echo "make test    the test-suite"
	@echo "make check   ruff, the type checker, then the suite"
	@echo "make bench   the benchmarks (minutes)"
	@echo "make bench-million  a million networks; on CPU a fraction of them"
	@echo "make faults  kill -9, signals, a full disk, done to the real command (minutes; the last as root)"
	@echo "make figures the study again, and from it what docs/ shows"

.venv/bin/python:
	$(PYTHON) -m venv .venv

# A stamp per extra, renewed when pyproject.toml changes: nothing is installed twice.
.venv/.study: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[study]"
	@touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[study,test]"
	@touch $@ .venv/.study

# A study that was stopped goes on.
study: .venv/.study
	$(BIN)/python -m vgrad study --resume

test: .venv/.test
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

bench: .venv/.test
	$(BIN)/python experiments/benchmarks/depth_sweep.py
	$(BIN)/python experiments/benchmarks/floor.py
	$(BIN)/python experiments/benchmarks/phase_diagram.py
	$(BIN)/python experiments/benchmarks/monitor_overhead.py
	$(BIN)/python experiments/benchmarks/diagnose_cost.py

# On CPU a stated fraction of it, extrapolated.
bench-million: .venv/.test
	$(BIN)/python experiments/benchmarks/million.py

faults: .venv/.test
	$(BIN)/python tests/faults/run.py

# What docs/ shows, from the code and a default study.
figures: study
	$(BIN)/python docs/build.py results/study.nc

clean:
	rm -rf .venv results .pytest_cache
