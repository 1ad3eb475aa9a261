"""The coordinator: rounds, aggregation, synthesis of impressions, and who belongs to the federation."""
