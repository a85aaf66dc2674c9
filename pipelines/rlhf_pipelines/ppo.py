"""The pipeline: from prompts and a model to a policy that is pushed if it is better."""

from collections.abc import Mapping
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl.pipeline_channel import PipelineChannel

from rlhf_ppo.change_detection.component import detect_changes
from rlhf_ppo.config_validation.component import validate_config
from rlhf_ppo.dataset_preparation.component import prepare_dataset
from rlhf_ppo.descriptions import documented
from rlhf_ppo.hub_push.component import push_to_hub
from rlhf_ppo.policy_evaluation.component import evaluate_policy, gate
from rlhf_ppo.ppo_training.component import train_ppo
from rlhf_ppo.reference_snapshot.component import snapshot_reference
from rlhf_ppo.run_conclusion.component import conclude_run

PIPELINE_NAME = "rlhf-ppo"
HF_SECRET = "hf-token"
"""Kubernetes secret, in the namespace of the run, whose key HF_TOKEN opens private repositories; may be absent."""

TRAINING_POD = (
    "train_accelerator",
    "train_accelerator_count",
    "train_cpu",
    "train_memory",
    "train_node_selector",
    "train_tolerations",
)
"""Outputs of validate_config: what train_ppo's pod asks for."""


def wire(parameters: dict[str, Any]) -> None:
    """Make the tasks and their order; ``parameters`` are the pipeline's inputs by name."""
    run_id = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    conclude = conclude_run(
        run_id=run_id,
        mlflow_tracking_uri=parameters["mlflow_tracking_uri"],
        tracker_project_name=parameters["tracker_project_name"],
    )
    _set_up(conclude, "Conclude the run", cached=False, retries=0, token=False)
    with dsl.ExitHandler(conclude, name="ppo"):
        # 1. Check everything before anything expensive; pin what the cached steps read. Nothing new: end here.
        validated = validate_config(**parameters)
        _set_up(validated, "Validate the config", cached=False, retries=0)
        changed = detect_changes(
            config=validated.outputs["config"],
            run_id=run_id,
            model_digest=validated.outputs["model_digest"],
            data_digest=validated.outputs["data_digest"],
        )
        _set_up(changed, "Detect changes", cached=False, retries=2, token=False)
        # A local run knows conditions on a task's single output only, and takes any other as false.
        with dsl.If(changed.output == True, name="there is something new"):  # noqa: E712
            _learn(parameters, run_id, validated.outputs)


def _learn(parameters: dict[str, Any], run_id: str, validated: Mapping[str, Any]) -> None:
    """Make the tasks that follow the checks; ``validated`` are the outputs of validate_config."""
    snapshot, prepared = _inputs(parameters, validated)
    of_run = {"config": validated["config"], "run_id": run_id}
    inputs = {"prompts": prepared.outputs["prompts"], "reference": snapshot.outputs["reference"]}

    # 3. Train
    trained = train_ppo(**of_run, **inputs)
    _set_up(trained, "Train the policy with PPO", cached=False, retries=2)
    # Where a TrainJob has the cards, the step that waits for it asks for none.
    pod = {name.removeprefix("train_"): validated[name] for name in TRAINING_POD}
    _place(trained, image=parameters["node_image"], **pod)
    kubernetes.empty_dir_mount(trained, "shm", "/dev/shm", medium="Memory")  # Else 64 MiB, too little for NCCL.

    # 4. Judge
    policy = trained.outputs["policy"]
    evaluated = evaluate_policy(**of_run, **inputs, policy=policy, history=trained.outputs["history"])
    _set_up(evaluated, "Evaluate policy against reference", cached=False, retries=2)
    pod = {name: parameters[f"node_{name}"] for name in ("accelerator", "cpu", "memory", "tolerations")}
    _place(
        evaluated,
        image=parameters["node_image"],
        accelerator_count="1",
        node_selector=parameters["node_selector"],
        **pod,
    )
    judged = gate(evaluation=evaluated.outputs["evaluation"])
    _set_up(judged, "Gate", cached=False, retries=0, token=False)

    # 5. Publish
    with dsl.If(judged.output == True, name="the gate is passed"):  # noqa: E712
        pushed = push_to_hub(**of_run, policy=policy, evaluation=evaluated.outputs["evaluation"])
        _set_up(pushed, "Push to the hub", cached=False, retries=3)


def _inputs(parameters: dict[str, Any], validated: Mapping[str, Any]) -> tuple[dsl.PipelineTask, dsl.PipelineTask]:
    """Make the tasks that give the reference and the prompts."""
    # 2. Both depend on their own parameters only, so KFP may take them from its cache.
    snapshot = snapshot_reference(
        model_name=parameters["model_name"],
        model_revision=validated["model_revision"],
        model_digest=validated["model_digest"],
    )
    _set_up(snapshot, "Snapshot the reference model", cached=True, retries=2)
    of_data = {name: value for name, value in parameters.items() if name.startswith("data_")}
    of_data["data_revision"] = validated["data_revision"]
    prepared = prepare_dataset(
        tokenizer=snapshot.outputs["tokenizer"],
        tokenizer_digest=snapshot.outputs["Output"],
        data_digest=validated["data_digest"],
        query_dataset=parameters["query_dataset"],
        remove_unused_columns=parameters["remove_unused_columns"],
        rollout_max_new_tokens=parameters["rollout_max_new_tokens"],
        **of_data,
    )
    _set_up(prepared, "Prepare the prompts", cached=True, retries=2)
    return snapshot, prepared


def _set_up(task: dsl.PipelineTask, label: str, *, cached: bool, retries: int, token: bool = True) -> None:
    """What every task is given; set here and not on submission, which reaches neither the push nor stored pipelines."""
    task.set_display_name(label)
    task.set_env_variable("PYTHONUNBUFFERED", "1")
    task.set_caching_options(cached)
    if retries:
        task.set_retry(retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
    if token:
        kubernetes.use_secret_as_env(task, HF_SECRET, {"HF_TOKEN": "HF_TOKEN"}, optional=True)


def _place(
    task: dsl.PipelineTask,
    *,
    image: Any,
    accelerator: Any,
    accelerator_count: Any,
    cpu: Any,
    memory: Any,
    node_selector: Any,
    tolerations: Any,
) -> None:
    """Let ``task`` run on the nodes that parameters of the run name; KFP ignores an accelerator without a name."""
    task.set_container_image(image)
    task.set_accelerator_type(accelerator).set_accelerator_limit(accelerator_count)
    # Equal requests and limits, which hugepages and CPU pinning ask for.
    task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)
    kubernetes.add_node_selector_json(task, node_selector)
    kubernetes.add_toleration_json(task, tolerations)
    # Else KFP's compiler forgets to hand what a pod asks for down into a condition.
    asked = (image, accelerator, accelerator_count, cpu, memory)
    task.register_pipeline_channels([value for value in asked if isinstance(value, PipelineChannel)])


@dsl.pipeline(name=PIPELINE_NAME, display_name="RLHF with PPO")
@documented
def ppo(
    # parameters: begin (written by python -m rlhf_pipelines.generate)
    exp_name: str = "rlhf-ppo",
    seed: int = 0,
    log_with: str = "",
    task_name: str = "",
    model_name: str = "",
    query_dataset: str = "",
    reward_model: str = "",
    remove_unused_columns: bool = True,
    tracker_kwargs: dict = {},  # noqa: B006
    accelerator_kwargs: dict = {},  # noqa: B006
    project_kwargs: dict = {},  # noqa: B006
    tracker_project_name: str = "trl",
    push_to_hub_if_best_kwargs: dict = {},  # noqa: B006
    steps: int = 20000,
    learning_rate: float = 1e-05,
    adap_kl_ctrl: bool = True,
    init_kl_coef: float = 0.2,
    kl_penalty: str = "kl",
    target: float = 6.0,
    horizon: float = 10000.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    batch_size: int = 256,
    gradient_accumulation_steps: int = 1,
    mini_batch_size: int = 1,
    ppo_epochs: int = 4,
    max_grad_norm: float = 0.0,
    early_stopping: bool = False,
    target_kl: float = 1.0,
    compare_steps: int = 1,
    ratio_threshold: float = 10.0,
    use_score_scaling: bool = False,
    use_score_norm: bool = False,
    score_clip: float = 0.0,
    whiten_rewards: bool = False,
    optimize_device_cache: bool = False,
    use_habana: bool = False,
    pad_for_acceleration: bool = False,
    pad_max_len: int = 0,
    pad_max_input_len: int = 0,
    model_revision: str = "",
    model_dtype: str = "float32",
    model_lora_r: int = 0,
    model_lora_alpha: int = 32,
    model_lora_dropout: float = 0.0,
    model_lora_target_modules: str = "all-linear",
    data_revision: str = "",
    data_config: str = "",
    data_split: str = "train",
    data_prompt_column: str = "prompt",
    data_chat_template: bool = False,
    data_system_prompt: str = "",
    data_max_prompt_tokens: int = 512,
    data_eval_fraction: float = 0.1,
    data_max_prompts: int = 0,
    reward_revision: str = "",
    reward_batch_size: int = 16,
    reward_max_tokens: int = 512,
    reward_sum: dict = {},  # noqa: B006
    reward_deadline_seconds: float = 120.0,
    rollout_max_new_tokens: int = 64,
    rollout_temperature: float = 1.0,
    rollout_batch_size: int = 64,
    ppo_controller_kl: str = "kl",
    ppo_missing_eos_penalty: float = 0.0,
    ppo_shared_layers: int = 0,
    ppo_value_head: str = "",
    ppo_separate_critic: bool = False,
    ppo_critic_learning_rate: float = 0.0,
    checkpoint_dir: str = "",
    checkpoint_name: str = "",
    checkpoint_every: int = 5,
    checkpoint_keep: int = 2,
    node_image: str = "rlhf-ppo/cpu:0.1.0",
    node_accelerator: str = "",
    node_accelerator_count: int = 0,
    node_cpu: str = "0",
    node_memory: str = "0",
    node_selector: dict = {},  # noqa: B006
    node_tolerations: list = [],  # noqa: B006
    node_timeout_seconds: int = 0,
    node_processes: int = 0,
    node_sharding: bool = False,
    node_count: int = 0,
    node_resources: dict = {},  # noqa: B006
    node_runtime: str = "torch-distributed",
    eval_max_prompts: int = 256,
    eval_samples_per_prompt: int = 1,
    eval_judge: str = "",
    eval_seed: int = 1234,
    gate_min_score_gain: float = 0.0,
    gate_min_score: float = -1000000000.0,
    gate_min_win_rate: float = 0.5,
    gate_min_champion_gain: float = 0.0,
    gate_min_judge_gain: float = -1000000000.0,
    gate_max_kl: float = 25.0,
    gate_min_distinct2: float = 0.7,
    gate_max_repetition: float = 0.5,
    gate_min_prompts: int = 50,
    hub_repo_id: str = "",
    hub_private: bool = True,
    hub_adapter: bool = False,
    mlflow_tracking_uri: str = "",
    mlflow_registered_model: str = "",
    mlflow_skip_unchanged: bool = False,
    # parameters: end
) -> None:
    """Fine-tune a language model with PPO against a reward; push it to the hub if it passes the gate."""
    wire(dict(locals()))
