"""distalign: learn the target language model behind pairwise preferences."""

__version__ = "0.1.0.dev0"
