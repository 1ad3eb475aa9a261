"""How impressions are made from the global model."""
