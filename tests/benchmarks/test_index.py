"""The index of the benchmarks has every program, and its links lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2] / "benchmarks"
INDEX = (ROOT / "README.md").read_text()
# Started by programs only.
WORKERS = {"scaling/rank_job.py", "scaling/link_probe.py", "simulator/micro_job.py"}


def test_every_program_has_a_row() -> None:
    programs = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert programs > WORKERS
    rows = {name.replace(".", "/") + ".py" for name in re.findall(r"python -m benchmarks\.([\w.]+)[^|\n]*` \|", INDEX)}
    rows |= set(re.findall(r"python benchmarks/([\w/]+\.py)[^|\n]*` \|", INDEX))
    assert rows == programs - WORKERS
    assert all(f"`{name}`" in INDEX for name in WORKERS)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", INDEX)
    assert len(links) > 20 and all((ROOT / link).exists() for link in links)
