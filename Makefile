PYTHON   ?= python3
VENV     ?= .venv
PY       := $(VENV)/bin/python
DATASETS ?= digits
LEVELS   ?= 0.1 0.2 0.3 0.4
SEEDS    ?= 0
CONFIGS  ?= 16
EPOCHS   ?= 10
JOBS     ?=
RUNS     := $(foreach d,$(DATASETS),$(foreach l,$(LEVELS),$(foreach s,$(SEEDS),runs/probe/$(d)/$(l)/$(s))))
EXPERIMENT := $(PY) -m papermill --cwd . --no-progress-bar --log-level WARNING -k python3
export OMP_NUM_THREADS ?= 1
# uv does not read pip's variable for local wheels
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: help demo test install lock notebook-test package-test prepare export clean-notebooks readme experiments figures clean
.DELETE_ON_ERROR:

help:              ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20
demo: install      ## the main job on the embedded digits: probe, predict, train the best in full
	$(VENV)/bin/llprobe run --dataset digits --configs 32 --epochs 20 --out runs/demo
test: install notebook-test package-test  ## everything that must pass

# --- set-up: a virtual environment with the locked versions -----------------------------------------------------
install: $(VENV)/.installed   ## virtual environment with llprobe and the development tools
$(VENV)/.installed: settings.ini setup.py constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip uv
	$(VENV)/bin/uv pip install --quiet --python $(PY) -e '.[dev]' -c constraints.txt
	touch $@
lock: install      ## take the newest versions that settings.ini allows into constraints.txt
	$(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --no-header --all-extras setup.py -o constraints.txt

# --- tests ------------------------------------------------------------------------------------------------------
notebook-test: install   ## nbdev_test: every cell of every module notebook
	$(VENV)/bin/nbdev_test --n_workers 2
package-test: install    ## pytest: packaging, crashes, numbers across modules
	$(PY) -m pytest -q tests

# --- before a commit --------------------------------------------------------------------------------------------
prepare: install export clean-notebooks readme test  ## export, clean, README, tests
export: install          ## notebooks -> package
	$(VENV)/bin/nbdev_export
clean-notebooks: install ## strip notebook metadata
	$(VENV)/bin/nbdev_clean
readme: install          ## README.md from nbs/index.ipynb
	$(PY) tests/readme.py

# --- experiments: resumable, one folder per data set, level and seed -----------------------------------------------
experiments: $(RUNS:=/result.json)   ## probe notebooks for DATASETS, LEVELS, SEEDS; then the figures
	$(foreach d,$(DATASETS),$(MAKE) --no-print-directory figures DATASET=$(d) &&) true
runs/probe/%/result.json: nbs/experiments/probe.ipynb | $(VENV)/.installed
	@mkdir -p $(@D)
	$(EXPERIMENT) $< $(@D)/probe.ipynb -r dataset '$(word 1,$(subst /, ,$*))' -p level $(word 2,$(subst /, ,$*)) -p seed $(word 3,$(subst /, ,$*)) \
	  -p n_configs $(CONFIGS) -p epochs $(EPOCHS) -p jobs '$(or $(JOBS),0)' -r out $(@D)
figures: install         ## summarise runs/probe/DATASET in figures/DATASET
	@mkdir -p runs/summary
	$(EXPERIMENT) nbs/experiments/summary.ipynb runs/summary/$(DATASET).ipynb -r dataset '$(DATASET)' -r runs runs/probe -r figures figures

clean:                   ## remove the environment and build products; runs and figures stay
	rm -rf $(VENV) build dist *.egg-info
