"""The README tells the truth: its code runs, its outputs are what is printed, its table is the generated one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.features import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$(?:\n\n((?:    [^\n]*\n)+))?", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("code", "printed"), BLOCKS, ids=[block[0].split("\n")[0] for block in BLOCKS])
def test_example_runs(code: str, printed: str) -> None:
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    command = [sys.executable, "-W", "ignore", "-c", path + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if printed:
        assert done.stdout.split() == printed.split()


def test_feature_table_is_the_generated_one() -> None:
    written = re.search(r"<!-- features -->\n(.*)\n<!-- /features -->", README, re.DOTALL)
    assert written is not None
    assert written[1] == table(), "run: python -m benchmarks features"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_figures_name_results_that_are_there() -> None:
    figures = README[README.index("## Figures") : README.index("**GPU: not measured.**")]
    named = re.findall(r"benchmarks/results/[\w./-]+", figures)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path
