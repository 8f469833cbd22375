"""Damage of every kind to files, command lines and checkpoints: few inputs in the default run, many by a flag.

pytest tests/fuzz                              # a few, drawn by a fixed seed
pytest -m fuzz                                 # 10,000 damaged files, 1,000 command lines, 200 kills, 200 flipped bits
pytest -m fuzz --fuzz-inputs 500               # as many files, and of the others in proportion
pytest tests/fuzz --fuzz-seed 1                # other inputs
pytest tests/fuzz -k graph --fuzz-only 321     # one input again, by the number that its fault was reported with
"""
