"""The lab: what the theory promises, measured on targets that are known exactly, by the loss functions that users run.

A table is a sequence policy with one-token responses; short sequences are enumerated. An experiment is a frozen
dataclass whose fields are its settings (the recipe) and whose `run` measures; an eighth is one file and one line here.
"""
