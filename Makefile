# make study: run the embedded study and write outputs/embedded/report.html     (STUDY=name for another)
# make test:  run every test, the notebooks' stored outputs among them
# make mutants: plant bugs that are new or whose code changed, one at a time, and see that a test fails:
#               outputs/published/mutants.csv     (MUTANTS=--all for every bug)
# make lab:   open JupyterLab on the notebooks
#
# Each makes .venv with pinned versions first, if it is missing. With an interpreter that already has the packages,
# `make study PYTHON=python3`, no .venv is made. PIP_ARGS goes to pip, for instance
# PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for PyTorch without CUDA.
STUDY ?= embedded
VENV := .venv/.installed
ifdef PYTHON
  READY :=
else
  PYTHON := .venv/bin/python
  READY := $(VENV)
endif
BOOTSTRAP ?= python3
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# Scripts such as jupyter are looked up beside the interpreter.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: study test mutants lab notebooks clean
study: $(READY)
	$(PYTHON) -m vitnb study $(STUDY)

test: $(READY)
	sh tests/run.sh $(PYTHON)

mutants: $(READY)
	$(PYTHON) tests/mutants.py $(MUTANTS)

lab: $(READY)
	$(PYTHON) -m jupyterlab notebooks

# Run the notebooks in place, in order, and keep their outputs: what the tests compare with.
notebooks: $(READY)
	for name in finetune evaluate ablate infer anatomy; do \
	  $(PYTHON) -m jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/$$name.ipynb || exit 1; done

$(VENV): pyproject.toml constraints.txt
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "Python 3.11.4 or newer is needed: make BOOTSTRAP=/path/to/python3.11 ...")'
	test -x .venv/bin/python || $(BOOTSTRAP) -m venv .venv
	@echo "Installing pinned packages into .venv (about 2 GB; minutes) ..."
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $(VENV)

clean:
	rm -rf outputs/embedded .snakemake
