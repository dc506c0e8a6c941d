"""Made-up people in the layout of the LaMP benchmark, whose own files cannot be had here."""

from __future__ import annotations

import json
from pathlib import Path


def write_lamp(folder: Path, people: int = 40) -> Path:
    """The news task, with train and dev split."""
    home = folder / "LaMP_2"
    home.mkdir()
    for part in ("train", "dev"):
        questions, golds = [], []
        for n in range(people):
            sections = [("sports", "crime", "travel")[(n * k) % 3] for k in range(n % 7)]
            profile = [
                {"id": f"{n}{k}", "title": "a", "text": f"{part} {n} wrote {k}", "category": section}
                for k, section in enumerate(sections)
            ]
            asked = f"Which category does this article relate to? categories: [a, b] article: {part} {n} asks"
            questions.append({"id": f"{part}{n}", "input": asked, "profile": profile})
            golds.append({"id": f"{part}{n}", "output": ("sports", "crime", "travel")[n % 3]})
        (home / f"{part}_questions.json").write_text(json.dumps(questions))
        (home / f"{part}_outputs.json").write_text(json.dumps({"task": "LaMP_2", "golds": golds}))
    return folder
