"""Vision-language models that answer in text: what the understanding path has of its own, beside the common core."""
