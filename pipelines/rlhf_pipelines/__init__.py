"""The pipeline and the ways to start it; kfp, never torch."""
