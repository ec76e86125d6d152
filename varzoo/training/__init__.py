"""Training: LightningModules, objectives, optimisation, and the run that puts them together."""
