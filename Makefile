# `make demo` and `make test` set up all that they need in .venv. Needs make and Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo serve stop check format lint types proto test test-fast coverage test-rayup test-clients determinism operations chaos simulate simulate-mutants front losses alarms restarts fuzz audit aot bench-loader bench overload hostile bench-peers load golden docs dashboards pictures clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: .venv/.installed ## make .venv with the grokmesh command

.venv/.installed: requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: install ## serve the demo model on two local hosts, stream a completion, stop
	$(BIN)/python -P -m tools.demo

serve: install ## leave the demo service running; `.venv/bin/grokmesh generate "..."` talks to it
	$(BIN)/grokmesh serve --detach

stop: install ## end it
	$(BIN)/grokmesh stop

check: lint types proto ## lint, types, import walls, proto

format: install ## rewrite what ruff would complain of, as far as it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy
	$(BIN)/mypy deploy/note_head.py

proto: install ## buf's STANDARD rules and comments; the generated modules are those of the .proto files
	cd proto && ../$(BIN)/buf lint
	tools/check_proto.sh

test: install ## all tests that CI runs: those that lose hosts one after the other, the others two files at a time
	$(BIN)/python -m pytest tests/chaos tests/rayup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/chaos --ignore=tests/rayup

test-fast: install ## the tests of a room each, without Ray and without what takes long: under three minutes
	$(BIN)/python -m pytest -q -m "not slow" tests/grokmesh tests/cluster tests/workers tests/tools

coverage: install build/coverage/.installed ## which lines make test-fast reaches
	PYTHONPATH=build/coverage $(BIN)/python -m pytest -q -m "not slow" --cov=grokmesh --cov=cluster --cov=workers --cov-report=term:skip-covered tests/grokmesh tests/cluster tests/workers tests/tools

build/coverage/.installed:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target build/coverage pytest-cov
	@touch $@

test-rayup: install ## `ray up` onto three hosts in namespaces of this machine; part of make test (needs root)
	$(BIN)/python -m pytest tests/rayup

test-clients: install build/clients/.installed ## OpenAI's client, LangChain, LiteLLM, lm-eval and Node.js against the demo on two hosts
	$(BIN)/python -m tests.clients

build/clients/.installed: requirements-clients.lock tests/clients/node/package-lock.json tests/clients/node/client.mjs
	$(PYTHON) -m venv build/clients
	build/clients/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-clients.lock
	cp -r tests/clients/node build/clients
	! command -v npm || npm ci --prefix build/clients/node --ignore-scripts --no-audit --no-fund
	@touch $@

determinism: install ## two thousand random schedules, each against what its requests get alone
	GROKMESH_SCHEDULES=2000 $(BIN)/python -m pytest -q tests/workers/runtime/test_schedules.py

operations: install ## a hundred thousand random operations on the scheduler, which must end with no page held
	GROKMESH_OPERATIONS=120000 $(BIN)/python -m pytest -q tests/workers/engine/test_scheduler.py

chaos: install ## two hundred random faults under load; FAULTS=N for another number
	GROKMESH_FAULTS=$(or $(FAULTS),200) $(BIN)/python -m pytest -q -s tests/chaos

simulate: install ## the control plane on a virtual clock, from one seed each: SEEDS=N, FIRST=N
	PYTHONHASHSEED=0 $(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),1000) --first $(or $(FIRST),0)

simulate-mutants: install ## faults in the code, one at a time, and how many seeds find each
	$(BIN)/python -m tests.simulation.mutants

front: install ## gateways and the controller are killed under load, fifty times each; KILLS=N for another number
	GROKMESH_KILLS=$(or $(KILLS),50) $(BIN)/python -m pytest -q -s tests/chaos/test_front.py

restarts: install ## fifty rolling restarts of replicas, and of gateways, under load, with not one failed request
	GROKMESH_RESTARTS=50 $(BIN)/python -m pytest -q -s tests/chaos/test_restarts.py

losses: install ## hosts are turned off, LOSSES=N times, with MODEL=DIR: how long until another takes their place
	GROKMESH_LOSSES=$(or $(LOSSES),10) $(if $(MODEL),GROKMESH_MODEL=$(MODEL)) $(BIN)/python -m pytest -q -s tests/chaos/test_host_loss.py

alarms: install ## SECONDS=3600 of load beside busy loops, with workers stopped for a second, cost no mesh
	GROKMESH_ALARM_SECONDS=$(or $(SECONDS),3600) $(BIN)/python -m pytest -q -s tests/chaos/test_false_alarms.py

fuzz: install build/fuzz/.installed ## millions of mutated messages, checkpoints, configurations and streams
	PYTHONPATH=build/fuzz:. $(BIN)/python -m tests.fuzz.run gateway -runs=2000000
	PYTHONPATH=build/fuzz:. $(BIN)/python -m tests.fuzz.run streams -runs=1000000
	PYTHONPATH=build/fuzz:. $(BIN)/python -m tests.fuzz.run http -runs=1000000
	PYTHONPATH=build/fuzz:. $(BIN)/python -m tests.fuzz.run checkpoint -runs=200000
	PYTHONPATH=build/fuzz:. $(BIN)/python -m tests.fuzz.run config -runs=20000

build/fuzz/.installed:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/fuzz atheris==3.0.0
	@touch $@

audit: install build/audit/.installed ## known vulnerabilities of what is installed, as the package index lists them
	build/audit/bin/pip-audit --disable-pip --require-hashes -r requirements.lock

build/audit/.installed:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	@touch $@

aot: build/aot/.installed ## compile the whole model for TPU slices and H100s; writes docs/support-matrix.md
	build/aot/bin/python -m pytest -q tests/tools/test_aot.py
	build/aot/bin/python -m tools.aot.support_matrix

build/aot/.installed: requirements-aot.lock pyproject.toml
	$(PYTHON) -m venv build/aot
	build/aot/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-aot.lock
	build/aot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

bench-loader: install ## loading a checkpoint beside reading its files, in turns
	$(BIN)/python -m tools.bench.loading

bench: install ## the engine as shares of this machine's limits, plans to followers, the gateway's streams, one and two hosts
	$(BIN)/grokmesh bench engine --checkpoint build/bench/model
	$(BIN)/python -m tools.bench.plans
	$(BIN)/python -m tools.bench.stream
	$(BIN)/python -m tools.bench.decode_step --checkpoint build/bench/model --devices 2
	$(BIN)/python -m tools.bench.prediction

hostile: install ## ten thousand hostile requests on the service at 127.0.0.1:50051 (telemetry.stall_seconds: 0.01): PID=, LOGS="..."
	$(BIN)/python -m tools.bench.hostile --pid $(PID) --logs $(LOGS)

overload: install ## ten times the load that the service can carry, idle connections, clients that do not read; memory over a million tokens
	$(BIN)/python -m tools.bench.overload --step 0.02
	$(BIN)/python -m tools.bench.overload
	$(BIN)/python -m tools.bench.soak

bench-peers: install build/bench/venv/.installed ## beside llama.cpp, engine and server, in one run
	$(BIN)/python -m tools.bench.peers --llama-python build/bench/venv/bin/python
	$(BIN)/python -m tools.bench.servers --llama-python build/bench/venv/bin/python

build/bench/venv/.installed:
	$(PYTHON) -m venv build/bench/venv
	build/bench/venv/bin/python -m pip install --quiet --disable-pip-version-check 'llama-cpp-python[server]'
	@touch $@

golden: install ## every golden set, mesh and number of hosts; GOLDEN=DIR for sets elsewhere
	tools/verify/verify_all.sh $(or $(GOLDEN),tests/golden)

load: install ## 500 requests of 32 clients on the running service, each compared with what it gets alone
	$(BIN)/python -m tools.load

docs: install ## renew the references that are made from proto and configuration
	$(BIN)/python -m tools.generate_docs

dashboards: install ## renew Grafana's JSON
	$(BIN)/python -m tools.dashboards.build

pictures: install ## draw the dashboards of a loaded demo for docs/; needs Debian's prometheus and chromium
	$(BIN)/python -m tools.pictures

clean: ## remove .venv and caches
	rm -rf .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
