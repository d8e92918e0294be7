"""The documentation: links that resolve, generated pages that are current, the length of the README."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedvit.config.renamed import RENAMED_KEYS
from fedvit.metrics import alert_rules

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "cluster_configs").rglob("*.md")])
DIRECTORIES = {"tutorials", "how-to", "reference", "explanation", "adr"}
"""The kinds of documentation; every page of docs/ is in one of them, or is one of the pages named below."""
AT_THE_TOP = {"README", "architecture", "benchmarks", "glossary", "results", "runbook", "security", "threat-model"}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """File and anchor of each relative link of a page."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield ((page.parent / path).resolve() if path else page), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page: Path) -> None:
    missing = [f"{path}#{anchor}" for path, anchor in links(page) if not path.exists()]
    missing += [
        f"{path}#{anchor}"
        for path, anchor in links(page)
        if anchor and path.suffix == ".md" and path.exists() and anchor not in anchors(path)
    ]
    assert missing == []


def test_every_page_is_one_of_the_four_kinds() -> None:
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert {page.parts[0] for page in pages if len(page.parts) > 1} == DIRECTORIES
    assert {page.stem for page in pages if len(page.parts) == 1} == AT_THE_TOP


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    indexed = {path for path, _ in links(index)} | {path for path, _ in links(ROOT / "docs" / "adr" / "README.md")}
    assert [page for page in (ROOT / "docs").rglob("*.md") if page not in indexed and page != index] == []


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_list_of_alerts_is_current() -> None:
    page = (ROOT / "docs/reference/alerts.md").read_text()
    groups = alert_rules.read_groups(alert_rules.RULES)
    assert page == alert_rules.markdown(groups), "Run: fedvit monitoring rules --table > docs/reference/alerts.md"


def described() -> Iterator[tuple[str, str]]:
    """Each package that the map of the architecture must list, with the first paragraph of its docstring."""
    folders = [path.parent for path in (ROOT / "fedvit").glob("*/__init__.py")]
    for folder in [*folders, ROOT / "actors", ROOT / "serve_apps", ROOT / "edge_runtime"]:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "no docstring"
        paragraph = " ".join(docstring.partition("\n\n")[0].split())
        name = ".".join(folder.relative_to(ROOT).parts)
        yield name, re.sub(r":\w+:`([^`]+)`", r"`\1`", paragraph).replace("``", "`")


@pytest.mark.parametrize(("package", "docstring"), sorted(described()))
def test_the_map_of_packages_has_their_docstrings(package: str, docstring: str) -> None:
    assert f"| `{package}` | {docstring} |" in (ROOT / "docs/architecture.md").read_text()


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED_KEYS.items()))
def test_the_changelog_names_each_renamed_setting(old: str, new: str) -> None:
    assert f"| `{old}` | `{new}` |" in (ROOT / "CHANGELOG.md").read_text()


def is_there(name: str) -> bool:
    """Whether a dotted name is a module or package of this checkout, or something that such a module defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return length == len(parts) or (length > 1 and parts[length] in file.read_text())
    return False


CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "adr"]
"""The pages that describe the present code; a decision or a change may name a module that is gone."""


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    modules = set(re.findall(r"`((?:fedvit|actors|serve_apps|edge_runtime)(?:\.\w+)+)`", text)) - {"fedvit.system"}
    files = re.findall(r"`((?:fedvit|actors|serve_apps|edge_runtime|cluster_configs|examples)/[\w./-]+)`", text)
    missing = [name for name in modules if not is_there(name)]
    assert missing + [file for file in files if not (ROOT / file).exists()] == []


def test_pages_that_the_code_names_exist() -> None:
    folders = ("fedvit", "actors", "serve_apps", "edge_runtime", "cluster_configs", "tests")
    files = [
        file for folder in folders for suffix in ("py", "yaml", "yml") for file in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    named = {(page, file) for file in files for page in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text())}
    assert [f"{file.relative_to(ROOT)}: {page}" for page, file in named if not (ROOT / page).exists()] == []
