"""From a recipe to a run folder: one method trained, or several compared."""
