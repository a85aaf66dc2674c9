"""The step prepare_dataset."""
