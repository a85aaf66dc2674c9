"""The first step: check everything, and pin what it names, before anything expensive starts."""
