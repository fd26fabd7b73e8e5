"""What a model is to us: sites, families, stages; the only room that knows HF."""
