"""Your own data: survey a dataset, infer its spec, convert recordings to RLDS."""
