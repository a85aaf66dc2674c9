"""The steps evaluate_policy and gate."""
