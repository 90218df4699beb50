"""Rules of the house that no linter knows. Each test lists the files that break its rule."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

from gup.config import Settings
from gup.errors import PROBLEMS
from gup.metrics import BY_NAME, CODES_OF_RESULT, STREAM_WASTED

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "gup").rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

READS_ENVIRONMENT = {
    "gup/config/loading.py",  # settings
    "gup/process/supervisor.py",  # what systemd passes: LISTEN_FDS, NOTIFY_SOCKET
    "gup/control/receivers.py",  # the few variables that the command gets
    "gup/demo/run.py",  # what its child processes inherit, without GUP_ variables
}
"""The modules besides the command line that may look at the environment."""

METRIC_NAMES = {f"{metric}{part}" for metric in BY_NAME for part in ("", "_bucket", "_sum", "_count")}
METRIC_NAMES.add(STREAM_WASTED.name)


def name(path):
    return str(path.relative_to(ROOT))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def text(path):
    return path.read_text(encoding="utf-8")


@cache
def syntax(path):
    return ast.parse(text(path))


def breaking(rule, paths):
    """What `rule` finds wrong in each file."""
    return {name(path): found for path in paths if (found := rule(path))}


def nodes(path, kind):
    return [node for node in ast.walk(syntax(path)) if isinstance(node, kind)]


def imports(path):
    """Modules and names imported, with dots."""
    found = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    for node in nodes(path, ast.ImportFrom):
        found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def dotted(path):
    found = [node for node in nodes(path, ast.Attribute) if isinstance(node.value, ast.Name)]
    return {f"{node.value.id}.{node.attr}" for node in found}


def test_no_module_imports_itself_by_way_of_others():
    """Imports for annotations alone count as well: who reads the one has to read the other."""
    modules = {module_of(path): path for path in MODULES}
    graph = {}
    for module, path in modules.items():
        named = imports(path) & modules.keys()
        packages = {name for name in named if any(other.startswith(f"{name}.") for other in named)}
        graph[module] = named - packages - {module}

    def reached(start):
        found, unseen = set(), set(graph[start])
        while unseen:
            module = unseen.pop()
            found.add(module)
            unseen |= graph[module] - found
        return found

    reach = {module: reached(module) for module in graph}
    circles = {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in graph
        if module in reach[module]
    }
    assert circles == set()


def test_a_name_stands_for_one_module():
    """Whoever looks for a module by its name finds one."""
    places = {}
    for path in MODULES:
        if not path.stem.startswith("__"):
            places.setdefault(path.stem, set()).add(path)
    assert {stem for stem, found in places.items() if len(found) > 1} == set()


def test_modules_say_what_they_own():
    def undocumented(path):
        return [] if (ast.get_docstring(syntax(path)) or "").strip() else ["no docstring"]

    assert breaking(undocumented, MODULES) == {}


def test_the_environment_is_read_in_few_places():
    def looks(path):
        allowed = name(path) in READS_ENVIRONMENT or name(path).startswith("gup/cli/")
        found = {"os.environ", "os.environb", "os.getenv", "os.putenv"} & (dotted(path) | imports(path))
        return set() if allowed else found

    assert breaking(looks, MODULES) == {}


def test_work_on_the_cache_directory_goes_through_the_one_place_that_names_the_disk():
    """`on_disk` makes an OSError the disk's; looks at chunks tell by their result and raise nothing."""
    allowed = {"gup/cache/disk.py", "gup/cache/open_entries.py"}

    def goes_around(path):
        return [node.lineno for node in nodes(path, ast.Attribute) if node.attr == "run_in_executor"]

    cache = [path for path in MODULES if name(path).startswith("gup/cache/")]
    assert set(breaking(goes_around, cache)) == allowed


THROUGH_THE_FACADE = ("system", "fault", "soak", "bench", "pictures", "harness")
MAY_IMPORT = {
    "harness/internals.py",  # the façade
    "harness/commands.py",  # runs the command line in the test's process
    "harness/upstreams.py",  # shares its answers to conditions with the demo
}


def test_tests_of_behaviour_know_gups_inside_through_the_facade_alone():
    files = [path for folder in THROUGH_THE_FACADE for path in (ROOT / "tests" / folder).glob("*.py")]
    assert len(files) > 30

    def direct(path):
        allowed = str(path.relative_to(ROOT / "tests")) in MAY_IMPORT
        return set() if allowed else {module for module in imports(path) if module.split(".")[0] == "gup"}

    assert breaking(direct, files) == {}


def test_nothing_is_pickled_or_evaluated():
    def dangerous(path):
        modules = {module.split(".")[0] for module in imports(path)}
        called = {node.func.id for node in nodes(path, ast.Call) if isinstance(node.func, ast.Name)}
        pickles = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
        return modules & pickles | called & {"eval", "exec"}

    assert breaking(dangerous, MODULES) == {}


def test_no_unfinished_piece_is_handed_over():
    def unfinished(path):
        raised = [getattr(node.exc, "func", node.exc) for node in nodes(path, ast.Raise)]
        stubs = [node for node in raised if getattr(node, "id", "") == "NotImplementedError"]
        return [*map(ast.dump, stubs), *re.findall(r"\b(?:TODO|FIXME|XXX)\b", text(path))]

    assert breaking(unfinished, MODULES) == {}


def test_what_the_drawings_name_exists():
    function = (ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [owner for path in MODULES for owner in nodes(path, ast.ClassDef)]
    functions = {(owner.name, n.name) for owner in owners for n in ast.walk(owner) if isinstance(n, function)}
    plain = {node.name for path in MODULES for node in syntax(path).body if isinstance(node, function)}
    page = text(ROOT / "docs" / "architecture.md")
    methods = set(re.findall(r"\b([A-Z]\w+)\.(\w+)\(\)", page))
    assert len(methods) > 10
    assert methods - functions == set()
    assert set(re.findall(r"(?<![.\w])([a-z_]\w*)\(\)", page)) - plain == set()


def test_the_modules_and_files_that_pages_name_exist():
    page = text(ROOT / "docs" / "architecture.md")
    table = re.search(r"^\| package \| holds \|\n.*?\n\n", page, re.MULTILINE | re.DOTALL)[0]
    modules = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert set(re.findall(r"`(\w+)`", table)) - modules == set()

    def missing(path):
        return {
            found
            for found in re.findall(r"`((?:gup|tests)/[\w/.]+)`", text(path))
            if not (ROOT / found).exists()
        }

    assert breaking(missing, [page for page in PAGES if page.name != "CHANGELOG.md"]) == {}


RIDDLES = re.compile(
    r"\b(anew|in vain|lately|maimed|mend(s|ed|ing)?|nobody's|put right|somebody|turned? away|upkeep|"
    r"whoever|goes? on with|gone on with|looked through|fetch(ed|ing)? ahead|by way of|"
    r"is no (archive|key|path|folder))\b"
)
"""Words of the first edition: a reader of a message or a page should not have to guess."""


def test_what_users_read_is_plain_english():
    """Messages, help and log lines in code (texts of two words and more), pages, monitoring."""

    def riddles(path):
        if path.suffix != ".py":
            return {match[0] for match in RIDDLES.finditer(re.sub(r"`[^`\n]*`", "", text(path)))}
        docstrings = {id(node.value) for node in nodes(path, ast.Expr)}
        texts = [node for node in nodes(path, ast.Constant) if id(node) not in docstrings]
        words = [node.value for node in texts if isinstance(node.value, str) and " " in node.value.strip()]
        return {match[0] for word in words for match in RIDDLES.finditer(word)}

    templates = [*(ROOT / "gup").rglob("*.html"), *(ROOT / "gup").rglob("page.js")]
    shown = [page for page in PAGES if page.name != "CHANGELOG.md"] + [*(ROOT / "deploy").rglob("*.yml")]
    assert breaking(riddles, [*MODULES, *templates, *shown]) == {}


def test_metrics_go_by_their_declared_names():
    """In code whatever ends like a counter; in pages whatever looks like a metric (site:… is a rule)."""

    def undeclared(path):
        suffixes = "total" if path.suffix == ".py" else "total|bytes|seconds|info|bucket|sum|count"
        return set(re.findall(rf"(?<!:)\bgup_[a-z_]+_(?:{suffixes})\b", text(path))) - METRIC_NAMES

    assert breaking(undeclared, MODULES + PAGES) == {}


def test_pages_name_settings_that_exist():
    tables = {section: field.annotation for section, field in Settings.model_fields.items()}
    keys = {
        f"{section}__{key}".upper()
        for section, annotation in tables.items()
        for key in getattr(annotation, "__args__", [annotation])[0].model_fields
    }
    assert "UPSTREAM__URL" in keys

    def unknown(path):
        return set(re.findall(r"\bGUP_([A-Z_]+__[A-Z_]+)\b", text(path))) - keys

    assert breaking(unknown, PAGES) == {}


def test_every_status_of_a_problem_is_a_code_that_can_be_counted():
    countable = {*CODES_OF_RESULT["refused"], *CODES_OF_RESULT["error"], *CODES_OF_RESULT["hit"]}
    assert {str(problem.status) for problem in PROBLEMS.values()} <= countable
    assert all(re.fullmatch(r"[a-z]+(?:-[a-z]+)*", slug) for slug in PROBLEMS)


def test_dependencies_have_their_reasons():
    configured = tomllib.loads(text(ROOT / "pyproject.toml"))
    project, build = configured["project"], configured["build-system"]["requires"]
    page = text(ROOT / "docs" / "dependencies.md")
    run, cluster, to_build, develop, to_fuzz = re.split(r"## To (?:run as|build|develop|fuzz)", page)

    def packages(requirements):
        return [re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in requirements]

    def explained(page):
        return re.findall(r"^\| `([^`]+)` \| \S.+ \|$", page, re.MULTILINE)

    assert explained(run) == packages(project["dependencies"])
    assert explained(cluster) == packages(project["optional-dependencies"]["cluster"])
    assert explained(to_build) == packages(build)
    assert explained(develop) == packages(project["optional-dependencies"]["dev"])
    assert explained(to_fuzz) == packages(project["optional-dependencies"]["fuzz"])


def test_the_changelog_has_a_place_for_what_is_new_and_the_command_is_where_the_package_says():
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    assert project["scripts"] == {"gup": "gup.cli:main"}
    assert re.search(r"^## \[Unreleased\]$", text(ROOT / "CHANGELOG.md"), re.MULTILINE)
