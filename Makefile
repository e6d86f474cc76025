PYTHON   ?= python3
VENV     ?= .venv
PY       := $(VENV)/bin/python
DATASETS ?= digits
DATASET  ?= digits
STUDY    ?=
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

.PHONY: help demo app test test-browser install lock notebook-test package-test prepare export clean-notebooks readme experiments figures recipes bench bench-quick dehb compare clean tables sources landscapes replay-probes replay-unseen replay-studies real-studies replay-lcdb
.DELETE_ON_ERROR:

help:              ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20
demo: install      ## the main job on the embedded digits: probe, predict, train the best in full
	$(VENV)/bin/llprobe run --dataset digits --configs 32 --epochs 20 --out runs/demo
app: install       ## the explorer as a web page on this machine: all studies below runs, or STUDY=folder
	PYTHONPATH='$(CURDIR)' JUPYTER_PATH=nbs/apps/share LLPROBE_STUDIES='$(abspath $(or $(STUDY),runs))' $(PY) -m voila nbs/apps/explore.ipynb --Voila.ip=127.0.0.1 --template=offline \
	  $$($(PY) -c 'import webbrowser; webbrowser.get()' 2>/dev/null || echo --no-browser)
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
	$(PY) -m pytest -q -n 2 --dist loadfile tests

test-browser: install    ## the tests that drive a browser, which is installed first where apt-get is
	command -v chromedriver >/dev/null || { apt-get update -q && apt-get install -y -q chromium chromium-driver; }
	$(PY) -m pytest -q tests -m browser

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
	$(foreach d,$(DATASETS),$(MAKE) --no-print-directory figures DATASET='$(d)' &&) true
runs/probe/%/result.json: nbs/experiments/probe.ipynb | $(VENV)/.installed
	@mkdir -p $(@D)
	$(EXPERIMENT) $< $(@D)/probe.ipynb -r dataset '$(word 1,$(subst /, ,$*))' -p level $(word 2,$(subst /, ,$*)) -p seed $(word 3,$(subst /, ,$*)) \
	  -p n_configs $(CONFIGS) -p epochs $(EPOCHS) -p jobs '$(or $(JOBS),0)' -r out $(@D)
figures: install         ## figures/DATASET from its table, landscapes and probe runs, and from STUDY=folder if given
	@mkdir -p runs/figures
	$(EXPERIMENT) nbs/experiments/figures.ipynb 'runs/figures/$(notdir $(DATASET)).ipynb' -r dataset '$(DATASET)' -r study '$(STUDY)'

# --- yardsticks: one config on all of CIFAR-10, tested once ---------------------------------------------------------
RECIPES      ?= paper best resnet
RECIPE_paper := {"num_channels": 32, "optimizer": "adam", "learning_rate": 0.001, "weight_decay": 0.0005, "dropout": 0.2, "batch_size": 128, "augment": "flip_crop"}
RECIPE_best  := {"num_channels": 64, "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0005, "dropout": 0.2, "batch_size": 128, "augment": "flip_crop"}
RECIPE_resnet := {"num_channels": 32, "num_blocks": 1, "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0005, "batch_size": 128, "augment": "flip_crop", "cutout": 0.25}
ARCHITECTURE_resnet := resnet
recipes: $(foreach r,$(RECIPES),$(foreach s,$(SEEDS),runs/recipe/cifar10/$(r)/$(s)/result.json))  ## RECIPES for 30 epochs on all of CIFAR-10, SEEDS
runs/recipe/cifar10/%/result.json: nbs/experiments/recipe.ipynb | $(VENV)/.installed
	@mkdir -p $(@D)
	$(EXPERIMENT) $< $(@D)/recipe.ipynb -r dataset cifar10 -r name $(*D) -r architecture '$(or $(ARCHITECTURE_$(*D)),simple_cnn)' -r config '$(RECIPE_$(*D))' -p seed $(*F) -r out $(@D) \
	  -r copy figures/cifar10/recipes/$(*D)-$(*F).json

# --- benchmarks: landscapes against their peers, in an environment of their own; training -------------------------
PEERS := .venv-peers
bench: runs/bench/landscape/result.json runs/bench/training/result.json  ## time landscapes, curvature and training (about 50 minutes on two cores)
$(PEERS)/.installed: | $(VENV)/.installed   ## the peers, with the same PyTorch
	$(VENV)/bin/uv venv --quiet --allow-existing --python $(PY) $(PEERS)
	$(VENV)/bin/uv pip install --quiet --python $(PEERS)/bin/python loss-landscapes==3.0.6 landscaper==1.3.1 pyhessian==0.1 \
	  "torch==$$($(PY) -c 'import torch; print(torch.__version__.split("+")[0])')"
	touch $@
runs/bench/landscape/result.json: nbs/experiments/bench_landscape.ipynb tests/bench_landscape.py $(PEERS)/.installed
	@mkdir -p $(@D)
	$(EXPERIMENT) $< $(@D)/bench_landscape.ipynb -p copy figures/bench/landscape.json
runs/bench/training/result.json: nbs/experiments/bench_training.ipynb tests/bench_training.py | $(VENV)/.installed
	@mkdir -p $(@D)
	$(EXPERIMENT) $< $(@D)/bench_training.ipynb -p copy figures/bench/training.json
bench-quick: $(PEERS)/.installed   ## the same in ten minutes: fewer repeats, the peers' planes scaled up from 5 x 5 points
	@mkdir -p runs/bench/quick/landscape runs/bench/quick/training
	$(EXPERIMENT) nbs/experiments/bench_landscape.ipynb runs/bench/quick/landscape/bench_landscape.ipynb -p repeats 3 -p peer_grid 5 -p out runs/bench/quick/landscape
	$(EXPERIMENT) nbs/experiments/bench_training.ipynb runs/bench/quick/training/bench_training.ipynb -p repeats 2 -p n 1280 -p out runs/bench/quick/training

# --- search methods compared on tables of finished trainings; DEHB wants NumPy below 2, so an environment of its own ------
DEHB     := .venv-dehb
TASKSET  ?=
REPLAY_SEEDS ?= 20
$(DEHB)/.installed: | $(VENV)/.installed
	$(VENV)/bin/uv venv --quiet --allow-existing --python $(PY) $(DEHB)
	$(VENV)/bin/uv pip install --quiet --python $(DEHB)/bin/python dehb==0.1.2
	touch $@
dehb: $(DEHB)/.installed   ## the environment of DEHB
compare: $(DEHB)/.installed   ## search methods against each other on TaskSet: TASKSET=file.npz, JOBS (30 minutes on one core)
	$(if $(TASKSET),,$(error give the TaskSet archive: make compare TASKSET=file.npz))
	@mkdir -p runs/replay/taskset
	$(EXPERIMENT) nbs/experiments/replay_taskset.ipynb runs/replay/taskset/replay_taskset.ipynb -r data_path '$(TASKSET)' \
	  -r out runs/replay/taskset -r copy figures/taskset -p seeds $(REPLAY_SEEDS) -p jobs '$(or $(JOBS),1)'

# --- ground truth: every config at every level and seed, and searches replayed on it ------------------------------
TABLES          := digits mnist5k cifar10-10k
TABLE_digits    := -r dataset digits -p n_configs 128 -r seeds '0 1 2' -p epochs 20
TABLE_mnist5k   := -r dataset mnist5k -p n_configs 64 -r seeds '0 1 2' -p epochs 15 -r architecture mlp
TABLE_cifar10-10k := -r dataset cifar10 -p subset 0.2 -p n_configs 24 -r seeds 0 -p epochs 10 -r augment flip_crop
UNSEEN          := cifar10-5k
TABLE_cifar10-5k := -r dataset cifar10 -p subset 0.1 -p n_configs 256 -r seeds 0 -p epochs 15 -r architecture mlp
tables: $(patsubst %,figures/%/table/card.json,$(TABLES) $(UNSEEN))   ## make the tables that are missing (hours); they are committed
figures/%/table/card.json: | $(VENV)/.installed
	@mkdir -p runs/table/$*
	$(EXPERIMENT) nbs/experiments/table.ipynb runs/table/$*/table.ipynb $(TABLE_$*) -r out runs/table/$* -r copy figures/$*/table
sources: $(TABLES:%=llprobe/sources/%.json)   ## what the tables have shown, for the package
llprobe/sources/%.json: figures/%/table/card.json
	@mkdir -p $(@D)
	$(PY) -c 'from llprobe.table import bundle_table; bundle_table("figures/$*/table", "$@")'
landscapes: figures/$(DATASET)/landscapes/result.json   ## train the best, median and worst of DATASET's table again and slice the loss around them (minutes)
figures/%/landscapes/result.json: nbs/experiments/landscapes.ipynb | $(VENV)/.installed
	@mkdir -p runs/landscapes/$*
	$(EXPERIMENT) $< runs/landscapes/$*/landscapes.ipynb -r table figures/$*/table -r out runs/landscapes/$* -r copy $(@D)
replay-probes: install dehb   ## replay searches on the tables, and the ablation of signals
	@mkdir -p runs/replay/probes
	$(EXPERIMENT) nbs/experiments/replay_probes.ipynb runs/replay/probes/replay_probes.ipynb -r tables '$(TABLES:%=figures/%/table)' -r copy figures/probes
replay-unseen: install dehb   ## the same on the table that nothing was chosen on
	@mkdir -p runs/replay/unseen
	$(EXPERIMENT) nbs/experiments/replay_probes.ipynb runs/replay/unseen/replay_probes.ipynb -r tables figures/$(UNSEEN)/table \
	  -r known 'figures/digits/table figures/mnist5k/table' -r bundled '$(TABLES:%=figures/%/table)' -r out runs/replay/unseen -r copy figures/probes-unseen
replay-studies: install  ## replay whole studies within budgets on the tables (20 minutes on two cores)
	@mkdir -p runs/replay/studies
	$(EXPERIMENT) nbs/experiments/replay_studies.ipynb runs/replay/studies/replay_studies.ipynb -r tables '$(TABLES:%=figures/%/table)' -r copy figures/studies
real-studies: install    ## real studies from both starts: with what comes with llprobe, and from nothing (half an hour on two cores)
	@mkdir -p runs/real-studies
	$(EXPERIMENT) nbs/experiments/real_studies.ipynb runs/real-studies/real_studies.ipynb -p copy figures/real-studies
LCDB ?=
replay-lcdb: install     ## rank learners of unseen data sets: LCDB=archive.npz, or LCDB="train.npz test.npz"
	@mkdir -p runs/replay/lcdb
	$(EXPERIMENT) nbs/experiments/replay_lcdb.ipynb runs/replay/lcdb/replay_lcdb.ipynb -r train_path '$(firstword $(LCDB))' -r test_path '$(lastword $(LCDB))' -r out runs/replay/lcdb -r copy figures/lcdb

clean:                   ## remove the environment and build products; runs and figures stay
	rm -rf $(VENV) $(PEERS) $(DEHB) build dist *.egg-info
