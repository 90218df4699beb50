"""`gup why` beside a real service: of a body that was resumed, of one that upstream does not have."""

from urllib.parse import quote

from harness.commands import command
from harness.content import content_path, zip_of
from harness.processes import until
from harness.service import Gup
from harness.upstreams import Answer, ScriptedUpstream

FULL, MISSING = content_path("full.zip"), content_path("none.zip")


def test_what_is_known_of_a_file(tmp_path):
    body = zip_of("full", 900_000)
    with ScriptedUpstream() as upstream:
        upstream.answer(FULL, Answer(body, etag='"f"', cut_after=400_000))
        with Gup(tmp_path / "cache", [upstream.url], workers=1) as gup:
            url = f"http://127.0.0.1:{gup.admin[1]}"
            assert gup.get(FULL).body == body
            assert gup.get(MISSING).status == 404

            def known():
                (file,) = gup.api(f"/api/v1/why?of={quote(FULL)}")[1]["files"]
                return file if file["clients"] and file["fetched"] else None

            file = until(known, "the fill and its client are known")
            assert (file["stored"], file["fetched"]["resumes"] >= 1) == (True, True)
            assert file["upstream"] == file["fetched"]["upstream"]
            assert [client["address"] for client in file["clients"]] == ["127.0.0.1"]
            told = command("why", FULL, "--admin", url)
            assert (told.returncode, "resumed" in told.stdout) == (0, True), told
            missing = command("why", f"http://gup:2967{MISSING}", "--admin", url)
            assert (missing.returncode, "Not stored." in missing.stdout) == (1, True), missing
            until(
                lambda: "upstream-not-found" in command("why", MISSING, "--admin", url).stdout,
                "the failure is told",
            )
