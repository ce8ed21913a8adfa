# Each target sets up what it needs. Fresh machine with Python 3.11: `make demo`, `make test`.
# Without an NVIDIA GPU: `make demo TORCH=cpu` takes PyTorch's small build. PYTHON=python3.13 chooses another Python, and
# PINS= leaves the choice of versions to pip.
PYTHON ?= python3.11
PINS ?= constraints.txt
TORCH ?=
TORCH_INDEX ?= $(if $(filter cpu,$(TORCH)),https://download.pytorch.org/whl/cpu)
# pip would compile all twenty thousand files, one after another; Python compiles the fifth that it imports
PIP := .venv/bin/python -m pip install -q --disable-pip-version-check --no-compile
BIN := .venv/bin
REPORT ?= runs/demo
export PYTHONHASHSEED := 0
export MPLBACKEND := agg
# Some images forbid Python to keep what it has compiled, and each process would compile all anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-notebooks test-python test-slow coverage mutants bench docs exercises lab explorers readme \
	hooks clean
# Other pins are another set-up; another Python needs another environment
DONE := .venv/.done-$(notdir $(PYTHON))-$(subst /,-,$(PINS))
setup: $(DONE)

$(DONE): settings.ini setup.py pyproject.toml $(PINS)
	@echo 'Setting up .venv: a few minutes, and $(if $(TORCH_INDEX),2,7) GB'
	@test -n '$(TORCH_INDEX)' || command -v nvidia-smi > /dev/null || \
		echo 'No NVIDIA GPU is seen here: TORCH=cpu behind the command would take the small build of PyTorch instead'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@! command -v $(PYTHON) > /dev/null || test "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" || \
		{ echo ".venv has $$($(BIN)/python -V): remove the folder to change to $(PYTHON)"; exit 1; }
	$(PIP) $(addprefix -c ,$(PINS)) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --no-deps) torch torchvision
	$(PIP) $(addprefix -c ,$(PINS)) -e '.[dev]'
	rm -f .venv/.done*
	touch $@

# Writes the drawn scenes, trains DCL+cls, tests on the two test videos, leaves $(REPORT)/
demo: setup
	$(BIN)/cwcl_data write runs/scenes
	$(BIN)/cwcl_train --data runs/scenes --preset demo --out $(REPORT) --overwrite

test: test-notebooks test-python

# Two processes of one thread; FILES='^1' runs one decade of the book
FILES ?= .
ONE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
test-notebooks: setup
	$(ONE) $(BIN)/python tools/book.py --files '$(FILES)'

test-python: setup
	$(ONE) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Takes the effect of every field of a recipe out of the library; each must turn a test red
mutants: setup
	$(ONE) $(BIN)/python tools/recipe_walk.py

# Which lines and branches of the library pytest runs, in every process that it starts
COVERAGE = COVERAGE_HOME=$(CURDIR)/runs/coverage $(BIN)/python -m coverage
coverage: setup
	$(PIP) $(addprefix -c ,$(PINS)) 'coverage>=7.10'
	rm -rf runs/coverage
	mkdir -p runs/coverage
	$(ONE) $(COVERAGE) run -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(COVERAGE) combine -q
	$(COVERAGE) report

test-slow: setup
	$(BIN)/python -m pytest -m slow
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n-workers 2 --flags slow

# Each part beside its peer, with how much faster it should be: data/results/bench; ONLY=contrast measures one line
ONLY ?=
bench: setup
	$(ONE) $(BIN)/python -W ignore tools/bench.py $(addprefix --only ,$(ONLY))

# Writes the study's results and the lists of lessons into the index, and the index to README.md
readme: setup
	$(BIN)/python tools/readme.py

docs: setup
	$(BIN)/python tools/docs.py

# The student's edition of the book: blanks in place of solutions
exercises: setup
	$(BIN)/python -c 'from cwcl.check import write_exercises; print(len(write_exercises(tell=print)), "lessons written to exercises/")'

# Both listen to this machine alone, and ask for the token that they print
lab: setup
	$(BIN)/jupyter lab --ip=127.0.0.1

explorers: setup
	$(BIN)/voila --Voila.ip=127.0.0.1 --Voila.auto_token=True nbs/63_explorers.ipynb

# Notebooks are cleaned on commit and merged cell by cell
hooks: setup
	$(BIN)/nbdev-install-hooks

clean:
	rm -rf _proc _docs build dist cwcl.egg-info
