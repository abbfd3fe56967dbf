"""From prompts to outputs: `engine.py` is the page to read. Loads no torch until a model is loaded."""
