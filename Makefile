# make demo   install into .venv, then run the trained small model on all tasks
# make web    install into .venv, then serve the page of the trained small model on localhost
# make tiny   install into .venv, then make the tiny untrained model that configs/tiny.py starts from
# make readme   run the demo, then copy the images that README.md shows
# make test   install into .venv, then lint and run the tests; make test-fast: those that start no process and are not slow

PYTHON ?= python3
BIN := .venv/bin
TINY := output/pretrained_models/mige-tiny

.PHONY: demo readme web tiny test test-fast install clean

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# Threads that sleep while they wait: on a busy machine spinning ones take ten times as long.
demo: .venv/installed
	rm -rf output/demo
	OMP_WAIT_POLICY=passive $(BIN)/python tools/demo.py --output output/demo

# The images of README.md's table.
readme: demo
	cd output/demo && for pair in two_references:subject move:edit replace_by_reference:subject_edit; do \
		case=$${pair%%:*}-unseen-000; \
		cp images/$$case.png ../../docs/images/$${pair##*:}.png; \
		for n in 1 2; do test ! -e inputs/$$case-$$n.png || \
			cp inputs/$$case-$$n.png ../../docs/images/$${pair##*:}-$$n.png; done; done

web: .venv/installed
	OMP_WAIT_POLICY=passive $(BIN)/python infer_scripts/web_demo.py

tiny: $(TINY)

# The official file layout first, so that the conversion runs that released weights go through.
$(TINY): .venv/installed
	rm -rf output/tiny_official $@
	$(BIN)/python tools/make_tiny_checkpoint.py output/tiny_official
	$(BIN)/python tools/convert_checkpoint.py release --config configs/tiny.py --output $@ \
		--model output/tiny_official/model.pth --vae output/tiny_official/vae --t5 output/tiny_official/t5

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-fast: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not processes and not browser and not slow"

clean:
	rm -rf output/demo output/tiny_official $(TINY)
