# Every target works on a machine with Python 3.11 or newer and nothing else installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Each process of the tests would compile them again where bytecode is not kept, as in many containers.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install install-dev install-tracing run demo compile test test-unit test-compiled check format docs pictures lock bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## prepare .venv with what the service needs
install-dev: $(VENV)/.installed-dev  ## prepare .venv with what the tests need as well

install-tracing: $(VENV)/.installed-tracing  ## what LUCID_OTLP_ENDPOINT needs, beside the rest in .venv

run: install  ## install, then serve on 127.0.0.1:8000 with an embedded Postgres
	@exec $(BIN)/lucid serve $(ARGS)

compile: install $(VENV)-compile/.installed  ## compile the busiest modules (needs a C compiler)
	@$(VENV)-compile/bin/python scripts/compile.py $(BIN)/python $(ARGS)

demo: install-dev  ## show it all alive for a minute and a half: three nodes, one killed, one drained, both back
	@exec $(BIN)/python -m demo $(ARGS)

# What fails beside other tests runs once more, alone: a machine that stood still for a second is no fault of the code.
test: install-dev  ## run every test, on an embedded Postgres or on LUCID_TEST_DATABASE_URL
	@$(PYTEST) -n 2 --dist worksteal $(ARGS) || { [ $$? -eq 1 ] && echo "=== once more, what failed, alone:" \
	  && $(PYTEST) -v --last-failed --last-failed-no-failures none $(ARGS); }

test-unit: install-dev  ## run the unit tests, which need no Postgres
	@$(PYTEST) -q -n 2 --dist worksteal tests/unit $(ARGS)

# The rest is tested in its usual form: unit tests replace parts that compiled modules don't look up.
test-compiled: install-dev compile  ## run the acceptance tests, and those of the gateway, on the compiled service
	@LUCID_COMPILED=true $(PYTEST) -n 2 --dist worksteal $(or $(ARGS),tests/acceptance \
	  tests/integration/egress tests/integration/gateway tests/integration/server)

check: install-dev  ## lint, format check, types, unused code, layout rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/vulture
	@$(PYTEST) -q tests/test_house_rules.py

format: install-dev  ## rewrite the code in the project's format
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: install-dev $(VENV)-compile/.installed  ## run every benchmark that the README quotes
	@$(VENV)-compile/bin/python scripts/compile.py --if-possible $(BIN)/python
	@$(BIN)/python -m benchmarks $(ARGS)

pictures: install-dev  ## take the dashboard's pictures for the docs (needs Chromium)
	@$(BIN)/python -m benchmarks dashboard_pictures

lock:  ## lock every dependency with hashes, for Python 3.11 to 3.14 (needs uv)
	@uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --quiet --group build pyproject.toml --output-file requirements/runtime.txt
	@uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --quiet --constraint requirements/runtime.txt \
	  --group build --extra tracing pyproject.toml --output-file requirements/tracing.txt
	@uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --quiet --constraint requirements/tracing.txt \
	  --group build --group dev --extra tracing pyproject.toml --output-file requirements/dev.txt
	@uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --quiet --constraint requirements/dev.txt \
	  --group compile --output-file requirements/compile.txt
	@uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --quiet --group docs --output-file requirements/docs.txt
	@for peer in bench bench-smg bench-litellm; do uv pip compile --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --custom-compile-command "make lock" --quiet requirements/$$peer.in \
	  --output-file requirements/$$peer.txt || exit 1; done

docs: $(VENV)-docs/.installed  ## build the documentation site in build/site; broken links and anchors fail
	@$(VENV)-docs/bin/python -m sphinx -q -W --keep-going -j auto -d build/doctrees -c docs/site . build/site $(ARGS)
	@echo "The documentation is in build/site/index.html."

clean:  ## remove the virtual environment and every cache, never the data folder
	@rm -rf $(VENV) $(VENV)-compile $(VENV)-docs build .venv-bench .venv-bench-* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: requirements/runtime.txt pyproject.toml
	@$(PYTHON) scripts/install.py $(VENV) $< $@ .

$(VENV)/.installed-tracing: requirements/tracing.txt | $(VENV)/.installed
	@$(PYTHON) scripts/install.py $(VENV) $< $@

$(VENV)/.installed-dev: requirements/dev.txt pyproject.toml
	@$(PYTHON) scripts/install.py $(VENV) $< $@ .

$(VENV)-compile/.installed: requirements/compile.txt
	@$(PYTHON) scripts/install.py $(VENV)-compile $< $@

$(VENV)-docs/.installed: requirements/docs.txt
	@$(PYTHON) scripts/install.py $(VENV)-docs $< $@
