# Each target makes its own environment in .venv first; nothing else needs to be installed.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK ?= cluster/locks/cpu.lock
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# pip compiles what it installs on one core; compileall takes all of them.
INSTALL := $(PIP) install --no-compile

export HF_HUB_OFFLINE ?= 1

# The quickstart's models come inside Python packages: nothing is asked of the Hugging Face hub.
.PHONY: help install quickstart reward-pairs test test-faults test-long test-cluster test-gpu bench-gpu test-fast test-wheel bench-training bench-synthesis bench-rewards bench-groups bench-dataplane bench-scaling submit docs docs-site docs-serve dist lint-github lint format type lock audit clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(READY)  ## the environment in .venv, from the CPU lock

$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rdpo needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH) || $(INSTALL) $(TORCH) --extra-index-url $(TORCH_INDEX)
	$(INSTALL) --no-deps -r $(LOCK)
	$(INSTALL) --no-deps -e .
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib rdpo > /dev/null || true
	@touch $@

quickstart: $(READY) models/plain-answer/config.json  ## from prompts to an aligned model and a report, on the CPU
	$(BIN)/rdpo run jobs/quickstart.toml

models/plain-answer/config.json: jobs/quickstart/fit_reward.py jobs/quickstart/reward_pairs.jsonl | $(READY)
	$(BIN)/python jobs/quickstart/fit_reward.py models/plain-answer

reward-pairs: $(READY)  ## write anew the pairs that the quickstart's reward model is fitted on
	$(BIN)/rdpo run jobs/quickstart.toml --until pairs --run-dir runs/reward-pairs --set synthesis.split=reward \
		--set 'rewards=[{kind="function", name="plainness", function="jobs.quickstart.rewards:plainness"}]' \
		--set pairs.min_gap=-9
	$(BIN)/python jobs/quickstart/fit_reward.py --export runs/reward-pairs jobs/quickstart/reward_pairs.jsonl

test: $(READY) lint type  ## lint, types and all tests that this machine can run, two files at a time
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

FAULTS := tests/faults tests/e2e/test_run.py tests/e2e/test_rounds.py tests/ray/test_dead_engine.py tests/ray/test_account.py tests/ray/test_training.py

# One after the other: two runs at once on two cores are slow enough to reach the limits of their time.
test-faults: $(READY)  ## every fault in every stage, kills by the dozen, rounds killed half way; prints the table
	$(BIN)/python -m pytest -q -m long $(FAULTS)

test-long: $(READY)  ## the other long cases: real servers, engines that judge, students of several processes
	$(BIN)/python -m pytest -q -m long --ignore=tests/cluster $(FAULTS:%=--ignore=%)

test-cluster: $(READY)  ## real Ray clusters on this machine: submitted jobs, an autoscaler, kinds of nodes, Slurm, metrics
	$(BIN)/python -m pytest -q -m "long or not long" tests/cluster tests/ray/test_placement.py tests/ray/test_metrics_endpoint.py

# On a GPU machine, in an environment of its own (see docs/gpu-job.md), which PYTHON names.
test-gpu:  ## the tests marked gpu, with the environment that is active: make test-gpu PYTHON=python
	$(PYTHON) -m pytest -q -m gpu tests/gpu

bench-gpu:  ## what one GPU does, logs and tables in runs/gpu: make bench-gpu PYTHON=python PAIRS=pairs.jsonl
	PYTHON=$(PYTHON) PAIRS=$(PAIRS) bash jobs/bench/gpu.sh

test-fast: $(READY)  ## the tests of the pure core, two files at a time: about four minutes on two cores
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/unit -m 'not ray and not long'

WHEEL := build/wheel

test-wheel: $(READY) models/plain-answer/config.json  ## the quickstart by the wheel, in a clean environment outside the repository's code
	rm -rf build
	mkdir -p $(WHEEL)
	$(PIP) wheel --no-deps --no-build-isolation -w $(WHEEL) .
	$(MAKE) $(WHEEL)/venv/.ready VENV=$(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip --disable-pip-version-check -q uninstall -y rdpo
	$(WHEEL)/venv/bin/python -m pip --disable-pip-version-check -q install --no-deps $(WHEEL)/*.whl
	cp -r jobs models $(WHEEL)
	cd $(WHEEL) && venv/bin/rdpo run jobs/quickstart.toml

PAIRS ?= jobs/quickstart/reward_pairs.jsonl
BENCH ?= --dtype float32 --tokens-per-batch 4096 --steps 5 --batch-size 4 --micro 2 --lora 16

bench-training: $(READY)  ## rdpo against TRL's DPOTrainer: make bench-training PAIRS=pairs.jsonl BENCH='--steps 5'
	$(BIN)/python jobs/bench/training.py $(PAIRS) $(BENCH)

SPEAK ?= --rows 96 --max-tokens 96

bench-synthesis: $(READY)  ## rdpo against bare vLLM and ray.data.llm: make bench-synthesis SPEAK='--rows 16'
	$(BIN)/python jobs/bench/synthesis.py $(SPEAK)

bench-rewards: $(READY)  ## a reward model's scores of 2 and 8 answers to a prompt, packed, padded and by plain transformers
	$(BIN)/python jobs/bench/rewards.py

bench-groups: $(READY)  ## groups of 2 to 16 answers against TRL on the same answers as pairs
	$(BIN)/python jobs/bench/groups.py

ROWS ?= 1000 10000 100000 1000000

bench-dataplane: $(READY)  ## what rdpo itself costs for each row, with an engine that echoes: ROWS='1000 10000'
	$(BIN)/python jobs/bench/dataplane.py --rows $(ROWS)

NODES ?= 1 2 4 8 16

bench-scaling: $(READY)  ## how near to linear many Ray nodes are, with engines of a known pace: NODES='1 4'
	$(BIN)/python -m jobs.bench.scaling --nodes $(NODES)

docs: $(READY)  ## write docs/config.md and the schemas of jobs/ anew from the fields of a job
	$(BIN)/python -m rdpo.config.manual > docs/config.md
	$(BIN)/python -m rdpo.config.schema jobs

JOB ?= jobs/safety_nodes.toml
ADDRESS ?= http://127.0.0.1:8265
RUN ?=

submit: $(READY)  ## send a job to a Ray cluster: make submit JOB=jobs/safety.toml ADDRESS=http://127.0.0.1:8265 RUN='--run-dir s3://…'
	$(BIN)/rdpo submit $(JOB) --address $(ADDRESS) $(RUN)

TOOLS := .venv-tools
SITE := docs/site/mkdocs.yml
# Where links from the site to the code lead, for example https://github.com/OWNER/NAME/blob/main
SOURCE_URL ?=

$(TOOLS)/.ready: cluster/locks/tools.lock
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check -q install --no-deps -r $<
	@touch $@

docs-site: $(TOOLS)/.ready  ## the documents as a site in build/site; a broken link ends it
	$(TOOLS)/bin/python docs/site/stage.py build/site-source $(SOURCE_URL)
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/bin/mkdocs build --strict -q -f $(SITE)

docs-serve: docs-site  ## the site on 127.0.0.1:8000
	$(TOOLS)/bin/python -m http.server -b 127.0.0.1 -d build/site 8000

lint-github: $(TOOLS)/.ready  ## workflows and issue forms by their schemas
	$(TOOLS)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(TOOLS)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/method.yml
	$(TOOLS)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(TOOLS)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

dist: $(TOOLS)/.ready  ## wheel and source distribution in dist/, checked
	rm -rf dist
	$(TOOLS)/bin/python -m build -q
	$(TOOLS)/bin/twine check --strict dist/*

lint: $(READY)  ## ruff and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(READY)  ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(READY)  ## mypy: strict on the package; on benchmarks and scripts, that what they call takes it
	$(BIN)/mypy
	$(BIN)/mypy --config-file jobs/mypy.ini jobs

lock: $(READY)  ## resolve the locks anew
	$(PIP) install uv
	$(BIN)/uv pip compile cluster/locks/cpu.in --override cluster/locks/cpu-leave-out.txt \
		--python-version 3.11 --no-header --no-annotate -q -o cluster/locks/cpu.lock \
		--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match
	$(BIN)/uv pip compile cluster/locks/gpu.in --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --no-header --no-annotate -q -o cluster/locks/gpu.lock
	$(BIN)/uv pip compile cluster/locks/tools.in --python-version 3.11 --no-header --no-annotate -q \
		-o cluster/locks/tools.lock

AUDIT := .venv-audit

audit:  ## known holes in the locked packages, by pip-audit in an environment of its own; asks the package index
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip --disable-pip-version-check -q install pip-audit==2.10.1
	@# Advisories know torch by its version without the name of the build.
	sed 's/+cpu$$//' $(LOCK) > $(AUDIT)/lock.txt
	$(AUDIT)/bin/pip-audit -r $(AUDIT)/lock.txt --no-deps --disable-pip --strict --progress-spinner off

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) $(AUDIT) $(TOOLS) .pytest_cache .mypy_cache .ruff_cache build
