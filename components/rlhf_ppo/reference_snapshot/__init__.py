"""The step snapshot_reference."""
