# make demo   install into .venv, then run all three tasks on example_data/
# make test   install into .venv, then lint and run the tests

PYTHON ?= python3
BIN := .venv/bin
TINY := output/pretrained_models/mige-tiny
NOTE := These weights are tiny and untrained: the outputs are noise. The page shows that every step runs.

.PHONY: demo test install clean

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# The official file layout first, so that the demo runs the conversion that released weights go through.
$(TINY): .venv/installed
	rm -rf output/tiny_official $@
	$(BIN)/python tools/make_tiny_checkpoint.py output/tiny_official
	$(BIN)/python tools/convert_checkpoint.py release --config configs/tiny.py --output $@ \
		--model output/tiny_official/model.pth --vae output/tiny_official/vae --t5 output/tiny_official/t5

demo: $(TINY)
	rm -rf output/demo
	$(BIN)/python infer_scripts/infer.py --model $(TINY) --output output/demo --note "$(NOTE)" \
		--records example_data/subject.json example_data/edit.json example_data/subject_edit.json

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

clean:
	rm -rf output/demo output/tiny_official $(TINY)
