"""Dataset specs: the fields of each dataset and their meaning."""
