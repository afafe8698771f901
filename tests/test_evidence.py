"""The pages of evidence say what the committed trainings say."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the benchmarks extra is not installed")
pytest.importorskip("sklearn", reason="the benchmarks extra is not installed")
pytest.importorskip("statsmodels", reason="the benchmarks extra is not installed")

import first_screen
import pays_finished
import pays_page
import physics_finished
import physics_page

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["evidence.md", "evidence_modalities.md", "evidence_physics.md"])
def test_a_page_made_anew_is_the_page(page: str, tmp_path: Path) -> None:
    made = tmp_path / page
    shutil.copy(DOCS / page, made)
    several = pays_finished.Finished(DOCS / "evidence_modalities.jsonl")
    physics = physics_finished.Finished(DOCS / "evidence_physics.jsonl")
    if page == "evidence_modalities.md":
        pays_page.write_page(several, made)
    elif page == "evidence_physics.md":
        physics_page.write_page(made, physics)
    else:
        first_screen.write(made, several, physics)
        assert (tmp_path / "evidence.png").read_bytes().startswith(b"\x89PNG")
    assert made.read_text() == (DOCS / page).read_text()
