"""Other programs' formats: Optuna's database, parts for an own Ray Tune experiment, warm starts."""
