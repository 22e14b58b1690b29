"""One module for each engine: `run(trial)` generates and says how long it took. Imported in the child only."""
