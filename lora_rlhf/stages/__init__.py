"""The pipeline, a module a stage: each has `run(session)`."""
