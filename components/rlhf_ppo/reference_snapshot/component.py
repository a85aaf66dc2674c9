"""The KFP interface of the step that freezes the model to start from."""

from kfp import dsl

from rlhf_ppo.descriptions import documented
from rlhf_ppo.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
@documented
def snapshot_reference(
    model_name: str,
    model_revision: str,
    model_digest: str,
    reference: dsl.Output[dsl.Model],
    tokenizer: dsl.Output[dsl.Artifact],
) -> str:
    """Freeze the model as safetensors with its tokenizer and a digest of every file.

    Args:
        model_digest: What model_name held when it was validated; only there to be part of the cache key.

    Returns:
        The digest of all files.
    """
    from pathlib import Path

    from rlhf_ppo.steps import running_step

    with running_step("snapshot_reference"):
        from rlhf_ppo.reference_snapshot import snapshot

        taken = snapshot.snapshot_reference(model_name, model_revision, Path(reference.path), Path(tokenizer.path))
        found = {name: taken[name] for name in ("source", "revision", "digest") if taken[name]}
        reference.metadata.update(found)
        tokenizer.metadata.update(found)
        return taken["digest"]
