"""Moves bytes and knows no model: where tensors lie in files, reading them, the weight stream, tiers, quantisation."""
