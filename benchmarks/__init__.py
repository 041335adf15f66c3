"""What the project measures of itself, in rooms by the question that a measurement answers
(docs/benchmarks.md).

`python -m benchmarks.ROOM.SCRIPT --help`, from the repository's root, says what a script measures.
"""
