"""The step push_to_hub."""
