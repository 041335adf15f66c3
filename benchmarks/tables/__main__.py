"""`python -m benchmarks.tables` writes evaluation_data.md and its pictures anew."""

from benchmarks.tables.evaluation import main

if __name__ == "__main__":
    main()
