"""`python -m benchmarks.tables` writes evaluation_data.md, its pictures and README's tables anew;
--check writes nothing."""

import argparse
import sys

from benchmarks.tables import evaluation, readme


def main() -> None:
    parser = argparse.ArgumentParser(description=evaluation.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not up to date")
    check = parser.parse_args().check
    pages = {evaluation.TARGET: evaluation.document(), readme.TARGET: readme.document()}
    stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check:
        sys.exit(f"stale: {', '.join(stale)}" if stale else 0)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    evaluation.draw_pictures()


if __name__ == "__main__":
    main()
