"""The pipeline, a run of records, memory modes."""
