"""The step detect_changes."""
