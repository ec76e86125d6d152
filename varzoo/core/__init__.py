"""What every other package stands on: token specs, random draws, schedules, checkpoints. Imports nothing of varzoo."""
