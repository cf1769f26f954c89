"""Training of the micro models: optimiser, run state and one file per objective."""
