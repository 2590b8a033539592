"""Dataset specs: what each dataset contains and what its fields mean."""
