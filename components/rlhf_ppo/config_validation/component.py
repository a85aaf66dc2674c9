"""The KFP interface of the first step: every parameter of a run comes in here, one config goes out."""

from typing import NamedTuple

from kfp import dsl

from rlhf_ppo.descriptions import documented
from rlhf_ppo.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
@documented
def validate_config(
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
) -> NamedTuple(  # type: ignore[valid-type]
    "Outputs",
    [
        ("config", str),
        ("model_revision", str),
        ("model_digest", str),
        ("data_revision", str),
        ("data_digest", str),
        ("train_accelerator", str),
        ("train_accelerator_count", str),
        ("train_cpu", str),
        ("train_memory", str),
        ("train_node_selector", dict),
        ("train_tolerations", list),
    ],
):
    """Check every parameter at once, before anything expensive starts, and pin what they name.

    Returns:
        The config as JSON; what decides the results of the cached steps: the hub's commits and the local data's
        digests; and what the pod of train_ppo asks Kubernetes for.
    """
    parameters = dict(locals())
    from rlhf_ppo.steps import running_step

    with running_step("validate_config"):
        from rlhf_ppo.config_validation import validate

        config = validate.validate_config(parameters)
        return (config, *validate.cache_keys(config), *validate.training_pod(config))
