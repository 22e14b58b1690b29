"""The embedded model `opt-tiny`: generators of its training data, its tokenizer, its training and its scores.

Nothing in the engine imports this package; the pipeline only reads the model folder `opt_tiny` beside this file.
"""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "opt_tiny"
"""The trained model: config, safetensors, tokenizer and model card."""
