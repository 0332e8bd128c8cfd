PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_OFFLINE = 1

.PHONY: demo test lint docs pictures tutorials clean

demo: $(VENV)/installed  ## install, then take the induction circuit apart: out/induction/report.html
	$(BIN)/spd-lens induction --out out/induction

test: $(VENV)/installed  ## install, then every test
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"
	$(BIN)/python -m pytest -m slow -rP

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/installed  ## install, then the documentation, strictly: out/docs/index.html
	@# -E: a page that is kept from an earlier build would not warn again
	$(BIN)/sphinx-build -W --keep-going -n -q -E -b html -d out/docs-state docs out/docs
	@echo "See out/docs/index.html"

pictures: $(VENV)/installed  ## the README's pictures, from the report of `make demo` (needs chromium)
	$(BIN)/python docs/pictures.py

tutorials: $(VENV)/installed  ## run every notebook of tutorials/ again, outputs and all
	$(BIN)/python tutorials/execute.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out dist
