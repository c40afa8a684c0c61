"""longlive: train video diffusion transformers to generate long videos."""

__version__ = "0.1.0.dev0"
