"""Types of content by products' names."""

import pytest

from gup.config import Settings
from gup.content.stream_types import CLIENT_PATCHES, OTHER, StreamTypes

SHIPPED = StreamTypes(Settings().catalog.types)


@pytest.mark.parametrize(
    ("product", "type_"),
    [
        ("SEPC Client Patch Win64 14.3 RU2", CLIENT_PATCHES),
        ("sepc  CLIENT\tPATCHES", CLIENT_PATCHES),
        ("SEPC Virus Definitions Win32 12.1 RU6", "virus_definitions"),
        ("SEPC IPS Signatures Win64 14.3", "ips_signatures"),
        ("SEPC CIDS Signatures 14.3", "ips_signatures"),
        ("SEPC Network Threat 14.3", "ips_signatures"),
        ("SEPC Behavior Analysis 14.3", "behavior_analysis"),
        ("SEPC Behavior And Security Heuristics 14.3", "behavior_analysis"),
        ("SEPC SONAR Definitions", "behavior_analysis"),
        ("SEPC Submission Control Data", "submission_control"),
        ("SEPC Extended File Attributes", OTHER),
        ("", OTHER),
    ],
)
def test_the_shipped_types(product, type_):
    assert SHIPPED.of(product) == type_


def test_own_types_are_tried_first_and_an_empty_list_takes_one_away():
    settings = Settings.model_validate(
        {"catalog": {"types": {"servers": ["*definitions win??*"], "submission_control": []}}}
    )
    types = StreamTypes(settings.catalog.types)
    assert types.of("SEPC Virus Definitions Win32 14.3") == "servers"
    assert types.of("SEPC Virus Definitions 14.3") == "virus_definitions"
    assert types.of("SEPC Submission Control") == OTHER
    assert types.names == SHIPPED.names | {"servers"}
