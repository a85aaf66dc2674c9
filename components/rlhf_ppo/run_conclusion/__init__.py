"""The exit handler conclude_run."""
